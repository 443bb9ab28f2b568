"""Foreign weights -> UN-EPT: official checkpoints, and backbones of mmcv, timm, DeiT's authors or transformers."""

import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hf_denseseg.errors import InputError
from hf_denseseg.models.conversion import KeyTable, fetch_weights, load_converted, need, read_hyper_parameters
from hf_denseseg.models.unept.configuration_unept import VARIANTS, UneptConfig
from hf_denseseg.models.unept.modeling_unept import LEVELS, UneptForSemanticSegmentation, resize_table
from hf_denseseg.models.unept.variants_unept import OUTPUT_STRIDE

logger = logging.getLogger(__name__)

Renames = tuple[tuple[str, Any], ...]

RESNET: Renames = (
    (r"^(backbone\.)?stem\.7\.", "unept.backbone.resnet.bn1."),
    (r"^(backbone\.)?stem\.", "unept.backbone.resnet.conv1."),
    (r"^(backbone\.)?(conv1|bn1|layer\d)\.", r"unept.backbone.resnet.\2."),
)
"""ResNet of mmcv (stem) or timm (conv1), alone or below `backbone.` in UN-EPT -> ours, applied in order."""

DEIT: Renames = (
    (r"^(backbone\.)?cls_token$", "unept.backbone.cls_token"),
    (r"^(backbone\.)?dist_token$", "unept.backbone.distillation_token"),
    (r"^(backbone\.)?pos_embed$", "unept.backbone.position_embeddings"),
    (r"^(backbone\.)?patch_embed\.proj\.", "unept.backbone.projection."),
    (r"^(backbone\.)?blocks\.", "unept.backbone.layers."),
    (r"^embeddings\.patch_embeddings\.", "unept.backbone."),
    (r"^embeddings\.", "unept.backbone."),
    (r"^layers\.(\d+)\.(layernorm|attention|mlp)", r"unept.backbone.layers.\1.\2"),
    (r"(backbone\.layers\.\d+)\.norm1\.", r"\1.layernorm_before."),
    (r"(backbone\.layers\.\d+)\.norm2\.", r"\1.layernorm_after."),
    (r"\.attn\.proj\.", ".attention.o_proj."),
    (r"(backbone\.layers\.\d+)\.mlp\.", r"\1."),
)
"""DeiT of its authors and timm, or of transformers, alone or below `backbone.` -> ours, applied in order."""

HEADS: Renames = (
    (r"^layers\.(\d)\.(weight|bias)$", r"unept.pyramid_proj.\1.\2"),
    (r"^spatial_branch\.convblock(\d)\.conv1\.", lambda found: f"unept.spatial_branch.{3 * int(found[1]) - 3}."),
    (r"^spatial_branch\.convblock(\d)\.bn\.", lambda found: f"unept.spatial_branch.{3 * int(found[1]) - 2}."),
    (r"^context_branch\.", "unept.context."),
    (r"(encoder\.layers\.\d+)\.norm1\.", r"\1.self_attn_norm."),
    (r"(encoder\.layers\.\d+)\.norm2\.", r"\1.ffn_norm."),
    # The official decoder numbers its norms in the order of the text, not in which they are applied.
    (r"(decoder\.layers\.\d+)\.norm2\.", r"\1.self_attn_norm."),
    (r"(decoder\.layers\.\d+)\.norm1\.", r"\1.cross_attn_norm."),
    (r"(decoder\.layers\.\d+)\.norm3\.", r"\1.ffn_norm."),
    (r"(context\.\w+\.layers\.\d+)\.linear([12])\.", r"\1.fc\2."),
    (r"\.self_attn\.out_proj\.", ".self_attn.o_proj."),
    (r"^query_embed\.weight$", "unept.query_embed"),
    (r"^cls\.", "classifier."),
    (r"^mask_head\.", "boundary_head."),
    (r"^dir_head\.", "direction_head."),
)
"""Everything but the backbone."""

SPLITS = {
    ".attn.qkv.": (".attention.q_proj.", ".attention.k_proj.", ".attention.v_proj."),
    ".self_attn.in_proj_weight": tuple(f".self_attn.{name}_proj.weight" for name in "qkv"),
    ".self_attn.in_proj_bias": tuple(f".self_attn.{name}_proj.bias" for name in "qkv"),
}

UNUSED_IN_BACKBONES = r"^(norm|fc|head|head_dist|pre_logits|layernorm|pooler|classifier|lm_head)\."
"""Last norm and classifiers."""

POSITIONS = r"(^|\.)(pos_embed|position_embeddings)$"
DISTILLATION = r"(^|\.)(dist|distillation)_token$"
QUERIES = "query_embed.weight"


def load_official(
    weights: str | Path | Mapping[str, torch.Tensor],
    hyper_parameters: str | Path | Mapping[str, Any],
    **overrides: Any,
) -> UneptForSemanticSegmentation:
    """Load an official UN-EPT checkpoint, or a pre-trained backbone under new branches.

    Args:
        weights: UN-EPT checkpoint; or `resnet50_v1c` of mmcv, or distilled DeiT in its authors' names (file or state
            dict); `timm:NAME`, which timm fetches; or the folder or hub id of a distilled DeiT of transformers.
        hyper_parameters: a published name, or the official sizes (JSON file or dict).
        overrides: configuration fields, for example `num_labels=19`. A UN-EPT checkpoint given with a published name
            sets `num_labels` and `image_size` itself. Tables of another grid are interpolated, with a note.

    Raises:
        InputError: see `hf_denseseg.load_official`; also a checkpoint of the other backbone.
        RunError: weights that cannot be fetched.
    """
    official = fetch_weights(weights)
    complete = QUERIES in official  # a UN-EPT checkpoint, not only a backbone
    if isinstance(hyper_parameters, str) and hyper_parameters in VARIANTS:
        fields = VARIANTS[hyper_parameters] | (_sizes_in(official) if complete else {})
    else:
        fields = read_config(read_hyper_parameters(hyper_parameters))
    config = UneptConfig(**{**fields, **overrides})
    _check_backbone(official, config)
    # A published checkpoint's tables have the grid of its own crop, square unless the sizes say otherwise.
    stored = UneptConfig(**fields) if complete else None
    official = fit_tables(official, config, stored)
    model = UneptForSemanticSegmentation(config)
    backbone = RESNET if config.backbone_type == "resnet" else DEIT
    if complete:
        dropped = load_converted(model, official, KeyTable((*HEADS, *backbone), SPLITS))
    else:
        table = KeyTable(backbone, SPLITS, dropped=UNUSED_IN_BACKBONES)
        dropped = load_converted(model, official, table, may_miss=r"^(?!unept\.backbone\.)")
    logger.warning(
        "Loaded %d tensors of the %s; dropped those without use: %s.%s",
        len(official) - len(dropped),
        "checkpoint" if complete else "backbone",
        ", ".join(dropped) or "none",
        "" if complete else " Everything else has random weights, train it.",
    )
    return model.eval()


def _check_backbone(official: Mapping[str, torch.Tensor], config: UneptConfig) -> None:
    deit = any(re.search(POSITIONS, key) for key in official)
    if deit != (config.backbone_type == "deit"):
        raise InputError(
            f"The weights are those of a {'DeiT' if deit else 'ResNet'}, but the backbone is "
            f"{config.backbone_type!r}. Take {'unept-deit-base' if deit else 'unept-resnet50'}, or other weights."
        )
    if deit and not any(re.search(DISTILLATION, key) for key in official):
        raise InputError(
            "The weights hold no distillation token. UN-EPT builds on the distilled DeiT, for example "
            "facebook/deit-base-distilled-patch16-384."
        )


def fit_tables(
    official: Mapping[str, torch.Tensor], config: UneptConfig, stored: UneptConfig | None = None
) -> dict[str, torch.Tensor]:
    """Interpolate query table and DeiT's positions of a checkpoint on the grids of `config`.

    Args:
        official: state dict with official names.
        config: of the model to build.
        stored: of the checkpoint; None for a backbone alone, whose grid is square.

    Raises:
        InputError: DeiT's positions are no square grid and two tokens.
    """
    fitted = dict(official)
    for key, table in official.items():
        if key == QUERIES and stored is not None:
            grid, target = _grid(stored, OUTPUT_STRIDE), _grid(config, OUTPUT_STRIDE)
            if grid != target and len(table) == grid[0] * grid[1]:
                logger.warning("Interpolated %s from %dx%d to %dx%d queries.", key, *grid, *target)
                fitted[key] = resize_table(table, grid, target, mode="bilinear")
        elif re.search(POSITIONS, key):
            side = math.isqrt(table.shape[1] - 2)
            grid = _grid(stored, stored.patch_size) if stored is not None else (side, side)
            if grid[0] * grid[1] != table.shape[1] - 2:
                raise InputError(f"{key} has {table.shape[1]} entries, which is no grid {grid} and two tokens.")
            target = _grid(config, config.patch_size)
            if grid != target:
                logger.warning("Interpolated %s from %dx%d to %dx%d patches.", key, *grid, *target)
                resized = resize_table(table[0, 2:], grid, target, mode="bicubic")
                fitted[key] = torch.cat((table[:, :2], resized[None]), dim=1)
    return fitted


def _grid(config: UneptConfig, unit: int) -> tuple[int, int]:
    height, width = config.image_sides
    return height // unit, width // unit


def _sizes_in(official: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Number of classes and side of the (square) training crop of an official checkpoint."""
    found = {"image_size": math.isqrt(len(official[QUERIES])) * OUTPUT_STRIDE}
    classifier = official.get("cls.weight")
    return found if classifier is None else found | {"num_labels": len(classifier)}


def read_config(official: Mapping[str, Any]) -> dict[str, Any]:
    """Translate official hyper-parameters to `UneptConfig` fields.

    Raises:
        InputError: a value is missing, or describes a network that UN-EPT is not.
    """
    backbone, num_classes, image_size = need(official, "backbone", "num_classes", "image_size")
    width, heads, points, ffn, depth = need(official, "d_model", "heads", "n_points", "ffn_dim", "depth")
    fixed = {"n_levels": LEVELS, "bn_eps": 1e-5, "activation": "relu"}
    for name, value in fixed.items():
        if official.get(name, value) != value:
            raise InputError(f"{name} is {official[name]}; only {value} is supported, as in the released code.")
    fields = {
        "image_size": list(image_size),
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_points": points,
        "intermediate_size": ffn,
        "num_hidden_layers": depth,
        "dropout": official.get("dropout", 0.1),
        "layer_norm_eps": official.get("ln_eps", 1e-5),
        "spatial_channels": list(official.get("spatial_channels", (64, 128))),
        "head_channels": official.get("head_channels", 256),
        "num_labels": num_classes,
    }
    if str(backbone).startswith("resnet"):
        return fields | _resnet_fields(official)
    if str(backbone).startswith("deit"):
        return fields | _deit_fields(official)
    raise InputError(f"backbone is {backbone!r}; resnet50_v1c or deit_distilled is needed.")


def _resnet_fields(official: Mapping[str, Any]) -> dict[str, Any]:
    fixed = {"output_stride": 8, "contract_dilation": True, "dilations": [1, 1, 2, 4], "strides": [1, 2, 1, 1]}
    for name, value in fixed.items():
        if official.get(name, value) != value:
            raise InputError(f"{name} is {official[name]}; only {value} is supported, as in the released code.")
    return {
        "backbone_type": "resnet",
        "depths": list(official.get("blocks", (3, 4, 6, 3))),
        "base_channels": official.get("base_channels", 64),
        "stem_channels": official.get("stem_channels", 64),
    }


def _deit_fields(official: Mapping[str, Any]) -> dict[str, Any]:
    layers, depth = list(official.get("out_blocks", (4, 8, 12))), official.get("backbone_depth", 12)
    if layers[-1] != depth:
        raise InputError(f"out_blocks are {layers} of {depth} blocks; the last block must be one of them.")
    return {
        "backbone_type": "deit",
        "patch_size": official.get("patch_size", 16),
        "backbone_hidden_size": official.get("embed_dim", 768),
        "backbone_num_attention_heads": official.get("backbone_heads", 12),
        "backbone_mlp_ratio": official.get("mlp_ratio", 4),
        "backbone_layer_norm_eps": official.get("backbone_ln_eps", 1e-6),
        "out_layers": layers,
    }


__all__ = ["load_official", "read_config"]
