"""Operators that several papers need and that are worth a kernel."""

from hf_denseseg.ops.ms_deform_attn import ms_deform_attn, sample_locations

__all__ = ["ms_deform_attn", "sample_locations"]
