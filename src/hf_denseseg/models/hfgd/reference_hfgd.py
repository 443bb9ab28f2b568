"""The reference implementation of HFGD: the modules as the paper draws them.

Same weights and outputs as `modeling_hfgd`, without its exact rewrites, so at a higher cost: attention with its
softmax written out, on contiguous (channels first) maps; every branch of the pyramid resized on its own, the merging
convolution after the last resize; norms apart from their convolutions. Tests and benchmark compare the two, and the
paper's GFLOPs count this one.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from hf_denseseg.models.flops import OperationCounts
from hf_denseseg.models.hfgd.layers_hfgd import HfgdConvNormAct, level_size, resize
from hf_denseseg.models.hfgd.modeling_hfgd import HfgdAttend, HfgdAxialAttention, HfgdModel
from hf_denseseg.models.hfgd.pyramid_hfgd import HfgdSemanticBranches


class ReferenceHfgdConvNormAct(HfgdConvNormAct):
    """Convolution, norm, ReLU, one after the other."""

    def linear(self, features: torch.Tensor) -> torch.Tensor:
        return self.norm(self.convolution(features))


class ReferenceHfgdAttend(HfgdAttend):
    """Attention with all weights in memory."""

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        query, key, value = (each.transpose(1, 2) for each in (query, key, value))
        weights = (query @ key.transpose(-2, -1) * self.scaling).softmax(dim=-1)
        return (weights @ value).transpose(1, 2)


class ReferenceHfgdAxialAttention(HfgdAxialAttention):
    """1x1 convolutions of maps; columns and rows are gathered for each attention."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        for axis, order in ((self.height, (0, 3, 2, 1)), (self.width, (0, 2, 3, 1))):
            query, key, value = (
                F.conv2d(features, each.weight[:, :, None, None], each.bias)
                .permute(order)
                .flatten(0, 1)
                .unflatten(2, (-1, axis.head_dim))
                for each in (axis.q_proj, axis.k_proj, axis.v_proj)
            )  # (B, C, h, w) -> (B*w, h, heads, d), then (B*h, w, heads, d)
            lines = axis.attend(query, key, value).flatten(2).unflatten(0, (len(features), -1))
            features = lines.permute(order if axis is self.height else (0, 3, 1, 2)).contiguous()
        return F.conv2d(features, self.o_proj.weight[:, :, None, None], self.o_proj.bias)


class ReferenceHfgdSemanticBranches(HfgdSemanticBranches):
    """Every branch is resized on its own and merged at the size of the output (Figure 5)."""

    def forward(self, maps: list[torch.Tensor], image_size: tuple[int, int]) -> torch.Tensor:
        sizes = [(each.shape[-2], each.shape[-1]) for each in maps]
        sizes.insert(0, level_size(image_size, 2))
        finest = 0 if self.output_stride == 2 else 1  # of `sizes`
        total = None
        for level, (convolutions, features) in enumerate(zip(self.branches, maps, strict=True), start=1):
            rest = cast(nn.ModuleList, convolutions)
            for step, convolution in enumerate(rest, start=1):
                # The finest branch is resized once at most, after its last convolution.
                target = level - step if level > 1 else finest if step == len(rest) else 1
                features = resize(convolution(features), sizes[max(target, finest)], self.align_corners)
            total = features if total is None else total + features
        return self.merge(total)


class ReferenceHfgdModel(HfgdModel):
    """The student on contiguous (channels first) maps."""

    def _student(
        self, low: list[torch.Tensor], context: torch.Tensor, top: torch.Tensor, image_size: tuple[int, int]
    ) -> torch.Tensor:
        low = [each.contiguous() for each in (low if self.config.wrapped_config is None else [*low, top])]
        context = context.contiguous()
        if self.config.guidance and self.config.stop_gradient in (True, "features"):
            low, context = [each.detach() for each in low], context.detach()
        features = self.reduce(self.upsampler(low, context, image_size))
        return features if self.axial_attention is None else features + self.axial_attention(features)


REFERENCE_CLASSES = {
    HfgdConvNormAct: ReferenceHfgdConvNormAct,
    HfgdAttend: ReferenceHfgdAttend,
    HfgdAxialAttention: ReferenceHfgdAxialAttention,
    HfgdSemanticBranches: ReferenceHfgdSemanticBranches,
    HfgdModel: ReferenceHfgdModel,
}


def published_multiply_adds(counts: OperationCounts) -> int:
    """Count as the paper's Table 9 does: multiply-adds of convolutions and of the products of attention."""
    return counts.layer_multiply_adds + counts.product_multiply_adds


__all__ = ["REFERENCE_CLASSES", "published_multiply_adds"]
