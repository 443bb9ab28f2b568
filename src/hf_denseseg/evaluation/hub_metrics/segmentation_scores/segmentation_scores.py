"""Exact mIoU, accuracies and per-class scores as a module of `evaluate`; `evaluate.load` opens this folder offline."""

# `evaluate` reads the imports of this file with a simple parser: one module per line.
from typing import Any

import datasets
import evaluate
import numpy as np

from hf_denseseg.data.ignore_index import ignore_index_of
from hf_denseseg.errors import InputError
from hf_denseseg.evaluation.segmentation_metrics import ConfusionMeter

_DESCRIPTION = """
Mean intersection over union, pixel accuracy and mean accuracy from one exact confusion matrix over all images.
Maps may differ in size; memory does not grow with their number.
"""

_INPUTS = """
Args:
    predictions: sequence of integer maps (height, width), ids 0..num_labels-1.
    references: sequence of ground truth maps, ignore_index where pixels are ignored.
    num_labels: number of classes; at `evaluate.load(..., num_labels=...)`, or with the first call that adds maps.
    ignore_index: id of ignored pixels (default 255, or 65535 with more than 254 classes). As in the hub's `mean_iou`
        it may be a class: its pixels are left out, while predicting it elsewhere still counts against it.
    reduce_labels: the ground truth counts classes from 1, and 0 is ignored: 0 -> 255, k -> k - 1, 255 stays (with
        more than 254 classes 65535 instead of 255).
    nan_to_num: number in place of a score that is not defined (default: NaN).
    absent: "zero" (default; mmsegmentation's mean) or "skip" (classes without labeled pixels left out).
    classes: names (default "0", "1", ...).
"""


LEFT_OUT = -100  # ground truth of an ignored class, to the confusion matrix


class SegmentationScores(evaluate.Metric):
    """Counts in `add` and `add_batch` already, instead of writing maps to Arrow (104 MiB per large image)."""

    def __init__(
        self, *args: Any, num_labels: int | None = None, ignore_index: int | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        if self.num_process != 1:
            raise InputError("This metric counts in one process. Add up the confusion matrices of several instead.")
        self.num_labels, self.ignore_index = num_labels, ignore_index
        self.meter: ConfusionMeter | None = None

    def _info(self) -> evaluate.MetricInfo:
        ids = datasets.Sequence(datasets.Sequence(datasets.Value("int64")))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": ids, "references": ids}),
        )

    def add(self, *, prediction: Any = None, reference: Any = None, **kwargs: Any) -> None:
        """Count one pair of maps."""
        self.add_batch(predictions=[prediction], references=[reference], **kwargs)

    def add_batch(
        self,
        *,
        predictions: Any = None,
        references: Any = None,
        num_labels: int | None = None,
        ignore_index: int | None = None,
        reduce_labels: bool = False,
    ) -> None:
        """Count several pairs of maps, which may differ in size; a call that is refused counts nothing."""
        classes = num_labels or self.num_labels or (self.meter.num_labels if self.meter else None)
        if classes is None:
            raise InputError("The number of classes is unknown. Give num_labels=... here or to evaluate.load.")
        void = ignore_index_of(classes)
        given = self.ignore_index if ignore_index is None else ignore_index
        ignored = void if given is None else given
        is_class = 0 <= ignored < classes
        meter = self.meter or ConfusionMeter(classes, LEFT_OUT if is_class else ignored)
        if (meter.num_labels, meter.ignore_index) != (classes, LEFT_OUT if is_class else ignored):
            raise InputError(
                f"Maps of {meter.num_labels} classes were added before, now num_labels is {classes} or ignore_index "
                "another one. Call compute in between."
            )
        labels = [_reduced(np.asarray(ids), void) if reduce_labels else np.asarray(ids) for ids in references]
        if is_class:
            labels = [np.where(ids == ignored, LEFT_OUT, ids.astype(np.int64)) for ids in labels]
        meter.update([np.asarray(ids) for ids in predictions], labels)
        self.meter = meter

    def compute(
        self,
        *,
        predictions: Any = None,
        references: Any = None,
        absent: str = "zero",
        classes: Any = None,
        nan_to_num: float | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Count the given maps, if any, return the scores of all maps so far, and start again."""
        if predictions is not None:
            self.add_batch(predictions=predictions, references=references, **kwargs)
        if self.meter is None:
            raise InputError("Nothing was added. Give predictions and references, or call add_batch first.")
        meter, self.meter = self.meter, None
        result = meter.compute(classes or [str(k) for k in range(meter.num_labels)], absent)

        def number(value: float | None) -> float:
            return value if value is not None else np.nan if nan_to_num is None else nan_to_num

        # Under the names and in the types of the hub's `mean_iou`, so that this module can replace it.
        for name in ("mean_iou", "mean_accuracy", "pixel_accuracy"):
            result[name] = number(result[name])
        result["overall_accuracy"] = result["pixel_accuracy"]
        result["per_category_iou"] = np.array([number(row["iou"]) for row in result["per_class"]])
        result["per_category_accuracy"] = np.array([number(row["accuracy"]) for row in result["per_class"]])
        return result

    def _compute(self, predictions: Any = None, references: Any = None, **kwargs: Any) -> dict[str, Any]:
        """As `compute`; notebooks call it to skip the conversion to Arrow, which there is none of here."""
        return self.compute(predictions=predictions, references=references, **kwargs)


def _reduced(ids: np.ndarray, void: int) -> np.ndarray:
    """0 -> void (255, or 65535), k -> k - 1, void stays."""
    raw = ids.astype(np.int64)
    return np.where((raw == 0) | (raw == void), void, raw - 1)
