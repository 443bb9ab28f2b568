"""Open a trained checkpoint of a task for use, or say why it is none."""

from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoImageProcessor, PreTrainedModel

import hf_denseseg
from hf_denseseg.errors import InputError, RunError

# Task -> Auto class and the ending of the class names it knows.
HEADS = {
    "semantic-segmentation": ("AutoModelForSemanticSegmentation", "ForSemanticSegmentation"),
    "image-classification": ("AutoModelForImageClassification", "ForImageClassification"),
    "object-detection": ("AutoModelForObjectDetection", "ForObjectDetection"),
    "instance-segmentation": ("AutoModelForInstanceSegmentation", "ForInstanceSegmentation"),
}


def task_of_class(name: str) -> str | None:
    """Task of a model class by the ending of its name; None for a class without a head."""
    return next((task for task, (_, ending) in HEADS.items() if name.endswith(ending)), None)


def task_of_checkpoint(checkpoint: str) -> str | None:
    """Task that the configuration of a checkpoint names; None if it cannot be read or names none."""
    try:
        config = AutoConfig.from_pretrained(checkpoint)
    except (OSError, ValueError):
        return None
    return task_of_class((config.architectures or [""])[0])


def load_trained_model(checkpoint: str, task: str = "semantic-segmentation", **overrides: Any) -> PreTrainedModel:
    """Load a model for a task with all its weights, in eval mode.

    Args:
        checkpoint: folder or hub id.
        task: one of `HEADS`.
        overrides: configuration fields; `ignore_mismatched_sizes=True` makes a head for other classes anew.

    Raises:
        InputError: no folder of a saved model, a model of another kind, one that lacks weights, or overrides that
            change the shape of the encoder's.
        RunError: a hub id that cannot be fetched.
    """
    folder = Path(checkpoint)
    if folder.exists() and not (folder / "config.json").exists():
        raise InputError(
            f"{checkpoint} holds no config.json. Give the folder of a saved model (a run's `model` folder)."
        )
    try:
        model, loaded = _class_of(checkpoint, task).from_pretrained(checkpoint, output_loading_info=True, **overrides)
    except OSError as error:
        if not folder.exists() and checkpoint.count("/") <= 1 and not checkpoint.startswith((".", "/")):
            raise RunError(f"Could not fetch {checkpoint} from the hub: {_first_line(error)}") from error
        raise InputError(f"{checkpoint} cannot be loaded: {_first_line(error)}") from error
    except (ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(
            f"{checkpoint} is no whole {task.replace('-', ' ')} checkpoint: {_first_line(error)}"
        ) from error
    mismatched = sorted(key for key, *_ in loaded["mismatched_keys"])
    encoder = [key for key in mismatched if key.startswith(f"{model.base_model_prefix}.")]
    if encoder:
        raise InputError(
            f"{checkpoint} holds {len(encoder)} encoder weights of another shape ({', '.join(encoder[:3])}): they "
            "would start anew. Leave the sizes as they are in the checkpoint; positions are interpolated for pictures "
            "of any size, so `image_size` stays too."
        )
    lacking = sorted([*loaded["missing_keys"], *(() if overrides.get("ignore_mismatched_sizes") else mismatched)])
    if lacking:
        raise InputError(
            f"{checkpoint} lacks {len(lacking)} weights of {type(model).__name__} ({', '.join(lacking[:3])} ...): "
            f"it was saved by another kind of model. Train a {task.rpartition('-')[2]} head first."
        )
    return model.eval()


def _class_of(checkpoint: str, task: str) -> Any:
    """Our class that the checkpoint names, if it is one for the task; else the Auto class."""
    auto_class, ending = HEADS[task]
    try:
        named = (AutoConfig.from_pretrained(checkpoint).architectures or [""])[0]
    except (OSError, ValueError):  # the Auto class says it better
        named = ""
    own = getattr(hf_denseseg, named, None) if named.endswith(ending) else None
    return own or getattr(transformers, auto_class)


def load_image_processor(checkpoint: str) -> Any:
    """Load the image processor saved beside a model.

    Raises:
        InputError: there is none.
    """
    try:
        return AutoImageProcessor.from_pretrained(checkpoint)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{checkpoint} has no image processor (preprocessor_config.json). Save one beside the model."
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
