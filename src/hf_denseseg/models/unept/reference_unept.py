"""The reference implementation of UN-EPT: the formulas as the released code writes them without its compiled operator.

Same weights and outputs as `modeling_unept` in more memory: the sampled values of all levels and points, and the
attention weights of DeiT, are kept; the projections of the decoder's self-attention are functions. Tests and benchmark
compare the two, and the FLOPs of the paper count this one.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from hf_denseseg.models.flops import OperationCounts
from hf_denseseg.models.unept.modeling_unept import (
    Shapes,
    UneptDeitAttention,
    UneptSampling,
    UneptSelfAttention,
)


class ReferenceUneptSampling(UneptSampling):
    """Locations and weights in memory, one `grid_sample` per level, all samples stacked (Deformable DETR)."""

    def forward(
        self,
        value: torch.Tensor,
        offsets: torch.Tensor,
        logits: torch.Tensor,
        reference_points: torch.Tensor,
        spatial_shapes: Shapes,
    ) -> torch.Tensor:
        batch, _, heads, channels = value.shape
        size = offsets.new_tensor([[width, height] for height, width in spatial_shapes])  # (levels, 2)
        locations = reference_points[:, :, None, :, None] + offsets / size[:, None]
        weights = logits.flatten(3).softmax(-1)
        samples = []
        levels = value.split([height * width for height, width in spatial_shapes], dim=1)
        for number, (level, (height, width)) in enumerate(zip(levels, spatial_shapes, strict=True)):
            maps = level.permute(0, 2, 3, 1).reshape(batch * heads, channels, height, width)
            grid = (2 * locations[:, :, :, number] - 1).transpose(1, 2).flatten(0, 1)  # (B*heads, Q, points, 2)
            samples.append(F.grid_sample(maps.to(grid.dtype), grid, align_corners=False))
        stacked = torch.stack(samples, dim=-2).flatten(-2)  # (B*heads, d, Q, levels * points)
        weighted = stacked * weights.transpose(1, 2).flatten(0, 1)[:, None]
        return weighted.sum(-1).view(batch, heads * channels, -1).transpose(1, 2).to(value.dtype)


class ReferenceUneptSelfAttention(UneptSelfAttention):
    """Packed projection and softmax over one axis, as `nn.MultiheadAttention` computes them."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        def project(linear: nn.Linear, tokens: torch.Tensor) -> torch.Tensor:
            # A product of functions: the paper's counter knows modules only.
            batched = linear.weight.t().expand(len(tokens), -1, -1)
            return torch.bmm(tokens, batched) + linear.bias

        batch, length, channels = hidden_states.shape
        tokens = hidden_states
        if self.axis == "pointwise":
            tokens = hidden_states.reshape(1, batch * length, channels)
        elif self.axis == "batch":
            tokens = hidden_states.transpose(0, 1)
        query, key, value = (project(each, tokens) for each in (self.q_proj, self.k_proj, self.v_proj))
        if self.axis == "pointwise":
            query, key, value = (each.transpose(0, 1) for each in (query, key, value))  # sequences of length 1
        query, key, value = (each.unflatten(2, (-1, self.head_dim)).transpose(1, 2) for each in (query, key, value))
        weights = (query @ key.transpose(-2, -1) * self.scaling).softmax(-1)
        attended = (weights @ value).transpose(1, 2).flatten(2)
        if self.axis == "pointwise":
            attended = attended.transpose(0, 1)
        output = project(self.o_proj, attended)
        return output.transpose(0, 1) if self.axis == "batch" else output.reshape(batch, length, channels)


class ReferenceUneptDeitAttention(UneptDeitAttention):
    """Attention with all N x N weights in memory (one matrix product, softmax, one matrix product)."""

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        query, key, value = (
            projection(hidden_states).unflatten(2, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        weights = (query @ key.transpose(-2, -1) * self.scaling).softmax(dim=-1)
        return self.o_proj((weights @ value).transpose(1, 2).flatten(2)), weights


REFERENCE_CLASSES = {
    UneptSampling: ReferenceUneptSampling,
    UneptSelfAttention: ReferenceUneptSelfAttention,
    UneptDeitAttention: ReferenceUneptDeitAttention,
}


def published_multiply_adds(counts: OperationCounts) -> int:
    """Count as the paper's Table 7 does: mmcv's counter of modules, at 480 x 480.

    Multiply-adds of convolutions and linear layers and two operations per element of a BatchNorm; no attention
    product, no sampling, no projection of the decoder's self-attention.
    """
    return counts.layer_multiply_adds + 2 * counts.norm_outputs


__all__ = ["REFERENCE_CLASSES", "published_multiply_adds"]
