"""Operators that several papers use and that have kernels of their own."""

from hf_denseseg.ops.kernelize import kernelize_deformable_attention
from hf_denseseg.ops.ms_deform_attn import ms_deform_attn
from hf_denseseg.ops.reference import sample_locations

__all__ = ["kernelize_deformable_attention", "ms_deform_attn", "sample_locations"]
