"""Parameter groups, learning rate schedules and class weights."""

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
from transformers import PreTrainedConfig, TrainingArguments

from hf_denseseg.errors import InputError

logger = logging.getLogger(__name__)


def encoder_prefix(model: nn.Module) -> str:
    """Name of the submodule with the pre-trained weights, which learns at the plain rate.

    It is the base model; if that is more than the pre-trained encoder, the model defines `_encoder_rate_prefix`; a
    model of transformers without a base model has a `backbone`.
    """
    return getattr(model, "_encoder_rate_prefix", "") or getattr(model, "base_model_prefix", "") or "backbone"


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
    """Group parameters by learning rate and weight decay.

    Parameters outside the encoder, see `encoder_prefix`, belong to the head and learn `head_multiplier` times faster,
    except for the model's `_encoder_rate_modules`.

    Args:
        model: with the attributes named here, as far as it needs them.
        learning_rate: of the encoder.
        weight_decay: of the parameters that decay.
        head_multiplier: factor on the learning rate of the head.
        layer_decay: scales the rates of the base model by `layer_decay ** (deepest - depth)`, where the model's
            `parameter_depth(name)` returns `(depth, deepest)`; None: no scaling.
        decay_everything: apply weight decay also to norms, biases (all one-dimensional parameters) and the tokens and
            position tables in the model's `_no_weight_decay`.
        no_decay_names: if given, exactly the parameters whose names contain one of these do not decay.

    Returns:
        Groups for a torch optimizer, each with the `names` of its parameters.

    Raises:
        InputError: `layer_decay` is given and the model has no `parameter_depth`.
    """
    prefix = encoder_prefix(model) + "."
    no_decay: tuple[str, ...] = getattr(model, "_no_weight_decay", ())
    encoder_rate: tuple[str, ...] = getattr(model, "_encoder_rate_modules", ())
    depth_of: Callable[[str], tuple[int, int]] | None = getattr(model, "parameter_depth", None)
    if layer_decay is not None and depth_of is None:
        raise InputError(f"{type(model).__name__} does not support layer_decay: take it out of the recipe.")
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        inner = name.removeprefix("module.")  # of DistributedDataParallel
        in_base = inner.startswith(prefix)
        in_head = not in_base and inner.partition(".")[0] not in encoder_rate
        rate = learning_rate * (head_multiplier if in_head else 1.0)
        if layer_decay is not None and depth_of is not None and in_base:
            depth, deepest = depth_of(name)  # 0 for the embeddings, `deepest` right below the head
            rate *= layer_decay ** (deepest - depth)
        if no_decay_names is None:
            is_exempt = not decay_everything and (parameter.ndim <= 1 or name.endswith(no_decay))
        else:
            is_exempt = any(part in name for part in no_decay_names)
        decay = 0.0 if is_exempt else weight_decay
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
    """Decay the learning rate of each group polynomially to the same final rate, as mmcv's `poly` with `min_lr`.

    After a linear warmup: `(start - lr_end) * (1 - step / steps) ** power + lr_end`. The schedule of transformers
    multiplies all groups by one factor, so that a head with ten times the rate would end at ten times the final rate.

    Args:
        optimizer: its groups hold the initial rates.
        warmup_steps: optimizer steps of the warmup.
        total_steps: all optimizer steps.
        power: exponent; 1 decays linearly.
        lr_end: learning rate after the last step.
        warmup_start: learning rate of the first step of the warmup.

    Raises:
        InputError: the initial rate of a group is not above `lr_end`.
    """
    return _decay_to_floor(
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
    """Decay the learning rate of each group by a half cosine to the same final rate, after a linear warmup.

    `lr_end + (start - lr_end) * (1 + cos(pi * step / steps)) / 2`; arguments as for `polynomial_schedule`. The cosine
    schedule of transformers warms up from 0, and its final rate is a fraction of the initial one.

    Raises:
        InputError: the initial rate of a group is not above `lr_end`.
    """
    return _decay_to_floor(
        optimizer,
        warmup_steps,
        total_steps,
        lr_end,
        warmup_start,
        lambda progress: (1 + math.cos(math.pi * min(1.0, progress))) / 2,
    )


def _decay_to_floor(
    optimizer: torch.optim.Optimizer,
    warmup_steps: int,
    total_steps: int,
    lr_end: float,
    warmup_start: float,
    remaining: Callable[[float], float],
) -> LambdaLR:
    """Warm up, then decay to `lr_end`.

    Args:
        optimizer: see `polynomial_schedule`, as for the other arguments.
        warmup_steps: optimizer steps of the warmup.
        total_steps: all optimizer steps.
        lr_end: learning rate after the last step.
        warmup_start: learning rate of the first step of the warmup.
        remaining: progress after the warmup, from 0 to 1 -> fraction of `start - lr_end` that is left, from 1 to 0.
    """
    # A resumed optimizer has the current rate in "lr" and the one it started from in "initial_lr".
    starts = [group.get("initial_lr", group["lr"]) for group in optimizer.param_groups]
    if min(starts) <= lr_end:
        raise InputError(
            f"lr_scheduler_kwargs: lr_end is {lr_end}, but a parameter group starts at the learning rate "
            f"{min(starts)}. Give a smaller lr_end, or a larger learning_rate or layer_decay."
        )

    def factor(step: int, start: float) -> float:
        if step < warmup_steps:
            return _warmup_factor(step, warmup_steps, warmup_start / start)
        fraction = remaining((step - warmup_steps) / max(1, total_steps - warmup_steps))
        return ((start - lr_end) * fraction + lr_end) / start  # LambdaLR multiplies by `start`

    return LambdaLR(optimizer, [partial(factor, start=start) for start in starts])


def _warmup_factor(step: int, warmup_steps: int, low: float) -> float:
    """Linear from `low` at step 0 to 1 at step `warmup_steps`."""
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
    """Constant, multiplied by `factor` at each drop (mmcv's `step` policy), after a linear warmup.

    Args:
        optimizer: its groups hold the initial rates.
        total_steps: all optimizer steps.
        drop_at: fraction of the steps before the drop, between 0 and 1; several for several drops.
        factor: multiplies the learning rates at each drop.
        warmup_steps: optimizer steps of the warmup.
        warmup_start: learning rate of the first step of the warmup.

    Raises:
        InputError: `drop_at` is not a fraction, or its fractions are not in ascending order.
    """
    fractions = [drop_at] if isinstance(drop_at, int | float) else list(drop_at)
    if not fractions or not all(0 < each < 1 for each in fractions) or sorted(set(fractions)) != fractions:
        raise InputError(
            f"lr_scheduler_kwargs: drop_at is {drop_at}. Give a fraction of the steps, such as 0.66, or several in "
            "ascending order."
        )
    drops = [round(each * total_steps) for each in fractions]

    def multiple(step: int, start: float) -> float:
        if step < warmup_steps:
            return _warmup_factor(step, warmup_steps, warmup_start / start)
        return factor ** sum(step >= drop for drop in drops)

    starts = [group.get("initial_lr", group["lr"]) for group in optimizer.param_groups]
    return LambdaLR(optimizer, [partial(multiple, start=start) for start in starts])


def load_class_weights(source: str | list[float] | None, num_labels: int) -> torch.Tensor | None:
    """Class weights `(num_labels,)` from a list, or from `FILE:NAME` with a file of `denseseg data stats`.

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


def warn_of_stale_statistics(config: PreTrainedConfig, steps: int) -> None:
    """Warn if a run is too short for the `batch_norm_momentum` of a configuration.

    Running statistics start at mean 0 and variance 1 and keep (1 - momentum) of their value per step, so that after a
    short run BatchNorm would normalize by the initial ones in evaluation.
    """
    kept = (1 - getattr(config, "batch_norm_momentum", 1.0)) ** steps
    if kept > 0.2:
        logger.warning(
            "After %d steps BatchNorm still holds %.0f %% of its initial statistics: its momentum is for longer runs. "
            "Predictions will be poor: set `config_overrides: {batch_norm_momentum: 0.1}`.",
            steps,
            100 * kept,
        )


def refuse_single_values(model: nn.Module, images: int, args: TrainingArguments, steps: int) -> None:
    """Refuse a run whose last batch of an epoch holds one image that a BatchNorm cannot normalize.

    Pyramid pooling (UperNet) averages a map to one value per channel; one image then has no variance, and torch raises
    an error in training. Several processes fill up their last batches.

    Raises:
        InputError: with the number of images and another batch size.
    """
    batch = args.train_batch_size
    last = images % batch or batch
    reached = steps * args.gradient_accumulation_steps >= math.ceil(images / batch)
    pooling = next((each for each in model.modules() if _normalizes_single_values(each)), None)
    if args.world_size > 1 or last > 1 or not reached or pooling is None:
        return
    fitting = next(size for size in range(max(batch, 2), images + 2) if images % size != 1)
    raise InputError(
        f"The last batch of an epoch would hold one image ({images} images in batches of {batch}), but "
        f"{type(pooling).__name__} normalizes one value per image and channel, which BatchNorm cannot do for a single "
        f"image in training. Use another per_device_train_batch_size, such as {fitting}."
    )


def _normalizes_single_values(module: nn.Module) -> bool:
    """Whether a child pools to one value and a BatchNorm stands in a later child."""
    pooled = False
    for child in module.children():
        if pooled and any(isinstance(each, nn.BatchNorm2d) for each in child.modules()):
            return True
        pooled = pooled or (isinstance(child, nn.AdaptiveAvgPool2d) and child.output_size in (1, (1, 1)))
    return False
