"""Foreign weights -> SETR: official SETR checkpoints, and encoders of timm, transformers or the original releases.

The tables of (pattern, replacement) rename keys; they are applied in order, so a later pattern sees the result of an
earlier one. `conversion.KeyTable` fails if a key of either side is left over.
"""

import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from hf_denseseg.errors import InputError
from hf_denseseg.models.conversion import KeyTable, fetch_weights, load_converted, need, read_hyper_parameters
from hf_denseseg.models.setr.configuration_setr import VARIANTS, SetrConfig
from hf_denseseg.models.setr.modeling_setr import SetrForSemanticSegmentation, resize_position_embeddings

logger = logging.getLogger(__name__)

Renames = tuple[tuple[str, Any], ...]

LAYER_RENAMES: Renames = (
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attn\.proj\.", ".attention.o_proj."),
)
TIMM_VIT: Renames = (
    (r"^(backbone\.)?cls_token$", "setr.encoder.embeddings.cls_token"),
    (r"^(backbone\.)?pos_embed$", "setr.encoder.embeddings.position_embeddings"),
    (r"^(backbone\.)?patch_embed\.proj\.", "setr.encoder.embeddings.projection."),
    (r"^(backbone\.)?blocks\.", "setr.encoder.layers."),
    *LAYER_RENAMES,
)
"""ViT and DeiT as timm and the original releases name them (in SETR below `backbone.`) -> ours."""

TIMM_BEIT: Renames = (
    (r"^cls_token$", "setr.encoder.beit.embeddings.cls_token"),
    (r"^patch_embed\.proj\.", "setr.encoder.beit.embeddings.patch_embeddings.projection."),
    (r"^blocks\.", "setr.encoder.beit.layers."),
    (r"\.gamma_([12])$", r".lambda_\1"),
    (r"\.attn\.relative_position_bias_table$", ".relative_position_bias.relative_position_bias_table"),
    (r"\.attn\.([qv])_bias$", r".attention.\1_proj.bias"),
    *LAYER_RENAMES,
)
TRANSFORMERS_VIT: Renames = (
    (r"^embeddings\.patch_embeddings\.", "embeddings."),
    (r"^(embeddings|layers)\.", r"setr.encoder.\1."),
)
TRANSFORMERS_BEIT: Renames = ((r"^(embeddings|layers)\.", r"setr.encoder.beit.\1."),)

# One fused matrix (3C, C) with the rows of query, key and value in this order.
SPLITS = {".attn.qkv.": (".attention.q_proj.", ".attention.k_proj.", ".attention.v_proj.")}

# The official classes number MLA's levels 2 to 5, as a feature pyramid does; ours count from 0.
MLA_HEAD: Renames = (
    (r"^backbone\.norm_(\d)\.", r"aggregation.norms.\1."),
    (r"^backbone\.mla\.mla_p(\d)_1x1\.", lambda found: f"aggregation.lateral.{int(found[1]) - 2}."),
    (r"^backbone\.mla\.mla_p(\d)\.", lambda found: f"aggregation.output.{int(found[1]) - 2}."),
    (r"^(aggregation\.(lateral|output)\.\d)\.0\.", r"\1.convolution."),
    (r"^(aggregation\.(lateral|output)\.\d)\.1\.", r"\1.norm."),
    (r"^decode_head\.mlahead\.head(\d)\.", lambda found: f"decode_head.streams.{int(found[1]) - 2}."),
    (
        r"^(decode_head\.streams\.\d)\.(\d)\.",  # of 0 to 5: convolution, norm, ReLU, convolution, norm, ReLU
        lambda found: f"{found[1]}.{int(found[2]) // 3}.{('convolution', 'norm')[int(found[2]) % 3]}.",
    ),
    (r"^decode_head\.cls\.", "decode_head.classifier."),
    (r"^(auxiliary_head\.\d)\.aux\.", r"\1."),
)

UNUSED_IN_HEADS = r"\.conv_seg\.(weight|bias)$"
"""A classifier that the ViT heads inherit from their official base class and never call."""

UNUSED_IN_ENCODERS = (
    r"^(norm|fc_norm|head|head_dist|pre_logits|layernorm|pooler|lm_head)\.|(^|\.)(dist|distillation|mask)_token$"
)
"""Last norm, pooler, classifiers, distillation token, and the mask token and head of masked-image pretraining."""

POSITIONS, DISTILLATION = r"(^|\.)(pos_embed|position_embeddings)$", r"(^|\.)(dist|distillation)_token$"
BIAS_TABLE = r"relative_position_bias_table$"
SHARED_TABLE = r"^(rel_pos_bias|shared_position_bias)\.relative_position_bias_table$"


def load_official(
    weights: str | Path | Mapping[str, torch.Tensor],
    hyper_parameters: str | Path | Mapping[str, Any],
    **overrides: Any,
) -> SetrForSemanticSegmentation:
    """Load an official SETR checkpoint, or a pretrained encoder under a new decoder.

    Args:
        weights: SETR checkpoint, or ViT, DeiT or BEiT in the names of timm and the original releases (file or state
            dict); `timm:NAME`, which timm fetches; or the folder or hub id of a ViT, DeiT or BEiT of transformers.
        hyper_parameters: a published name, or the official sizes (JSON file or dict).
        overrides: configuration fields, for example `num_labels=19`. A SETR checkpoint given with a published name
            sets `num_labels` and `image_size` itself. Position tables of another grid are interpolated, which is
            logged.

    Raises:
        InputError: see `hf_denseseg.load_official`; also a checkpoint of another decoder or encoder, and a position
            table that does not fit its tokens.
        RunError: weights that cannot be fetched.
    """
    official = fetch_weights(weights)
    if isinstance(hyper_parameters, str) and hyper_parameters in VARIANTS:
        fields = VARIANTS[hyper_parameters] | _sizes_in(official, SetrConfig.patch_size)
    else:
        fields = read_config(read_hyper_parameters(hyper_parameters))
    config = SetrConfig(**{**fields, **overrides})
    complete = any(key.startswith("decode_head.") for key in official)
    table = _complete_table(official, config) if complete else _encoder_table(official, config)
    official = fit_bias_tables(fit_positions(official, config.grid), config)
    model = SetrForSemanticSegmentation(config)
    # Keys of ours that the weights may lack: none, or those of the decoder. `(?!)` matches nothing.
    may_miss = r"(?!)" if complete else r"^(decode_head|auxiliary_head|aggregation)\."
    dropped = load_converted(model, official, table, may_miss)
    logger.warning(
        "Loaded %d tensors of the %s; dropped those without use: %s.%s",
        len(official) - len(dropped),
        "checkpoint" if complete else "encoder",
        ", ".join(dropped) or "none",
        "" if complete else " The decoder has random weights, train it.",
    )
    return model.eval()


def decoder_of(official: Mapping[str, torch.Tensor]) -> str:
    """Name of the decoder that an official SETR checkpoint holds."""
    if any(key.startswith("backbone.mla.") for key in official):
        return "mla"
    return "pup" if "decode_head.conv_2.weight" in official else "naive"


def _complete_table(official: Mapping[str, torch.Tensor], config: SetrConfig) -> KeyTable:
    found, head = decoder_of(official), config.decode_head
    if found != head:
        raise InputError(
            f"The checkpoint has the decoder {found!r}, but {head!r} was asked for. Take a name setr-{found}-..., or "
            "give the weights of an encoder alone to start a new decoder."
        )
    renames = list(MLA_HEAD) if head == "mla" else []
    # The up-head numbers its layers conv_0, conv_1, ...; the last of them is the classifier.
    count = 1 if head == "naive" else {2: 4, 4: 2}[config.pup_upsampling]
    for prefix, convolutions in (("decode_head", count), (r"auxiliary_head\.\d", 1)) if head != "mla" else ():
        for index in range(convolutions):
            ours = r"\1.convolution." if head == "naive" else rf"\1.convolutions.{index}."
            renames.append((rf"^({prefix})\.conv_{index}\.", f"{ours}convolution."))
            renames.append((rf"^({prefix})\.syncbn_fc_{index}\.", f"{ours}norm."))
        renames.append((rf"^({prefix})\.conv_{convolutions}\.", r"\1.classifier."))
    return KeyTable((*renames, *TIMM_VIT), SPLITS, dropped=UNUSED_IN_HEADS)


def _encoder_table(official: Mapping[str, torch.Tensor], config: SetrConfig) -> KeyTable:
    # Only BEiT has layer scale or relative positions.
    beit = any(re.search(rf"\.(gamma|lambda)_1$|{BIAS_TABLE}", key) for key in official)
    if beit != (config.encoder == "beit"):
        raise InputError(
            f"The weights are those of a {'BEiT' if beit else 'plain ViT'}, but the encoder is {config.encoder!r}. "
            f"Take a name of `denseseg models 'setr-*-{'beit' if beit else 'vit'}-*'`, or other weights."
        )
    if "embeddings.cls_token" in official:
        renames = TRANSFORMERS_BEIT if beit else TRANSFORMERS_VIT
    else:
        renames = TIMM_BEIT if beit else TIMM_VIT
    return KeyTable(renames, SPLITS, dropped=UNUSED_IN_ENCODERS)


def fit_positions(official: Mapping[str, torch.Tensor], target: tuple[int, int]) -> dict[str, torch.Tensor]:
    """Interpolate the position table of a checkpoint to the grid `target`, dropping the entry of a distillation token.

    Raises:
        InputError: the entries are not a square grid, one for the class token, and one for the distillation token if
            the checkpoint has that token.
    """
    fitted = dict(official)
    extra = 1 + any(re.search(DISTILLATION, key) for key in official)
    for key in (key for key in official if re.search(POSITIONS, key)):
        table = official[key]
        side = math.isqrt(table.shape[1])
        if table.shape[1] != side * side + extra:
            tokens = "class and distillation token" if extra == 2 else "class token (there is no distillation token)"
            raise InputError(
                f"{key} has {table.shape[1]} entries, which is no square grid plus the {tokens}. A distilled "
                "checkpoint needs its `dist_token`: give the complete checkpoint."
            )
        if (side, side) != target:
            logger.warning("Interpolated %s from %dx%d to %dx%d patches.", key, side, side, *target)
        fitted[key] = resize_position_embeddings(table, (side, side), target)
    return fitted


def fit_bias_tables(official: Mapping[str, torch.Tensor], config: SetrConfig) -> dict[str, torch.Tensor]:
    """Interpolate BEiT's relative position tables to the model's grid, and copy a shared one into every layer.

    The rule is transformers': bilinear on the `(2h - 1) x (2w - 1)` offsets, the three rows of the class token kept.
    BEiT is pretrained with one table for all layers and fine-tuned with one for each.

    Raises:
        InputError: the table is not that of a square grid.
    """
    fitted = {}
    for key, value in official.items():
        if not re.search(BIAS_TABLE, key):
            fitted[key] = value
            continue
        side = math.isqrt(len(value) - 3)
        if side * side != len(value) - 3:
            raise InputError(f"{key} has {len(value)} rows, which is no square of offsets plus 3.")
        offsets = value[:-3].T.reshape(1, -1, side, side)  # (rows, heads) -> (1, heads, 2h - 1, 2w - 1)
        size = (2 * config.grid[0] - 1, 2 * config.grid[1] - 1)
        resized = F.interpolate(offsets, size=size, mode="bilinear", align_corners=False)
        table = torch.cat((resized.flatten(2)[0].T, value[-3:]))
        if re.search(SHARED_TABLE, key):
            inside = "layers.{}.relative_position_bias" if key.startswith("shared") else "blocks.{}.attn"
            names = [f"{inside.format(layer)}.{key.rpartition('.')[2]}" for layer in range(config.num_hidden_layers)]
            fitted |= {name: table.clone() for name in names}
        else:
            fitted[key] = table
    return fitted


def _sizes_in(official: Mapping[str, torch.Tensor], patch_size: int) -> dict[str, int]:
    """Number of classes and side of the training crop, as the shapes of a complete official checkpoint show them."""
    if not any(key.startswith("decode_head.") for key in official):
        return {}
    classifier, table = official.get("decode_head.conv_seg.weight"), official.get("backbone.pos_embed")
    found = {} if classifier is None else {"num_labels": len(classifier)}
    return found if table is None else found | {"image_size": math.isqrt(table.shape[1]) * patch_size}


def read_config(official: Mapping[str, Any]) -> dict[str, Any]:
    """Translate official hyper-parameters to `SetrConfig` fields.

    Raises:
        InputError: a value is missing, or describes a network that SETR is not.
    """
    model, image_size, hidden_size = need(official, "model", "image_size", "hidden_size")
    depth, num_heads, num_classes = need(official, "depth", "num_heads", "num_classes")
    head = str(model).lower().removeprefix("setr-")
    if head not in ("naive", "pup", "mla"):
        raise InputError(f"model is {model!r}; SETR-naive, SETR-pup or SETR-mla is needed.")
    if official.get("batch_norm_eps", 1e-5) != 1e-5:
        raise InputError(
            f"batch_norm_eps is {official['batch_norm_eps']}; only 1e-5 is supported, as in the releases."
        )
    layers, levels = official.get("aux_layers_zero_based"), official.get("mla_index_zero_based")
    if head == "mla" and official.get("mla_channels") != official.get("decoder_channels", 256):
        raise InputError(
            f"mla_channels {official.get('mla_channels')} and decoder_channels {official.get('decoder_channels')} "
            "differ; the released decoders have one width."
        )
    return {
        "image_size": image_size,
        "patch_size": official.get("patch_size", 16),
        "hidden_size": hidden_size,
        "num_hidden_layers": depth,
        "num_attention_heads": num_heads,
        "mlp_ratio": official.get("mlp_ratio", 4),
        "layer_norm_eps": official.get("layer_norm_eps", 1e-6),
        "decode_head": head,
        "decoder_hidden_size": official.get("decoder_channels", 256),
        "mla_hidden_size": official.get("mla_head_channels") or 128,
        "use_auxiliary_head": head == "mla" or bool(layers),
        **({"mla_layers": levels} if head == "mla" else {"auxiliary_layers": layers or []}),
        "auxiliary_loss_weight": official.get("aux_loss_weight", 0.4),
        "semantic_loss_ignore_index": official.get("ignore_index", 255),
        "num_labels": num_classes,
    }


__all__ = ["fit_positions", "load_official", "read_config"]
