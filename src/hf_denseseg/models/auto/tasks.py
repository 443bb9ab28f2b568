"""The tasks, in one table: what each is called in recipes, by transformers and on the hub."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TaskNames:
    """How one task is called.

    Args:
        auto_classes: classes of transformers that open a checkpoint, the task's own first.
        pipeline: name of the pipeline, and `pipeline_tag` of a model card.
        loader: function of `hf_denseseg` that loads data for it.
    """

    auto_classes: tuple[str, ...]
    pipeline: str
    loader: str

    @property
    def auto_class(self) -> str:
        """The Auto class of this task."""
        return self.auto_classes[0]

    @property
    def ending(self) -> str:
        """How our classes with a head for the task end, after the family's prefix (`ForObjectDetection`)."""
        return self.auto_class.removeprefix("AutoModel")


SEMANTIC_SEGMENTATION = "semantic-segmentation"
IMAGE_CLASSIFICATION = "image-classification"
OBJECT_DETECTION = "object-detection"
INSTANCE_SEGMENTATION = "instance-segmentation"
DETECTION_TASKS = (OBJECT_DETECTION, INSTANCE_SEGMENTATION)

# The image-segmentation pipeline tries AutoModelForImageSegmentation first; a model with masks also detects objects.
TASKS = {
    SEMANTIC_SEGMENTATION: TaskNames(
        ("AutoModelForSemanticSegmentation", "AutoModelForImageSegmentation"),
        "image-segmentation",
        "load_segmentation",
    ),
    IMAGE_CLASSIFICATION: TaskNames(
        ("AutoModelForImageClassification",), "image-classification", "load_classification"
    ),
    OBJECT_DETECTION: TaskNames(("AutoModelForObjectDetection",), "object-detection", "load_detection"),
    INSTANCE_SEGMENTATION: TaskNames(
        ("AutoModelForInstanceSegmentation", "AutoModelForObjectDetection", "AutoModelForImageSegmentation"),
        "image-segmentation",
        "load_detection",
    ),
}


def task_of_class(name: str) -> str | None:
    """Task of a model class by the ending of its name; None for a class without a head."""
    return next((task for task, names in TASKS.items() if name.endswith(names.ending)), None)
