"""The student of HFGD: U-SFPN, the pyramid of Sec. 3.3 (Figure 5), and SemanticFPN, from which it is derived."""

from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from hf_denseseg.models.hfgd.configuration_hfgd import HfgdConfig
from hf_denseseg.models.hfgd.layers_hfgd import HfgdConvNormAct, at_width, level_size, resize

Size = tuple[int, int]


class HfgdPyramid(nn.Module):
    """Top-down path: laterals of C2 to C4 plus the resized next coarser map; the high-level map itself is the top.

    U-SFPN has 3x3 laterals, SemanticFPN 1x1. No convolution smooths the sums.
    """

    def __init__(self, config: HfgdConfig, low_channels: list[int]) -> None:
        super().__init__()
        kernel_size = 3 if config.upsampler == "u_sfpn" else 1
        self.align_corners = config.align_corners
        self.laterals = nn.ModuleList(
            HfgdConvNormAct(channels, config.decoder_width, kernel_size) for channels in low_channels
        )

    def forward(self, low: list[torch.Tensor], top: torch.Tensor) -> list[torch.Tensor]:
        """Compute p2 to p5, finest first, from C2 to C4 and the high-level map."""
        maps = [top]
        for lateral, features in zip(reversed(self.laterals), reversed(low), strict=True):
            own = lateral(features)
            maps.insert(0, own + resize(maps[0], (own.shape[-2], own.shape[-1]), self.align_corners))
        return maps


class HfgdSemanticBranches(nn.Module):
    """Right side of SemanticFPN: every level is convolved and upsampled step by step; the sum is merged.

    At stride 4 level i has max(1, i) convolutions, each followed by a resize to the next finer level (none for the
    finest); at stride 2 each level has one more.

    Branches that end with the same resize are summed before it, and at stride 2 the linear part of the merging 1x1
    convolution is applied before the last resize: the same function, since bilinear weights sum to 1.
    """

    def __init__(self, config: HfgdConfig) -> None:
        super().__init__()
        width = config.decoder_width
        self.align_corners, self.output_stride = config.align_corners, config.output_stride
        more = int(config.output_stride == 2)
        self.branches = nn.ModuleList(
            nn.ModuleList(HfgdConvNormAct(width, width, 3) for _ in range(max(level, 1) + more)) for level in range(4)
        )
        self.merge = HfgdConvNormAct(width, config.merge_channels)

    def forward(self, maps: list[torch.Tensor], image_size: Size) -> torch.Tensor:
        sizes = [(each.shape[-2], each.shape[-1]) for each in maps]  # of p2 to p5, at strides 4, 8, 16, 32
        ends = []  # of each branch, before its last resize
        for level, (convolutions, features) in enumerate(zip(self.branches, maps, strict=True)):
            *before, last = cast(nn.ModuleList, convolutions)
            for step, convolution in enumerate(before, start=1):
                features = convolution(features)
                if level:
                    features = resize(features, sizes[level - step], self.align_corners)
            ends.append(last(features))
        if self.output_stride == 4:
            return self.merge(ends[0] + resize(ends[1] + ends[2] + ends[3], sizes[0], self.align_corners))
        return self._merge_and_double(ends[0] + ends[1] + ends[2] + ends[3], level_size(image_size, 2))

    def _merge_and_double(self, features: torch.Tensor, size: Size) -> torch.Tensor:
        """Merge and resize to stride 2; in training the norm takes its statistics from the large map."""
        merge = self.merge
        if merge.norm.training:
            return F.relu(merge.norm(resize(merge.convolution(features), size, self.align_corners)), inplace=True)
        return F.relu(resize(merge.linear(features), size, self.align_corners), inplace=True)


class HfgdSemanticFpn(nn.Module):
    """U-SFPN or SemanticFPN: C2 to C4 and the high-level map -> `(B, merge_channels, H/4, W/4)`, or at stride 2."""

    def __init__(self, config: HfgdConfig, low_channels: list[int], top_channels: int) -> None:
        super().__init__()
        self.channels = config.merge_channels
        self.top = at_width(top_channels, config.decoder_width)
        self.pyramid = HfgdPyramid(config, low_channels)
        self.semantic = HfgdSemanticBranches(config)

    def forward(self, low: list[torch.Tensor], top: torch.Tensor, image_size: Size) -> torch.Tensor:
        """Compute the student's map from C2 to C4 (finest first) and the high-level map."""
        return self.semantic(self.pyramid(low, self.top(top)), image_size)


__all__ = ["HfgdSemanticFpn"]
