"""Deformable attention in plain loops, and random calls of it, for the tests of the definition and of the kernels."""

import math

import torch
from torch import Tensor

from hf_denseseg.ops.kernel_loading import find_kernel

Shapes = list[tuple[int, int]]


def needs_kernel(device: str = "cpu") -> str:
    """Why the compiled kernel is missing, or an empty string: for `pytest.mark.skipif`."""
    search = find_kernel(device)
    return "" if search.kernel is not None else f"no kernel for {device}: {search.reasons()}"


def random_call(
    shapes: Shapes,
    *,
    batch: int = 1,
    queries: int = 7,
    heads: int = 2,
    channels: int = 32,
    points: int = 4,
    dtype: torch.dtype = torch.float32,
    shared_references: bool = False,
    columns: int = 2,
    seed: int = 0,
) -> list[Tensor]:
    """value, offsets, logits, reference points; no point is within 0.01 of a pixel center, where gradients jump."""
    random = torch.Generator().manual_seed(seed)
    levels, tokens = len(shapes), sum(height * width for height, width in shapes)
    value = torch.randn(batch, tokens, heads, channels, generator=random, dtype=torch.float64)
    references = torch.rand(1 if shared_references else batch, queries, levels, columns, generator=random).double()
    size = torch.tensor([shape[::-1] for shape in shapes], dtype=torch.float64)
    fraction = 0.01 + 0.98 * torch.rand(batch, queries, heads, levels, points, 2, generator=random).double()
    corner = torch.floor((torch.rand(fraction.shape, generator=random).double() * 1.6 - 0.3) * size[:, None])
    offsets = corner + fraction - (references[..., :2] * size - 0.5)[:, :, None, :, None]
    if columns == 4:
        offsets = offsets / (references[..., 2:] * size * 0.5 / points)[:, :, None, :, None]
    logits = torch.randn(offsets.shape[:-1], generator=random, dtype=torch.float64)
    return [tensor.to(dtype) for tensor in (value, offsets, logits, references)]


def plain_loops(value: Tensor, offsets: Tensor, logits: Tensor, references: Tensor, shapes: Shapes) -> Tensor:
    """The definition, one corner at a time."""
    batch, queries, heads, levels, points, _ = offsets.shape
    out = value.new_zeros(batch, queries, heads, value.shape[-1])
    for b in range(batch):
        for q in range(queries):
            reference = references[b if len(references) > 1 else 0, q]
            for m in range(heads):
                weights = logits[b, q, m].flatten().softmax(0).view(levels, points)
                start = 0
                for level, (height, width) in enumerate(shapes):
                    for p in range(points):
                        scale = value.new_ones(2)
                        if len(reference[level]) == 4:
                            scale = reference[level, 2:] * value.new_tensor([width, height]) * 0.5 / points
                        center = reference[level, :2] * value.new_tensor([width, height]) - 0.5
                        x, y = (center + scale * offsets[b, q, m, level, p]).unbind()
                        if not (-1 < x < width and -1 < y < height):
                            continue
                        left, top = math.floor(x), math.floor(y)
                        for row, weight_y in ((top, 1 - (y - top)), (top + 1, y - top)):
                            for column, weight_x in ((left, 1 - (x - left)), (left + 1, x - left)):
                                if 0 <= row < height and 0 <= column < width:
                                    corner = value[b, start + row * width + column, m]
                                    out[b, q, m] = out[b, q, m] + weights[level, p] * weight_y * weight_x * corner
                    start += height * width
    return out.flatten(2)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what was expected (1 at least: one logit alone has no gradient)."""
    expected = expected.double()
    return ((found.double() - expected).norm() / expected.norm().clamp(min=1.0)).item()
