"""Well-known segmentation models of transformers by name, with random weights, to compare with under one recipe.

A folder or a hub id of any other model works as well; these need no files.
"""

from typing import Any

from transformers import (
    AutoConfig,
    AutoModelForSemanticSegmentation,
    MobileNetV2Config,
    PreTrainedConfig,
    PreTrainedModel,
    SegformerConfig,
    SegformerImageProcessor,
    UperNetConfig,
)

from hf_denseseg.errors import InputError, unknown_name
from hf_denseseg.models.channels import set_image_channels

_STAGES = ["stage1", "stage2", "stage3", "stage4"]
_CONVNEXT = {"model_type": "convnext", "hidden_sizes": [96, 192, 384, 768], "depths": [3, 3, 9, 3]}
_SWIN = {"model_type": "swin", "embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24]}
_UPERNET = {"auxiliary_in_channels": 384, "auxiliary_channels": 256}
# Name -> class of its configuration, and the fields that differ from the class's defaults.
PEERS: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "segformer-b0": (SegformerConfig, {}),  # Xie et al., 2021, Table 6
    "segformer-b1": (SegformerConfig, {"hidden_sizes": [64, 128, 320, 512]}),
    # Liu et al., 2022, Sec. 3.6
    "upernet-convnext-tiny": (UperNetConfig, {"backbone_config": _CONVNEXT | {"out_features": _STAGES}, **_UPERNET}),
    # Liu et al., 2021, Sec. 4.3
    "upernet-swin-tiny": (
        UperNetConfig,
        {"backbone_config": _SWIN | {"drop_path_rate": 0.3, "out_features": _STAGES}, **_UPERNET},
    ),
    "mobilenetv2-deeplabv3plus": (MobileNetV2Config, {"output_stride": 16}),  # Sandler et al., 2018, Sec. 6.3
}


def create_peer(name: str, **overrides: Any) -> PreTrainedModel:
    """Build a model of `PEERS` with random weights.

    Args:
        name: key of `PEERS`.
        overrides: configuration fields, for example `num_labels=19`; `num_channels` is set in the backbone too.

    Raises:
        InputError: a field that the configuration does not have.
    """
    kind, fields = PEERS[name]
    known, num_channels = kind(), overrides.pop("num_channels", None)
    for key in overrides:
        if not hasattr(known, key):
            otherwise = f"See {kind.__name__} in the documentation of transformers."
            fault = unknown_name(f"{kind.__name__} field", key, known.to_dict(), otherwise)
            raise InputError(f"config_overrides of {name}: {fault}")
    fields = {**fields, **overrides}
    if isinstance(backbone := fields.get("backbone_config"), dict):
        fields["backbone_config"] = AutoConfig.for_model(**backbone)
    config = kind(**fields)
    if num_channels is not None:
        set_image_channels(config, num_channels)
    return AutoModelForSemanticSegmentation.from_config(config)


def encoder_prefix(model: PreTrainedModel) -> str:
    """Prefix of the names of the encoder's weights: of its backbone, or of the whole model without the head."""
    return "backbone." if hasattr(model, "backbone") else f"{model.base_model_prefix}."


def create_peer_image_processor(**options: Any) -> SegformerImageProcessor:
    """Image processor of all of them: mean and deviation of ImageNet, labels as they are."""
    return SegformerImageProcessor(**{"do_reduce_labels": False, **options})


__all__ = ["PEERS", "create_peer", "create_peer_image_processor", "encoder_prefix"]
