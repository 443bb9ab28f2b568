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

"""Configuration of HFGD and the sizes of its published variants."""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig
from transformers.backbone_utils import BackboneConfigMixin, consolidate_backbone_kwargs_to_config
from transformers.configuration_utils import PreTrainedConfig

from hf_denseseg.models.configuration import CheckedFields
from hf_denseseg.models.hfgd.checks_hfgd import check_wrapped
from hf_denseseg.models.hfgd.variants_hfgd import LEVELS, VARIANTS

REGULARIZED = ("cae", "sa_car")  # extra encodings that class-aware regularization acts on


@strict
class HfgdConfig(CheckedFields, BackboneConfigMixin, PreTrainedConfig):
    """Configuration of HFGD; the defaults are the published network on ResNet-50, at stride 4.

    Args:
        backbone_config: configuration of a backbone of transformers, or a `TimmBackboneConfig`, that returns four
            maps, the finest at stride 4; None is ResNet-50.
        wrapped_config: configuration of a segmentation model of transformers (UperNet, SegFormer) whose encoder and
            head replace backbone, extra encoding and upsampler; see `HfgdForSemanticSegmentation.guide`.
        extra_encoding: module on the coarsest map: `"cae"` (Sec. 3.2), `"sa_car"` (CAR's self-attention head),
            `"ocr"`, `"aspp"`, `"ppm"` or `"identity"` (one 1x1 convolution).
        upsampler: `"u_sfpn"` (Sec. 3.3), `"sfpn"`, `"fapn"`, `"upernet"`, `"deeplabv3plus"` (Table 8), or `"none"`:
            the coarsest map is classified (FCN and dilated networks of Table 1).
        output_stride: pixels per logit of `"u_sfpn"` and `"sfpn"`.
        guidance: whether class tokens learn from the high-level map only and are shared with the upsampler; else there
            is one branch with its own classifier.
        axial_attention: whether axial attention follows the upsampler.
        stop_gradient: what the guided loss does not train: `"features"` (backbone, encoding), `"tokens"`, true: both.
        auxiliary_fcn: FCN on the coarsest map beside the upsampler, whose prediction is the model's (Sec. 5.1):
            `"joint"`, or `"stopped"`, which sends no gradient to the backbone.
        decoder_width: channels of high-level map, upsampler and class tokens.
        cae_wide_channels: width of CAE's first convolution.
        cae_channels: width of its self-attention, and of the map that is regularized.
        cae_qk_channels: channels of its queries and keys.
        merge_channels: channels after the upsampler's last convolution, then projected to `decoder_width` if unequal.
        axial_heads: heads of the axial attention.
        axial_projections: `"per_axis"`, or `"shared"` by both axes (the authors' public layer).
        align_corners: how maps, labels and logits are resized.
        batch_norm_momentum: of all BatchNorms, the backbone's too; the published 0.0003 needs 30,000 steps.
        normalize_features: keep the norms that Swin and ConvNeXt of transformers add to each map.
        high_level_loss_weight: weight of the cross-entropy of the high-level logits.
        car_intra_weight: weight of the loss between class centers and their pixels.
        car_inter_weight: the same between centers, and between centers and pixels of others; both 0: CAR is off.
        car_c2c_threshold: similarity between centers of two classes that costs nothing, summed over the other classes.
        car_c2p_threshold: the same between a center and pixels of other classes.
        car_batch_center: class centers of the whole batch (of all processes), else of each image.
        car_mask_ignored_in_c2p: leave ignored pixels out of the center-to-pixel loss (they count as other classes).
        car_center_decay: keep moving centers with this decay (off in all published settings).
        loss_normalization: `"all"` divides the cross-entropy by all pixels, ignored ones included (authors' code),
            `"valid"` by the valid ones.
        semantic_loss_ignore_index: train id that the losses leave out; 255 means 65535 beyond 254 classes.
    """

    model_type = "hfgd"
    sub_configs = {"backbone_config": AutoConfig, "wrapped_config": AutoConfig}
    attribute_map = {"hidden_size": "decoder_width", "num_attention_heads": "axial_heads"}
    keys_to_ignore_at_inference = ["loss_dict"]

    backbone_config: dict[str, Any] | PreTrainedConfig | None = None
    wrapped_config: dict[str, Any] | PreTrainedConfig | None = None
    extra_encoding: Literal["cae", "sa_car", "ocr", "aspp", "ppm", "identity"] = "cae"
    upsampler: Literal["u_sfpn", "sfpn", "fapn", "upernet", "deeplabv3plus", "none"] = "u_sfpn"
    output_stride: Literal[2, 4] = 4
    guidance: bool = True
    axial_attention: bool = True
    stop_gradient: bool | Literal["features", "tokens"] = True
    auxiliary_fcn: Literal["none", "joint", "stopped"] = "none"
    decoder_width: int = 256
    cae_wide_channels: int = 2048
    cae_channels: int = 512
    cae_qk_channels: int = 64
    merge_channels: int = 256
    axial_heads: int = 4
    axial_projections: Literal["per_axis", "shared"] = "per_axis"
    align_corners: bool = True
    batch_norm_momentum: float = 0.1
    normalize_features: bool = False
    high_level_loss_weight: float | int = 1.0
    car_intra_weight: float | int = 1.0
    car_inter_weight: float | int = 1.0
    car_c2c_threshold: float | int = 0.5
    car_c2p_threshold: float | int = 0.25
    car_batch_center: bool = True
    car_mask_ignored_in_c2p: bool = False
    car_center_decay: float | None = None
    loss_normalization: Literal["all", "valid"] = "all"
    semantic_loss_ignore_index: int = 255
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Build the inner configurations, and name the maps that the backbone class can return."""
        former = kwargs.pop("guided_config", None)  # the name of `wrapped_config` in older checkpoints
        if self.wrapped_config is None:
            self.wrapped_config = former
        default = None if self.wrapped_config is not None else "resnet"
        for name, kind in (("wrapped_config", None), ("backbone_config", default)):
            inner, kwargs = consolidate_backbone_kwargs_to_config(
                backbone_config=getattr(self, name),
                default_config_type=kind,
                default_config_kwargs={"out_features": list(LEVELS)},
                **kwargs,
            )
            setattr(self, name, inner)
        self.check_fields(kwargs)
        self.name_maps([*LEVELS, "context", "guided"], kwargs)
        super().__post_init__(**kwargs)

    @property
    def num_hidden_layers(self) -> int:
        """Stages of the backbone."""
        return len(LEVELS)

    @property
    def regularized(self) -> bool:
        """Whether there are losses of class-aware regularization."""
        return (
            self.wrapped_config is None
            and self.extra_encoding in REGULARIZED
            and (self.car_intra_weight > 0 or self.car_inter_weight > 0)
        )

    def validate_architecture(self) -> None:
        """Check the fields against each other.

        Raises:
            ValueError: (wrapped by the strict dataclass) fields that do not fit; it names the field to change.
        """
        if self.decoder_width % self.axial_heads:
            raise ValueError(
                f"{self.axial_heads} heads do not divide `decoder_width` {self.decoder_width}. "
                "Change `decoder_width` or `axial_heads`."
            )
        if self.upsampler == "none" and (self.guidance or self.axial_attention):
            raise ValueError("Without an upsampler nothing is guided: set `guidance` and `axial_attention` to False.")
        if self.auxiliary_fcn != "none" and (self.guidance or self.wrapped_config is not None):
            raise ValueError("`auxiliary_fcn` is for unguided networks of this package: set `guidance` to False.")
        if self.output_stride == 2 and self.upsampler not in ("u_sfpn", "sfpn"):
            raise ValueError(f"`output_stride` 2 needs `upsampler` 'u_sfpn' or 'sfpn', not {self.upsampler!r}.")
        if self.car_center_decay is not None and not self.car_batch_center:
            raise ValueError(
                "Moving centers are those of batches: set `car_batch_center`, or `car_center_decay` to None."
            )
        check_wrapped(self)


__all__ = ["LEVELS", "VARIANTS", "HfgdConfig"]
