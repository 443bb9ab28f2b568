"""The reference implementation of DSCT: the formulas as the paper and the Conformer code write them.

Same weights and outputs as `modeling_dsct`, without its exact rewrites, so at a higher cost. Tests and benchmark
compare the two, and the paper's FLOPs count this one.
"""

from typing import Any

import torch
import torch.nn.functional as F

from hf_denseseg.models.dsct.modeling_dsct import (
    DsctAttention,
    DsctSacHead,
    DsctSpatialToContext,
    crop_map,
)
from hf_denseseg.models.flops import OperationCounts


class ReferenceDsctAttention(DsctAttention):
    """Attention with all N x N weights in memory (one matrix product, softmax, one matrix product)."""

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        batch, length, channels = hidden_states.shape
        query, key, value = (
            projection(hidden_states).view(batch, length, -1, self.head_dim).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        weights = (query @ key.transpose(-2, -1) * self.scaling).softmax(dim=-1)
        return self.o_proj((weights @ value).transpose(1, 2).reshape(batch, length, channels)), weights


class ReferenceDsctSpatialToContext(DsctSpatialToContext):
    """1x1 convolution at full resolution, then pooling."""

    def forward(self, features: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        pooled = F.avg_pool2d(self.projection(features), self.pool_size)
        return F.gelu(self.layernorm(crop_map(pooled, grid).flatten(2).transpose(1, 2)))


class ReferenceDsctSacHead(DsctSacHead):
    """Upsample both maps, concatenate, then the 1x1 convolution on all channels at 1/4."""

    def forward(
        self, spatial_map: torch.Tensor, context_map: torch.Tensor, image_size: tuple[int, int]
    ) -> torch.Tensor:
        # Both maps at 1/4 of the image: (B, C_spatial + C_context, H/4, W/4).
        size = ((image_size[0] + 3) // 4, (image_size[1] + 3) // 4)
        joined = torch.cat((self.upsample(spatial_map, size), self.upsample(context_map, size)), dim=1)
        return self.classifier(self.dropout(F.relu(self.norm(self.fuse(joined)))))


REFERENCE_CLASSES = {
    DsctAttention: ReferenceDsctAttention,
    DsctSpatialToContext: ReferenceDsctSpatialToContext,
    DsctSacHead: ReferenceDsctSacHead,
}


def published_multiply_adds(counts: OperationCounts) -> int:
    """Count as the FLOPs column of the paper does.

    Multiply-adds of convolutions and linear layers, one operation per BatchNorm output, attention products twice.
    """
    return counts.layer_multiply_adds + counts.norm_outputs + 2 * counts.product_multiply_adds


__all__ = ["REFERENCE_CLASSES", "published_multiply_adds"]
