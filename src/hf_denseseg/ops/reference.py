"""Multi-scale deformable attention in plain torch: the definition (Deformable DETR, Eq. 3; UN-EPT, Eq. 4).

Letters in the shapes: B images, Q queries, S value tokens (the sum of height x width over the levels), M heads,
D channels of a head, L levels, P points of a query, head and level.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_denseseg.errors import InputError

Shapes = Sequence[tuple[int, int]]


_OUTSIDE = -4.0  # grid coordinate for a point that adds nothing: none of its corners touches the map


LARGEST_SAMPLE = 2**26  # elements that one call of grid_sample returns (256 MiB in float32)


def ms_deform_attn_reference(
    value: Tensor, offsets: Tensor, logits: Tensor, reference_points: Tensor, spatial_shapes: Shapes
) -> Tensor:
    """The definition in plain torch, for 2-column reference points; arguments as in `ms_deform_attn`."""
    offsets, size = exact_coordinates(offsets), width_heights(spatial_shapes, offsets)
    # In pixels, where 0 is the center of the first pixel: (B, Q, M, L, P, 2).
    locations = (exact_coordinates(reference_points) * size - 0.5)[:, :, None, :, None] + offsets
    weights = logits.to(locations.dtype).flatten(-2).softmax(-1).view(logits.shape)
    return _sample(value, locations, weights, spatial_shapes)


def sample_locations(
    value: Tensor, sampling_locations: Tensor, attention_weights: Tensor, spatial_shapes: Shapes
) -> Tensor:
    """Sum `value` at the given locations with the given weights (the signature of the kernels hub).

    Args:
        value: `(B, S, M, D)`.
        sampling_locations: `(B, Q, M, L, P, 2)` as (x, y), 0..1 from edge to edge of the image.
        attention_weights: `(B, Q, M, L, P)`, used as they are.
        spatial_shapes: (height, width) of every level.

    Returns:
        `(B, Q, M * D)` in the dtype of `value`.

    Raises:
        InputError: if the shapes do not match.
    """
    check_arguments(value, sampling_locations, attention_weights, spatial_shapes)
    locations = exact_coordinates(sampling_locations)
    locations = locations * width_heights(spatial_shapes, locations)[:, None] - 0.5
    return _sample(value, locations, attention_weights.to(locations.dtype), spatial_shapes)


def exact_coordinates(coordinates: Tensor) -> Tensor:
    """Coordinates in float32 at least: in 16 bits they are up to half a pixel off."""
    return coordinates if coordinates.dtype == torch.float64 else coordinates.float()


def width_heights(spatial_shapes: Shapes, like: Tensor) -> Tensor:
    """(width, height) of every level, `(L, 2)`, to scale its (x, y)."""
    # `new_full` instead of `tensor`: sizes may be symbolic while a graph is traced. One axis, since OpenVINO (2026.4)
    # makes `(1,)` of the shape `()`.
    rows = [
        torch.cat([like.new_full((1,), size, dtype=exact_coordinates(like).dtype) for size in reversed(shape)])
        for shape in spatial_shapes
    ]
    return torch.stack(rows)


def check_arguments(value: Tensor, points: Tensor, weights: Tensor, spatial_shapes: Shapes) -> None:
    """Refuse tensors whose shapes do not match."""
    if value.dim() != 4 or points.dim() != 6 or points.shape[-1] != 2 or points.shape[:-1] != weights.shape:
        raise InputError(
            f"value {tuple(value.shape)}, points {tuple(points.shape)} and weights {tuple(weights.shape)} were given; "
            "deformable attention needs (B, S, M, D), (B, Q, M, L, P, 2) and (B, Q, M, L, P)."
        )
    if value.shape[0] != points.shape[0] or value.shape[2] != points.shape[2]:
        raise InputError(
            f"value has {value.shape[0]} images and {value.shape[2]} heads, its points have {points.shape[0]} and "
            f"{points.shape[2]}; they must agree."
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
    """Convert pixels to the -1..1 of `grid_sample` (corners not aligned); points off the map go far outside."""
    x, y = pixels.unbind(-1)
    on_map = (x > -1) & (y > -1) & (x < width) & (y < height)  # false for NaN
    grid = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], -1)
    return torch.where(on_map[..., None], grid, _OUTSIDE)


def _weighted_sample(feature_map: Tensor, grid: Tensor, weights: Tensor) -> Tensor:
    """Sample `(N, D, H, W)` at `(N, Q, P, 2)` and sum over P with weights `(N, 1, Q, P)`: `(N, D, Q)`."""

    def sample(points: Tensor, point_weights: Tensor) -> Tensor:
        return (F.grid_sample(feature_map, points, "bilinear", "zeros", align_corners=False) * point_weights).sum(-1)

    if torch.compiler.is_compiling():  # the number of queries may be symbolic
        return sample(grid, weights)
    chunk = max(1, LARGEST_SAMPLE // (feature_map.shape[0] * feature_map.shape[1] * grid.shape[2]))
    parts = [sample(*part) for part in zip(grid.split(chunk, 1), weights.split(chunk, 2), strict=True)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)
