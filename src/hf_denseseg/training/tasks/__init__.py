"""The tasks of recipes: each loads its data, trains, scores and draws."""

import importlib
from functools import cache

from hf_denseseg.errors import InputError, unknown_name
from hf_denseseg.training.tasks.task import Task

# Task -> module and class; a run imports only its own.
_CLASSES = {
    "semantic-segmentation": ("segmentation", "SemanticSegmentation"),
    "image-classification": ("classification", "ImageClassification"),
    "object-detection": ("detection", "ObjectDetection"),
    "instance-segmentation": ("detection", "InstanceSegmentation"),
}


@cache
def get_task(name: str) -> Task:
    """Return the task with this name.

    Raises:
        InputError: there is none; the nearest name is proposed.
    """
    if name not in _CLASSES:
        raise InputError(unknown_name("task", name, _CLASSES))
    module, kind = _CLASSES[name]
    return getattr(importlib.import_module(f"hf_denseseg.training.tasks.{module}"), kind)()
