"""The passes by device, with checks: `_cpu` (compiled) or `_triton`."""

from types import ModuleType

import torch
from torch import Tensor

from . import _cpu

if torch.cuda.is_available():  # Triton is not needed elsewhere
    from . import _triton
else:
    _triton = None


def _backend(device_type: str) -> ModuleType:
    """The module for a type of device; no import in here, since `torch.compile` traces it."""
    return _cpu if device_type == "cpu" else _triton


def unserved(value: Tensor, points: Tensor) -> str | None:
    """Why this kernel does not support tensors of these shapes, dtypes and devices, or None if it does."""
    if _backend(value.device.type) is None or value.device.type not in ("cpu", "cuda"):
        return f"there is no kernel for {value.device.type}"
    levels, per_level = points.shape[3:5]
    if levels * per_level > 256 or levels > 16:
        return f"{levels} levels with {per_level} points exceed 16 levels or 256 points"
    return _backend(value.device.type).unserved(value)


def forward(
    value: Tensor, offsets: Tensor, logits: Tensor, reference_points: Tensor, spatial_shapes: list[int]
) -> tuple[Tensor, Tensor]:
    """Output `(B, Q, M * D)` and the log-sum-exp `(B, Q, M)` of the logits, which the backward pass needs.

    Args:
        value: `(B, S, M, D)`, float32, bfloat16 or float16.
        offsets: `(B, Q, M, L, P, 2)`, (x, y) in pixels of the level, float32.
        logits: `(B, Q, M, L, P)`.
        reference_points: `(B or 1, Q, L, 2)`, (x, y) in 0..1.
        spatial_shapes: height and width of every level, one after the other.
    """
    return _backend(value.device.type).forward(value, offsets, logits, reference_points, spatial_shapes)


def backward(
    grad: Tensor,
    value: Tensor,
    offsets: Tensor,
    logits: Tensor,
    reference_points: Tensor,
    spatial_shapes: list[int],
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, offsets and logits, each in the dtype of its tensor."""
    passes = _backend(value.device.type)
    return passes.backward(grad, value, offsets, logits, reference_points, spatial_shapes, out, lse)


def forward_sampled(value: Tensor, locations: Tensor, weights: Tensor, spatial_shapes: list[int]) -> Tensor:
    """Output for locations `(B, Q, M, L, P, 2)` in 0..1 and weights that are used as they are."""
    return _backend(value.device.type).forward_sampled(value, locations, weights, spatial_shapes)


def backward_sampled(
    grad: Tensor, value: Tensor, locations: Tensor, weights: Tensor, spatial_shapes: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, locations and weights, each in the dtype of its tensor."""
    return _backend(value.device.type).backward_sampled(grad, value, locations, weights, spatial_shapes)


def instruction_set(name: str = "") -> str:
    """The CPU instruction set in use: AVX-512, AVX2 or generic; a name switches to it, if the processor has it."""
    return _cpu.ops.instruction_set(name)
