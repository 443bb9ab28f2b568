"""The other context encoders and upsamplers that the paper tries with and without guidance (Tables 1, 4 and 8).

An encoder turns the coarsest map C5 into the high-level map; an upsampler turns C2 to C4 and that map into one at C2's
size. Both read nothing but these maps, so that they can be guided.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import deform_conv2d

from hf_denseseg.models.hfgd.configuration_hfgd import HfgdConfig
from hf_denseseg.models.hfgd.layers_hfgd import HfgdConvNormAct, at_width, resize
from hf_denseseg.models.hfgd.pyramid_hfgd import HfgdSemanticBranches

ATROUS_RATES = (12, 24, 36)  # for backbones at stride 8 (Chen et al., 2018)
POOL_BINS = (1, 2, 3, 6)  # Zhao et al., 2017
DEEPLAB_LOW_CHANNELS = 48  # Chen et al., 2018, Sec. 4.1


class HfgdPooledContext(nn.Module):
    """Pool a map to bins x bins, convolve, and resize it back: `(B, C, h, w)` -> `(B, out_channels, h, w)`.

    Args:
        in_channels: C.
        out_channels: channels of the output.
        kernel_size: of the convolution on the pooled map.
        bins: side of the pooled map.
        align_corners: how it is resized back.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, bins: int, align_corners: bool) -> None:
        super().__init__()
        self.bins, self.align_corners = bins, align_corners
        self.block = HfgdConvNormAct(in_channels, out_channels, kernel_size)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        size = features.shape[-2], features.shape[-1]
        pooled = F.adaptive_avg_pool2d(features, self.bins)
        if self.bins > 1:
            return resize(self.block(pooled), size, self.align_corners)
        # One value per image and channel: torch's BatchNorm refuses a batch of one, which has no variance. The value
        # repeated over the map has the same mean and variance, and for one image variance 0: the output is the norm's
        # bias, as in Keras.
        return F.relu(self.block.norm(self.block.convolution(pooled).expand(-1, -1, *size)))


class HfgdIdentityEncoder(nn.Module):
    """No extra encoding: one 1x1 convolution projects C5 to the decoder's width."""

    def __init__(self, config: HfgdConfig, in_channels: int) -> None:
        super().__init__()
        self.channels = config.decoder_width
        self.projection = HfgdConvNormAct(in_channels, self.channels)

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, None]:
        """C5 -> high-level map `(B, channels, h, w)`, and no map to regularize."""
        return self.projection(features), None


class HfgdAsppEncoder(nn.Module):
    """Atrous spatial pyramid pooling (Chen et al., 2018): global pooling, 1x1, and three dilated convolutions."""

    def __init__(self, config: HfgdConfig, in_channels: int) -> None:
        super().__init__()
        width = self.channels = config.decoder_width
        self.branches = nn.ModuleList(
            [
                HfgdPooledContext(in_channels, width, 1, 1, config.align_corners),
                HfgdConvNormAct(in_channels, width),
                *(HfgdConvNormAct(in_channels, width, 3, dilation=rate) for rate in ATROUS_RATES),
            ]
        )
        self.fusion = HfgdConvNormAct(len(self.branches) * width, width)

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, None]:
        """C5 -> high-level map `(B, channels, h, w)`, and no map to regularize."""
        return self.fusion(torch.cat([branch(features) for branch in self.branches], dim=1)), None


class HfgdOcrEncoder(nn.Module):
    """Object-contextual representations (Yuan et al., 2020): pixels attend to the means of soft object regions.

    Widths as there: `cae_channels` (512) for pixels and regions, half of it inside the attention. There the regions
    come from C4; here from C5, the only map that an extra encoding reads. They learn from the labels by a loss of
    their own.
    """

    def __init__(self, config: HfgdConfig, in_channels: int) -> None:
        super().__init__()
        width, half = config.cae_channels, config.cae_channels // 2
        self.channels = config.decoder_width
        self.regions = nn.Sequential(
            HfgdConvNormAct(in_channels, width), nn.Conv2d(width, int(config.num_labels or 0), kernel_size=1)
        )
        self.pixels = HfgdConvNormAct(in_channels, width, 3)
        self.query = nn.Sequential(HfgdConvNormAct(width, half), HfgdConvNormAct(half, half))
        self.key = nn.Sequential(HfgdConvNormAct(width, half), HfgdConvNormAct(half, half))
        self.value = HfgdConvNormAct(width, half)
        self.expand = HfgdConvNormAct(half, width)
        self.fusion = HfgdConvNormAct(2 * width, self.channels)

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """C5 -> high-level map `(B, channels, h, w)`, and the logits of the regions `(B, num_labels, h, w)`."""
        logits, pixels = self.regions(features), self.pixels(features)
        weights = logits.flatten(2).softmax(-1)  # (B, K, N), of each region over the N pixels
        means = (weights @ pixels.flatten(2).transpose(1, 2)).transpose(1, 2)[..., None]  # (B, C, K, 1)
        query, key, value = (
            layer(each).flatten(2).transpose(1, 2)
            for layer, each in ((self.query, pixels), (self.key, means), (self.value, means))
        )  # (B, N, C/2), (B, K, C/2), (B, K, C/2)
        attention = (query @ key.transpose(1, 2) * query.shape[2] ** -0.5).softmax(-1)  # (B, N, K)
        context = (attention @ value).transpose(1, 2).unflatten(2, features.shape[-2:])
        return self.fusion(torch.cat([self.expand(context), pixels], dim=1)), logits


class HfgdPyramidPoolingEncoder(nn.Module):
    """Pyramid pooling of UperNet (Xiao et al., 2018): C5 beside its means over 1, 2, 3 and 6 bins a side.

    Twice as wide as the decoder: 512 as published.
    """

    def __init__(self, config: HfgdConfig, in_channels: int) -> None:
        super().__init__()
        width = self.channels = 2 * config.decoder_width
        self.pools = nn.ModuleList(
            HfgdPooledContext(in_channels, width, 3, bins, config.align_corners) for bins in POOL_BINS
        )
        self.fusion = HfgdConvNormAct(in_channels + len(POOL_BINS) * width, width, 3)

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, None]:
        """C5 -> high-level map `(B, channels, h, w)`, and no map to regularize."""
        return self.fusion(torch.cat([features, *(pool(features) for pool in self.pools)], dim=1)), None


class HfgdOffsets(nn.Conv2d):
    """3x3 convolution that predicts, for each tap of a 3x3 kernel, a shift (y, x) and a weight: 9 pairs, then 9.

    Initialized with zeros (authors' code): at first a plain convolution with every tap weighted by sigmoid(0) = 0.5.
    """


class HfgdShiftedConvolution(nn.Module):
    """3x3 convolution whose taps are shifted and weighted at every position (Zhu et al., 2019).

    Not an `nn.Conv2d`: adapters add a plain convolution to those, which would be another function than a change of
    these weights.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, channels, 3, 3))
        self.bias = nn.Parameter(torch.empty(channels))

    def forward(self, features: torch.Tensor, shifts: torch.Tensor) -> torch.Tensor:
        """Map `(B, C, h, w)` and output of `HfgdOffsets` `(B, 27, h, w)` -> `(B, C, h, w)`."""
        offsets, weights = shifts.split([18, 9], dim=1)  # (y, x) and one weight for each of 9 taps
        # In float32: torchvision has no bfloat16 on the CPU, and positions on a fine map need more than its 8 bits.
        aligned = deform_conv2d(
            features.float(),
            offsets.float(),
            self.weight.float(),
            self.bias.float(),
            padding=(1, 1),
            mask=weights.float().sigmoid(),
        )
        return aligned.to(features.dtype)


class HfgdDeformableConvolution(nn.Module):
    """Modulated deformable 3x3 convolution of one group (Zhu et al., 2019), its offsets predicted from another map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.offsets = HfgdOffsets(channels, 27, kernel_size=3, padding=1)
        self.convolution = HfgdShiftedConvolution(channels)

    def forward(self, features: torch.Tensor, guide: torch.Tensor) -> torch.Tensor:
        """Both maps `(B, C, h, w)` -> `(B, C, h, w)`."""
        return self.convolution(features, self.offsets(guide))


class HfgdFeatureAlignment(nn.Module):
    """One level of FaPN (Huang et al., 2021): select channels of the finer map, align the coarser one with it, add.

    As in the authors' code (iSeg, `fapn`): no norms, and no biases but in the deformable convolution.
    """

    def __init__(self, low_channels: int, channels: int, align_corners: bool) -> None:
        super().__init__()
        self.align_corners = align_corners
        self.squeeze = nn.Conv2d(low_channels, low_channels, kernel_size=1, bias=False)
        self.excite = nn.Conv2d(low_channels, low_channels, kernel_size=1, bias=False)
        self.lateral = nn.Conv2d(low_channels, channels, kernel_size=1, bias=False)
        self.difference = nn.Conv2d(2 * channels, channels, kernel_size=1, bias=False)
        self.deformable = HfgdDeformableConvolution(channels)

    def forward(self, low: torch.Tensor, top: torch.Tensor) -> torch.Tensor:
        """Finer map `(B, low_channels, h, w)` and coarser one -> `(B, channels, h, w)`."""
        gate = self.excite(F.relu(self.squeeze(low.mean(dim=(2, 3), keepdim=True)))).sigmoid()  # (B, C, 1, 1)
        lateral = self.lateral(low * gate + low)
        top = resize(top, (low.shape[-2], low.shape[-1]), self.align_corners)
        guide = self.difference(torch.cat([lateral, 2 * top], dim=1))
        return F.relu(self.deformable(top, guide)) + lateral


class HfgdFapn(nn.Module):
    """Feature-aligned pyramid, then the semantic branches: `(B, merge_channels, H/4, W/4)`."""

    def __init__(self, config: HfgdConfig, low_channels: list[int], top_channels: int) -> None:
        super().__init__()
        self.channels = config.merge_channels
        self.top = at_width(top_channels, config.decoder_width)
        self.alignments = nn.ModuleList(
            HfgdFeatureAlignment(channels, config.decoder_width, config.align_corners) for channels in low_channels
        )
        self.semantic = HfgdSemanticBranches(config)

    def forward(self, low: list[torch.Tensor], top: torch.Tensor, image_size: tuple[int, int]) -> torch.Tensor:
        """C2 to C4 and the high-level map -> map of C2's size."""
        maps = [self.top(top)]
        for alignment, features in zip(reversed(self.alignments), reversed(low), strict=True):
            maps.insert(0, alignment(features, maps[0]))
        return self.semantic(maps, image_size)


class HfgdUperNet(nn.Module):
    """UperNet's pyramid (Xiao et al., 2018), twice as wide as the decoder: `(B, 512, H/4, W/4)` as published."""

    def __init__(self, config: HfgdConfig, low_channels: list[int], top_channels: int) -> None:
        super().__init__()
        width = 2 * config.decoder_width
        self.channels, self.align_corners = width, config.align_corners
        self.top = at_width(top_channels, width)
        self.laterals = nn.ModuleList(HfgdConvNormAct(channels, width) for channels in low_channels)
        self.smoothing = nn.ModuleList(HfgdConvNormAct(width, width, 3) for _ in low_channels)
        self.fusion = HfgdConvNormAct((len(low_channels) + 1) * width, width, 3)

    def forward(self, low: list[torch.Tensor], top: torch.Tensor, image_size: tuple[int, int]) -> torch.Tensor:
        """C2 to C4 and the high-level map -> map of C2's size."""
        maps = [self.top(top)]
        for lateral, features in zip(reversed(self.laterals), reversed(low), strict=True):
            size = features.shape[-2], features.shape[-1]
            maps.insert(0, lateral(features) + resize(maps[0], size, self.align_corners))
        *summed, top = maps
        levels = [*(smooth(each) for smooth, each in zip(self.smoothing, summed, strict=True)), top]
        finest = levels[0].shape[-2], levels[0].shape[-1]
        resized = [levels[0], *(resize(each, finest, self.align_corners) for each in levels[1:])]
        return self.fusion(torch.cat(resized, dim=1))


class HfgdDeeplabV3Plus(nn.Module):
    """Decoder of DeepLabV3+ (Chen et al., 2018): the high-level map beside a narrow C2; C3 and C4 are not used."""

    def __init__(self, config: HfgdConfig, low_channels: list[int], top_channels: int) -> None:
        super().__init__()
        self.channels, self.align_corners = config.decoder_width, config.align_corners
        self.low = HfgdConvNormAct(low_channels[0], DEEPLAB_LOW_CHANNELS)
        self.fusion = nn.Sequential(
            HfgdConvNormAct(DEEPLAB_LOW_CHANNELS + top_channels, self.channels, 3),
            HfgdConvNormAct(self.channels, self.channels, 3),
        )

    def forward(self, low: list[torch.Tensor], top: torch.Tensor, image_size: tuple[int, int]) -> torch.Tensor:
        """C2 to C4 and the high-level map -> map of C2's size."""
        size = low[0].shape[-2], low[0].shape[-1]
        return self.fusion(torch.cat([self.low(low[0]), resize(top, size, self.align_corners)], dim=1))


ENCODERS: dict[str, type[nn.Module]] = {
    "identity": HfgdIdentityEncoder,
    "ocr": HfgdOcrEncoder,
    "aspp": HfgdAsppEncoder,
    "ppm": HfgdPyramidPoolingEncoder,
}
"""Context encoders by `extra_encoding`; CAE and CAR's own head are in `modeling_hfgd`."""

UPSAMPLERS: dict[str, type[HfgdFapn] | type[HfgdUperNet] | type[HfgdDeeplabV3Plus]] = {
    "fapn": HfgdFapn,
    "upernet": HfgdUperNet,
    "deeplabv3plus": HfgdDeeplabV3Plus,
}
"""Upsamplers by name; U-SFPN and SemanticFPN are in `pyramid_hfgd`."""

__all__ = ["ENCODERS", "UPSAMPLERS"]
