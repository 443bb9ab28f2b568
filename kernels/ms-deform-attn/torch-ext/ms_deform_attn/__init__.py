"""Multi-scale deformable attention: compiled for CPUs (AVX-512, AVX2, any other), Triton for CUDA.

`ms_deform_attn` takes raw offsets, raw logits and reference points; softmax and locations are computed inside and
never stored. `sample` takes given locations and weights, and `layers.MultiScaleDeformableAttention` is the layer that
transformers' Deformable DETR and its relatives look up. `forward` and `backward` are the passes of `ms_deform_attn`,
for code that registers its own operator.
"""

from . import layers
from ._autograd import ms_deform_attn, sample
from ._backends import backward, forward, instruction_set, unserved

INTERFACE = 1  # version of arguments and results; raise it with every change that breaks callers

__all__ = ["INTERFACE", "backward", "forward", "instruction_set", "layers", "ms_deform_attn", "sample", "unserved"]
