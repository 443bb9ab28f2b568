"""Building blocks of all parts of HFGD: convolution with BatchNorm and ReLU, and the resize between the levels."""

import torch
import torch.nn.functional as F
from torch import nn

from hf_denseseg.models.plain_layers import are_plain, fold_batch_norm

NORM_EPS = 1e-3  # epsilon of every BatchNorm outside the backbone (authors' code)


class HfgdConvNormAct(nn.Module):
    """Convolution of the same size without bias, BatchNorm, ReLU: `(B, C, h, w)` -> `(B, out_channels, h, w)`.

    In eval mode the norm is folded into the convolution.

    Args:
        in_channels: C.
        out_channels: channels of the output.
        kernel_size: odd side of the kernel.
        dilation: pixels between its taps.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 1, dilation: int = 1) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            padding=dilation * (kernel_size // 2),
            dilation=dilation,
            bias=False,
        )
        self.norm = nn.BatchNorm2d(out_channels, eps=NORM_EPS)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Convolution, norm, ReLU."""
        return F.relu(self.linear(features), inplace=True)

    def linear(self, features: torch.Tensor) -> torch.Tensor:
        """Everything before the ReLU."""
        convolution, norm = self.convolution, self.norm
        if norm.training or not are_plain(convolution, norm):
            return norm(convolution(features))
        weight, bias = fold_batch_norm(convolution, norm)
        return F.conv2d(features, weight, bias, padding=convolution.padding, dilation=convolution.dilation)


def resize(features: torch.Tensor, size: tuple[int, int], align_corners: bool) -> torch.Tensor:
    """Bilinear resize of a map to (height, width)."""
    return F.interpolate(features, size=size, mode="bilinear", align_corners=align_corners)


def level_size(image_size: tuple[int, int], stride: int) -> tuple[int, int]:
    """Size of a map of this stride: ceil(side / stride)."""
    return (image_size[0] + stride - 1) // stride, (image_size[1] + stride - 1) // stride


def at_width(channels: int, width: int) -> nn.Module:
    """Project a map of `channels` to `width`; identity in the paper's pairs of encoder and upsampler."""
    return nn.Identity() if channels == width else HfgdConvNormAct(channels, width)


__all__ = ["HfgdConvNormAct", "at_width", "level_size", "resize"]
