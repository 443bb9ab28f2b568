"""Parameter groups, their schedule, class weights: which weight learns how fast, which class counts how much."""

import json
import logging
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from hf_denseseg.errors import InputError

logger = logging.getLogger(__name__)


def parameter_groups(
    model: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float,
    head_multiplier: float = 1.0,
    layer_decay: float | None = None,
    decay_everything: bool = False,
    no_decay_names: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """Sort parameters by learning rate and weight decay.

    Norms, biases (all one-dimensional weights) and the tokens and position tables named in the model's
    `_no_weight_decay` do not decay, unless `decay_everything`; with `no_decay_names` only names that hold one of these
    words are spared. What lies outside the base model is head, except for the model's `_encoder_rate_modules`; a model
    whose base model is more than the pre-trained encoder says where that lies (`_encoder_rate_prefix`). Layer-wise
    decay asks the model's `parameter_depth(name) -> (depth, deepest)` and scales the base model by
    `layer_decay ** (deepest - depth)`.

    Returns:
        Groups as torch optimizers take them, each with its `names`.

    Raises:
        InputError: `layer_decay` is given and the model does not say how deep its parameters lie.
    """
    prefix = getattr(model, "_encoder_rate_prefix", getattr(model, "base_model_prefix", "")) + "."
    spared: tuple[str, ...] = getattr(model, "_no_weight_decay", ())
    encoder_rate: tuple[str, ...] = getattr(model, "_encoder_rate_modules", ())
    depth_of: Callable[[str], tuple[int, int]] | None = getattr(model, "parameter_depth", None)
    if layer_decay is not None and depth_of is None:
        raise InputError(f"layer_decay is not known for {type(model).__name__}: take it out of the recipe.")
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        inner = name.removeprefix("module.")
        in_base = inner.startswith(prefix)
        in_head = not in_base and inner.partition(".")[0] not in encoder_rate
        rate = learning_rate * (head_multiplier if in_head else 1.0)
        if layer_decay is not None and depth_of is not None and in_base:
            depth, deepest = depth_of(name)
            rate *= layer_decay ** (deepest - depth)
        if no_decay_names is None:
            is_spared = not decay_everything and (parameter.ndim <= 1 or name.endswith(spared or ("\0",)))
        else:
            is_spared = any(word in name for word in no_decay_names)
        decay = 0.0 if is_spared else weight_decay
        group = groups.setdefault((rate, decay), {"params": [], "names": [], "lr": rate, "weight_decay": decay})
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def polynomial_schedule(
    optimizer: torch.optim.Optimizer,
    *,
    warmup_steps: int,
    total_steps: int,
    power: float = 1.0,
    lr_end: float = 1e-7,
    warmup_start: float = 0.0,
) -> LambdaLR:
    """Let every group fall from its own learning rate to the same floor, as mmcv's `poly` policy with `min_lr` does.

    After a linear warmup: `(start - lr_end) * (1 - step / steps) ** power + lr_end`. The schedule of transformers
    multiplies all groups by one factor: a head with ten times the rate would end at ten times the floor.

    Args:
        optimizer: its groups hold the rates to start from.
        warmup_steps: optimizer steps of the warmup.
        total_steps: optimizer steps in all.
        power: exponent; 1 is a straight line.
        lr_end: learning rate after the last step.
        warmup_start: learning rate of the first step of the warmup.

    Raises:
        InputError: a group does not start above the floor.
    """
    return _falling(
        optimizer, warmup_steps, total_steps, lr_end, warmup_start, lambda progress: max(0.0, 1 - progress) ** power
    )


def cosine_schedule(
    optimizer: torch.optim.Optimizer,
    *,
    warmup_steps: int,
    total_steps: int,
    lr_end: float = 0.0,
    warmup_start: float = 0.0,
) -> LambdaLR:
    """Let every group fall along half a cosine to the same floor, after a linear warmup from a given rate.

    `lr_end + (start - lr_end) * (1 + cos(pi * step / steps)) / 2`; arguments as for `polynomial_schedule`. The cosine
    of transformers warms up from 0 and has its floor as a share.

    Raises:
        InputError: a group does not start above the floor.
    """
    return _falling(
        optimizer,
        warmup_steps,
        total_steps,
        lr_end,
        warmup_start,
        lambda progress: (1 + math.cos(math.pi * min(1.0, progress))) / 2,
    )


def _falling(
    optimizer: torch.optim.Optimizer,
    warmup_steps: int,
    total_steps: int,
    lr_end: float,
    warmup_start: float,
    remaining: Callable[[float], float],
) -> LambdaLR:
    """Warm up, then fall to `lr_end`; `remaining(progress)` is the share above it, 1 at progress 0 and 0 at 1."""
    starts = [group.get("initial_lr", group["lr"]) for group in optimizer.param_groups]
    if min(starts) <= lr_end:
        raise InputError(
            f"lr_scheduler_kwargs: lr_end is {lr_end}, but a group of weights starts at the learning rate "
            f"{min(starts)}. Give a smaller lr_end, or a larger learning_rate or layer_decay."
        )

    def factor(step: int, start: float) -> float:
        if step < warmup_steps:
            return _warmup_factor(step, warmup_steps, warmup_start / start)
        share = remaining((step - warmup_steps) / max(1, total_steps - warmup_steps))
        return ((start - lr_end) * share + lr_end) / start  # LambdaLR multiplies by the start

    return LambdaLR(optimizer, [partial(factor, start=start) for start in starts])


def _warmup_factor(step: int, warmup_steps: int, low: float) -> float:
    return low + (1 - low) * (step / warmup_steps)


def step_schedule(
    optimizer: torch.optim.Optimizer,
    *,
    total_steps: int,
    drop_at: float | Sequence[float],
    factor: float,
    warmup_steps: int = 0,
    warmup_start: float = 0.0,
) -> LambdaLR:
    """Constant, and at each drop `factor` times what it was (mmcv's `step` policy), after a linear warmup.

    Args:
        optimizer: its groups hold the rates to start from.
        total_steps: optimizer steps in all.
        drop_at: share of the steps before the drop, between 0 and 1; several for several drops.
        factor: what the learning rates are multiplied with at each drop.
        warmup_steps: optimizer steps of the warmup.
        warmup_start: learning rate of the first step of the warmup.

    Raises:
        InputError: `drop_at` is no share, or not in order.
    """
    shares = [drop_at] if isinstance(drop_at, int | float) else list(drop_at)
    if not shares or not all(0 < share < 1 for share in shares) or sorted(set(shares)) != shares:
        raise InputError(
            f"lr_scheduler_kwargs: drop_at is {drop_at}. Give a share of the steps, such as 0.66, or rising ones."
        )
    drops = [round(share * total_steps) for share in shares]

    def multiple(step: int, start: float) -> float:
        if step < warmup_steps:
            return _warmup_factor(step, warmup_steps, warmup_start / start)
        return factor ** sum(step >= drop for drop in drops)

    starts = [group.get("initial_lr", group["lr"]) for group in optimizer.param_groups]
    return LambdaLR(optimizer, [partial(multiple, start=start) for start in starts])


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


def warn_of_stale_statistics(config: Any, steps: int) -> None:
    """Warn if a run is too short for the `batch_norm_momentum` of a configuration.

    In evaluation BatchNorm would still use much of its initial statistics.
    """
    kept = (1 - getattr(config, "batch_norm_momentum", 1.0)) ** steps
    if kept > 0.2:
        logger.warning(
            "After %d steps BatchNorm still holds %.0f %% of its initial statistics: its momentum is for longer runs. "
            "Predictions will be poor: set `config_overrides: {batch_norm_momentum: 0.1}`.",
            steps,
            100 * kept,
        )
