"""Exact mIoU, accuracies and per-class scores as a module of `evaluate`; `evaluate.load` opens this folder offline."""

# `evaluate` reads the imports of this file with a simple parser: one module per line.
from typing import Any

import datasets
import evaluate
import numpy as np

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
    ignore_index: id of ignored pixels, not a class (default 255).
    absent: "zero" (default; mmsegmentation's mean) or "skip" (classes without labeled pixels left out).
    classes: names (default "0", "1", ...).
"""


class SegmentationScores(evaluate.Metric):
    """Counts in `add` and `add_batch` already, instead of writing maps to Arrow (104 MiB per large image)."""

    def __init__(self, *args: Any, num_labels: int | None = None, ignore_index: int = 255, **kwargs: Any) -> None:
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
    ) -> None:
        """Count several pairs of maps, which may differ in size."""
        if self.meter is None:
            classes = num_labels or self.num_labels
            if classes is None:
                raise InputError("The number of classes is unknown. Give num_labels=... here or to evaluate.load.")
            self.meter = ConfusionMeter(classes, self.ignore_index if ignore_index is None else ignore_index)
        self.meter.update([np.asarray(ids) for ids in predictions], [np.asarray(ids) for ids in references])

    def compute(
        self,
        *,
        predictions: Any = None,
        references: Any = None,
        absent: str = "zero",
        classes: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Count the given maps, if any, return the scores of all maps so far, and start again."""
        if predictions is not None:
            self.add_batch(predictions=predictions, references=references, **kwargs)
        if self.meter is None:
            raise InputError("Nothing was added. Give predictions and references, or call add_batch first.")
        meter, self.meter = self.meter, None
        result = meter.compute(classes or [str(k) for k in range(meter.num_labels)], absent)
        # Also under the names of the hub's `mean_iou`, so that this module can replace it.
        result["overall_accuracy"] = result["pixel_accuracy"]
        result["per_category_iou"] = [row["iou"] for row in result["per_class"]]
        result["per_category_accuracy"] = [row["accuracy"] for row in result["per_class"]]
        return result
