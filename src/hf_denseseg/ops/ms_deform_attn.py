"""Multi-scale deformable attention (Deformable DETR, Eq. 3; UN-EPT, Eq. 4): definition, operator and choice of kernel.

Letters in the shapes: B pictures, Q queries, S value tokens (the sum of height x width over the levels), M heads,
D channels of a head, L levels, P points of a query, head and level.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from hf_denseseg.errors import InputError, RunError
from hf_denseseg.ops.kernel_loading import choose_path, find_hub_kernel, find_kernel

Shapes = Sequence[tuple[int, int]]

_OUTSIDE = -4.0  # grid coordinate of a point that counts for nothing: no corner of it touches the map
_LARGEST_SAMPLE = 2**26  # numbers that one call of grid_sample gives out (256 MiB in float32)


def ms_deform_attn(
    value: Tensor, offsets: Tensor, logits: Tensor, reference_points: Tensor, spatial_shapes: Shapes
) -> Tensor:
    """Gather each query's value at its sampled points, weighted by the softmax of its logits.

    Args:
        value: `(B, S, M, D)`, the levels one after the other, each row by row.
        offsets: `(B, Q, M, L, P, 2)` as (x, y), in pixels of the level; with 4-column reference points in halves of
            the box, divided by P.
        logits: `(B, Q, M, L, P)`; the softmax runs over L and P together.
        reference_points: `(B or 1, Q, L, 2)` as (x, y) or `(B or 1, Q, L, 4)` as (x, y, width, height), in 0..1.
        spatial_shapes: (height, width) of every level.

    Returns:
        `(B, Q, M * D)` in the dtype of `value`. Points at -1 or below and at the width or height or above (in pixels),
        and points that are no number, add exactly 0.

    Raises:
        InputError: if the shapes do not belong together.
    """
    _check(value, offsets, logits, spatial_shapes)
    _check_references(reference_points, offsets)
    device = value.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        value = value.to(torch.get_autocast_dtype(device))
    offsets, reference_points = _exact(offsets), _exact(reference_points)
    if reference_points.shape[-1] == 4:  # boxes: bring their offsets into pixels, so that kernels know one form only
        reference_points, box = reference_points.split(2, -1)
        scale = box * _width_heights(spatial_shapes, offsets) * (0.5 / offsets.shape[-2])
        offsets = offsets * scale[:, :, None, :, None]
    path = choose_path(value, offsets)
    if path == "reference":
        return attend_plainly(value, offsets, logits, reference_points, spatial_shapes)
    if path == "hub":
        return _attend_with_hub_kernel(value, offsets, logits, reference_points, spatial_shapes)
    flat = [size for shape in spatial_shapes for size in shape]
    return torch.ops.hf_denseseg.ms_deform_attn(value, offsets, logits, reference_points, flat)[0]


def attend_plainly(
    value: Tensor, offsets: Tensor, logits: Tensor, reference_points: Tensor, spatial_shapes: Shapes
) -> Tensor:
    """The definition in plain torch, for 2-column reference points; arguments as of `ms_deform_attn`."""
    offsets, size = _exact(offsets), _width_heights(spatial_shapes, offsets)
    locations = (_exact(reference_points) * size - 0.5)[:, :, None, :, None] + offsets
    weights = logits.to(locations.dtype).flatten(-2).softmax(-1).view(logits.shape)
    return _sample(value, locations, weights, spatial_shapes)


def sample_locations(
    value: Tensor, sampling_locations: Tensor, attention_weights: Tensor, spatial_shapes: Shapes
) -> Tensor:
    """Sum `value` at the given locations with the given weights: the signature of the kernel hub.

    Args:
        value: `(B, S, M, D)`.
        sampling_locations: `(B, Q, M, L, P, 2)` as (x, y), 0..1 from edge to edge of the picture.
        attention_weights: `(B, Q, M, L, P)`, used as they are.
        spatial_shapes: (height, width) of every level.

    Returns:
        `(B, Q, M * D)` in the dtype of `value`.

    Raises:
        InputError: if the shapes do not belong together.
    """
    _check(value, sampling_locations, attention_weights, spatial_shapes)
    locations = _exact(sampling_locations)
    locations = locations * _width_heights(spatial_shapes, locations)[:, None] - 0.5
    return _sample(value, locations, attention_weights.to(locations.dtype), spatial_shapes)


def _exact(coordinates: Tensor) -> Tensor:
    """Coordinates in float32 at least: 16 bits place them up to half a pixel off."""
    return coordinates if coordinates.dtype == torch.float64 else coordinates.float()


def _width_heights(spatial_shapes: Shapes, like: Tensor) -> Tensor:
    """(width, height) of every level, `(L, 2)`, to scale its (x, y)."""
    rows = [
        torch.stack([like.new_full((), size, dtype=_exact(like).dtype) for size in reversed(shape)])
        for shape in spatial_shapes
    ]
    return torch.stack(rows)


def _check_references(reference_points: Tensor, offsets: Tensor) -> None:
    """Refuse reference points that are not the queries'."""
    batch, queries, _, levels = offsets.shape[:4]
    given = tuple(reference_points.shape)
    if len(given) != 4 or given[-1] not in (2, 4):
        raise InputError(f"reference points {given} were given; 4 dimensions and 2 or 4 columns are needed.")
    if given[0] not in (1, batch) or given[1:3] != (queries, levels):
        raise InputError(
            f"reference points {given} were given for {batch} pictures, {queries} queries, {levels} levels."
        )


def _attend_with_hub_kernel(
    value: Tensor, offsets: Tensor, logits: Tensor, reference_points: Tensor, spatial_shapes: Shapes
) -> Tensor:
    """The hub's kernel accumulates in the dtype it is given, so everything goes there in float32."""
    kernel = find_hub_kernel().kernel
    assert kernel is not None
    size = _width_heights(spatial_shapes, offsets)
    locations = reference_points[:, :, None, :, None] + offsets / size[:, None]
    weights = logits.float().flatten(-2).softmax(-1).view(logits.shape)
    shapes = torch.tensor(spatial_shapes, device=value.device)
    starts = torch.cat([shapes.new_zeros(1), shapes.prod(1).cumsum(0)[:-1]])
    layer = kernel.layers.MultiScaleDeformableAttention()
    columns = min(value.shape[0], 64)  # pictures the kernel takes at a time; they have to divide the batch
    columns = columns if value.shape[0] % columns == 0 else 1
    arguments = (shapes, list(spatial_shapes), starts, locations.contiguous(), weights, columns)
    return layer(value.float().contiguous(), *arguments).to(value.dtype)


@torch.library.custom_op("hf_denseseg::ms_deform_attn", mutates_args=())
def _forward(
    value: Tensor, offsets: Tensor, logits: Tensor, reference_points: Tensor, spatial_shapes: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp, by our kernel where there is one: an exported program may run where there is none."""
    kernel = find_kernel(value.device.type).kernel
    if kernel is not None and kernel.unserved(value, offsets) is None:
        return kernel.forward(value, offsets, logits, reference_points, list(spatial_shapes))
    shapes = list(zip(spatial_shapes[::2], spatial_shapes[1::2], strict=True))
    out = attend_plainly(value, offsets, logits, reference_points, shapes)
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
def _(value: Tensor, offsets: Tensor, logits: Tensor, reference_points: Tensor, spatial_shapes: Any) -> Any:
    out = value.new_empty(value.shape[0], offsets.shape[1], value.shape[2] * value.shape[3])
    return out, logits.new_empty(logits.shape[:3], dtype=torch.float32)


@_backward.register_fake
def _(grad: Tensor, value: Tensor, offsets: Tensor, logits: Tensor, *rest: Any) -> Any:
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (value, offsets, logits))


def _keep(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.spatial_shapes = inputs
    ctx.save_for_backward(*tensors, *output)


def _gradients(ctx: Any, grad: Tensor, _: Any) -> tuple:
    """Gradients of the op; that of the reference points is the sum of the offsets' in units of the picture."""
    value, offsets, logits, reference_points, out, lse = ctx.saved_tensors
    shapes = ctx.spatial_shapes
    grads = _backward(grad.contiguous(), value, offsets, logits, reference_points, shapes, out, lse)
    reference = None
    if ctx.needs_input_grad[3]:
        size = _width_heights(list(zip(shapes[::2], shapes[1::2], strict=True)), grads[1])
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
def _operations(value: Any, offsets: Any, *rest: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Two operations for each of the four corners of every point and channel."""
    return 8 * math.prod(offsets[:-1]) * value[-1]


def _autocast_rule(device_type: str) -> Callable:
    """What autocast does to the operator: the value follows it, coordinates stay in float32."""

    def rule(value: Tensor, offsets: Tensor, logits: Tensor, reference_points: Tensor, shapes: Sequence[int]) -> Any:
        dtype = torch.get_autocast_dtype(device_type)
        with torch.autocast(device_type, enabled=False):
            return _forward(value.to(dtype), offsets.float(), logits, reference_points.float(), shapes)

    return rule


_AUTOCAST = torch.library.Library("hf_denseseg", "FRAGMENT")
_AUTOCAST.impl("ms_deform_attn", _autocast_rule("cpu"), "AutocastCPU")
_AUTOCAST.impl("ms_deform_attn", _autocast_rule("cuda"), "AutocastCUDA")


def _check(value: Tensor, points: Tensor, weights: Tensor, spatial_shapes: Shapes) -> None:
    """Refuse tensors that do not belong together."""
    if value.dim() != 4 or points.dim() != 6 or points.shape[-1] != 2 or points.shape[:-1] != weights.shape:
        raise InputError(
            f"value {tuple(value.shape)}, points {tuple(points.shape)} and weights {tuple(weights.shape)} were given; "
            "deformable attention needs (B, S, M, D), (B, Q, M, L, P, 2) and (B, Q, M, L, P)."
        )
    if value.shape[0] != points.shape[0] or value.shape[2] != points.shape[2]:
        raise InputError(
            f"value has {value.shape[0]} pictures and {value.shape[2]} heads, its points have {points.shape[0]} and "
            f"{points.shape[2]}; give both the same."
        )
    tokens = sum(height * width for height, width in spatial_shapes)
    if len(spatial_shapes) != points.shape[3] or tokens != value.shape[1]:
        raise InputError(
            f"spatial_shapes {list(spatial_shapes)} describe {len(spatial_shapes)} levels with {tokens} tokens; the "
            f"points are for {points.shape[3]} levels and value has {value.shape[1]} tokens."
        )


def _sample(value: Tensor, locations: Tensor, weights: Tensor, spatial_shapes: Shapes) -> Tensor:
    """Sum the bilinear samples of every level, one level after the other to keep memory low.

    Runs in float32 at least: `grid_sample` of 16-bit tensors is wrong on the CPU (its coordinates have 16 bits, its
    addresses overflow from 182 x 182 pixels).
    """
    batch, queries, heads, _, points, _ = locations.shape
    channels = value.shape[-1]
    maps = value.to(locations.dtype).split([height * width for height, width in spatial_shapes], dim=1)
    total: Tensor | None = None
    for level, (height, width) in enumerate(spatial_shapes):
        feature_map = maps[level].permute(0, 2, 3, 1).reshape(batch * heads, channels, height, width)
        grid = _grid(locations[:, :, :, level], height, width).transpose(1, 2).flatten(0, 1)  # (B*M, Q, P, 2)
        level_weights = weights[:, :, :, level].transpose(1, 2).flatten(0, 1)[:, None]  # (B*M, 1, Q, P)
        sampled = _weighted_sample(feature_map, grid, level_weights)
        total = sampled if total is None else total + sampled
    assert total is not None
    output = total.view(batch, heads * channels, queries).transpose(1, 2)
    return output.to(value.dtype).contiguous()


def _grid(pixels: Tensor, height: int, width: int) -> Tensor:
    """Coordinates -1..1 of `grid_sample` (corners not aligned); points that do not count are sent far outside."""
    x, y = pixels.unbind(-1)
    counts = (x > -1) & (y > -1) & (x < width) & (y < height)  # false for NaN
    grid = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], -1)
    return torch.where(counts[..., None], grid, _OUTSIDE)


def _weighted_sample(feature_map: Tensor, grid: Tensor, weights: Tensor) -> Tensor:
    """`(N, D, Q)`: samples of `(N, D, H, W)` at `(N, Q, P, 2)`, summed over P with weights `(N, 1, Q, P)`."""
    chunk = grid.shape[1]
    if not torch.compiler.is_compiling():
        chunk = max(1, _LARGEST_SAMPLE // (feature_map.shape[0] * feature_map.shape[1] * grid.shape[2]))
    parts = []
    for some_points, some_weights in zip(grid.split(chunk, 1), weights.split(chunk, 2), strict=True):
        samples = F.grid_sample(feature_map, some_points, "bilinear", "zeros", align_corners=False)
        parts.append((samples * some_weights).sum(-1))
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)
