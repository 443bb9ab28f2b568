"""Segmentation models of transformers under guidance (Sec. 5.5): teacher and student in UperNet and SegFormer.

A model can be guided if its head reads feature maps of its encoder and nothing else. Its auxiliary head is left out,
and the class tokens replace its classifier.
"""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import (
    AutoModelForSemanticSegmentation,
    PreTrainedConfig,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    UperNetForSemanticSegmentation,
)
from transformers.modeling_outputs import BackboneOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.models.segformer.modeling_segformer import SegformerDecodeHead
from transformers.models.upernet.modeling_upernet import UperNetHead

from hf_denseseg.errors import InputError
from hf_denseseg.models.hfgd.configuration_hfgd import HfgdConfig
from hf_denseseg.models.hfgd.layers_hfgd import HfgdConvNormAct

Size = tuple[int, int]


class WrappedParts(NamedTuple):
    """The three parts that guidance needs of a model.

    Args:
        backbone: image -> maps, finest first.
        encoder: coarsest map -> high-level map and None; attribute `channels`.
        upsampler: maps, high-level map and (height, width) of the image -> the student's map; attribute `channels`.
    """

    backbone: Any
    encoder: Any
    upsampler: Any


class UperNetTeacher(nn.Module):
    """Pyramid pooling of an UperNet head: `(B, C5, h, w)` -> `(B, hidden_size, h, w)`."""

    def __init__(self, head: UperNetHead) -> None:
        super().__init__()
        self.channels = head.channels
        self.psp_modules, self.bottleneck = head.psp_modules, head.bottleneck

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, None]:
        return self.bottleneck(torch.cat((features, *self.psp_modules(features)), dim=1)), None


def _coarsest(maps: list[torch.Tensor]) -> torch.Tensor:
    return maps[-1]


class UperNetStudent(nn.Module):
    """The rest of an UperNet head, with the teacher's map in place of the pyramid pooling."""

    def __init__(self, head: UperNetHead) -> None:
        super().__init__()
        self.channels = head.channels
        self.head = head
        head.classifier = nn.Identity()
        head.psp_modules, head.bottleneck = nn.Identity(), nn.Identity()
        head.psp_forward = _coarsest  # type: ignore[method-assign]

    def forward(self, low: list[torch.Tensor], top: torch.Tensor, image_size: Size) -> torch.Tensor:
        return self.head([*low[:-1], top])


class SegformerTeacher(HfgdConvNormAct):
    """One 1x1 convolution of the coarsest map to the head's width: SegFormer has no context module of its own."""

    def __init__(self, config: SegformerConfig) -> None:
        super().__init__(config.hidden_sizes[-1], config.decoder_hidden_size)
        self.channels = config.decoder_hidden_size

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return super().forward(features), None


class SegformerStudent(nn.Module):
    """A SegFormer head: it reads all four maps of the encoder, but not the teacher's map."""

    def __init__(self, head: SegformerDecodeHead, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.head = head
        head.classifier = nn.Identity()

    def forward(self, low: list[torch.Tensor], top: torch.Tensor, image_size: Size) -> torch.Tensor:
        return self.head(low)


class SegformerMaps(nn.Module):
    """SegFormer's encoder with the interface of a backbone."""

    def __init__(self, encoder: PreTrainedModel) -> None:
        super().__init__()
        self.encoder = encoder
        self.config = encoder.config

    def forward_with_filtered_kwargs(
        self, pixel_values: torch.Tensor, output_attentions: bool = False, **kwargs: Any
    ) -> BackboneOutput:
        """Return the four maps; hidden states only on request, although the maps are taken from them."""
        outputs = self.encoder(
            pixel_values, output_hidden_states=True, output_attentions=output_attentions, return_dict=True
        )
        states = outputs.hidden_states[-len(self.config.hidden_sizes) :]
        asked = kwargs.get("output_hidden_states")
        return BackboneOutput(
            feature_maps=tuple(states),
            hidden_states=outputs.hidden_states if asked else None,
            attentions=outputs.attentions,
        )


def _upernet(model: UperNetForSemanticSegmentation) -> WrappedParts:
    head = model.decode_head
    return WrappedParts(model.backbone, UperNetTeacher(head), UperNetStudent(head))


def _segformer(model: SegformerForSemanticSegmentation) -> WrappedParts:
    channels = model.config.decoder_hidden_size
    return WrappedParts(
        SegformerMaps(model.segformer), SegformerTeacher(model.config), SegformerStudent(model.decode_head, channels)
    )


GUIDABLE: dict[str, Callable[[Any], WrappedParts]] = {"upernet": _upernet, "segformer": _segformer}
"""Model type -> function that takes such a model apart."""


def check_guidable(config: PreTrainedConfig) -> None:
    """Refuse the configuration of a model that cannot be wrapped.

    Raises:
        InputError: it is neither UperNet's nor SegFormer's.
    """
    if config.model_type not in GUIDABLE:
        raise InputError(
            f"Models of type {config.model_type!r} cannot be guided. Guidable: {', '.join(sorted(GUIDABLE))}; for "
            "other decoders give `HfgdConfig` a `backbone_config` and one of its upsamplers."
        )


def wrapped_parts(config: HfgdConfig, model: PreTrainedModel | None = None) -> WrappedParts:
    """Take apart a new model of `config.wrapped_config`, or a copy of the given one."""
    inner = config.wrapped_config
    assert isinstance(inner, PreTrainedConfig)
    check_guidable(inner)
    copied = AutoModelForSemanticSegmentation.from_config(inner) if model is None else copy.deepcopy(model)
    return GUIDABLE[inner.model_type](copied)


__all__ = ["GUIDABLE", "WrappedParts", "check_guidable", "wrapped_parts"]
