"""Official HLG checkpoints -> ours: classification, dense backbone, SETR-PUP-HLG and both detectors.

Tables of (pattern, replacement) rename keys; they are applied in order, so a later pattern sees the result of an
earlier one.
"""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_denseseg.errors import InputError
from hf_denseseg.models.conversion import KeyTable, fetch_weights, load_converted, need, read_hyper_parameters
from hf_denseseg.models.hlg import modeling_hlg, modeling_hlg_detection
from hf_denseseg.models.hlg.configuration_hlg import VARIANTS, HlgConfig
from hf_denseseg.models.hlg.convert_hlg_detection import DETECTION_RENAMES, LABEL_ROWS

logger = logging.getLogger(__name__)

Renames = tuple[tuple[str, Any], ...]

POSITION_BIAS: Renames = (
    (r"\.pos_proj\.", ".projection."),
    (r"\.pos([123])\.0\.", lambda found: f".norms.{int(found[1]) - 1}."),
    (r"\.pos([123])\.2\.", lambda found: f".layers.{int(found[1]) - 1}."),
)
# spatial_smooth.0 is a sequence (convolution, norm, GELU) x 3 in the release: indices 0, 1, 3, 4, 6, 7 have weights.
SMOOTHING: Renames = tuple(
    (rf"\.spatial_smooth\.0\.{3 * index + kind}\.", f".smoothing.{part}.{('convolution', 'norm')[kind]}.")
    for index, part in enumerate(("reduce", "convolution", "expand"))
    for kind in (0, 1)
)
ENCODER: Renames = (
    (r"^backbone\.", ""),
    # Stem: convolution and norm at 0 and 1 of each block; in ours a GELU stands between the blocks.
    (r"^s0_conv\.([01])\.0\.", lambda found: f"hlg.encoder.stem.{2 * int(found[1])}.convolution."),
    (r"^s0_conv\.([01])\.1\.", lambda found: f"hlg.encoder.stem.{2 * int(found[1])}.norm."),
    (r"^block(\d)\.", lambda found: f"hlg.encoder.stages.{int(found[1]) - 1}."),
    (r"^norm_out_(\d)\.", r"hlg.encoder.layernorms.\1."),
    (r"^norm\.", "hlg.encoder.layernorms.3."),
    # Before the rule for `norm1` of stages 1 to 3 below: in stage 4 it follows the attention.
    (r"^(hlg\.encoder\.stages\.3\.\d+)\.norm1\.", r"\1.attention.layernorm."),
    # DWMLP, with its strided shortcut in the first layer of a stage.
    (r"\.down_proj\.proj\.0\.", ".mlp.shortcut.convolution."),
    (r"\.down_proj\.proj\.1\.", ".mlp.shortcut.norm."),
    (r"\.mlp\.fc1\.", ".mlp.expand.convolution."),
    (r"\.mlp\.norm1\.", ".mlp.expand.norm."),
    (r"\.mlp\.fc2\.", ".mlp.depthwise.convolution."),
    (r"\.mlp\.norm2\.", ".mlp.depthwise.norm."),
    (r"\.mlp\.fc3\.", ".mlp.reduce."),
    (r"^(hlg\.encoder\.stages\.\d\.\d+)\.norm2\.", r"\1.mlp.layernorm."),
    # Attention; `norm0` and `h0_norm` precede it, `aux_q` is the DWConv of Eq. 9.
    (r"^(hlg\.encoder\.stages\.\d\.\d+)\.norm1\.", r"\1.attention.layernorm_query."),
    (r"^(hlg\.encoder\.stages\.\d\.\d+)\.norm0\.", r"\1.attention.layernorm_local."),
    (r"\.h0_norm\.", ".attention.layernorm_embedding."),
    (r"\.h0_conv\.", ".attention.embedding_convolution."),
    (r"\.aux_q\.", ".attention.query_convolution."),
    (r"^(hlg\.encoder\.stages\.\d\.\d+)\.([qkv])\.", r"\1.attention.\2_proj."),
    (r"\.global_attn\.proj\.", ".attention.o_proj."),
    (r"\.pos_local\.", ".attention.local_bias."),
    (r"\.pos_global\.", ".attention.global_bias."),
    *SMOOTHING,
    *POSITION_BIAS,
)
"""Names of the released backbone (with or without the prefix `backbone.`) -> ours."""

HEADS: Renames = (
    (r"^head\.", "classifier."),
    (r"^decode_head\.conv_0\.", "decode_head.fuse.convolution."),
    (r"^decode_head\.syncbn_fc_0\.", "decode_head.fuse.norm."),
    (r"^(decode_head|auxiliary_head)\.conv_seg\.", r"\1.classifier."),
    (r"^auxiliary_head\.convs\.0\.bn\.", "auxiliary_head.convs.0.batch_norm."),
    (r"^decode_head\.decode_transformer\.(\d)\.", r"decode_head.layers.\1."),
    (r"^(decode_head\.layers\.\d)\.norm0\.", r"\1.attention.layernorm_local."),
    (r"^(decode_head\.layers\.\d)\.norm1\.", r"\1.attention.layernorm_query."),
    (r"^(decode_head\.layers\.\d)\.norm2\.", r"\1.layernorm."),
    (r"\.attn\.norm\.", ".attention.layernorm_embedding."),
    (r"\.attn\.pos\.", ".attention.position_bias."),
    (r"\.attn\.q\.", ".attention.q_proj."),
    (r"\.attn\.proj\.", ".attention.o_proj."),
    (r"\.attn\.kv\.", ".attention.kv_proj."),
    (r"^(decode_head\.layers\.\d)\.mlp\.", r"\1."),
)
# One fused matrix (2C, C): rows of the keys, then of the values.
SPLITS = {".kv_proj.": (".k_proj.", ".v_proj.")}

OWN_ENCODER = "encoder.stem.0.convolution.weight"
"""A key that marks an encoder saved by this package."""

UNUSED_CLASSIFIER = r"^head\."
"""ImageNet classifier, dropped where another head takes its place."""


def load_official(
    weights: str | Path | Mapping[str, torch.Tensor],
    hyper_parameters: str | Path | Mapping[str, Any],
    **overrides: Any,
) -> PreTrainedModel:
    """Load an official HLG checkpoint, or an ImageNet encoder under a new head.

    Widths, depths and stem are read from the weights. Official weights also set the rules of the release: padded
    tokens take part (`mask_padding=False`), and the global position bias is that of the copy of the code they come
    from (`global_bias` `"flat"` for classification weights, `"tuple4"` for dense ones), unless `overrides` say
    otherwise.

    Args:
        weights: classification, segmentation or detection checkpoint, or the dense backbone alone (file or state
            dict; also wrapped in `model`, `model_ema` or `state_dict`); or the folder or hub id of an HLG of this
            package, whose encoder is used with the rules of `hyper_parameters`.
        hyper_parameters: a published name, or the official sizes (JSON file or dict).
        overrides: configuration fields, for example `num_labels=19`.

    Returns:
        A model of the published name's task class, or of the class that the hyper-parameters describe.

    Raises:
        InputError: see `hf_denseseg.load_official`; also a checkpoint of another task.
        RunError: weights that cannot be fetched.
    """
    official = fetch_weights(weights)
    complete = False
    if isinstance(hyper_parameters, str) and hyper_parameters in VARIANTS and OWN_ENCODER in official:
        fields: dict[str, Any] = dict(VARIANTS[hyper_parameters])
    elif isinstance(hyper_parameters, str) and hyper_parameters in VARIANTS:
        fields = dict(VARIANTS[hyper_parameters])
        complete = _holds_head(official, fields["architectures"][0])
        # Only the dense backbone has norms after stages 1 to 3.
        rule = "tuple4" if any("norm_out_0." in key for key in official) else "flat"
        fields |= read_sizes(official) | {"global_bias": rule, "mask_padding": False}
        if complete:
            fields |= _labels_in(official, fields["architectures"][0])
    else:
        fields, complete = read_config(read_hyper_parameters(hyper_parameters)), True
    config = HlgConfig(**{**fields, **overrides})
    model = _model_class(config)(config)
    dropped = load_converted(model, official, _table(config, complete), may_miss=_may_miss(official, complete))
    logger.warning(
        "Loaded %d tensors of the %s (global_bias=%r, mask_padding=%s); dropped those without use: %s.%s",
        len(official) - len(dropped),
        "checkpoint" if complete else "encoder",
        config.global_bias,
        config.mask_padding,
        ", ".join(dropped) or "none",
        "" if complete else " The head has random weights, train it.",
    )
    return model.eval()


def read_sizes(official: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Read widths, heads, depths, stem and window embedding from the shapes of a checkpoint.

    Raises:
        InputError: there is no HLG encoder in it.
    """
    names = {key.removeprefix("backbone."): value for key, value in official.items()}
    try:
        stages: dict[str, Any] = {
            "hidden_sizes": [len(names[f"block{stage}.0.q.weight"]) for stage in range(1, 5)],
            "num_attention_heads": [len(names[f"block{stage}.0.pos_global.pos3.2.bias"]) for stage in range(1, 5)],
            "stem_kernel_sizes": [names[f"s0_conv.{index}.0.weight"].shape[-1] for index in (0, 1)],
        }
    except KeyError as error:
        raise InputError(
            f"The weights hold no HLG encoder: {error} is missing. Give a checkpoint of the official code (keys such "
            "as block1.0.q.weight, also below `backbone.`)."
        ) from error
    # Layers of stage k are the distinct i of the keys block{k}.{i}.*.
    depths = [len({key.split(".")[1] for key in names if key.startswith(f"block{stage}.")}) for stage in range(1, 5)]
    convolution = "block1.0.h0_conv.weight" in names
    return {**stages, "depths": depths, **({"window_embedding": "convolution"} if convolution else {})}


def read_config(official: Mapping[str, Any]) -> dict[str, Any]:
    """Translate official hyper-parameters to `HlgConfig` fields, the task class in `architectures` among them.

    Raises:
        InputError: a value is missing, or describes a network that HLG is not.
    """
    name, widths, heads, depths = need(official, "model", "embed_dims", "num_heads", "depths")
    kind = next((word for word in ("classification", "backbone", "SETR-PUP") if word in str(name)), None)
    if kind is None:
        raise InputError(f"model is {name!r}; HLG classification, HLG backbone or SETR-PUP-HLG is needed.")
    fixed = {"batch_norm_eps": 1e-5, "dpb_layer_norm_eps": 1e-5, "decoder_layer_norm_eps": 1e-5, "fuse_level": 0}
    for key, value in fixed.items():
        if official.get(key, value) != value:
            raise InputError(f"{key} is {official[key]}; only {value} is supported, as in the releases.")
    classes = {"classification": "ForImageClassification", "backbone": "Model", "SETR-PUP": "ForSemanticSegmentation"}
    fields = {
        "architectures": [f"Hlg{classes[kind]}"],
        "hidden_sizes": widths,
        "num_attention_heads": heads,
        "depths": depths,
        "mlp_ratio": official.get("mlp_ratio", 4),
        "window_size": official.get("window_size", 7),
        "stem_kernel_sizes": official.get("stem_kernel_sizes", [3, 3]),
        "layer_norm_eps": official.get("layer_norm_eps", 1e-6),
        "global_bias": str(official.get("global_bias", "tuple4")).split()[0],
        "mask_padding": False,
        "normalize_stages": kind != "classification",
    }
    if kind != "backbone":
        fields["num_labels"] = need(official, "num_classes")[0]
    if kind == "SETR-PUP":
        fields["decoder_hidden_size"], fields["auxiliary_hidden_size"] = need(
            official, "decoder_channels", "aux_channels"
        )
        fields["decoder_interval"] = official.get("decoder_interval", 8)
    return fields


def _model_class(config: HlgConfig) -> type[PreTrainedModel]:
    name = (config.architectures or [""])[0]
    return getattr(modeling_hlg, name, None) or getattr(modeling_hlg_detection, name)


def _holds_head(official: Mapping[str, torch.Tensor], task: str) -> bool:
    """Whether the checkpoint has the head of this task; an encoder alone has not.

    Raises:
        InputError: it has the head of another dense task.
    """
    marks = {
        "HlgForImageClassification": r"^head\.",
        "HlgForSemanticSegmentation": r"^decode_head\.",
        "HlgForObjectDetection": r"^bbox_head\.",
        "HlgForInstanceSegmentation": r"^roi_head\.",
    }
    found = [name for name, mark in marks.items() if any(re.search(mark, key) for key in official)]
    if found and found[0] not in (task, "HlgForImageClassification"):
        raise InputError(f"The checkpoint is one of {found[0]}, but {task} was asked for. Take a name of that task.")
    return task in found


def _labels_in(official: Mapping[str, torch.Tensor], task: str) -> dict[str, int]:
    """Number of classes of a complete checkpoint, from the shape of its classifier."""
    rows = {
        "HlgForImageClassification": ("head.weight", 1),
        "HlgForSemanticSegmentation": ("decode_head.conv_seg.weight", 1),
        **LABEL_ROWS,
    }
    key, per_class = rows[task]
    return {"num_labels": len(official[key]) // per_class} if key in official else {}


def _table(config: HlgConfig, complete: bool) -> KeyTable:
    task = (config.architectures or [""])[0]
    own = (r"^encoder\.", "hlg.encoder.")  # an encoder saved by this package
    renames: Renames = (own, *DETECTION_RENAMES.get(task, ()), *HEADS, *ENCODER)
    if task == "HlgModel":
        renames = (*renames, (r"^hlg\.", ""))
    return KeyTable(renames, SPLITS, dropped=r"(?!)" if complete else UNUSED_CLASSIFIER)


def _may_miss(official: Mapping[str, torch.Tensor], complete: bool) -> str:
    """Pattern of our weights that may be missing, and start fresh: the head of an encoder, and norms of stages 1 to 3.

    Classification checkpoints lack those norms. `(?!)` matches nothing.
    """
    if complete:
        return r"(?!)"
    without_norms = not any(re.search(r"norm_out_0\.|^encoder\.layernorms\.0\.", key) for key in official)
    return r"^(?!hlg\.)" + (r"|^hlg\.encoder\.layernorms\.[012]\." if without_norms else "")


__all__ = ["load_official", "read_config", "read_sizes"]
