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

"""HFGD: high-level features teach the class tokens, and the upsampler has to match them.

"High-level Feature Guided Decoding for Semantic Segmentation" (Figure 2). The backbone and the context-augmented
encoder (CAE, Sec. 3.2) are the teacher: their coarse map trains the class tokens. The upsampler (U-SFPN, Sec. 3.3,
in `pyramid_hfgd`) is the student: the guidance module (HFGM, Sec. 3.1) classifies its pixels with the same tokens and
stops every gradient that would reach teacher or tokens. Read this module first; the README orders the other ones.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BackboneOutput, SemanticSegmenterOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.generic import can_return_tuple

from hf_denseseg.models.hfgd.backbone_hfgd import build_backbone, check_levels, feature_maps
from hf_denseseg.models.hfgd.configuration_hfgd import HfgdConfig
from hf_denseseg.models.hfgd.layers_hfgd import HfgdConvNormAct, at_width
from hf_denseseg.models.hfgd.pyramid_hfgd import HfgdSemanticFpn
from hf_denseseg.models.hfgd.regularization_hfgd import HfgdClassAwareRegularization
from hf_denseseg.models.hfgd.upsamplers_hfgd import ENCODERS, UPSAMPLERS, HfgdOffsets, HfgdShiftedConvolution
from hf_denseseg.models.hfgd.wrapped_hfgd import WrappedParts, check_guidable, wrapped_parts
from hf_denseseg.models.inputs import check_images, ignored_id, segmentation_labels
from hf_denseseg.models.losses import segmentation_loss
from hf_denseseg.models.one_logit import name_two_classes

# CODEPATH: a wrapped model in Sec. 5.5 (`HfgdForSemanticSegmentation.guide`); every published name has its own parts.
# CODEPATH: guidance in every published name and in rows with HFGM or "+ guidance"; not in the others of Tables 1 to 8.
# CODEPATH: gradients stop in all of these but for the row of Sec. 5.2 (hfgd_ablation_sfpn_no_stops_*).
# trf-ignore: TRF041 config.wrapped_config, config.guidance, config.stop_gradient

REGION_LOSS_WEIGHT = 0.4  # of OCR's regions (Yuan et al., 2020, Sec. 4.1)
SMALLEST_SIDE = 4  # pixels per side of one pixel of the finest map


@dataclass
class HfgdModelOutput(ModelOutput):
    """Output of teacher and student; C is `decoder_width` (twice that with PPM).

    Args:
        last_hidden_state: `(B, C, H/4, W/4)` the student's map U (stride 2 with `output_stride=2`).
        high_level_features: `(B, C, H/32, W/32)` the teacher's map.
        regularized_features: `(B, cae_channels, H/32, W/32)` input of class-aware regularization, if there is any.
        region_logits: `(B, num_labels, H/32, W/32)` of the object regions, with OCR.
        feature_maps: the backbone's four maps C2 to C5, on request: pipelines would split a tuple by position.
        hidden_states: the backbone's, on request.
        attentions: the backbone's, on request, if it has any.
    """

    last_hidden_state: torch.Tensor | None = None
    high_level_features: torch.Tensor | None = None
    regularized_features: torch.Tensor | None = None
    region_logits: torch.Tensor | None = None
    feature_maps: tuple[torch.Tensor, ...] | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class HfgdSegmenterOutput(SemanticSegmenterOutput):
    """Segmentation output.

    Args:
        high_level_logits: `(B, num_labels, H/32, W/32)` of the teacher; with labels or on request.
        loss_dict: every loss before its weight: `guided`, `high_level`, `car_intra`, `car_c2c`, `car_c2p`; `regions`
            with OCR, `auxiliary` with an auxiliary FCN.
    """

    high_level_logits: torch.Tensor | None = None
    loss_dict: dict[str, torch.Tensor] | None = None


# Same as eager_attention_forward in modeling_dsct
def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention written out: `(B, heads, N, d)` -> `(B, N, heads, d)` and the weights `(B, heads, N, N)`."""
    weights = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class HfgdAttend(nn.Module):
    """Attention itself, without weights, by the implementation that the configuration names.

    Args:
        config: names it.
        scaling: factor of the products.
    """

    def __init__(self, config: HfgdConfig, scaling: float) -> None:
        super().__init__()
        self.config, self.scaling = config, scaling
        self.is_causal = False

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Three times `(B, N, heads, d)` -> `(B, N, heads, d)` of the values."""
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        query, key, value = (each.transpose(1, 2) for each in (query, key, value))
        return attend(self, query, key, value, None, scaling=self.scaling, dropout=0.0)[0]


# --- context-augmented encoder (Sec. 3.2)


class HfgdQueryKey(nn.Linear):
    """Queries and keys in one layer; both start from the same random kernel (authors' code)."""


class HfgdSelfAttention(GradientCheckpointingLayer):
    """Full self-attention over all positions: one head, no scale, no output projection (CAR's head).

    `(B, C, h, w)` -> `(B, C, h, w)`.
    """

    def __init__(self, config: HfgdConfig) -> None:
        super().__init__()
        self.qk_proj = HfgdQueryKey(config.cae_channels, 2 * config.cae_qk_channels)
        self.v_proj = nn.Linear(config.cae_channels, config.cae_channels)
        self.attend = HfgdAttend(config, scaling=1.0)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        tokens = features.flatten(2).transpose(1, 2)  # (B, C, h, w) -> (B, N, C)
        query, key = self.qk_proj(tokens)[:, :, None].chunk(2, dim=-1)  # one head each
        attended = self.attend(query, key, self.v_proj(tokens)[:, :, None])[:, :, 0]  # (B, N, C)
        return attended.transpose(1, 2).unflatten(2, features.shape[-2:])


class HfgdContextEncoder(nn.Module):
    """CAE (Figure 2, top): wide 1x1, reduced to the width of the self-attention, then the map that is regularized.

    As `"sa_car"` it is CAR's own head, which starts with one 3x3 convolution instead. No norm or ReLU follows
    `linear`: class-aware regularization acts on its output.
    """

    def __init__(self, config: HfgdConfig, in_channels: int) -> None:
        super().__init__()
        width = config.cae_channels
        self.channels = config.decoder_width
        wide, cae = config.cae_wide_channels, config.extra_encoding == "cae"
        self.wide = HfgdConvNormAct(in_channels, wide) if cae else nn.Identity()
        self.reduce = HfgdConvNormAct(wide, width) if cae else HfgdConvNormAct(in_channels, width, kernel_size=3)
        self.self_attention = HfgdSelfAttention(config)
        self.linear = nn.Conv2d(width, width, kernel_size=1)
        self.project = HfgdConvNormAct(width, config.decoder_width)

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the high-level map and the map that is regularized, both of the size of C5."""
        features = self.reduce(self.wide(features))  # (B, C5, h, w) -> (B, cae_wide_channels, ...) -> (B, width, h, w)
        regularized = self.linear(features + self.self_attention(features))
        return self.project(regularized), regularized


# --- guidance (Sec. 3.1)


class HfgdAxisAttention(nn.Module):
    """Attention of each line within itself: `(B, lines, length, C)` -> the same; heads are blocks of channels."""

    def __init__(self, config: HfgdConfig, channels: int) -> None:
        super().__init__()
        self.head_dim = channels // config.axial_heads
        self.q_proj = nn.Linear(channels, channels)
        self.k_proj = nn.Linear(channels, channels)
        self.v_proj = nn.Linear(channels, channels)
        self.attend = HfgdAttend(config, self.head_dim**-0.5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        lines = tokens.flatten(0, 1)
        query, key, value = (
            projection(lines).unflatten(2, (-1, self.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )  # (B*lines, length, C) -> three times (B*lines, length, heads, d)
        return self.attend(query, key, value).reshape(tokens.shape)


class HfgdAxialAttention(GradientCheckpointingLayer):
    """Axial attention with projections for each axis: every column, then every row, then one 1x1 convolution.

    `(B, C, h, w)` -> `(B, C, h, w)`, in channels-last memory: each axis costs one copy that brings its lines together.
    """

    def __init__(self, config: HfgdConfig, channels: int) -> None:
        super().__init__()
        self.height = HfgdAxisAttention(config, channels)
        self.width = HfgdAxisAttention(config, channels)
        self.o_proj = nn.Linear(channels, channels)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        # (B, C, h, w) -> columns (B, w, h, C) -> rows (B, h, w, C). The columns get no name: their memory is freed.
        rows = self.width(self.height(features.permute(0, 3, 2, 1).contiguous()).transpose(1, 2).contiguous())
        return self.o_proj(rows).permute(0, 3, 1, 2)


class HfgdSharedAxialAttention(GradientCheckpointingLayer):
    """Axial attention of the authors' public layer: queries and keys serve both axes, one value passes through both.

    `(B, C, h, w)` -> `(B, C, h, w)`. Heads are blocks of the input channels; in the output they are interleaved:
    channel `c * heads + head`. The authors clip attention to 1 - 1e-7, which matters only on maps one pixel wide.
    """

    def __init__(self, config: HfgdConfig, channels: int, qk_channels: int | None = None) -> None:
        super().__init__()
        self.heads, qk_channels = config.axial_heads, qk_channels or channels
        self.q_proj = nn.Linear(channels, qk_channels)
        self.k_proj = nn.Linear(channels, qk_channels)
        self.v_proj = nn.Linear(channels, channels)
        self.attend = HfgdAttend(config, (qk_channels // self.heads) ** -0.5)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        tokens = features.permute(0, 2, 3, 1)  # (B, h, w, C)
        query, key, value = (
            projection(tokens).unflatten(3, (self.heads, -1)) for projection in (self.q_proj, self.k_proj, self.v_proj)
        )  # three times (B, h, w, heads, d)
        columns = (each.transpose(1, 2).flatten(0, 1) for each in (query, key, value))  # (B*w, h, heads, d)
        value = self.attend(*columns).unflatten(0, (features.shape[0], -1)).transpose(1, 2)
        rows = self.attend(*(each.flatten(0, 1) for each in (query, key, value)))  # (B*h, w, heads, d)
        rows = rows.unflatten(0, (features.shape[0], -1))
        return rows.permute(0, 4, 3, 1, 2).flatten(1, 2)  # (B, h, w, heads, d) -> (B, d * heads, h, w)


class HfgdClassTokens(nn.Conv2d):
    """Class tokens W and b: `(B, C, h, w)` -> logits `(B, num_labels, h, w)`.

    With `stop` they are detached: the loss of these logits does not train them (Sec. 3.1).
    """

    def forward(self, features: torch.Tensor, stop: bool = False) -> torch.Tensor:
        if not stop:
            return super().forward(features)
        bias = None if self.bias is None else self.bias.detach()
        return F.conv2d(features, self.weight.detach(), bias)


# --- models


class HfgdPreTrainedModel(PreTrainedModel):
    """Initialization and capabilities common to all HFGD classes."""

    config: HfgdConfig
    base_model_prefix = "hfgd"
    main_input_name = "pixel_values"
    input_modalities = ("image",)  # type: ignore[assignment]
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # the loss is a mean; Trainer must not rescale it by the number of items
    _no_split_modules = ["HfgdContextEncoder", "HfgdSemanticFpn", "HfgdAxialAttention", "HfgdSharedAxialAttention"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _encoder_rate_prefix = "hfgd.backbone"
    _no_weight_decay = ("relative_position_bias_table", "position_embeddings")

    def get_input_embeddings(self) -> nn.Module:
        """Return the backbone's first convolution."""
        return next(module for module in self.modules() if isinstance(module, nn.Conv2d))

    def set_attn_implementation(self, attn_implementation: str | dict, *args: Any, **kwargs: Any) -> None:
        """Choose how attention is computed; a backbone without attention is skipped (a ResNet would refuse)."""
        if isinstance(attn_implementation, str):
            inner = [each.config for each in self.modules() if getattr(each, "has_attentions", False)]
            names = [name for name in self.config.sub_configs if getattr(self.config, name) in inner]
            attn_implementation = dict.fromkeys(["", *names], attn_implementation)
        super().set_attn_implementation(attn_implementation, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialize as Keras does (authors' code): glorot-uniform weights, biases 0."""
        if isinstance(module, nn.Conv2d | nn.Linear | HfgdShiftedConvolution):
            weight = module.weight
            if isinstance(module, HfgdQueryKey):
                half = torch.empty_like(weight[: len(weight) // 2])
                init.copy_(weight, torch.cat((nn.init.xavier_uniform_(half),) * 2))
            elif isinstance(module, HfgdOffsets):
                init.zeros_(weight)
            else:
                init.xavier_uniform_(weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, HfgdClassAwareRegularization) and module.center_decay is not None:
            init.zeros_(module.class_centers)
        else:
            super()._init_weights(module)


class HfgdModel(HfgdPreTrainedModel):
    """Teacher and student without the class tokens: backbone, extra encoding, upsampler, axial attention.

    Raises:
        InputError: a backbone without the four maps, or with maps of other strides.
    """

    def __init__(self, config: HfgdConfig) -> None:
        super().__init__(config)
        parts = wrapped_parts(config) if config.wrapped_config is not None else self._own_parts(config)
        self.backbone, self.context_encoder, self.upsampler = parts
        width: int = parts.encoder.channels
        self.reduce = nn.Identity() if self.upsampler is None else at_width(parts.upsampler.channels, width)
        self.axial_attention = None
        # CODEPATH: every published name, and rows with HFGM or axial attention; not guidance alone and the baselines.
        if config.axial_attention:
            # CODEPATH: one set per axis in every published name; shared: the authors' public layer (see the README).
            kind = HfgdAxialAttention if config.axial_projections == "per_axis" else HfgdSharedAxialAttention
            self.axial_attention = kind(config, width)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = config.batch_norm_momentum
        self.post_init()

    @staticmethod
    def _own_parts(config: HfgdConfig) -> WrappedParts:
        backbone = build_backbone(config)
        channels = check_levels(backbone)
        encoders: dict[str, Any] = {"cae": HfgdContextEncoder, "sa_car": HfgdContextEncoder, **ENCODERS}
        encoder = encoders[config.extra_encoding](config, channels[-1])
        if config.upsampler == "none":  # CODEPATH: FCN and dilated networks of Tables 1 and 2 (hfgd_ablation_fcn_*)
            return WrappedParts(backbone, encoder, None)
        upsamplers = {"u_sfpn": HfgdSemanticFpn, "sfpn": HfgdSemanticFpn, **UPSAMPLERS}
        return WrappedParts(backbone, encoder, upsamplers[config.upsampler](config, channels[:-1], encoder.channels))

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        output_feature_maps: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> HfgdModelOutput:
        """Encode `(B, 3, H, W)` images of any size from 4 pixels up."""
        # The backbone, which may be timm's, records both itself.
        states, attentions = kwargs.get("output_hidden_states"), kwargs.get("output_attentions")
        if states is None:
            states = self.config.output_hidden_states
        if attentions is None:
            attentions = self.config.output_attentions
        image_size = (pixel_values.shape[-2], pixel_values.shape[-1])
        check_images(pixel_values, SMALLEST_SIDE)
        outputs = feature_maps(
            self.backbone,
            pixel_values,
            output_hidden_states=states is not False,  # 0 and [0, 2] name states
            output_attentions=attentions,
        )
        *low, top = outputs.feature_maps  # type: ignore[misc]  # C2, C3, C4 and C5
        context, extra = self.context_encoder(top)
        # CODEPATH: rows "OCR" of Table 1 (hfgd_ablation_*_ocr_*); no published name.
        regions, regularized = (extra, None) if self.config.extra_encoding == "ocr" else (None, extra)
        guided = context if self.upsampler is None else self._student(low, context, top, image_size)
        return HfgdModelOutput(
            last_hidden_state=guided,
            high_level_features=context,
            regularized_features=regularized,
            region_logits=regions,
            feature_maps=outputs.feature_maps if output_feature_maps else None,
            hidden_states=_selected(outputs.hidden_states, states),
            attentions=outputs.attentions,
        )

    def _student(
        self, low: list[torch.Tensor], context: torch.Tensor, top: torch.Tensor, image_size: tuple[int, int]
    ) -> torch.Tensor:
        """Everything after the gradient stops on C2 to C4 and on the high-level map (Figure 2)."""
        if self.config.wrapped_config is not None:
            low = [*low, top]  # heads of transformers may read the backbone's coarsest map too
        if self.config.guidance and self.config.stop_gradient in (True, "features"):
            low, context = [each.detach() for each in low], context.detach()
        # Axial attention works on channels-last memory; Transformer backbones return channels-first maps.
        low, context = [_channels_last(each) for each in low], _channels_last(context)
        features = self.reduce(self.upsampler(low, context, image_size))
        return features if self.axial_attention is None else features + self.axial_attention(features)


def _selected(states: Any, chosen: bool | int | list[int] | None) -> Any:
    """Keep the hidden states that `output_hidden_states` names, None in place of the others, as in transformers."""
    if states is None or chosen is None or isinstance(chosen, bool):
        return states
    kept = {index % len(states) for index in ([chosen] if isinstance(chosen, int) else chosen)}
    return tuple(each if index in kept else None for index, each in enumerate(states))


def _channels_last(features: torch.Tensor) -> torch.Tensor:
    return features.contiguous(memory_format=torch.channels_last)


class HfgdBackbone(BackboneMixin, HfgdModel):
    """HFGD as a backbone: maps `stage1` to `stage4`, `context` (high-level map) and `guided` (the student's)."""

    def __init__(self, config: HfgdConfig) -> None:
        super().__init__(config)
        width = cast(int, self.context_encoder.channels)
        self.num_features = [*check_levels(self.backbone), width, width]

    @can_return_tuple
    def forward(self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> BackboneOutput:
        """Return the maps named in `config.out_features`."""
        outputs = HfgdModel.forward(self, pixel_values, output_feature_maps=True, return_dict=True, **kwargs)
        found = (*outputs.feature_maps, outputs.high_level_features, outputs.last_hidden_state)
        maps = dict(zip(self.stage_names, found, strict=True))
        return BackboneOutput(
            feature_maps=tuple(maps[name] for name in self.out_features),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class HfgdAuxiliaryFcn(nn.Module):
    """FCN beside the upsampler (Sec. 5.1): C5 -> 1x1 convolution -> logits `(B, num_labels, H/32, W/32)`.

    It shows what the upsampler does to the features of the backbone. Stopped, it only reads them.
    """

    def __init__(self, config: HfgdConfig, in_channels: int) -> None:
        super().__init__()
        self.stopped = config.auxiliary_fcn == "stopped"
        self.projection = HfgdConvNormAct(in_channels, config.decoder_width)
        self.projection.norm.momentum = config.batch_norm_momentum
        self.classifier = nn.Conv2d(config.decoder_width, int(config.num_labels or 0), kernel_size=1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.projection(features.detach() if self.stopped else features))


class HfgdForSemanticSegmentation(HfgdPreTrainedModel):
    """HFGD (Figure 2), its ablations, and other upsamplers under its guidance (Table 8)."""

    def __init__(self, config: HfgdConfig) -> None:
        name_two_classes(config)
        super().__init__(config)
        self.hfgd = HfgdModel(config)
        width = cast(int, self.hfgd.context_encoder.channels)
        self.class_tokens = HfgdClassTokens(width, int(config.num_labels or 0), kernel_size=1)
        self.auxiliary_fcn = None
        if config.auxiliary_fcn != "none":  # CODEPATH: Sec. 5.1 (hfgd_ablation_sfpn_auxiliary_fcn*), no published name
            self.auxiliary_fcn = HfgdAuxiliaryFcn(config, check_levels(cast(Any, self.hfgd.backbone))[-1])
        # CODEPATH: every published name, and rows with CAE or CAR; not plain "SA", OCR, ASPP, PPM and the baselines.
        self.regularization = HfgdClassAwareRegularization(config, config.cae_channels) if config.regularized else None
        self.loss_function = functools.partial(segmentation_loss, normalization=config.loss_normalization)
        self.post_init()

    @classmethod
    def guide(cls, model: PreTrainedModel, **fields: Any) -> "HfgdForSemanticSegmentation":
        """Wrap a segmentation model of transformers, with its weights, so that it trains under guidance (Sec. 5.5).

        Its coarsest map becomes the teacher, its head the student, its classifier the class tokens.

        Args:
            model: `UperNetForSemanticSegmentation` or `SegformerForSemanticSegmentation`.
            fields: configuration fields such as `axial_attention=False`.

        Raises:
            InputError: a model of another kind.
            StrictDataclassError: `fields` that do not fit, for example other labels than the model's.
        """
        check_guidable(model.config)
        theirs = {"id2label": model.config.id2label, "label2id": model.config.label2id, "align_corners": False}
        wrapper = cls(HfgdConfig(**{**theirs, **fields, "wrapped_config": model.config}))
        parts: Any = (wrapper.hfgd.backbone, wrapper.hfgd.context_encoder, wrapper.hfgd.upsampler)
        for own, given in zip(parts, wrapped_parts(wrapper.config, model), strict=True):
            own.load_state_dict(given.state_dict())
        classifier = cast(nn.Conv2d, model.get_submodule("decode_head.classifier"))
        wrapper.class_tokens.load_state_dict(classifier.state_dict())
        return wrapper

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        output_auxiliary_logits: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> HfgdSegmenterOutput:
        """Segment images.

        Args:
            pixel_values: `(B, 3, H, W)`, normalized; any size from 4 pixels up.
            labels: `(B, H, W)` train ids of any integer dtype; `ignored_id` (255) and -100 are ignored.
            output_auxiliary_logits: whether to return the high-level logits too.

        Returns:
            `logits` `(B, num_labels, H/4, W/4)` (other strides: see `output_stride`, `upsampler` and `auxiliary_fcn`);
            with labels also `loss`, `loss_dict` and, with `guidance`, `high_level_logits`.
        """
        config = self.config
        labels = segmentation_labels(labels, pixel_values, config)
        read_by_fcn = self.auxiliary_fcn is not None
        outputs = self.hfgd(pixel_values, output_feature_maps=read_by_fcn, return_dict=True, **kwargs)
        stop = config.guidance and config.stop_gradient in (True, "tokens")
        logits = self.class_tokens(outputs.last_hidden_state, stop=stop)
        high_level = None
        if config.guidance and (labels is not None or output_auxiliary_logits):
            high_level = self.class_tokens(outputs.high_level_features)
        auxiliary = None if self.auxiliary_fcn is None else self.auxiliary_fcn(outputs.feature_maps[-1])
        losses = None
        if labels is not None:
            judged = {"guided": logits, "high_level": high_level, "regions": outputs.region_logits}
            losses = self._losses(judged | {"auxiliary": auxiliary}, outputs.regularized_features, labels)
        return HfgdSegmenterOutput(
            loss=None if losses is None else self._total(losses),
            logits=logits if auxiliary is None else auxiliary,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            high_level_logits=high_level,
            loss_dict=losses,
        )

    def _losses(
        self, logits: dict[str, torch.Tensor | None], regularized: torch.Tensor | None, labels: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Every loss by its name, without weights: a cross-entropy for each of the `logits`, and those of CAR."""
        losses = {}
        for name, each in logits.items():
            if each is not None:
                losses[name] = self.loss_function(
                    logits=each,
                    labels=labels,
                    ignore_index=ignored_id(self.config),
                    align_corners=self.config.align_corners,
                )
        if self.regularization is not None:
            losses |= self.regularization(regularized, labels)
        return losses

    def _total(self, losses: dict[str, torch.Tensor]) -> torch.Tensor:
        """Weighted sum. The paper gives no weights; those of CAR are 1 in its code."""
        config = self.config
        weights = {
            "guided": 1.0,
            "high_level": config.high_level_loss_weight,
            "regions": REGION_LOSS_WEIGHT,
            "auxiliary": 1.0,
            "car_intra": config.car_intra_weight,
            "car_c2c": config.car_inter_weight,
            "car_c2p": config.car_inter_weight,
        }
        return sum(weights[name] * loss for name, loss in losses.items())  # type: ignore[return-value]


__all__ = [
    "HfgdBackbone",
    "HfgdForSemanticSegmentation",
    "HfgdModel",
    "HfgdPreTrainedModel",
]
