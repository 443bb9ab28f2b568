"""The reference implementation of HLG: the formulas as the released code writes them.

Same weights and outputs as `modeling_hlg`, without its savings, so at a higher cost: the bias network runs in every
call and for all offsets of a table, softmax attention keeps all weights and biases in memory, queries, keys and values
are projected separately, BatchNorm is a pass of its own, and maps and tokens are copied into each other's layout.
Tests and benchmark compare the two, and the FLOPs of the paper count this one.
"""

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from hf_denseseg.models.flops import OperationCounts
from hf_denseseg.models.hlg.modeling_hlg import (
    HlgConvNorm,
    HlgDecoderAttention,
    HlgDecoderLayer,
    HlgForSemanticSegmentation,
    HlgLayer,
    HlgLocalGlobalAttention,
    HlgSegmenterOutput,
    HlgSelfAttention,
    eager_attention_forward,
)
from hf_denseseg.models.hlg.positions_hlg import HlgPlaces, HlgPositionBias


class ReferenceHlgConvNorm(HlgConvNorm):
    """Convolution, then BatchNorm, not folded, on maps with the channels first in memory."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.norm(self.convolution(features.contiguous()))


class ReferenceHlgPositionBias(HlgPositionBias):
    """Runs the network on all (2H - 1) x (2W - 1) offsets, more if keys lie outside the map, in every call."""

    def forward(self, places: HlgPlaces, like: torch.Tensor) -> torch.Tensor:
        device = like.device
        key_y, key_x = (each.flatten() for each in self._keys(places, device))
        rows, columns = (torch.arange(side, device=device) for side in places.size)
        query_y, query_x = (each.flatten() for each in torch.meshgrid(rows, columns, indexing="ij"))
        (height, width), (down, across) = places.size, places.keys
        if places.scrambled:  # index with rows of 2w - 1, table with rows of 2W - 1 (rule "tuple4")
            low_y, low_x, stride = 1 - height, 1 - width, 2 * across - 1
            index = (query_y[:, None] - key_y + down - 1) * stride + query_x[:, None] - key_x + across - 1
            size = (2 * height - 1, 2 * width - 1)
        else:
            last_y = max(height, places.first[0] + places.step[0] * (down - 1) + 1) - 1
            last_x = max(width, places.first[1] + places.step[1] * (across - 1) + 1) - 1
            low_y, low_x, size = -last_y, -last_x, (height + last_y, width + last_x)
            index = (query_y[:, None] - key_y - low_y) * size[1] + query_x[:, None] - key_x - low_x
        dy, dx = (torch.arange(side, device=device) + low for side, low in zip(size, (low_y, low_x), strict=True))
        offsets = torch.stack([each.flatten() for each in torch.meshgrid(dy, dx, indexing="ij")], dim=1)
        bias = self.table(offsets.float()).to(like.dtype)[:, index.flatten()]
        return bias.view(1, self.num_heads, len(query_y), len(key_y))

    @staticmethod
    def _keys(places: HlgPlaces, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        down, across = places.keys
        if places.row:
            number = torch.arange(down * across, device=device)
            return number // places.row, number % places.row
        y, x = (
            torch.arange(count, device=device) * step + first
            for count, step, first in zip(places.keys, places.step, places.first, strict=True)
        )
        y, x = torch.meshgrid(y, x, indexing="ij")
        return y, x


class ReferenceAttention:
    """Mixin in front of a class of `modeling_hlg`: softmax attention with all scores in memory."""

    scaling: float
    split_heads: Callable[..., Iterator[torch.Tensor]]

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return eager_attention_forward(cast(nn.Module, self), query, key, value, bias, scaling=self.scaling)

    def attend_globally(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        position_bias: HlgPositionBias,
        places: HlgPlaces,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        shape = query.shape
        query, key, value = self.split_heads(query, key, value)
        attended, weights = self.attend(query, key, value, position_bias(places, query))
        return attended.reshape(shape), weights


class ReferenceLocalGlobalAttention(ReferenceAttention, HlgLocalGlobalAttention):
    """Stages 1 to 3, with one matrix product per projection."""

    @staticmethod
    def _project(tokens: torch.Tensor, *layers: nn.Linear) -> tuple[torch.Tensor, ...]:
        return tuple(layer(tokens) for layer in layers)


class ReferenceSelfAttention(ReferenceAttention, HlgSelfAttention):
    """Attention of the last stage."""


class ReferenceDecoderAttention(ReferenceAttention, HlgDecoderAttention):
    """Attention of the decoder."""


class ReferenceHlgLayer(HlgLayer):
    """Returns its map with the channels first in memory."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return super().forward(*args, **kwargs).contiguous()


class ReferenceHlgDecoderLayer(HlgDecoderLayer):
    """Returns its map with the channels first in memory."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return super().forward(*args, **kwargs).contiguous()


class ReferenceHlgForSemanticSegmentation(HlgForSemanticSegmentation):
    """Returns logits at the size of the image."""

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None, **kwargs: Any) -> Any:
        outputs: HlgSegmenterOutput = super().forward(pixel_values, labels=labels, **kwargs)
        assert outputs.logits is not None
        size = pixel_values.shape[-2:]
        outputs["logits"] = F.interpolate(outputs.logits, size=size, mode="bilinear", align_corners=False)
        return outputs


REFERENCE_CLASSES = {
    HlgConvNorm: ReferenceHlgConvNorm,
    HlgPositionBias: ReferenceHlgPositionBias,
    HlgLocalGlobalAttention: ReferenceLocalGlobalAttention,
    HlgSelfAttention: ReferenceSelfAttention,
    HlgDecoderAttention: ReferenceDecoderAttention,
    HlgLayer: ReferenceHlgLayer,
    HlgDecoderLayer: ReferenceHlgDecoderLayer,
    HlgForSemanticSegmentation: ReferenceHlgForSemanticSegmentation,
}


def published_multiply_adds(counts: OperationCounts) -> int:
    """Count as the FLOPs of Table 7 do: multiply-adds, of the two attention products only one.

    With both, all five rounded cells would be too high by half of the products; this is the best reading, not proof.
    """
    return counts.layer_multiply_adds + counts.product_multiply_adds // 2


__all__ = ["REFERENCE_CLASSES", "published_multiply_adds"]
