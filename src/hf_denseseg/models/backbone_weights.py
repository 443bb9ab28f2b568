"""Pre-trained weights of torchvision, timm or transformers -> the backbone inside a segmentation model."""

import logging
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, TimmBackboneConfig

from hf_denseseg.models.conversion import KeyTable, fetch_weights, load_converted

logger = logging.getLogger(__name__)

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


def load_backbone(
    model: PreTrainedModel, weights: str | Path | Mapping[str, torch.Tensor], prefix: str = "backbone."
) -> None:
    """Load pre-trained weights into the backbone of a model; the rest keeps the weights that it has.

    Args:
        model: receives the weights.
        weights: `timm:NAME`, the folder or hub id of a model of transformers (or of a model of this package with a
            backbone, which is taken), or a file or state dict of torchvision or timm.
        prefix: of the names of the backbone's weights in the model.

    Raises:
        InputError: unused, missing or wrongly shaped keys (all listed), or weights that cannot be read.
        RunError: weights that cannot be fetched.
    """
    official = fetch_weights(weights)
    backbone: Any = model.get_submodule(prefix.removesuffix("."))
    renamed = rename_backbone(official, set(backbone.state_dict()), complete_names(backbone.config), prefix)
    others = rf"^(?!{re.escape(prefix)})"
    dropped = load_converted(model, renamed, KeyTable((), {}, dropped=others), may_miss=others)
    logger.warning(
        "Loaded %d tensors of the backbone; dropped those without use: %s. Everything else has random weights, train "
        "it.",
        len(official) - len(dropped),
        ", ".join(dropped) or "none",
    )


def complete_names(config: PreTrainedConfig) -> set[str]:
    """Names of the weights of a network of timm with its classifier; none for a network of transformers."""
    if not isinstance(config, TimmBackboneConfig):
        return set()
    import timm

    with torch.device("meta"):
        return set(timm.create_model(str(config.backbone), pretrained=False).state_dict())


def rename_backbone(
    official: Mapping[str, torch.Tensor], wanted: set[str], complete_network: Collection[str], prefix: str
) -> dict[str, torch.Tensor]:
    """Rename the weights of a backbone to the names in our model.

    Args:
        official: state dict of transformers, timm, torchvision or of a model with a backbone.
        wanted: names in our backbone.
        complete_network: names in the classifier that the backbone is a part of, see `complete_names`.
        prefix: of the backbone in our model.

    Returns:
        The same tensors: those of the backbone under `prefix`, others (heads) under the names they had.
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
        renamed[key if behind_last_stage else prefix + (found or name)] = tensor
    return renamed


__all__ = ["complete_names", "load_backbone", "rename_backbone"]
