"""Official Conformer checkpoints (718 keys) -> DSCT."""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hf_denseseg.errors import InputError
from hf_denseseg.models.conversion import KeyTable, fetch_weights, load_converted, need, read_hyper_parameters
from hf_denseseg.models.dsct.configuration_dsct import VARIANTS, DsctConfig
from hf_denseseg.models.dsct.modeling_dsct import DsctForImageClassification, DsctForSemanticSegmentation, DsctModel

logger = logging.getLogger(__name__)

CLASSIFIERS = r"^(conv|trans)_cls_head\."

RENAMES = (
    (r"^conv1\.", "encoder.stem.convolution."),
    (r"^bn1\.", "encoder.stem.norm."),
    (r"^cls_token$", "encoder.embeddings.cls_token"),
    (r"^trans_patch_conv\.", "encoder.embeddings.projection."),
    (r"^conv_1\.", "encoder.spatial."),
    (r"^trans_1\.", "encoder.context."),
    (r"^conv_trans_(\d+)\.", lambda found: f"encoder.blocks.{int(found[1]) - 2}."),
    (r"^trans_norm\.", "encoder.layernorm."),
    (r"\.cnn_block\.", ".spatial."),
    (r"\.fusion_block\.", ".fusion."),
    (r"\.squeeze_block\.conv_project\.", ".spatial_to_context.projection."),
    (r"\.squeeze_block\.ln\.", ".spatial_to_context.layernorm."),
    (r"\.expand_block\.conv_project\.", ".context_to_spatial.projection."),
    (r"\.expand_block\.bn\.", ".context_to_spatial.norm."),
    (r"\.trans_block\.", ".context."),
    (r"\.context\.norm1\.", ".context.layernorm_before."),
    (r"\.context\.norm2\.", ".context.layernorm_after."),
    (r"\.attn\.proj\.", ".attention.o_proj."),
    (r"\.bn([123])\.", r".norm\1."),
    (r"\.residual_conv\.", ".residual.0."),
    (r"\.residual_bn\.", ".residual.1."),
)
"""Official name -> name in `DsctModel`, applied in order."""

SPLITS = {".attn.qkv.": (".attention.q_proj.", ".attention.k_proj.", ".attention.v_proj.")}

HEAD_RENAMES = (
    (r"^encoder\.", "dsct.encoder."),
    (r"^conv_cls_head\.", "spatial_classifier."),
    (r"^trans_cls_head\.", "context_classifier."),
)
"""Applied last for the task classes, whose encoder lies one level deeper."""


def load_official(
    weights: str | Path | Mapping[str, torch.Tensor],
    hyper_parameters: str | Path | Mapping[str, Any],
    **overrides: Any,
) -> DsctModel | DsctForImageClassification | DsctForSemanticSegmentation:
    """Load an official Conformer checkpoint.

    Args:
        weights: file or state dict with the official names, or the folder or hub id of a DSCT of this package, whose
            encoder is used.
        hyper_parameters: a published name with a head gives `DsctForSemanticSegmentation` with a random head, without
            the four ImageNet classifier tensors; one without a head, or the official sizes (JSON file or dict), give
            `DsctForImageClassification`, or `DsctModel` if the checkpoint has no classifiers.
        overrides: configuration fields, for example `num_labels=19`.

    Raises:
        InputError: see `hf_denseseg.load_official`.
    """
    official = fetch_weights(weights)
    if isinstance(hyper_parameters, str) and hyper_parameters in VARIANTS:
        fields = VARIANTS[hyper_parameters]
        if fields["architectures"] == ["DsctForSemanticSegmentation"]:
            return _load_encoder(DsctForSemanticSegmentation(DsctConfig(**{**fields, **overrides})), official)
        classes = {"num_labels": len(official["conv_cls_head.bias"])} if "conv_cls_head.bias" in official else {}
        config = DsctConfig(**{**fields, **classes, **overrides})
    else:
        config = DsctConfig(**{**read_config(read_hyper_parameters(hyper_parameters)), **overrides})
    if any(re.search(CLASSIFIERS, key) for key in official):
        classifier = DsctForImageClassification(config)
        load_converted(classifier, official, KeyTable((*RENAMES, *HEAD_RENAMES), SPLITS))
        return classifier.eval()
    encoder = DsctModel(config)
    load_converted(encoder, official, KeyTable(RENAMES, SPLITS))
    return encoder.eval()


def _load_encoder(
    model: DsctForSemanticSegmentation, official: Mapping[str, torch.Tensor]
) -> DsctForSemanticSegmentation:
    table = KeyTable((*RENAMES, *HEAD_RENAMES), SPLITS, dropped=CLASSIFIERS)
    dropped = load_converted(model, official, table, may_miss=r"^decode_head\.")
    logger.warning(
        "Loaded %d official tensors; dropped the ImageNet classifiers (%s); decode_head has random weights, train it.",
        len(official) - len(dropped),
        ", ".join(dropped) or "none in the file",
    )
    return model.eval()


def read_config(official: Mapping[str, Any]) -> dict[str, Any]:
    """Translate official hyper-parameters to `DsctConfig` fields.

    Raises:
        InputError: a value is missing, or describes a network that DSCT is not.
    """
    channels, depth, strides = need(official, "stage_channels", "depth", "spatial_strides")
    embed_dim, num_heads, num_classes = need(official, "embed_dim", "num_heads", "num_classes")
    dilation_from_block = official.get("dilation_from_block")
    if official.get("patch_size", 16) != 16:
        raise InputError(
            f"patch_size is {official['patch_size']}; only 16 is supported, as in every released Conformer."
        )
    if list(strides) not in ([4, 8, 16, 32], [4, 8, 8, 8]):
        raise InputError(
            f"spatial_strides are {strides}; [4, 8, 16, 32] (ImageNet) or [4, 8, 8, 8] (DSCT) are supported."
        )
    if dilation_from_block not in (None, 2 * depth // 3 + 1):
        raise InputError(
            f"dilation_from_block is {dilation_from_block}; null and {2 * depth // 3 + 1}, the "
            "first block without its "
            "stride, are supported."
        )
    output_stride = strides[-1]
    return {
        "num_channels": official.get("in_channels", 3),
        "stem_channels": official.get("stem_channels", 64),
        "spatial_hidden_sizes": list(channels),
        "hidden_size": embed_dim,
        "num_hidden_layers": depth,
        "num_attention_heads": num_heads,
        "mlp_ratio": official.get("mlp_ratio", 4),
        "qkv_bias": official.get("qkv_bias", True),
        "output_stride": output_stride,
        "dilated": output_stride == 32 or dilation_from_block is not None,
        "num_labels": num_classes,
    }


__all__ = ["load_official", "read_config"]
