"""The tasks a recipe can name: how each loads its data, trains, scores, draws and reports."""

from hf_denseseg.errors import InputError, unknown_name
from hf_denseseg.training.tasks.classification import ImageClassification
from hf_denseseg.training.tasks.detection import InstanceSegmentation, ObjectDetection
from hf_denseseg.training.tasks.segmentation import SemanticSegmentation
from hf_denseseg.training.tasks.task import Task

_TASKS: dict[str, Task] = {
    task.name: task
    for task in (SemanticSegmentation(), ImageClassification(), ObjectDetection(), InstanceSegmentation())
}


def get_task(name: str) -> Task:
    """Return the task with this name.

    Raises:
        InputError: there is none; the nearest name is proposed.
    """
    if name not in _TASKS:
        raise InputError(unknown_name("task", name, _TASKS))
    return _TASKS[name]
