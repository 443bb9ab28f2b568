"""The tasks, in one table: what each is called in recipes, by transformers and on the hub."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TaskNames:
    """How one task is called.

    Args:
        auto_class: class of transformers that opens a checkpoint.
        ending: of the names of our classes with a head for the task, after the family's prefix.
        pipeline: name of the pipeline, and `pipeline_tag` of a model card.
        loader: function of `hf_denseseg` that loads data for it.
    """

    auto_class: str
    ending: str
    pipeline: str
    loader: str


SEMANTIC_SEGMENTATION = "semantic-segmentation"
IMAGE_CLASSIFICATION = "image-classification"
OBJECT_DETECTION = "object-detection"
INSTANCE_SEGMENTATION = "instance-segmentation"
DETECTION_TASKS = (OBJECT_DETECTION, INSTANCE_SEGMENTATION)

TASKS = {
    SEMANTIC_SEGMENTATION: TaskNames(
        "AutoModelForSemanticSegmentation", "ForSemanticSegmentation", "image-segmentation", "load_segmentation"
    ),
    IMAGE_CLASSIFICATION: TaskNames(
        "AutoModelForImageClassification", "ForImageClassification", "image-classification", "load_classification"
    ),
    OBJECT_DETECTION: TaskNames(
        "AutoModelForObjectDetection", "ForObjectDetection", "object-detection", "load_detection"
    ),
    INSTANCE_SEGMENTATION: TaskNames(
        "AutoModelForInstanceSegmentation", "ForInstanceSegmentation", "image-segmentation", "load_detection"
    ),
}


def task_of_class(name: str) -> str | None:
    """Task of a model class by the ending of its name; None for a class without a head."""
    return next((task for task, names in TASKS.items() if name.endswith(names.ending)), None)
