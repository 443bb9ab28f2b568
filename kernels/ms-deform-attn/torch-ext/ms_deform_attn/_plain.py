"""The sampling step in plain torch, for what a build does not serve: a CUDA build on the CPU, other devices."""

import torch
from torch import Tensor
from torch.nn import functional as F


def sample(value: Tensor, locations: Tensor, weights: Tensor, spatial_shapes: list[int]) -> Tensor:
    """Weighted sum of what `grid_sample` reads from each level; arguments as in `forward_sampled`."""
    batch, _, heads, channels = value.shape
    queries, points = locations.shape[1], locations.shape[4]
    dtype = torch.promote_types(value.dtype, locations.dtype)  # coordinates never lose precision to the values
    out, start = 0.0, 0
    for level, (height, width) in enumerate(zip(spatial_shapes[::2], spatial_shapes[1::2], strict=True)):
        image = value[:, start : start + height * width].permute(0, 2, 3, 1)  # (B, M, D, H * W)
        grid = (2 * locations[:, :, :, level] - 1).transpose(1, 2).reshape(batch * heads, queries, points, 2)
        image = image.reshape(batch * heads, channels, height, width)
        read = F.grid_sample(image.to(dtype), grid.to(dtype), align_corners=False)
        share = weights[:, :, :, level].transpose(1, 2).reshape(batch * heads, 1, queries, points)
        out = out + (read * share).sum(3)  # (B * M, D, Q)
        start += height * width
    return out.view(batch, heads * channels, queries).transpose(1, 2).to(value)
