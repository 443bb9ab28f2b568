# Copyright 2026 The hf_denseseg authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Configuration of UN-EPT."""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers.backbone_utils import BackboneConfigMixin
from transformers.configuration_utils import PreTrainedConfig

from hf_denseseg.models.configuration import CheckedFields
from hf_denseseg.models.unept.variants_unept import OUTPUT_STRIDE, VARIANTS, weights_of


@strict
class UneptConfig(CheckedFields, BackboneConfigMixin, PreTrainedConfig):
    """Configuration of UN-EPT; the defaults are the published network on ResNet-50.

    Args:
        num_channels: channels of the input image.
        image_size: training crop in pixels, one number or (height, width); its grids are those that the query table
            and DeiT's positions are stored at. Images of other sizes get interpolated tables.
        backbone_type: `"resnet"` (timm's `resnet50c` at stride 8) or `"deit"` (distilled DeiT).
        depths: bottlenecks in each stage of the ResNet.
        base_channels: width of the ResNet's first stage; a bottleneck returns four times its width.
        stem_channels: channels after the ResNet's stem.
        patch_size: side of a DeiT patch in pixels.
        backbone_hidden_size: channels of DeiT's tokens.
        backbone_num_attention_heads: attention heads of each DeiT layer.
        backbone_mlp_ratio: hidden width of DeiT's MLPs as a multiple of `backbone_hidden_size`.
        backbone_layer_norm_eps: of DeiT's LayerNorms.
        out_layers: DeiT layers whose output makes the pyramid, counted from 1; the last is DeiT's depth.
        num_levels: maps of the pyramid, the backbone's last ones (L of Table 6).
        use_spatial_branch: whether there is a spatial branch with its boundary and direction head (Table 5); without
            it the learned table alone is the decoder's queries, and only the coarse loss is left.
        hidden_size: channels of the pyramid, the queries and the spatial branch (d_model).
        num_hidden_layers: layers of the context encoder, and as many of its decoder.
        num_attention_heads: heads of both kinds of attention there.
        num_points: sampled points of each query, head and level (N).
        intermediate_size: hidden width of the feed-forward networks of encoder and decoder.
        dropout: in encoder and decoder, in training.
        layer_norm_eps: of their LayerNorms.
        spatial_channels: channels of the first two convolutions of the spatial branch.
        head_channels: channels inside boundary and direction head.
        decoder_self_attention: `"pointwise"` (each query attends to itself: the released code on one image),
            `"batch"` (the same position in all images of a batch: the released code as written; for training only) or
            `"spatial"` (all queries of an image; neither code nor paper).
        use_boundary_refinement: whether `logits` are the refined ones.
        refine_scale: length of a refinement step in pixels.
        boundary_threshold_on: what is compared with 0.5 to find boundary pixels: the raw `"logit"` (released code) or
            the `"probability"`.
        loss_weights: of coarse, refined, boundary and direction loss; `"code"`, `"paper"` or four numbers.
        loss_normalization: `"all"` divides the loss by all pixels, ignored ones included (official code), `"valid"`
            by the valid ones.
        direction_supervision: directions are supervised at `"predicted"` (released code) or `"true"` boundary pixels.
        min_class_pixels: classes with fewer pixels in a crop get no boundary and no direction.
        ignore_small_classes: leave their pixels out of both losses; else they count as boundary (released code).
        official_targets: count ignored pixels as boundary too, as the released code does.
        semantic_loss_ignore_index: train id that the losses leave out; 255 means 65535 beyond 254 classes.
    """

    model_type = "unept"
    keys_to_ignore_at_inference = ["loss_dict"]

    num_channels: int = 3
    image_size: int | list[int] | tuple[int, ...] = 480
    backbone_type: Literal["resnet", "deit"] = "resnet"
    depths: list[int] | tuple[int, ...] = (3, 4, 6, 3)
    base_channels: int = 64
    stem_channels: int = 64
    patch_size: int = 16
    backbone_hidden_size: int = 768
    backbone_num_attention_heads: int = 12
    backbone_mlp_ratio: float | int = 4
    backbone_layer_norm_eps: float = 1e-6
    out_layers: list[int] | tuple[int, ...] = (4, 8, 12)
    num_levels: Literal[1, 2, 3] = 3
    use_spatial_branch: bool = True
    hidden_size: int = 256
    num_hidden_layers: int = 2
    num_attention_heads: int = 8
    num_points: int = 16
    intermediate_size: int = 2048
    dropout: float | int = 0.1
    layer_norm_eps: float = 1e-5
    spatial_channels: list[int] | tuple[int, ...] = (64, 128)
    head_channels: int = 256
    decoder_self_attention: Literal["pointwise", "batch", "spatial"] = "pointwise"
    use_boundary_refinement: bool = False
    refine_scale: int = 1
    boundary_threshold_on: Literal["logit", "probability"] = "logit"
    loss_weights: str | list[float | int] | tuple[float | int, ...] = "code"
    loss_normalization: Literal["all", "valid"] = "all"
    direction_supervision: Literal["predicted", "true"] = "predicted"
    min_class_pixels: int = 100
    ignore_small_classes: bool = True
    official_targets: bool = False
    semantic_loss_ignore_index: int = 255
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Name the maps that the backbone class can return."""
        self.check_fields(kwargs)
        pyramid = [f"pyramid{level}" for level in range(1, self.num_levels + 1)]
        self.name_maps([*(["spatial"] if self.use_spatial_branch else []), *pyramid, "context"], kwargs)
        super().__post_init__(**kwargs)

    @property
    def image_sides(self) -> tuple[int, int]:
        """Training crop as (height, width)."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else tuple(self.image_size)  # type: ignore[return-value]

    @property
    def unit(self) -> int:
        """Number of pixels that both sides of an image are padded to a multiple of."""
        return OUTPUT_STRIDE if self.backbone_type == "resnet" else self.patch_size

    def validate_architecture(self) -> None:
        """Check the sizes against each other.

        Raises:
            ValueError: (wrapped by the strict dataclass) sizes that do not fit; the message names the field to change.
        """
        sides = self.image_sides
        if len(sides) != 2 or any(side < self.unit or side % self.unit for side in sides):
            raise ValueError(
                f"`image_size` is {self.image_size}. Give one number or (height, width), multiples of {self.unit}."
            )
        if self.patch_size % OUTPUT_STRIDE:
            raise ValueError(f"`patch_size` is {self.patch_size}; queries are 8 pixels apart: use a multiple of 8.")
        for size, heads in (("hidden_size", "num_attention_heads"),) + (
            (("backbone_hidden_size", "backbone_num_attention_heads"),) if self.backbone_type == "deit" else ()
        ):
            if getattr(self, size) % getattr(self, heads):
                raise ValueError(
                    f"{getattr(self, heads)} heads do not divide `{size}` {getattr(self, size)}. "
                    f"Change `{size}` or `{heads}`."
                )
        if self.hidden_size % 4:
            raise ValueError(f"`hidden_size` is {self.hidden_size}; sine and cosine of x and y need a multiple of 4.")
        for name, length in (("depths", 4), ("spatial_channels", 2), ("out_layers", 3)):
            if len(getattr(self, name)) != length or min(getattr(self, name)) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}; {length} positive numbers are needed.")
        if list(self.out_layers) != sorted(set(self.out_layers)):
            raise ValueError(f"`out_layers` are {self.out_layers}; increasing numbers are needed.")
        if self.use_boundary_refinement and not self.use_spatial_branch:
            raise ValueError("`use_boundary_refinement` needs `use_spatial_branch`: set it to False, or both to True.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"`dropout` is {self.dropout}; a probability in [0, 1) is needed.")
        weights_of(self.loss_weights)


__all__ = ["VARIANTS", "UneptConfig"]
