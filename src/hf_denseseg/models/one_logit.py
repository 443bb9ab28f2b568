"""One logit that tells two classes apart: their names, and the logits of both."""

import torch
from transformers import PreTrainedConfig

from hf_denseseg.models.configuration import CheckedFields


def name_two_classes(config: PreTrainedConfig) -> None:
    """Name the two classes that the one logit of a segmentation model tells apart; for other models do nothing.

    transformers counts the names for `num_labels`, and its pipelines look predicted ids up in `id2label`: so both
    names are kept, with `one_logit`.
    """
    if config.num_labels == 1 and len(config.id2label or {}) < 2:
        name = class_names(config)[0]
        config.one_logit = True
        config.id2label = {0: "background", 1: "foreground" if name == "LABEL_0" else name}
        config.label2id = {name: index for index, name in config.id2label.items()}


def class_names(config: PreTrainedConfig) -> list[str]:
    """Names of the classes that a model predicts, by id.

    The configurations of transformers have one name for one logit: that of the foreground.
    """
    names = [str(name) for _, name in sorted((config.id2label or {}).items())]
    return ["background", *names] if len(names) == 1 and not isinstance(config, CheckedFields) else names


def two_logits(logits: torch.Tensor) -> torch.Tensor:
    """Logits of both classes: one logit `(B, 1, h, w)` gets a 0 for class 0 before it, several stay as they are.

    The softmax of the two is (1 - sigmoid, sigmoid) of the one, and their cross-entropy is the binary one.
    """
    return torch.cat([torch.zeros_like(logits), logits], 1) if logits.shape[1] == 1 else logits


__all__ = ["class_names", "name_two_classes", "two_logits"]
