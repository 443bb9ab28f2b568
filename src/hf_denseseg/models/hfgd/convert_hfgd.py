"""Foreign weights -> HFGD: pre-trained backbones, and single layers of the authors' TensorFlow code.

No checkpoint of HFGD was published, so there is no table for a complete model.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_denseseg.errors import InputError
from hf_denseseg.models.backbone_weights import load_backbone
from hf_denseseg.models.conversion import KeyTable, load_converted, need, read_hyper_parameters, read_weights
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
    model = HfgdForSemanticSegmentation(config)
    load_backbone(model, weights, prefix="hfgd.backbone.")
    return model.eval()


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


__all__ = ["load_layer", "load_official"]
