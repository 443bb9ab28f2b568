"""Multi-scale deformable attention (Deformable DETR, Eq. 3; UN-EPT, Eq. 4): the operator and its gradients.

Letters in the shapes: B images, Q queries, S value tokens (the sum of height x width over the levels), M heads,
D channels of a head, L levels, P points of a query, head and level.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from hf_denseseg.errors import InputError, RunError
from hf_denseseg.ops.kernel_loading import choose_path, find_hub_kernel, find_kernel
from hf_denseseg.ops.reference import (
    Shapes,
    check_arguments,
    exact_coordinates,
    ms_deform_attn_reference,
    width_heights,
)


def ms_deform_attn(
    value: Tensor, offsets: Tensor, logits: Tensor, reference_points: Tensor, spatial_shapes: Shapes
) -> Tensor:
    """Sample the value maps at each query's points and sum with the softmax of its logits as weights.

    Args:
        value: `(B, S, M, D)`, levels concatenated, each row by row.
        offsets: `(B, Q, M, L, P, 2)` as (x, y), in pixels of the level; with 4-column reference points in halves of
            the box, divided by P.
        logits: `(B, Q, M, L, P)`; the softmax runs over L and P together.
        reference_points: `(B or 1, Q, L, 2)` as (x, y) or `(B or 1, Q, L, 4)` as (x, y, width, height), in 0..1.
        spatial_shapes: (height, width) of every level.

    Returns:
        `(B, Q, M * D)` in the dtype of `value`. Points at pixel -1 or below, at the width or height or above, and NaN
        add exactly 0.

    Raises:
        InputError: if the shapes do not match.
    """
    check_arguments(value, offsets, logits, spatial_shapes)
    _check_references(reference_points, offsets)
    device = value.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        value = value.to(torch.get_autocast_dtype(device))  # the value follows autocast, coordinates do not
    offsets, reference_points = exact_coordinates(offsets), exact_coordinates(reference_points)
    if reference_points.shape[-1] == 4:  # boxes: offsets in pixels, so that kernels need to know one form only
        reference_points, box = reference_points.split(2, -1)
        scale = box * width_heights(spatial_shapes, offsets) * (0.5 / offsets.shape[-2])
        offsets = offsets * scale[:, :, None, :, None]
    path = choose_path(value, offsets)
    if path == "reference":
        return ms_deform_attn_reference(value, offsets, logits, reference_points, spatial_shapes)
    if path == "hub":
        return _attend_with_hub_kernel(value, offsets, logits, reference_points, spatial_shapes)
    flat = [size for shape in spatial_shapes for size in shape]
    return torch.ops.hf_denseseg.ms_deform_attn(value, offsets, logits, reference_points, flat)[0]


def _check_references(reference_points: Tensor, offsets: Tensor) -> None:
    """Refuse reference points whose shape does not match the queries."""
    batch, queries, _, levels = offsets.shape[:4]
    given = tuple(reference_points.shape)
    if len(given) != 4 or given[-1] not in (2, 4):
        raise InputError(f"reference points {given} were given; 4 dimensions and 2 or 4 columns are needed.")
    if given[0] not in (1, batch) or given[1:3] != (queries, levels):
        raise InputError(
            f"reference points {given} were given for {batch} images, {queries} queries, {levels} levels."
        )


def _attend_with_hub_kernel(
    value: Tensor, offsets: Tensor, logits: Tensor, reference_points: Tensor, spatial_shapes: Shapes
) -> Tensor:
    """Run the hub's kernel in float32, since it accumulates in the dtype of its inputs."""
    kernel = find_hub_kernel().kernel
    assert kernel is not None
    size = width_heights(spatial_shapes, offsets)
    locations = reference_points[:, :, None, :, None] + offsets / size[:, None]  # (B, Q, M, L, P, 2) in 0..1
    weights = logits.float().flatten(-2).softmax(-1).view(logits.shape)
    # `level_start_index` of the kernel: tokens before each level.
    shapes = torch.tensor(spatial_shapes, device=value.device)
    starts = torch.cat([shapes.new_zeros(1), shapes.prod(1).cumsum(0)[:-1]])
    layer = kernel.layers.MultiScaleDeformableAttention()
    columns = min(value.shape[0], 64)  # images per step of the kernel; must divide the batch
    columns = columns if value.shape[0] % columns == 0 else 1
    arguments = (shapes, list(spatial_shapes), starts, locations.contiguous(), weights, columns)
    return layer(value.float().contiguous(), *arguments).to(value.dtype)


@torch.library.custom_op("hf_denseseg::ms_deform_attn", mutates_args=())
def _forward(
    value: Tensor, offsets: Tensor, logits: Tensor, reference_points: Tensor, spatial_shapes: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp `(B, Q, M)`; in plain torch where an exported program runs without our kernel."""
    kernel = find_kernel(value.device.type).kernel
    if kernel is not None and kernel.unserved(value, offsets) is None:
        return kernel.forward(value, offsets, logits, reference_points, list(spatial_shapes))
    shapes = list(zip(spatial_shapes[::2], spatial_shapes[1::2], strict=True))
    out = ms_deform_attn_reference(value, offsets, logits, reference_points, shapes)
    return out, logits.float().flatten(-2).logsumexp(-1)


@torch.library.custom_op("hf_denseseg::ms_deform_attn_backward", mutates_args=())
def _backward(
    grad: Tensor,
    value: Tensor,
    offsets: Tensor,
    logits: Tensor,
    reference_points: Tensor,
    spatial_shapes: Sequence[int],
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    search = find_kernel(value.device.type)
    if search.kernel is None:
        raise RunError(
            f"this program was traced with a deformable-attention kernel that is missing here: {search.reasons()}. "
            "Run `denseseg kernels build`, or trace it again with DENSESEG_MSDA=reference."
        )
    return search.kernel.backward(grad, value, offsets, logits, reference_points, list(spatial_shapes), out, lse)


@_forward.register_fake
def _(value: Tensor, offsets: Tensor, logits: Tensor, reference_points: Tensor, spatial_shapes: Sequence[int]) -> Any:
    out = value.new_empty(value.shape[0], offsets.shape[1], value.shape[2] * value.shape[3])
    return out, logits.new_empty(logits.shape[:3], dtype=torch.float32)


@_backward.register_fake
def _(grad: Tensor, value: Tensor, offsets: Tensor, logits: Tensor, *rest: Tensor | Sequence[int]) -> Any:
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (value, offsets, logits))


def _keep(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.spatial_shapes = inputs
    ctx.save_for_backward(*tensors, *output)


def _gradients(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple:
    """Gradients of the operator; a reference point's is the sum of its offsets', scaled from pixels to 0..1."""
    value, offsets, logits, reference_points, out, lse = ctx.saved_tensors
    shapes = ctx.spatial_shapes
    grads = _backward(grad.contiguous(), value, offsets, logits, reference_points, shapes, out, lse)
    reference = None
    if ctx.needs_input_grad[3]:
        size = width_heights(list(zip(shapes[::2], shapes[1::2], strict=True)), grads[1])
        reference = (grads[1].sum((2, 4)) * size).sum_to_size(reference_points.shape)
    return *grads, reference, None


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise RunError(
        "the kernels for deformable attention have no second derivative. Set DENSESEG_MSDA=reference, which "
        "computes it in plain torch."
    )


_forward.register_autograd(_gradients, setup_context=_keep)
_backward.register_autograd(_no_second_derivative)


@register_flop_formula(torch.ops.hf_denseseg.ms_deform_attn)
def _operations(value: Sequence[int], offsets: Sequence[int], *rest: object, **kwargs: object) -> int:
    """FLOPs: a multiplication and an addition for each of the four corners of every point and channel."""
    return 8 * math.prod(offsets[:-1]) * value[-1]


def _autocast_rule(device_type: str) -> Callable:
    """Rule of the operator under autocast: the value is cast, coordinates stay in float32."""

    def rule(value: Tensor, offsets: Tensor, logits: Tensor, reference_points: Tensor, shapes: Sequence[int]) -> Any:
        dtype = torch.get_autocast_dtype(device_type)
        with torch.autocast(device_type, enabled=False):
            return _forward(value.to(dtype), offsets.float(), logits, reference_points.float(), shapes)

    return rule


_AUTOCAST = torch.library.Library("hf_denseseg", "FRAGMENT")
# Another copy of this code, which a checkpoint brought along, may have registered them before.
_AUTOCAST.impl("ms_deform_attn", _autocast_rule("cpu"), "AutocastCPU", allow_override=True)
_AUTOCAST.impl("ms_deform_attn", _autocast_rule("cuda"), "AutocastCUDA", allow_override=True)
