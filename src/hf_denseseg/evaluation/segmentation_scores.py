"""What is counted of a picture, and what the sums over all pictures say.

Everything is an int64 count that adds up exactly over pictures and processes in any order; only the figures derived at
the end are fractions.
"""

import math
from typing import Any, NamedTuple

import torch

from hf_denseseg.data.labels import LabelSpec
from hf_denseseg.evaluation.boundary_iou import WIDTH_SHARE, boundary_counts, boundary_iou
from hf_denseseg.evaluation.segmentation_metrics import category_metrics, confusion_matrix, segmentation_metrics
from hf_denseseg.evaluation.size_recall import SIZE_LIMITS, SIZES, size_counts, size_recall


class PictureScore(NamedTuple):
    """How one picture was answered.

    Args:
        mean_iou: IoU within the picture, mean over the classes that its label shows; None if all is void.
        pixel_accuracy: right pixels / labelled pixels; None if all is void.
        pixels: labelled pixels.
        confusion: the commonest mistake as (true class, predicted class, share of the labelled pixels); None if there
            is none.
    """

    mean_iou: float | None
    pixel_accuracy: float | None
    pixels: int
    confusion: tuple[int, int, float] | None


class Confusion(NamedTuple):
    """Pixels of one class that were taken for another."""

    truth: str
    predicted: str
    pixels: int
    share: float  # of the true class's pixels


def count_picture(prediction: torch.Tensor, label: torch.Tensor, num_labels: int) -> torch.Tensor:
    """Count one picture.

    Args:
        prediction: `(H, W)` class ids, all of them classes.
        label: `(H, W)` class ids and 255 = void, at the label's own resolution.
        num_labels: number of classes C, at most 254.

    Returns:
        int64 vector on the CPU: the confusion matrix `(C, C)`, `boundary_counts` `(3, C)` and `size_counts`
        `(3, 3, C)`, flattened one after the other.

    Raises:
        InputError: see `confusion_matrix`.
    """
    label = label.to(prediction.device)
    matrix = confusion_matrix(prediction, label, num_labels)
    # Known to be classes and void now, so bytes hold them.
    prediction, label = prediction.to(torch.uint8), label.to(torch.uint8)
    boundary = boundary_counts(prediction, label, num_labels)
    sizes = torch.from_numpy(size_counts(prediction.cpu().numpy(), label.cpu().numpy(), num_labels))
    return torch.cat([each.flatten().cpu() for each in (matrix, boundary, sizes)])


def _parts(counts: torch.Tensor, num_labels: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Matrix, boundary and sizes of what `count_picture` flattened."""
    square = num_labels**2
    matrix, boundary, sizes = counts.split([square, 3 * num_labels, 9 * num_labels])
    return matrix.view(num_labels, num_labels), boundary.view(3, num_labels), sizes.view(3, 3, num_labels)


class Evaluation:
    """Sums of the counts of all pictures, and the score of each.

    Args:
        spec: names of the classes, and their categories if there are any.

    Attributes:
        pictures: number of a picture in its data set -> how it was answered.
        length: places in the vector that `count_picture` gives.
    """

    def __init__(self, spec: LabelSpec) -> None:
        self.spec = spec
        self.pictures: dict[int, PictureScore] = {}
        self.length = spec.num_labels**2 + 12 * spec.num_labels
        self._counts = torch.zeros(self.length, dtype=torch.int64)

    @property
    def matrix(self) -> torch.Tensor:
        """Confusion matrix `(C, C)` of all pictures so far, rows = truth."""
        return _parts(self._counts, self.spec.num_labels)[0]

    def add(self, index: int, counts: torch.Tensor) -> None:
        """Take in what `count_picture` gave for a picture; a picture that was taken in before is left out."""
        if index not in self.pictures:
            self._counts += counts
            self.pictures[index] = picture_score(_parts(counts, self.spec.num_labels)[0])

    def scores(self) -> dict[str, Any]:
        """All figures, as fractions.

        Returns:
            What `segmentation_metrics` gives, and: `boundary_iou` (mean over the classes that have one) and
            `boundary_width` (share of the diagonal); `size_recall` (`small`, `medium`, `large`: `segments`, `pixels`,
            `recall`) and `size_limits` (shares of the picture); `mean_image_iou` (mean over pictures of the mean
            over the classes in each: another figure than `mean_iou`, and not the benchmarks'); `category_iou` and
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
        scores["boundary_width"] = WIDTH_SHARE
        scores["size_recall"] = {
            size: {key: value for key, value in recall[size].items() if key != "per_class"} for size in SIZES
        }
        scores["size_limits"] = list(SIZE_LIMITS)
        # By number, since a sum of fractions depends on its order.
        scores["mean_image_iou"] = _mean([self.pictures[index].mean_iou for index in sorted(self.pictures)])
        if self.spec.categories:
            scores |= category_metrics(matrix, self.spec.classes, self.spec.categories)
        scores["confusion_matrix"] = matrix.tolist()
        return scores

    def worst(self, count: int) -> list[int]:
        """Numbers of the pictures with the lowest mean IoU, worst first; of equal ones the first in the data set."""
        return self._ranked()[:count]

    def best(self, count: int) -> list[int]:
        """Numbers of the pictures with the highest mean IoU, best first."""
        return self._ranked()[::-1][:count]

    def _ranked(self) -> list[int]:
        known = [(score.mean_iou, index) for index, score in self.pictures.items() if score.mean_iou is not None]
        return [index for _, index in sorted(known)]


def picture_score(matrix: torch.Tensor) -> PictureScore:
    """Score of a picture with this confusion matrix."""
    right, truth, predicted = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
    pixels = int(truth.sum())
    if not pixels:
        return PictureScore(None, None, 0, None)
    shown = truth > 0
    iou = (right.double() / (truth + predicted - right))[shown]
    wrong = matrix - torch.diag(right)
    place = int(wrong.argmax())
    most = int(wrong.flatten()[place])
    confusion = (*divmod(place, len(matrix)), most / pixels) if most else None
    return PictureScore(float(iou.mean()), int(right.sum()) / pixels, pixels, confusion)


def confusions(scores: dict[str, Any]) -> list[Confusion]:
    """Every pair of classes that was confused, the largest share of the true class's pixels first."""
    names = [row["class"] for row in scores["per_class"]]
    pairs = []
    for truth, counts in zip(names, scores["confusion_matrix"], strict=True):
        pairs += [
            Confusion(truth, predicted, pixels, pixels / sum(counts))
            for predicted, pixels in zip(names, counts, strict=True)
            if pixels and predicted != truth
        ]
    return sorted(pairs, key=lambda pair: (-pair.share, -pair.pixels))


def _mean(values: list[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return math.fsum(there) / len(there) if there else None
