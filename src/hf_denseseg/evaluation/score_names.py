"""Labels of each task's scores, and sentences on their chance level and test protocol."""

from dataclasses import dataclass, field
from typing import Any

_SIZES = {"": "", "_50": "50", "_75": "75", "_small": ", small", "_medium": ", medium", "_large": ", large"}
_BOX = {f"box_ap{part}": f"box AP{label}" for part, label in _SIZES.items()}
_MASK = {f"mask_ap{part}": f"mask AP{label}" for part, label in _SIZES.items()}


@dataclass(frozen=True)
class ScoreNames:
    """Labels of what `scores` in `results.json` holds.

    Args:
        metrics: key in the scores -> label of a fraction; the first is the main metric.
        columns: key in a row of the per-class table -> label of a fraction; the first is drawn as a bar.
        counted: key of the count in a row of the per-class table, and its label.
        scored_on: what the scores are counted over.
        hub_metrics: key in the scores -> name of the metric on the hub, where it differs.
    """

    metrics: dict[str, str]
    columns: dict[str, str]
    counted: tuple[str, str]
    scored_on: str
    hub_metrics: dict[str, str] = field(default_factory=dict)

    @property
    def main_metric(self) -> tuple[str, str]:
        """Key and label of the main metric."""
        return next(iter(self.metrics.items()))

    @property
    def logged(self) -> tuple[str, ...]:
        """Keys of the scores that are logged in training, of which one may choose the best checkpoint."""
        rest = ("_trained", "_averaged", "_75", "_small", "_medium", "_large")
        return tuple(key for key in self.metrics if not key.endswith(rest))

    def means(self, scores: dict[str, Any]) -> dict[str, str]:
        """The metrics that these scores have a value for."""
        return {key: label for key, label in self.metrics.items() if scores.get(key) is not None}

    def columns_of(self, scores: dict[str, Any]) -> dict[str, str]:
        """The columns of the per-class table that these scores hold."""
        rows = scores["per_class"]
        return {key: label for key, label in self.columns.items() if not rows or key in rows[0]}


SCORE_NAMES = {
    "semantic-segmentation": ScoreNames(
        metrics={"mean_iou": "mIoU", "pixel_accuracy": "pixel accuracy", "mean_accuracy": "mean accuracy"},
        columns={"iou": "IoU", "accuracy": "accuracy", "boundary_iou": "boundary IoU"},
        counted=("pixels", "pixels"),
        scored_on="at the resolution of the label maps",
    ),
    "image-classification": ScoreNames(
        metrics={
            "top1": "top-1 accuracy",
            "top5": "top-5 accuracy",
            "top1_trained": "top-1 accuracy, trained weights",
            "top1_averaged": "top-1 accuracy, averaged weights",
        },
        columns={"accuracy": "accuracy", "top5": "top-5"},
        counted=("images", "images"),
        scored_on="every image once",
        hub_metrics={"top1": "accuracy", "top5": "top_5_accuracy"},
    ),
    "object-detection": ScoreNames(
        metrics=_BOX,
        columns={"box_ap": "box AP", "box_ap_50": "box AP50"},
        counted=("objects", "objects"),
        scored_on="average precision over IoU 0.5 to 0.95, 100 boxes, as COCO counts it",
    ),
    "instance-segmentation": ScoreNames(
        metrics=_BOX | _MASK,
        columns={"box_ap": "box AP", "mask_ap": "mask AP"},
        counted=("objects", "objects"),
        scored_on="average precision over IoU 0.5 to 0.95, 100 objects, as COCO counts it",
    ),
}


def chance_level(task: str, scores: dict[str, Any]) -> str:
    """A sentence on the score of a constant prediction (for a detector: of another image's objects)."""
    if task == "semantic-segmentation":
        miou, name = constant_prediction_miou(scores)
        return f'Always predicting "{name}" would give {100 * miou:.1f} % mIoU.'
    if task == "image-classification":
        common = max(scores["per_class"], key=lambda row: row["images"])
        fraction = common["images"] / scores["images"]
        return f'Always predicting "{common["class"]}" would give {100 * fraction:.1f} % top-1 accuracy.'
    if scores["chance"] is None:
        return "With one image there is no other whose objects could be predicted."
    return f"Predicting the objects of another image would give {100 * scores['chance']:.1f} % box AP."


def constant_prediction_miou(scores: dict[str, Any]) -> tuple[float, str]:
    """Chance level of segmentation: the mIoU of the best constant prediction, and its class."""
    pixels = {row["class"]: row["pixels"] for row in scores["per_class"]}
    name = max(pixels, key=lambda key: pixels[key])
    present = sum(count > 0 for count in pixels.values())  # all of them have IoU 0, except the predicted one
    return pixels[name] / sum(pixels.values()) / present, name


def describe_protocol(task: str, protocol: dict[str, Any]) -> str:
    """The test protocol that `results.json` holds, in a few words."""
    if task == "semantic-segmentation":
        scales = protocol.get("scales") or [1.0]
        window = "x".join(str(side) for side in protocol["crop_size"] or ())
        parts = ["whole image" if protocol["mode"] == "whole" else f"window {window}"]
        parts.append("single scale" if len(scales) == 1 else f"{len(scales)} scales")
        if (threshold := protocol.get("threshold", 0.5)) != 0.5:
            parts.append(f"threshold {threshold:g}")
        if (temperature := protocol.get("temperature", 1.0)) != 1:
            parts.append(f"temperature {temperature:.4g}")
        return ", ".join(parts + (["flip"] if protocol.get("flip") else []))
    if task == "image-classification":
        crop = "x".join(map(str, protocol["crop_size"])) if protocol["crop_size"] else None
        size = "x".join(map(str, protocol["size"].values()))
        return f"shortest edge {size}, center crop {crop}" if crop else f"resized to {size}"
    return f"shortest edge {protocol['shortest_edge']}, longest edge at most {protocol['longest_edge']}"
