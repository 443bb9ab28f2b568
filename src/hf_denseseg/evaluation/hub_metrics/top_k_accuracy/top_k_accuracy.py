"""Top-1 and top-5 accuracy of class scores as a module of `evaluate`; `evaluate.load` opens this folder offline."""

# `evaluate` reads the imports of this file with a simple parser: one module per line.
from typing import Any

import datasets
import evaluate
import torch

from hf_denseseg.errors import InputError
from hf_denseseg.evaluation.classification_metrics import AccuracyMeter, true_class_rank

_DESCRIPTION = """
Fraction of images whose true class has the highest score (of equal ones the smaller id counts), or one of the five
highest. Only counts are kept.
"""

_INPUTS = """
Args:
    predictions: scores (logits or probabilities) of shape (images, classes).
    references: true ids of shape (images,).
    classes: names for the per-class table (default "0", "1", ...).
"""


class TopKAccuracy(evaluate.Metric):
    """Counts in `add_batch` already, instead of writing scores to Arrow."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.num_process != 1:
            raise InputError("This metric counts in one process. Gather the scores of several first.")
        self.meter: AccuracyMeter | None = None

    def _info(self) -> evaluate.MetricInfo:
        scores = datasets.Sequence(datasets.Value("float32"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": scores, "references": datasets.Value("int64")}),
        )

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Count several images."""
        scores, labels = torch.as_tensor(predictions), torch.as_tensor(references)
        self.meter = self.meter or AccuracyMeter(scores.shape[-1])
        self.meter.update(true_class_rank(scores, labels), labels)

    def compute(
        self, *, predictions: Any = None, references: Any = None, classes: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Count the given scores, if any, return the accuracies of all images so far, and start again."""
        if predictions is not None:
            self.add_batch(predictions=predictions, references=references)
        if self.meter is None:
            raise InputError("Nothing was added. Give predictions and references, or call add_batch first.")
        meter, self.meter = self.meter, None
        result = meter.compute(classes or [str(k) for k in range(meter.counts.shape[1])])
        # Also under the names of the hub's `accuracy`, so that this module can replace it.
        return result | {"accuracy": result["top1"], "top_5_accuracy": result["top5"]}
