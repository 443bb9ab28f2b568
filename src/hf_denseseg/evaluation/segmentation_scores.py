"""The counts of an image, and the scores of their sums over all images.

All counts are int64 and add up exactly over images and processes in any order; only the scores derived from them at
the end are fractions.
"""

import math
from typing import Any, NamedTuple

import torch

from hf_denseseg.data.ignore_index import MOST_CLASSES_IN_BYTES
from hf_denseseg.data.labels import LabelSpec
from hf_denseseg.evaluation.boundary_iou import WIDTH_FRACTION, boundary_counts, boundary_iou
from hf_denseseg.evaluation.segmentation_metrics import category_metrics, confusion_matrix, segmentation_metrics
from hf_denseseg.evaluation.size_recall import SIZE_LIMITS, SIZES, size_counts, size_recall


class ImageScore(NamedTuple):
    """How well one image was predicted.

    Args:
        mean_iou: IoU within the image, mean over the classes in its label map; None if all pixels are ignored.
        pixel_accuracy: right pixels / labeled pixels; None if all pixels are ignored.
        pixels: labeled pixels.
        confusion: the most common mistake as (true class, predicted class, fraction of the labeled pixels); None if
            there is none.
    """

    mean_iou: float | None
    pixel_accuracy: float | None
    pixels: int
    confusion: tuple[int, int, float] | None


class Confusion(NamedTuple):
    """Pixels of one class that were taken for another."""

    ground_truth: str
    predicted: str
    pixels: int
    fraction: float  # of the true class's pixels


def count_image(prediction: torch.Tensor, label: torch.Tensor, num_labels: int) -> torch.Tensor:
    """Count one image.

    Args:
        prediction: `(H, W)` class ids, all of them classes.
        label: `(H, W)` class ids and `ignore_index_of(num_labels)`, at the label's own resolution.
        num_labels: number of classes C.

    Returns:
        int64 vector on the CPU: the confusion matrix `(C, C)`, `boundary_counts` `(3, C)` and `size_counts`
        `(3, 3, C)`, flattened one after the other.

    Raises:
        InputError: see `confusion_matrix`.
    """
    label = label.to(prediction.device)
    matrix = confusion_matrix(prediction, label, num_labels)
    # `confusion_matrix` has checked that only classes and the ignored id occur: bytes hold up to 254 classes.
    kind = torch.uint8 if num_labels <= MOST_CLASSES_IN_BYTES else torch.int32
    prediction, label = prediction.to(kind), label.to(kind)
    boundary = boundary_counts(prediction, label, num_labels)
    sizes = torch.from_numpy(size_counts(prediction.cpu().numpy(), label.cpu().numpy(), num_labels))
    return torch.cat([each.flatten().cpu() for each in (matrix, boundary, sizes)])


def _parts(counts: torch.Tensor, num_labels: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The three arrays that `count_image` flattened."""
    square = num_labels**2
    matrix, boundary, sizes = counts.split([square, 3 * num_labels, 9 * num_labels])
    return matrix.view(num_labels, num_labels), boundary.view(3, num_labels), sizes.view(3, 3, num_labels)


class Evaluation:
    """Sums of the counts of all images, and the score of each.

    Args:
        spec: names of the classes, and their categories if there are any.

    Attributes:
        images: number of an image in its dataset -> its score.
        length: of the vector that `count_image` returns.
    """

    def __init__(self, spec: LabelSpec) -> None:
        self.spec = spec
        self.images: dict[int, ImageScore] = {}
        self.length = spec.num_labels**2 + 12 * spec.num_labels
        self._counts = torch.zeros(self.length, dtype=torch.int64)

    @property
    def matrix(self) -> torch.Tensor:
        """Confusion matrix `(C, C)` of all images so far, rows = ground truth."""
        return _parts(self._counts, self.spec.num_labels)[0]

    def add(self, index: int, counts: torch.Tensor) -> None:
        """Add the result of `count_image` for an image; an image that was added before is left out."""
        if index not in self.images:
            self._counts += counts
            self.images[index] = image_score(_parts(counts, self.spec.num_labels)[0])

    def merge(self, other: "Evaluation") -> None:
        """Add the counts of other images, made by another process."""
        self._counts += other._counts
        self.images |= other.images

    def scores(self) -> dict[str, Any]:
        """All scores, as fractions.

        Returns:
            The result of `segmentation_metrics`, and: `boundary_iou` (mean over the classes that have one) and
            `boundary_width` (fraction of the diagonal); `size_recall` (`small`, `medium`, `large`: `segments`,
            `pixels`, `recall`) and `size_limits` (fractions of the image); `mean_image_iou` (mean over images of the
            mean over the classes in each: not `mean_iou`, and not what the benchmarks report); `category_iou` and
            `per_category` if the specification has categories; `confusion_matrix`. Each row of `per_class` gets
            `boundary_iou` and `recall_small`, `recall_medium`, `recall_large`.
        """
        matrix, boundary, sizes = _parts(self._counts, self.spec.num_labels)
        scores = segmentation_metrics(matrix, self.spec.classes)
        near, recall = boundary_iou(boundary), size_recall(sizes.numpy())
        for k, row in enumerate(scores["per_class"]):
            row["boundary_iou"] = near[k]
            row.update({f"recall_{size}": recall[size]["per_class"][k] for size in SIZES})
        scores["boundary_iou"] = _mean(near)
        scores["boundary_width"] = WIDTH_FRACTION
        scores["size_recall"] = {
            size: {key: value for key, value in recall[size].items() if key != "per_class"} for size in SIZES
        }
        scores["size_limits"] = list(SIZE_LIMITS)
        # In the order of their numbers, since a sum of floating-point numbers depends on its order.
        scores["mean_image_iou"] = _mean([self.images[index].mean_iou for index in sorted(self.images)])
        if self.spec.categories:
            scores |= category_metrics(matrix, self.spec.classes, self.spec.categories)
        scores["confusion_matrix"] = matrix.tolist()
        return scores

    def worst(self, count: int) -> list[int]:
        """Numbers of the images with the lowest mean IoU, worst first; of equal ones the first in the dataset."""
        return self._ranked()[:count]

    def best(self, count: int) -> list[int]:
        """Numbers of the images with the highest mean IoU, best first."""
        return self._ranked()[::-1][:count]

    def _ranked(self) -> list[int]:
        known = [(score.mean_iou, index) for index, score in self.images.items() if score.mean_iou is not None]
        return [index for _, index in sorted(known)]


def image_score(matrix: torch.Tensor) -> ImageScore:
    """Score of an image, given its confusion matrix `(C, C)`."""
    right, labeled, predicted = matrix.diagonal(), matrix.sum(1), matrix.sum(0)  # (C,) each
    pixels = int(labeled.sum())
    if not pixels:
        return ImageScore(None, None, 0, None)
    iou = (right.double() / (labeled + predicted - right))[labeled > 0]
    wrong = matrix - torch.diag(right)
    worst = int(wrong.argmax())  # index into the flattened matrix: true class * C + predicted class
    most = int(wrong.flatten()[worst])
    confusion = (*divmod(worst, len(matrix)), most / pixels) if most else None
    return ImageScore(float(iou.mean()), int(right.sum()) / pixels, pixels, confusion)


def confusions(scores: dict[str, Any]) -> list[Confusion]:
    """Every pair of classes that was confused, the largest fraction of the true class's pixels first."""
    names = [row["class"] for row in scores["per_class"]]
    pairs = []
    for true, counts in zip(names, scores["confusion_matrix"], strict=True):
        pairs += [
            Confusion(true, predicted, pixels, pixels / sum(counts))
            for predicted, pixels in zip(names, counts, strict=True)
            if pixels and predicted != true
        ]
    return sorted(pairs, key=lambda pair: (-pair.fraction, -pair.pixels))


def _mean(values: list[float | None]) -> float | None:
    defined = [value for value in values if value is not None]
    return math.fsum(defined) / len(defined) if defined else None
