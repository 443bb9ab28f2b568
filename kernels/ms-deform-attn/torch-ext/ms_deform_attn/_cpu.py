"""The compiled passes on the CPU. They compute in float32: 16-bit tensors are cast up once, and rounded once."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ._ops import ops

_BLOCK = 16  # the compiled code takes 16 channels at a time; other heads are padded with zeros


def unserved(value: Tensor) -> str | None:
    """Why the compiled code does not support this value, or None if it does."""
    if not hasattr(ops, "forward"):
        return "this build has no compiled code for the CPU"
    if value.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"{value.dtype} is not computed, since the kernel works in float32"
    if value.shape[1:].numel() + value.shape[1] * value.shape[2] * _BLOCK >= 2**30:
        return f"one image of value {tuple(value.shape)} exceeds the 32-bit addresses of the kernel"
    return None


def forward(
    value: Tensor, offsets: Tensor, logits: Tensor, reference_points: Tensor, spatial_shapes: list[int]
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp; see the package."""
    out, lse = ops.forward(
        _wide(value), _rows(offsets), _rows(logits), reference_points.float().contiguous(), spatial_shapes
    )
    return _narrow(out, value), lse


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
    """Gradients of value, offsets and logits; see the package."""
    grads = ops.backward(
        _wide_heads(grad, value),
        _wide(value),
        _rows(offsets),
        _rows(logits),
        reference_points.float().contiguous(),
        spatial_shapes,
        _wide_heads(out, value),
        lse,
    )
    return _gradients(grads, value, offsets, logits)


def forward_sampled(value: Tensor, locations: Tensor, weights: Tensor, spatial_shapes: list[int]) -> Tensor:
    """Output for given locations and weights."""
    out, _ = ops.forward(_wide(value), _rows(locations), _rows(weights), None, spatial_shapes)
    return _narrow(out, value)


def backward_sampled(
    grad: Tensor, value: Tensor, locations: Tensor, weights: Tensor, spatial_shapes: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, locations and weights."""
    nothing = weights.new_empty(0, dtype=torch.float32)
    grads = ops.backward(
        _wide_heads(grad, value),
        _wide(value),
        _rows(locations),
        _rows(weights),
        None,
        spatial_shapes,
        nothing,
        nothing,
    )
    return _gradients(grads, value, locations, weights)


def _wide(value: Tensor) -> Tensor:
    """`value` in float32, its heads padded with zeros to complete blocks of channels."""
    missing = -value.shape[-1] % _BLOCK
    value = value.float()
    return (F.pad(value, (0, missing)) if missing else value).contiguous()


def _wide_heads(heads: Tensor, value: Tensor) -> Tensor:
    """`(B, Q, M * D)` in float32, padded as `value` is."""
    return _wide(heads.unflatten(-1, value.shape[2:])).flatten(-2)


def _narrow(out: Tensor, value: Tensor) -> Tensor:
    """Undo `_wide` on `(B, Q, M * D)`: the dtype and the channels of `value`."""
    channels = value.shape[-1]
    if channels % _BLOCK:
        out = out.unflatten(-1, (value.shape[2], -1))[..., :channels].flatten(-2)
    return out.to(value.dtype)


def _rows(points: Tensor) -> Tensor:
    """`points` in float32, contiguous per query; rows may be strided (slices of one fused projection)."""
    points = points.float()
    inner, expected = points.stride()[2:], points.new_empty(points.shape[2:], device="meta").stride()
    return points if inner == expected else points.contiguous()


def _gradients(
    grads: tuple[Tensor, Tensor, Tensor], value: Tensor, points: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients in the shapes and dtypes of their tensors."""
    grad_value = grads[0][..., : value.shape[-1]].to(value.dtype)
    return grad_value.contiguous(), grads[1].to(points.dtype), grads[2].to(weights.dtype)
