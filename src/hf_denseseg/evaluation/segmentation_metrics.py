"""Exact segmentation metrics from one int64 confusion matrix over all images."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from hf_denseseg.data.ignore_index import ignore_index_of
from hf_denseseg.errors import InputError

LabelMap = torch.Tensor | np.ndarray
ABSENT_CONVENTIONS = ("zero", "skip")
# There is a bin for every id between the smallest and the largest legal one, so a distant ignore_index costs memory.
LARGEST_ID_RANGE = 4096


def confusion_matrix(
    prediction: LabelMap, label: LabelMap, num_labels: int, ignore_index: int | None = None
) -> torch.Tensor:
    """Count the pixels of each (true class, predicted class) pair exactly.

    One histogram of joint ids, without a mask: ignored and unknown ids have bins of their own, which are checked
    afterwards.

    Args:
        prediction: class ids of any shape and integer dtype, on any device; where `label` is ignored, any class or
            `ignore_index` is allowed.
        label: true class ids of the same shape; `ignore_index` marks ignored pixels.
        num_labels: number of classes C.
        ignore_index: id of ignored pixels, outside 0..C-1; None is 255, or 65535 with more than 254 classes.

    Returns:
        `(C, C)` int64 on the device of `prediction`, rows = ground truth, columns = prediction.

    Raises:
        InputError: shapes differ, an id is neither a class nor `ignore_index`, a labeled pixel is predicted as
            ignored, or `ignore_index` is a class.
    """
    ignore_index = ignore_index_of(num_labels) if ignore_index is None else ignore_index
    low, high = _id_range(num_labels, ignore_index)
    prediction = _integer_map(prediction, "prediction")
    label = _integer_map(label, "label").to(prediction.device)
    if prediction.shape != label.shape:
        raise InputError(
            f"Prediction has shape {tuple(prediction.shape)}, label {tuple(label.shape)}. "
            "Resize the prediction to the label's own size first."
        )
    if high - low >= LARGEST_ID_RANGE:  # a distant ignore_index: it gets the bin after the classes
        prediction = _with_near_ignored(prediction, num_labels, ignore_index, "prediction")
        label = _with_near_ignored(label, num_labels, ignore_index, "label")
        if bool(((prediction == num_labels) & (label < num_labels)).any()):
            raise InputError(_ignored_prediction(ignore_index))
        low, high, ignore_index = 0, num_labels, num_labels
    for ids, role in ((prediction, "prediction"), (label, "label")):
        _check_range(ids, low, high, role)
    width = high - low + 1  # ids low..high, so that a pair of ids is one number below width * width
    joint = torch.add(prediction.to(torch.int32), label.to(torch.int32), alpha=width)  # one pass: p + width * label
    if low:  # a negative ignore_index: shift both ids to start at 0
        joint -= low * (width + 1)
    counts = torch.bincount(joint.flatten(), minlength=width * width).view(width, width)  # (label, prediction)
    classes = slice(-low, num_labels - low)  # bins of the ids 0..C-1
    matrix = counts[classes, classes]
    ignored = counts[ignore_index - low]  # what was predicted at ignored pixels
    # Every pixel is labeled and predicted as a class, or ignored in the label and predicted as a class or ignored;
    # a pixel that is counted nowhere else has an id that is not legal there.
    counted = matrix.sum() + ignored[classes].sum() + ignored[ignore_index - low]
    if int(counted) != label.numel():
        raise InputError(_unknown_ids(counts.cpu(), low, num_labels, ignore_index))
    return matrix.clone()


def _id_range(num_labels: int, ignore_index: int) -> tuple[int, int]:
    if num_labels < 1:
        raise InputError(f"num_labels is {num_labels}. Give the number of classes, 1 or more.")
    if 0 <= ignore_index < num_labels:
        raise InputError(
            f"ignore_index {ignore_index} is one of the {num_labels} classes, so its false positives would vanish. "
            "Encode ignored pixels as 255 (or -100) and keep every class in the metric."
        )
    low, high = min(0, ignore_index), max(num_labels - 1, ignore_index)
    if num_labels >= LARGEST_ID_RANGE:
        raise InputError(
            f"{num_labels} classes have {num_labels**2:,} pairs to count; fewer than {LARGEST_ID_RANGE} classes are "
            "scored."
        )
    return low, high


def _with_near_ignored(ids: torch.Tensor, num_labels: int, ignore_index: int, role: str) -> torch.Tensor:
    """Ids with `num_labels` for ignored pixels; other ids that are no class are refused."""
    unknown = ids[((ids < 0) | (ids >= num_labels)) & (ids != ignore_index)]
    if len(unknown):
        raise InputError(_illegal(role, unknown.unique().tolist(), num_labels, ignore_index))
    return torch.where(ids == ignore_index, num_labels, ids.long())


def _illegal(role: str, ids: list[int], num_labels: int, ignore_index: int) -> str:
    return (
        f"The {role} holds ids {ids[:8]}, legal are 0 to {num_labels - 1} and {ignore_index} (ignored). "
        "Check `num_labels` and the label specification."
    )


def _integer_map(ids: LabelMap, role: str) -> torch.Tensor:
    ids = torch.as_tensor(ids)
    if ids.is_floating_point() or ids.is_complex():
        raise InputError(f"The {role} has dtype {ids.dtype}. Give class ids as integers (for logits: their argmax).")
    if ids.dtype == torch.bool:
        return ids.to(torch.uint8)
    # The wider unsigned types lack most operations in torch.
    return ids.long() if ids.dtype in (torch.uint16, torch.uint32, torch.uint64) else ids


def _check_range(ids: torch.Tensor, low: int, high: int, role: str) -> None:
    """Refuse ids that have no bin; bytes always have one with the usual ignore_index 255, which saves a pass."""
    if ids.numel() == 0 or (ids.dtype == torch.uint8 and high >= 255):
        return
    smallest, largest = (int(value) for value in torch.aminmax(ids))
    if smallest < low or largest > high:
        raise InputError(
            f"The {role} holds ids from {smallest} to {largest}, legal are {low} to {high}. "
            "Map raw ids to train ids and padding to the ignore_index first."
        )


def _unknown_ids(counts: torch.Tensor, low: int, num_labels: int, ignore_index: int) -> str:
    legal = {*range(num_labels), ignore_index}
    for role, totals in (("label", counts.sum(1)), ("prediction", counts.sum(0))):
        unknown = [index + low for index in totals.nonzero().flatten().tolist() if index + low not in legal]
        if unknown:
            return _illegal(role, unknown, num_labels, ignore_index)
    return _ignored_prediction(ignore_index)


def _ignored_prediction(ignore_index: int) -> str:
    return (
        f"The prediction is {ignore_index} (ignored) at labeled pixels. "
        "Predict a class for every pixel; only labels may be ignored."
    )


class ConfusionMeter:
    """Sum of confusion matrices over a dataset; memory does not grow with the number or size of images.

    Args:
        num_labels: number of classes C.
        ignore_index: id of pixels that do not count; by default 255, beyond 254 classes 65535.

    Raises:
        InputError: no classes, or an `ignore_index` that is one of them.
    """

    def __init__(self, num_labels: int, ignore_index: int | None = None) -> None:
        self.num_labels = num_labels
        self.ignore_index = ignore_index_of(num_labels) if ignore_index is None else ignore_index
        _id_range(num_labels, self.ignore_index)
        self.matrix = torch.zeros(num_labels, num_labels, dtype=torch.int64)

    def update(self, prediction: LabelMap | Iterable[LabelMap], label: LabelMap | Iterable[LabelMap]) -> None:
        """Add one pair of maps, a batch, or two equally long sequences of maps that may differ in size.

        Args:
            prediction: `(H, W)` or `(B, H, W)` class ids, or a sequence of `(H, W)` maps.
            label: the same of the ground truth.

        Raises:
            InputError: other shapes, floating-point values or unknown ids; then nothing was added.
        """
        if isinstance(prediction, torch.Tensor | np.ndarray) and isinstance(label, torch.Tensor | np.ndarray):
            self.add(confusion_matrix(prediction, label, self.num_labels, self.ignore_index))
            return
        predictions, labels = list(prediction), list(label)
        if len(predictions) != len(labels):
            raise InputError(
                f"{len(predictions)} predictions came with {len(labels)} labels. Give one label for each."
            )
        # All pairs are counted before any is added: a refused batch leaves the meter as it was.
        matrices = [
            confusion_matrix(predicted, true, self.num_labels, self.ignore_index)
            for predicted, true in zip(predictions, labels, strict=True)
        ]
        for matrix in matrices:
            self.add(matrix)

    def add(self, matrix: torch.Tensor) -> None:
        """Add a `(C, C)` matrix of integer counts, or several as `(N, C, C)`, e.g. gathered from other processes.

        Raises:
            InputError: another shape, or counts that are no integers.
        """
        if matrix.is_floating_point() or matrix.shape[-2:] != self.matrix.shape or matrix.ndim > 3:
            raise InputError(
                f"A confusion matrix of shape {tuple(matrix.shape)} and dtype {matrix.dtype} cannot be added. "
                f"Give integer counts of shape ({self.num_labels}, {self.num_labels})."
            )
        self.matrix += matrix.to("cpu", torch.int64).reshape(-1, *self.matrix.shape).sum(0)

    def compute(self, classes: Sequence[str], absent: str = "zero") -> dict[str, Any]:
        """Metrics of everything added so far.

        Args:
            classes: C names.
            absent: convention for classes that are in neither labels nor predictions, see `segmentation_metrics`.

        Returns:
            As `segmentation_metrics`: `mean_iou`, `pixel_accuracy`, `mean_accuracy`, `per_class` and others.
        """
        return segmentation_metrics(self.matrix, classes, absent)


def segmentation_metrics(matrix: LabelMap, classes: Sequence[str], absent: str = "zero") -> dict[str, Any]:
    """Summarize a confusion matrix in fractions.

    IoU = TP / (TP + FP + FN) of the summed counts, then the mean over classes. A class in neither labels nor
    predictions has no IoU and is left out. One that is only predicted counts as 0 under `"zero"` (mmsegmentation,
    `evaluate`; the papers' numbers) and is left out under `"skip"` (detectron2, ultralytics).

    Args:
        matrix: `(C, C)` counts, rows = ground truth.
        classes: C names.
        absent: convention of `mean_iou` and of the per-class IoU.

    Returns:
        `mean_iou`, `pixel_accuracy`, `mean_accuracy`, `frequency_weighted_iou`, `absent` (the convention's name),
        `mean_iou_by_absent` (both), `pixels` (labeled ones) and `per_class`, a list of `class`, `iou`, `accuracy`,
        `pixels`; a value is None where it is not defined.

    Raises:
        InputError: unknown convention, or a matrix and names of different length.
    """
    if absent not in ABSENT_CONVENTIONS:
        raise InputError(f"absent={absent!r} is unknown. Use one of {', '.join(map(repr, ABSENT_CONVENTIONS))}.")
    counts = torch.as_tensor(matrix).cpu().numpy()
    if counts.shape != (len(classes), len(classes)):
        raise InputError(f"A {counts.shape} confusion matrix does not fit {len(classes)} class names.")
    true_positive, labeled, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)  # (C,) each
    with np.errstate(invalid="ignore"):  # 0 / 0 gives NaN, which means "not defined" below
        accuracy = true_positive / labeled
        iou = {"zero": true_positive / (labeled + predicted - true_positive)}
    iou["skip"] = np.where(labeled > 0, iou["zero"], np.nan)
    total = int(labeled.sum())
    return {
        "mean_iou": _mean(iou[absent]),
        "pixel_accuracy": int(true_positive.sum()) / total if total else None,
        "mean_accuracy": _mean(accuracy),
        "frequency_weighted_iou": float(np.nansum(iou["zero"] * labeled) / total) if total else None,
        "absent": absent,
        "mean_iou_by_absent": {name: _mean(iou[name]) for name in ABSENT_CONVENTIONS},
        "pixels": total,
        "per_class": [
            {
                "class": name,
                "iou": _number(iou[absent][k]),
                "accuracy": _number(accuracy[k]),
                "pixels": int(labeled[k]),
            }
            for k, name in enumerate(classes)
        ],
    }


def category_metrics(
    matrix: LabelMap, classes: Sequence[str], categories: Mapping[str, Sequence[str]]
) -> dict[str, Any]:
    """IoU of groups of classes, as Cityscapes scores its categories.

    A pixel is right if it is predicted as any class of its category: rows and columns of the matrix are merged, then
    IoU is computed as for classes. A class in no category counts as false positives and has no IoU of its own.

    Args:
        matrix: `(C, C)` counts, rows = ground truth.
        classes: C names.
        categories: category -> names of its classes.

    Returns:
        `category_iou` (mean over the categories that have one, None without any) and `per_category`, a list of
        `category`, `classes`, `iou`, `accuracy`, `pixels`.
    """
    grouped = [name for names in categories.values() for name in names]
    rest = [name for name in classes if name not in grouped]
    groups = [[classes.index(name) for name in names] for names in (*categories.values(), rest)]
    counts = torch.as_tensor(matrix).cpu()
    rows = torch.stack([counts[group].sum(0) for group in groups])  # (G, C), the last row for the rest
    merged = torch.stack([rows[:, group].sum(1) for group in groups], dim=1)  # (G, G)
    table = segmentation_metrics(merged, [*categories, ""])["per_class"][:-1]
    ious = [row["iou"] for row in table if row["iou"] is not None]
    return {
        "category_iou": sum(ious) / len(ious) if ious else None,
        "per_category": [
            {"category": row.pop("class"), "classes": list(names), **row}
            for row, names in zip(table, categories.values(), strict=True)
        ],
    }


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _mean(values: np.ndarray) -> float | None:
    present = values[~np.isnan(values)]
    return float(present.mean()) if present.size else None
