"""Load a trained checkpoint for a task, or say why it cannot be used."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoImageProcessor, PreTrainedConfig, PreTrainedModel

from hf_denseseg.errors import InputError, RunError
from hf_denseseg.models.auto.registration import families, family_classes
from hf_denseseg.models.auto.tasks import SEMANTIC_SEGMENTATION, TASKS, task_of_class
from hf_denseseg.models.one_logit import class_names

# What transformers and torch raise for malformed files; each comes from another layer below `from_pretrained`.
MALFORMED = (
    *(OSError, ValueError, RuntimeError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError),
    *(ImportError, RecursionError, MemoryError, SafetensorError, StrictDataclassError),
)
# Limits for an untrusted configuration: layers, any number in it, and bytes of weights that are always allowed.
MOST_LAYERS, LARGEST_NUMBER, ALWAYS_TAKEN = 1000, 1 << 20, 1 << 28


def task_of_checkpoint(checkpoint: str) -> str | None:
    """Task of a checkpoint according to its configuration; None if that cannot be read or names no task."""
    try:
        return task_of_class(_class_name(read_config(checkpoint)))
    except MALFORMED:
        return None


def classes_of_checkpoint(checkpoint: str) -> list[str]:
    """Names of the classes of a checkpoint in the order of its outputs; none if its configuration cannot be read."""
    try:
        return class_names(read_config(checkpoint))
    except MALFORMED:
        return []


def has_one_logit(checkpoint: str) -> bool:
    """Whether a segmentation checkpoint gives one logit for its two classes, according to its configuration."""
    try:
        return read_config(checkpoint).num_labels == 1
    except MALFORMED:
        return False


def load_trained_model(checkpoint: str, task: str = SEMANTIC_SEGMENTATION, **overrides: Any) -> PreTrainedModel:
    """Load a model for a task with all its weights, in eval mode.

    A checkpoint may come from anywhere: no code in it is run, only safetensors are read, and a configuration that asks
    for much more memory than the stored weights is refused.

    Args:
        checkpoint: folder or hub id.
        task: one of `TASKS`.
        overrides: configuration fields; `ignore_mismatched_sizes=True` creates a new head for other classes.

    Raises:
        InputError: no folder of a saved model, a model of another kind, missing weights, overrides that change the
            shape of encoder weights, a pickle, or a configuration that is far larger than the weights.
        RunError: a hub id that cannot be downloaded.
    """
    folder = Path(checkpoint)
    if folder.exists() and not (folder / "config.json").exists():
        raise InputError(
            f"{checkpoint} holds no config.json. Give the folder of a saved model (a run's `model` folder)."
        )
    pickles = sorted(path.name for path in folder.glob("*.bin")) if folder.is_dir() else []
    if pickles and not list(folder.glob("*.safetensors")):
        raise InputError(
            f"{checkpoint} holds its weights in {pickles[0]}, a pickle, which may run code when it is opened. Only "
            "safetensors are read: save the model again with `save_pretrained` where you trust it."
        )
    try:
        kind = _class_of(checkpoint, task)
        if folder.is_dir():
            _check_size(folder, kind)
        model, loaded = kind.from_pretrained(
            checkpoint, output_loading_info=True, use_safetensors=True, trust_remote_code=False, **overrides
        )
    except OSError as error:
        if not folder.exists() and checkpoint.count("/") <= 1 and not checkpoint.startswith((".", "/")):
            raise RunError(
                f"Could not fetch {checkpoint} from the hub: {_first_line(error)} Check the name and the network, or "
                "give the folder of a saved model."
            ) from error
        raise InputError(f"{checkpoint} cannot be loaded: {_first_line(error)}") from error
    except InputError:
        raise
    except MALFORMED as error:
        raise InputError(
            f"{checkpoint} is no complete {task.replace('-', ' ')} checkpoint: {_first_line(error)} Save it again, or "
            "give another."
        ) from error
    mismatched = sorted(key for key, *_ in loaded["mismatched_keys"])
    # A head for other classes may be replaced on request, encoder weights never.
    encoder = [key for key in mismatched if key.startswith(f"{model.base_model_prefix}.")]
    if encoder:
        raise InputError(
            f"{checkpoint} holds {len(encoder)} encoder weights of another shape ({', '.join(encoder[:3])}): they "
            "would be random again. Leave the sizes as they are in the checkpoint; positions are interpolated for "
            "images of any size, so `image_size` stays too."
        )
    lacking = sorted([*loaded["missing_keys"], *(() if overrides.get("ignore_mismatched_sizes") else mismatched)])
    if lacking:
        raise InputError(
            f"{checkpoint} lacks {len(lacking)} weights of {type(model).__name__} ({', '.join(lacking[:3])} ...): "
            f"it was saved by another kind of model. Train a {task.rpartition('-')[2]} head first."
        )
    return model.eval()


def _class_of(checkpoint: str, task: str) -> Any:
    """The class that the checkpoint names, if it is ours and for the task; else the Auto class."""
    names = TASKS[task]
    try:
        config = read_config(checkpoint)
    except InputError:
        raise
    except (OSError, ValueError):  # loading through the Auto class raises the better message
        return getattr(transformers, names.auto_class)
    named = _class_name(config)
    classes = family_classes(config.model_type) if config.model_type in families() else {}
    own = classes.get(named) if named.endswith(names.ending) else None
    return own or getattr(transformers, names.auto_class)


def read_config(checkpoint: str) -> PreTrainedConfig:
    """Read the configuration of a checkpoint, without running code that it may contain.

    Raises:
        InputError: more than 1,000 layers, or a number beyond that of any model.
    """
    file = Path(checkpoint) / "config.json"
    if file.exists():
        for key, value in _numbers(json.loads(file.read_text())):
            limit = MOST_LAYERS if "layers" in key or "depth" in key else LARGEST_NUMBER
            if abs(value) > limit:
                raise InputError(f"{file}: {key} is {value}; at most {limit:,} is accepted from a checkpoint.")
    return AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)


def _class_name(config: PreTrainedConfig) -> str:
    return str((config.architectures or [""])[0])


def _check_size(folder: Path, kind: Any) -> None:
    """Refuse a configuration that asks for far more weights than the folder holds, which would exhaust the memory.

    Raises:
        InputError: more than 16 times the bytes that are stored.
    """
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    config = read_config(str(folder))
    with torch.device("meta"):  # shapes only
        model = (
            kind(config) if isinstance(kind, type) and issubclass(kind, PreTrainedModel) else kind.from_config(config)
        )
    needed = sum(each.numel() * each.element_size() for each in (*model.parameters(), *model.buffers()))
    if needed > 16 * stored + ALWAYS_TAKEN:
        raise InputError(
            f"{folder}/config.json describes a model of {needed:,} bytes, but its weights are {stored:,} bytes: the "
            "two do not belong together. Copy or save the model again."
        )


def _numbers(value: Any, key: str = "") -> Iterator[tuple[str, int]]:
    """Every integer in a JSON value, with the key above it."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _numbers(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from _numbers(inner, key)
    elif isinstance(value, int):
        yield key, value


def load_image_processor(checkpoint: str, **options: Any) -> Any:
    """Load the image processor saved beside a model, with other values of some of its fields.

    Raises:
        InputError: there is none.
    """
    try:
        return AutoImageProcessor.from_pretrained(checkpoint, trust_remote_code=False, **options)
    except MALFORMED as error:
        raise InputError(
            f"{checkpoint} has no image processor (preprocessor_config.json). Save one beside the model."
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
