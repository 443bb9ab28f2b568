"""The reference implementation of SETR: the formulas as the released code writes them.

Same weights and outputs as `modeling_setr`, without its savings, so at a higher cost: softmax attention with all
weights in memory, the output of every layer kept, logits resized to the image. Tests and benchmark compare the two,
and the FLOPs of the paper count this one.
"""

from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F

from hf_denseseg.models.flops import OperationCounts
from hf_denseseg.models.setr.modeling_setr import (
    SetrAttention,
    SetrEncoder,
    SetrForSemanticSegmentation,
    SetrSegmenterOutput,
    fit_to_patches,
    tokens_to_map,
)


class ReferenceSetrAttention(SetrAttention):
    """Attention with all N x N weights in memory (Eq. 2: matrix product, softmax, matrix product)."""

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        batch, length, channels = hidden_states.shape
        weight = torch.cat([each.weight for each in (self.q_proj, self.k_proj, self.v_proj)])
        bias = torch.cat([each.bias for each in (self.q_proj, self.k_proj, self.v_proj)])
        packed = F.linear(hidden_states, weight, bias).reshape(batch, length, 3, -1, self.head_dim)
        query, key, value = packed.permute(2, 0, 3, 1, 4)  # (B, N, 3, heads, d) -> three times (B, heads, N, d)
        weights = (query @ key.transpose(-2, -1) * self.scaling).softmax(dim=-1)
        return self.o_proj((weights @ value).transpose(1, 2).reshape(batch, length, channels)), weights


class ReferenceSetrEncoder(SetrEncoder):
    """Keeps the output of every layer."""

    def forward(
        self, pixel_values: torch.Tensor, stages: Collection[int], **kwargs: Any
    ) -> tuple[dict[int, torch.Tensor], torch.Tensor]:
        tokens, grid = self.embeddings(fit_to_patches(pixel_values, self.patch_size))
        kept = [tokens]
        for layer in self.layers:
            kept.append(layer(kept[-1]))
        return {stage: tokens_to_map(each, grid) for stage, each in enumerate(kept)}, kept[-1]


class ReferenceSetrForSemanticSegmentation(SetrForSemanticSegmentation):
    """Returns logits at the size of the image."""

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None, **kwargs: Any) -> Any:
        outputs: SetrSegmenterOutput = super().forward(pixel_values, labels=labels, **kwargs)
        size = pixel_values.shape[-2:]
        assert outputs.logits is not None
        outputs["logits"] = F.interpolate(outputs.logits, size=size, mode="bilinear", align_corners=False)
        return outputs


REFERENCE_CLASSES = {
    SetrAttention: ReferenceSetrAttention,
    SetrEncoder: ReferenceSetrEncoder,
    SetrForSemanticSegmentation: ReferenceSetrForSemanticSegmentation,
}


def published_multiply_adds(counts: OperationCounts) -> int:
    """Count as the FLOPs column of the paper does: multiply-adds, attention products included, auxiliary heads not."""
    return counts.layer_multiply_adds + counts.product_multiply_adds


__all__ = ["REFERENCE_CLASSES", "published_multiply_adds"]
