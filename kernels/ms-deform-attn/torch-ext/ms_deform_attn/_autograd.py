"""The two functions as torch operators: traceable by torch.compile and torch.export, differentiable once."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _backends
from ._ops import add_op_namespace_prefix

_TWICE = "deformable attention has no second derivative in this kernel; use a plain torch version for it."


def _refuse_unserved(value: Tensor, points: Tensor) -> None:
    """Check inside the operator, so that a compiler does not trace the choice of code."""
    if (reason := _backends.unserved(value, points)) is not None:
        raise ValueError(f"ms-deform-attn: {reason}.")


@torch.library.custom_op(add_op_namespace_prefix("attend"), mutates_args=())
def _attend(
    value: Tensor, offsets: Tensor, logits: Tensor, reference_points: Tensor, spatial_shapes: Sequence[int]
) -> tuple[Tensor, Tensor]:
    _refuse_unserved(value, offsets)
    return _backends.forward(value, offsets, logits, reference_points, list(spatial_shapes))


@torch.library.custom_op(add_op_namespace_prefix("attend_backward"), mutates_args=())
def _attend_backward(
    grad: Tensor,
    value: Tensor,
    offsets: Tensor,
    logits: Tensor,
    reference_points: Tensor,
    spatial_shapes: Sequence[int],
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    return _backends.backward(grad, value, offsets, logits, reference_points, list(spatial_shapes), out, lse)


@torch.library.custom_op(add_op_namespace_prefix("sample"), mutates_args=())
def _sample(value: Tensor, locations: Tensor, weights: Tensor, spatial_shapes: Sequence[int]) -> Tensor:
    _refuse_unserved(value, locations)
    return _backends.forward_sampled(value, locations, weights, list(spatial_shapes))


@torch.library.custom_op(add_op_namespace_prefix("sample_backward"), mutates_args=())
def _sample_backward(
    grad: Tensor, value: Tensor, locations: Tensor, weights: Tensor, spatial_shapes: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    return _backends.backward_sampled(grad, value, locations, weights, list(spatial_shapes))


def _output(value: Tensor, points: Tensor) -> Tensor:
    return value.new_empty(value.shape[0], points.shape[1], value.shape[2] * value.shape[3])


def _like(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in tensors)


@_attend.register_fake
def _(value: Tensor, offsets: Tensor, logits: Tensor, reference_points: Tensor, spatial_shapes: Any) -> Any:
    return _output(value, offsets), logits.new_empty(logits.shape[:3], dtype=torch.float32)


@_sample.register_fake
def _(value: Tensor, locations: Tensor, weights: Tensor, spatial_shapes: Any) -> Any:
    return _output(value, locations)


@_attend_backward.register_fake
def _(grad: Tensor, value: Tensor, offsets: Tensor, logits: Tensor, *rest: Any) -> Any:
    return _like(value, offsets, logits)


@_sample_backward.register_fake
def _(grad: Tensor, value: Tensor, locations: Tensor, weights: Tensor, spatial_shapes: Any) -> Any:
    return _like(value, locations, weights)


def _keep_attend(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.spatial_shapes = inputs
    ctx.save_for_backward(*tensors, *output)


def _attend_gradients(ctx: Any, grad: Tensor, _: Any) -> tuple:
    value, offsets, logits, reference_points, out, lse = ctx.saved_tensors
    shapes = ctx.spatial_shapes
    grads = _attend_backward(grad.contiguous(), value, offsets, logits, reference_points, shapes, out, lse)
    reference = None
    if ctx.needs_input_grad[3]:
        sizes = [[shapes[i + 1], shapes[i]] for i in range(0, len(shapes), 2)]
        reference = grads[1].sum((2, 4)) * grads[1].new_tensor(sizes)
        reference = reference.sum_to_size(reference_points.shape).to(reference_points.dtype)
    return *grads, reference, None


def _keep_sample(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.spatial_shapes = inputs
    ctx.save_for_backward(*tensors)


def _sample_gradients(ctx: Any, grad: Tensor) -> tuple:
    return *_sample_backward(grad.contiguous(), *ctx.saved_tensors, ctx.spatial_shapes), None


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(_TWICE)


_attend.register_autograd(_attend_gradients, setup_context=_keep_attend)
_sample.register_autograd(_sample_gradients, setup_context=_keep_sample)
_attend_backward.register_autograd(_no_second_derivative)
_sample_backward.register_autograd(_no_second_derivative)


def ms_deform_attn(
    value: Tensor, offsets: Tensor, logits: Tensor, reference_points: Tensor, spatial_shapes: Sequence[int]
) -> Tensor:
    """Deformable attention from raw offsets and logits: `(B, Q, M * D)`; arguments as in `forward` of the package.

    Raises:
        ValueError: if the kernel does not support these tensors, with the reason.
    """
    return _attend(value, offsets.float(), logits, reference_points.float(), spatial_shapes)[0]


def sample(value: Tensor, locations: Tensor, weights: Tensor, spatial_shapes: Sequence[int]) -> Tensor:
    """Weighted samples at locations `(B, Q, M, L, P, 2)` in 0..1: `(B, Q, M * D)`.

    Raises:
        ValueError: if the kernel does not support these tensors, with the reason.
    """
    return _sample(value, locations, weights, spatial_shapes)
