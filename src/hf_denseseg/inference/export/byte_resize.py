"""The antialiased bilinear resize of bytes in whole numbers, so that every runtime computes the bytes of torch.

In floating point, runtimes differ in how they round a value halfway between two bytes, and where the sizes have a
small ratio there are many such values: from 640 to 512 pixels 0.1 % of the classes came out differently.
"""

import torch
from torch import nn

from hf_denseseg.inference.sliding_window import Size

# As in torch's kernel for bytes: weights are signed integers of 16 bits, with at most 22 bits behind the binary point.
WEIGHT_LIMIT, MOST_BITS = 2**15, 22


class ByteResize(nn.Module):
    """Resize images `(B, C, H, W)` uint8 as torch does: the rows first, then the columns, in fixed point.

    Args:
        before: `(height, width)` of the images.
        after: `(height, width)` of the output.
    """

    def __init__(self, before: Size, after: Size) -> None:
        super().__init__()
        self.rows, self.columns = AxisResize(before[1], after[1], -1), AxisResize(before[0], after[0], -2)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Return `(B, C, height, width)` uint8."""
        return self.columns(self.rows(image.int())).to(torch.uint8)


class AxisResize(nn.Module):
    """Resize axis `dim` (-1 or -2) of bytes that are held as int32 from `before` to `after`."""

    index: torch.Tensor
    weight: torch.Tensor

    def __init__(self, before: int, after: int, dim: int) -> None:
        super().__init__()
        self.dim = dim
        scale = before / after
        support = max(scale, 1.0)
        centers = (torch.arange(after, dtype=torch.float64) + 0.5) * scale
        first = (centers - support + 0.5).long().clamp(min=0)
        end = (centers + support + 0.5).long().clamp(max=before)
        # (taps, after): the values that each output is made of, and their weights.
        index = first + torch.arange(int((end - first).max()))[:, None]
        weight = (1 - ((index - centers + 0.5) / support).abs()).clamp(min=0) * (index < end)
        weight = weight / weight.sum(0)
        self.bits = 0  # behind the binary point: as many as the largest weight leaves
        while self.bits < MOST_BITS and int(0.5 + float(weight.max()) * 2 ** (self.bits + 1)) < WEIGHT_LIMIT:
            self.bits += 1
        self.register_buffer("index", index.clamp(max=before - 1), persistent=False)
        self.register_buffer("weight", (weight * 2**self.bits + 0.5).int(), persistent=False)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Weighted sums, rounded to the nearest byte."""
        total = torch.tensor(2 ** (self.bits - 1), dtype=torch.int32)
        for index, weight in zip(self.index, self.weight, strict=True):
            total = total + values.index_select(self.dim, index) * weight.view(-1, *[1] * (-1 - self.dim))
        return torch.div(total, 2**self.bits, rounding_mode="trunc").clamp(max=255)
