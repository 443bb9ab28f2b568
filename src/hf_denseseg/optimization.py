"""Parameter groups and class weights: which weight learns how fast, which class counts how much."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_denseseg.errors import InputError


def parameter_groups(
    model: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float,
    head_multiplier: float = 1.0,
    layer_decay: float | None = None,
) -> list[dict[str, Any]]:
    """Sort parameters by learning rate and weight decay.

    Norms, biases (all one-dimensional weights) and the tokens and position tables named in the model's
    `_no_weight_decay` do not decay. What lies outside the base model is head. Layer-wise decay asks the model's
    `parameter_depth(name) -> (depth, deepest)` and scales by `layer_decay ** (deepest - depth)`.

    Returns:
        Groups as torch optimizers take them, each with its `names`.

    Raises:
        InputError: `layer_decay` is given and the model does not say how deep its parameters lie.
    """
    prefix = getattr(model, "base_model_prefix", "") + "."
    spared: tuple[str, ...] = getattr(model, "_no_weight_decay", ())
    depth_of: Callable[[str], tuple[int, int]] | None = getattr(model, "parameter_depth", None)
    if layer_decay is not None and depth_of is None:
        raise InputError(f"layer_decay is not known for {type(model).__name__}: take it out of the recipe.")
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        in_head = not name.removeprefix("module.").startswith(prefix)
        rate = learning_rate * (head_multiplier if in_head else 1.0)
        if layer_decay is not None and depth_of is not None and not in_head:
            depth, deepest = depth_of(name)
            rate *= layer_decay ** (deepest - depth)
        decay = 0.0 if parameter.ndim <= 1 or name.endswith(spared or ("\0",)) else weight_decay
        group = groups.setdefault((rate, decay), {"params": [], "names": [], "lr": rate, "weight_decay": decay})
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def load_class_weights(source: str | list[float] | None, num_labels: int) -> torch.Tensor | None:
    """Class weights `(num_labels,)` from a list, or from `FILE:NAME` as `denseseg data stats` writes it.

    Raises:
        InputError: the file, the name in it, or the number of weights is wrong.
    """
    if source is None:
        return None
    if isinstance(source, str):
        path, _, name = source.rpartition(":")
        try:
            table = json.loads(Path(path or source).read_text())["class_weights"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"class_weights: {source} is not FILE:NAME with a file of `denseseg data stats` ({error})."
            ) from error
        if name not in table:
            raise InputError(f"class_weights: no weights {name!r} in {path}; it holds {', '.join(table)}.")
        source = table[name]
    if len(source) != num_labels:
        raise InputError(f"class_weights: {len(source)} weights for {num_labels} classes. Give one for each class.")
    return torch.tensor(source, dtype=torch.float32)
