"""Recipes: one flat YAML file per published row, checked key by key, overridable on the command line."""

import logging
import sys
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import TrainingArguments

from hf_denseseg.errors import InputError
from hf_denseseg.inference import InferenceSettings
from hf_denseseg.naming import unknown_name

logger = logging.getLogger(__name__)


@dataclass
class ModelArguments:
    """Which model is trained, and from what it starts."""

    model: str = field(
        default="dsct-tiny-sac", metadata={"help": "published name (`denseseg models`), checkpoint folder or hub id"}
    )
    config_overrides: dict | None = field(
        default=None, metadata={"help": "config fields that differ from the published ones: '{drop_path_rate: 0.2}'"}
    )
    encoder_weights: str | None = field(
        default=None, metadata={"help": "official ImageNet checkpoint of the encoder; None starts from random weights"}
    )
    published: dict | None = field(
        default=None, metadata={"help": "the paper's numbers for this row, as fractions: '{mean_iou: 0.4866}'"}
    )


@dataclass
class DataArguments:
    """What the model is trained and tested on, how pictures are augmented and how they are tested."""

    dataset: str = field(default="synthetic", metadata={"help": "'synthetic', a folder, or a hub dataset id"})
    label_spec: str | None = field(default=None, metadata={"help": "label specification file (YAML or JSON)"})
    dataset_columns: dict | None = field(
        default=None, metadata={"help": "our column: its name in the data, '{label: mask}'"}
    )
    dataset_revision: str | None = field(default=None, metadata={"help": "revision of a hub dataset"})
    streaming: bool = field(default=False, metadata={"help": "read shards as a stream, without an index"})
    train_split: str = field(default="train", metadata={"help": "split that is trained on"})
    eval_split: str = field(default="validation", metadata={"help": "split that is evaluated"})
    max_train_samples: int | None = field(default=None, metadata={"help": "use only the first pictures"})
    max_eval_samples: int | None = field(default=None, metadata={"help": "use only the first pictures"})

    crop_size: list[int] = field(
        default_factory=lambda: [512, 512], metadata={"help": "training crop in pixels: height width"}
    )
    base_size: list[int] | None = field(
        default=None,
        metadata={"help": "box (height width) into which a picture is fitted before random scaling; None: own size"},
    )
    scale_range: list[float] = field(
        default_factory=lambda: [0.5, 2.0], metadata={"help": "random scale: smallest largest"}
    )
    max_class_ratio: float = field(default=0.75, metadata={"help": "no class may fill more of a crop (10 tries)"})
    flip: bool = field(default=True, metadata={"help": "mirror every second picture"})
    photometric_distortion: bool = field(
        default=True, metadata={"help": "random brightness, contrast, saturation and hue"}
    )

    test_mode: str = field(default="whole", metadata={"help": "'whole' picture, or 'slide' a window"})
    test_crop_size: list[int] | None = field(default=None, metadata={"help": "window in pixels: height width"})
    test_stride: list[int] | None = field(default=None, metadata={"help": "step of the window: height width"})
    test_base_size: list[int] | None = field(default=None, metadata={"help": "box into which a picture is fitted"})
    test_scales: list[float] = field(default_factory=lambda: [1.0], metadata={"help": "multi-scale ratios"})
    test_raise_short_side: bool = field(
        default=False, metadata={"help": "SETR: no short side below the window's; of several scales no long limit"}
    )
    test_pad_to_window: bool = field(
        default=False, metadata={"help": "pad a picture smaller than the window to it; else the window shrinks"}
    )
    test_flip: bool = field(default=False, metadata={"help": "average with the mirrored picture"})

    def inference_settings(self) -> InferenceSettings:
        """The test protocol as `inference` takes it."""
        return InferenceSettings.from_dict(
            {
                "mode": self.test_mode,
                "crop_size": self.test_crop_size,
                "stride": self.test_stride,
                "base_size": self.test_base_size,
                "scales": self.test_scales,
                "flip": self.test_flip,
                "raise_short_side": self.test_raise_short_side,
                "pad_to_window": self.test_pad_to_window,
            }
        )


@dataclass
class SegmentationTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments` with what the papers' schedules need besides."""

    output_dir: str | None = field(default=None, metadata={"help": "run folder (default: runs/<recipe name>)"})
    max_steps: int = field(default=1000, metadata={"help": "optimizer steps; the budget of a run"})
    learning_rate: float = field(default=1.0e-4, metadata={"help": "peak learning rate"})
    lr_scheduler_type: str = field(default="polynomial", metadata={"help": "schedule; see transformers"})
    lr_scheduler_kwargs: dict | None = field(
        default_factory=lambda: {"power": 0.9, "lr_end": 0.0},
        metadata={"help": "polynomial: power, lr_end = the floor; constant: drop_at = share of steps, factor"},
    )
    weight_decay: float = field(default=0.01, metadata={"help": "AdamW decay of the weights that decay"})
    decay_everything: bool = field(
        default=False, metadata={"help": "weight decay also on norms, biases, tokens and tables"}
    )
    max_grad_norm: float = field(default=0.0, metadata={"help": "clip the gradient norm; 0 does not clip"})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "pictures per device and step"})
    per_device_eval_batch_size: int = field(default=1, metadata={"help": "pictures per device in evaluation"})
    eval_strategy: str = field(default="steps", metadata={"help": "when to evaluate: no, steps, epoch"})
    eval_steps: float | None = field(default=None, metadata={"help": "evaluate every so many steps (default: 10 x)"})
    save_steps: float = field(default=0, metadata={"help": "checkpoint every so many steps (default: eval_steps)"})
    save_total_limit: int | None = field(default=2, metadata={"help": "checkpoints kept, oldest deleted first"})
    logging_steps: float = field(default=0, metadata={"help": "log every so many steps (default: 100 x)"})
    seed: int = field(default=0, metadata={"help": "seed of weights, order, augmentation and drop-out"})

    head_learning_rate_multiplier: float = field(
        default=1.0, metadata={"help": "factor on the learning rate of all heads"}
    )
    layer_decay: float | None = field(
        default=None, metadata={"help": "factor on the learning rate per layer below the head; None: off"}
    )
    loss_normalization: str | None = field(
        default=None,
        metadata={"help": "divide the loss by the 'valid' pixels or by 'all' (default: as the model's config says)"},
    )
    class_weights: str | list[float] | None = field(
        default=None, metadata={"help": "JSON file of `denseseg data stats`, as FILE:enet or FILE:median"}
    )
    ohem_threshold: float | None = field(default=None, metadata={"help": "probability below which a pixel is hard"})
    ohem_min_kept: int = field(default=100_000, metadata={"help": "pixels kept per picture at least"})
    channels_last: bool = field(
        default=False, metadata={"help": "keep maps as (batch, height, width, channels) in memory; faster on CPUs"}
    )
    sync_batch_norm: bool = field(default=True, metadata={"help": "BatchNorm statistics over all GPUs"})
    ema_decay: float | None = field(default=None, metadata={"help": "average the weights with this decay"})
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "see DistributedDataParallel"})

    def __post_init__(self) -> None:
        """Derive the steps that were left open, then let transformers check the rest."""
        if self.max_steps < 1:
            raise InputError(f"max_steps is {self.max_steps}: give the number of optimizer steps, at least 1.")
        if self.loss_normalization not in (None, "valid", "all"):
            raise InputError(f"loss_normalization is {self.loss_normalization!r}: use 'valid' or 'all'.")
        if self.warmup_steps >= self.max_steps:
            logger.warning(
                "warmup_steps is cut from %d to %d, since max_steps is %d.",
                self.warmup_steps,
                self.max_steps - 1,
                self.max_steps,
            )
            self.warmup_steps = self.max_steps - 1
        self.eval_steps = self.eval_steps or max(1, self.max_steps // 10)
        self.save_steps = self.save_steps or self.eval_steps
        self.logging_steps = self.logging_steps or max(1, self.max_steps // 100)
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.cuda.is_available()
        if self.disable_tqdm is None:
            self.disable_tqdm = not sys.stderr.isatty()
        # Ours, not the user's: tensors are made and named by the data part, statistics are summed batch by batch.
        self.remove_unused_columns = False
        self.label_names = ["labels"]
        self.batch_eval_metrics = True
        super().__post_init__()


ARGUMENT_CLASSES: tuple[Any, ...] = (ModelArguments, DataArguments, SegmentationTrainingArguments)


class Recipe(typing.NamedTuple):
    """A checked recipe: what is trained, on what, and how; `given` holds the keys that differ from the defaults."""

    model: ModelArguments
    data: DataArguments
    training: SegmentationTrainingArguments
    given: dict[str, Any]

    def to_yaml(self) -> str:
        """The given keys as text that `load_recipe` reads back to an equal recipe."""
        return yaml.safe_dump(self.given, sort_keys=False)


def recipe_fields() -> dict[str, tuple[Any, Any]]:
    """Every key a recipe may hold: key -> (argument class, type)."""
    return {
        name: (owner, annotation)
        for owner in ARGUMENT_CLASSES
        for name, annotation in typing.get_type_hints(owner).items()
        if name in owner.__dataclass_fields__ and owner.__dataclass_fields__[name].init
    }


def load_recipe(path: str | Path | None, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe file and the command-line overrides that follow it.

    Args:
        path: YAML file, or None for the defaults alone.
        overrides: words such as `["--max_steps", "100", "--crop_size", "256", "256"]`; they win over the file.

    Raises:
        InputError: no such file, not a mapping, a key that does not exist (the nearest one is proposed) or a value of
            the wrong type.
    """
    given = {} if path is None else _read_yaml(Path(path))
    _check(given, f"Recipe {path}")
    given |= parse_overrides(overrides or [])
    given.setdefault("output_dir", f"runs/{Path(path).stem}" if path else "runs/default")
    fields = recipe_fields()
    try:
        model, data, training = (
            owner(**{key: value for key, value in given.items() if fields[key][0] is owner})
            for owner in ARGUMENT_CLASSES
        )
    except (ValueError, TypeError, ImportError) as error:  # what transformers finds wrong in a value
        raise InputError(f"Recipe {path or 'from the command line'}: {error}") from error
    data.inference_settings()
    return Recipe(model, data, training, given)


def parse_overrides(words: list[str]) -> dict[str, Any]:
    """Turn `--key value [value ...]` into a dictionary; values are read as YAML, a bare `--flag` is true.

    Raises:
        InputError: a word without its `--key`, an unknown key or a value of the wrong type.
    """
    values: dict[str, Any] = {}
    key = None
    for word in words:
        if word.startswith("--"):
            key, _, rest = word[2:].partition("=")
            key = key.replace("-", "_")
            values[key] = [rest] if rest else []
        elif key is None:
            raise InputError(f"{word!r} stands alone: write `--key value`, for example `--max_steps 100`.")
        else:
            values[key].append(word)
    fields = recipe_fields()
    parsed = {name: _parse_words(fields[name][1] if name in fields else None, parts) for name, parts in values.items()}
    _check(parsed, "Command line")
    return parsed


def _parse_words(annotation: Any, words: list[str]) -> Any:
    if not words:
        return True
    kinds = _kinds(annotation)
    parsed = [yaml.safe_load(word) for word in words]
    # YAML takes 1e-4 for text, and no for false; on a command line the meaning is plain.
    parsed = [_as_number(value) if {float, list} & kinds else value for value in parsed]
    if str in kinds and list not in kinds:
        parsed = [value if type(value) in kinds else word for value, word in zip(parsed, words, strict=True)]
    several = len(parsed) > 1 or (list in kinds and str not in kinds and not isinstance(parsed[0], list))
    return parsed if several else parsed[0]


def _as_number(value: Any) -> Any:
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(
            f"No recipe at {path}. The recipes of the papers lie in scripts/recipes; give the path of one."
        ) from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"Recipe {path} is no readable YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise InputError(f"Recipe {path} holds no `key: value` lines.")
    return content


def _check(values: dict[str, Any], where: str) -> None:
    fields = recipe_fields()
    for key, value in values.items():
        if key not in fields:
            hint = unknown_name("key", str(key), fields, otherwise="`denseseg train --keys` lists the keys.")
            raise InputError(f"{where}: {hint}")
        kinds = _kinds(fields[key][1])
        allowed = tuple(kinds | {int} if float in kinds else kinds)
        # bool is an int in Python, but `max_steps: true` is a mistake.
        if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in kinds):
            names = " or ".join(sorted(kind.__name__ for kind in kinds - {type(None)}))
            hint = " Write numbers with a dot: 1.0e-4." if float in kinds and isinstance(value, str) else ""
            hint = " YAML takes yes and no for true and false: quote them." if isinstance(value, bool) else hint
            raise InputError(f"{where}: {key} must be {names}, but is {value!r} ({type(value).__name__}).{hint}")


def _kinds(annotation: Any) -> set[type]:
    """Plain Python types that a field annotation accepts."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return set().union(*(_kinds(part) for part in typing.get_args(annotation)))
    if typing.get_origin(annotation) is typing.Literal:
        return {type(choice) for choice in typing.get_args(annotation)}
    plain = typing.get_origin(annotation) or annotation
    # Enumerations and nested dataclasses of transformers are given by name.
    return {plain} if plain in (bool, int, float, str, list, dict, type(None)) else {str}
