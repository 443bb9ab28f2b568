"""Foreign weights -> HFGD: pre-trained backbones, and single layers of the authors' TensorFlow code.

No checkpoint of HFGD was published, so there is no table for a complete model.
"""

import logging
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, TimmBackboneConfig

from hf_denseseg.errors import InputError
from hf_denseseg.models.conversion import (
    KeyTable,
    fetch_weights,
    load_converted,
    need,
    read_hyper_parameters,
    read_weights,
)
from hf_denseseg.models.hfgd.configuration_hfgd import VARIANTS, HfgdConfig
from hf_denseseg.models.hfgd.layers_hfgd import HfgdConvNormAct
from hf_denseseg.models.hfgd.modeling_hfgd import (
    HfgdContextEncoder,
    HfgdForSemanticSegmentation,
    HfgdSelfAttention,
    HfgdSharedAxialAttention,
)
from hf_denseseg.models.hfgd.pyramid_hfgd import HfgdSemanticFpn
from hf_denseseg.models.hfgd.regularization_hfgd import HfgdClassAwareRegularization

logger = logging.getLogger(__name__)

BACKBONE = "hfgd.backbone."

RESNET = (
    (r"^conv1\.", "embedder.embedder.convolution."),
    (r"^bn1\.", "embedder.embedder.normalization."),
    (r"^layer(\d)\.(\d+)\.", lambda found: f"encoder.stages.{int(found[1]) - 1}.layers.{found[2]}."),
    (r"\.downsample\.0\.", ".shortcut.convolution."),
    (r"\.downsample\.1\.", ".shortcut.normalization."),
    (r"\.conv(\d)\.", lambda found: f".layer.{int(found[1]) - 1}.convolution."),
    (r"\.bn(\d)\.", lambda found: f".layer.{int(found[1]) - 1}.normalization."),
)
"""ResNet of torchvision or timm -> ResNet of transformers, applied in order."""

UNUSED_IN_BACKBONES = r"^(fc|head|classifier|pooler|norm|layernorm|hidden_states_norms)\."
"""Classifiers and norms after the last stage."""

DENSE = (
    (r"\.kernel$", ".weight"),
    (r"\.gamma$", ".weight"),
    (r"\.beta$", ".bias"),
    (r"\.moving_mean$", ".running_mean"),
    (r"\.moving_variance$", ".running_var"),
)
"""Keras' names, in every layer."""

LAYERS: dict[str, tuple] = {
    "axial_attention": ((r"^query_conv\.", "q_proj."), (r"^key_conv\.", "k_proj."), (r"^value_conv\.", "v_proj.")),
    "self_attention": ((r"^qk_conv\.", "qk_proj."), (r"^value_conv\.", "v_proj.")),
    "class_aware_regularization": (
        (r"^last_class_center$", "regularization.class_centers"),
        (r"^linear_conv\.", "linear."),
        (r"^end_conv\.", "project.convolution."),
        (r"^end_norm\.", "project.norm."),
    ),
    "car_self_attention_head": (
        (r"^down_conv\.down_conv_conv\.", "reduce.convolution."),
        (r"^down_conv\.down_conv_bn\.", "reduce.norm."),
        (r"^attention\.qk_conv\.", "self_attention.qk_proj."),
        (r"^attention\.value_conv\.", "self_attention.v_proj."),
        (r"^car\.linear_conv\.", "linear."),
        (r"^car\.end_conv\.", "project.convolution."),
        (r"^car\.end_norm\.", "project.norm."),
    ),
    "semantic_fpn": (
        (r"^fpn\.skip_conv_filters(\d)\.\w+_(conv|bn)\.", r"pyramid.laterals.\1.\2."),
        (r"^sem\.end_conv\.\w+_(conv|bn)\.", r"semantic.merge.\1."),
        (r"^sem\.s_(\d)_conv_(\d)\.\w+_(conv|bn)\.", r"semantic.branches.\1.\2.\3."),
        (r"\.conv\.", ".convolution."),
        (r"\.bn\.", ".norm."),
    ),
}
"""Layer of the authors' code -> names of its weights in ours, applied in order."""


def load_official(
    weights: str | Path | Mapping[str, torch.Tensor],
    hyper_parameters: str | Path | Mapping[str, Any],
    **overrides: Any,
) -> nn.Module:
    """Load a pre-trained backbone under a new decoder, or one layer of the authors' TensorFlow code.

    Args:
        weights: of a backbone: `timm:NAME`, the folder or hub id of a model of transformers (or of an HFGD model, of
            which the backbone is taken), or a file or state dict of torchvision or timm; of a layer: file or state
            dict with TensorFlow's names.
        hyper_parameters: a published name; of a layer its sizes (JSON file or dict with `"level": "layer"`).
        overrides: configuration fields, for example `num_labels=19`.

    Raises:
        InputError: see `hf_denseseg.load_official`.
        RunError: weights that cannot be fetched.
    """
    if not (isinstance(hyper_parameters, str) and hyper_parameters in VARIANTS):
        return load_layer(read_weights(weights), read_hyper_parameters(hyper_parameters))
    config = HfgdConfig(**{**VARIANTS[hyper_parameters], **overrides})
    if config.wrapped_config is not None:
        raise InputError("A wrapped model brings its own weights: use `HfgdForSemanticSegmentation.guide(model)`.")
    official = fetch_weights(weights)
    model = HfgdForSemanticSegmentation(config)
    backbone: Any = model.hfgd.backbone
    renamed = rename_backbone(official, set(backbone.state_dict()), complete_names(backbone.config))
    table = KeyTable((), {}, dropped=r"^(?!hfgd\.backbone\.)")
    dropped = load_converted(model, renamed, table, may_miss=r"^(?!hfgd\.backbone\.)")
    logger.warning(
        "Loaded %d tensors of the backbone; dropped those without use: %s. Everything else has random weights, train "
        "it.",
        len(official) - len(dropped),
        ", ".join(dropped) or "none",
    )
    return model.eval()


def complete_names(config: PreTrainedConfig) -> set[str]:
    """Names of the weights of a network of timm with its classifier; none for a network of transformers."""
    if not isinstance(config, TimmBackboneConfig):
        return set()
    import timm

    with torch.device("meta"):
        return set(timm.create_model(str(config.backbone), pretrained=False).state_dict())


def rename_backbone(
    official: Mapping[str, torch.Tensor], wanted: set[str], complete_network: Collection[str] = ()
) -> dict[str, torch.Tensor]:
    """Rename the weights of a backbone to the names in our model.

    Args:
        official: state dict of transformers, timm, torchvision or of an HFGD model.
        wanted: names in our backbone.
        complete_network: names in the classifier that the backbone is a part of, see `complete_names`.

    Returns:
        The same tensors: those of the backbone under `hfgd.backbone.`, others (heads) under the names they had.
    """
    complete = any(key.startswith("backbone.") for key in official)
    renamed = {}
    for key, tensor in official.items():
        name = key.removeprefix("backbone.")
        if (complete and name == key) or re.search(UNUSED_IN_BACKBONES, name):
            renamed[key] = tensor
            continue
        for pattern, replacement in RESNET if "embedder.embedder.convolution.weight" in wanted else ():
            name = re.sub(pattern, replacement, name)
        # transformers nests some models below a name of their own; timm flattens the first level of its networks.
        candidates = (name, f"swin.{name}", f"_backbone.{name}", f"_backbone.model.{name}")
        flattened = f"_backbone.{name.replace('.', '_', 1)}"
        found = next((each for each in (*candidates, flattened) if each in wanted), None)
        behind_last_stage = found is None and key in complete_network
        renamed[key if behind_last_stage else BACKBONE + (found or name)] = tensor
    return renamed


def load_layer(weights: Mapping[str, torch.Tensor], sizes: Mapping[str, Any]) -> nn.Module:
    """Build one layer and load its TensorFlow weights.

    Args:
        weights: kernels as (height, width, in, out).
        sizes: `level`, `module`, and the layer's sizes under the authors' names.

    Raises:
        InputError: a layer that HFGD does not have, or a complete model (none was published).
    """
    level, name = sizes.get("level"), str(sizes.get("module"))
    if level != "layer" or name not in LAYERS:
        raise InputError(
            f"level {level!r}, module {name!r}: of the authors' code only layers can be loaded: {', '.join(LAYERS)}. "
            f"For a backbone give a published name: {', '.join(VARIANTS)}."
        )
    layer = _build_layer(name, sizes)
    linear = {each for each, module in layer.named_modules() if isinstance(module, nn.Linear)}
    official = {}
    shared = any(isinstance(module, HfgdSelfAttention) for module in layer.modules())
    for key, tensor in (_join_query_and_key(weights) if shared else weights).items():
        if key.endswith(".kernel"):
            tensor = tensor.permute(3, 2, 0, 1)  # (kh, kw, in, out) -> (out, in, kh, kw)
        official[key] = tensor
    table = KeyTable((*LAYERS[name], *DENSE), {})
    for key in official:
        if table.targets(key)[0].rpartition(".")[0] in linear:
            official[key] = official[key].flatten(1) if official[key].ndim == 4 else official[key]
    load_converted(layer, official, table, may_miss=r"num_batches_tracked$")
    return layer.eval()


def _join_query_and_key(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Concatenate query and key projection of a self-attention to one layer, as in ours."""
    joined = dict(weights)
    for key in weights:
        if "query_conv" in key:
            other = key.replace("query_conv", "key_conv")
            joined[key.replace("query_conv", "qk_conv")] = torch.cat((joined.pop(key), joined.pop(other)), dim=-1)
    return joined


def _build_layer(name: str, sizes: Mapping[str, Any]) -> nn.Module:
    """The layer with random weights."""
    common: dict[str, Any] = {"align_corners": bool(sizes.get("align_corners", False))}
    if name == "axial_attention":
        channels, heads, qk_channels = need(sizes, "channels", "num_heads", "qk_channels")
        config = HfgdConfig(decoder_width=channels, axial_heads=heads)
        return HfgdSharedAxialAttention(config, channels, qk_channels)
    if name == "self_attention":
        channels, qk_channels = need(sizes, "value_channels", "qk_channels")
        return HfgdSelfAttention(HfgdConfig(cae_channels=channels, cae_qk_channels=qk_channels))
    if name == "semantic_fpn":
        width, channels = need(sizes, "width", "in_channels")
        config = HfgdConfig(upsampler="sfpn", decoder_width=width, merge_channels=width, **common)
        return HfgdSemanticFpn(config, channels[:-1], channels[-1])
    common["num_labels"] = need(sizes, "num_classes")[0]
    if name == "class_aware_regularization":
        channels_in, channels = need(sizes, "channels_in", "channels")
        config = HfgdConfig(**common, **_regularization_fields(sizes))
        return nn.ModuleDict(
            {
                "linear": nn.Conv2d(channels_in, channels, kernel_size=1),
                "project": HfgdConvNormAct(channels, channels),
                "regularization": HfgdClassAwareRegularization(config, channels),
            }
        )
    in_channels, width, qk_channels = need(sizes, "in_channels", "mid_channels", "qk_channels")
    config = HfgdConfig(
        extra_encoding="sa_car",
        cae_channels=width,
        cae_qk_channels=qk_channels,
        decoder_width=width,
        **common,
    )
    return HfgdContextEncoder(config, in_channels)


def _regularization_fields(sizes: Mapping[str, Any]) -> dict[str, Any]:
    batch_center, moving, c2c, c2p = need(
        sizes, "batch_class_center", "use_last_class_center", "c2c_threshold", "c2p_threshold"
    )
    return {
        "car_batch_center": batch_center,
        "car_center_decay": float(need(sizes, "last_class_center_decay")[0]) if moving else None,
        "car_c2c_threshold": c2c,
        "car_c2p_threshold": c2p,
    }


__all__ = ["load_layer", "load_official", "rename_backbone"]
