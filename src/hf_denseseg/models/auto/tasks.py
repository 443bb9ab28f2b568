"""The four tasks: their names, Auto classes and endings of class names."""

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


TASKS = ("semantic-segmentation", "image-classification", "object-detection", "instance-segmentation")


SEGMENTATION, CLASSIFICATION, DETECTION = TASKS[:1], TASKS[1:2], TASKS[2:]
