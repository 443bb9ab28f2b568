"""Train a segmentation model, and evaluate it image by image with its test protocol."""

import functools
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_denseseg.data.augmentation.segmentation import collate_train
from hf_denseseg.data.labels import IGNORE_INDEX, LabelSpec
from hf_denseseg.evaluation.segmentation_scores import Evaluation, count_image
from hf_denseseg.evaluation.size_recall import check_installed
from hf_denseseg.inference.segmentation import segment
from hf_denseseg.inference.settings import InferenceSettings
from hf_denseseg.models.losses import segmentation_loss
from hf_denseseg.training.arguments import TaskTrainingArguments
from hf_denseseg.training.evaluation import processes_of
from hf_denseseg.training.optimization import load_class_weights
from hf_denseseg.training.trainer import TaskTrainer


class SegmentationTrainer(TaskTrainer):
    """Trains and evaluates any segmentation model of this package.

    Evaluation predicts each image at the resolution of its label map and keeps counts only: memory stays constant, and
    label maps may differ in size.

    Args:
        model: a model of this package.
        args: see `TaskTrainingArguments`.
        spec: label specification, with the class names of the per-class table.
        settings: test protocol.
        options: see `TaskTrainer`; `train_dataset` is a `data.augmentation.segmentation.TrainDataset` or its
            streaming form, `eval_dataset` an `EvalDataset`.
    """

    logged_scores = ("mean_iou", "pixel_accuracy", "mean_accuracy")
    spec: LabelSpec

    def __init__(
        self,
        model: PreTrainedModel,
        args: TaskTrainingArguments,
        *,
        spec: LabelSpec,
        settings: InferenceSettings,
        **options: Any,
    ) -> None:
        check_installed()
        self.settings = settings
        self.evaluation = Evaluation(spec)
        self.names: dict[int, str] = {}  # of the images that were evaluated
        default: str = getattr(model.config, "loss_normalization", "valid")
        self._normalization = args.loss_normalization or default
        self._class_weights = load_class_weights(args.class_weights, spec.num_labels)
        model.loss_function = functools.partial(
            segmentation_loss,
            normalization=self._normalization,
            class_weights=self._class_weights,
            ohem_threshold=args.ohem_threshold,
            ohem_min_kept=args.ohem_min_kept,
        )
        super().__init__(model, args, spec=spec, train_collator=collate_train, **options)

    @property
    def protocol(self) -> dict[str, Any]:
        """The inference settings."""
        return self.settings.to_dict()

    def loss_weight(self, inputs: dict[str, Any]) -> torch.Tensor:
        """Number (with class weights: summed weight) of the pixels over which the loss of a batch is a mean."""
        labels = inputs["labels"]
        if self._normalization == "all":
            return torch.tensor(float(labels.numel()))
        valid = (labels != IGNORE_INDEX) & (labels != -100)  # (B, H, W)
        if self._class_weights is None:
            return valid.sum().float()
        weights = self._class_weights.to(labels.device)[torch.where(valid, labels, 0).long()]
        return torch.where(valid, weights, 0.0).sum()

    def predict_samples(self, model: nn.Module, samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Name and counts of each image: the nonzero counts, and their places in the vector of `count_image`."""
        records = []
        for sample in samples:
            counts = count_image(self._predict(model, sample), sample["label"], self.spec.num_labels)
            places = counts.nonzero().flatten()
            records.append({"id": sample["id"], "places": places.tolist(), "counts": counts[places].tolist()})
        return records

    def reset_scores(self) -> None:
        """Remove all counts."""
        self.evaluation, self.names = Evaluation(self.spec), {}

    def add_record(self, number: int, record: dict[str, Any]) -> None:
        """Add the counts of an image; only their sum and the image's score are kept."""
        counts = torch.zeros(self.evaluation.length, dtype=torch.int64)
        counts[record["places"]] = torch.tensor(record["counts"], dtype=torch.int64)
        self.evaluation.add(number, counts)
        self.names[number] = record["id"]

    def compute_scores(self) -> dict[str, Any]:
        """Sum the counts of all processes."""
        joined = Evaluation(self.spec)
        for evaluation, names in processes_of(self).gather((self.evaluation, self.names)):
            joined.merge(evaluation)
            self.names |= names
        self.evaluation = joined
        return joined.scores()

    def _predict(self, model: nn.Module, sample: dict[str, Any]) -> torch.Tensor:
        image = sample["image"].to(self.args.device)
        with torch.no_grad(), self.compute_loss_context_manager():
            return segment(model, image, self.settings, self.preprocessing, size=sample["label"].shape[-2:])

    def predict_labels(self, sample: dict[str, Any]) -> torch.Tensor:
        """Predicted ids `(H, W)` of a sample of the evaluation data, at the size of its label map, on the CPU."""
        return self._predict(self.accelerator.unwrap_model(self.model), sample).cpu()

    def save_beside(self, folder: Path) -> None:
        """Write the test protocol."""
        self.settings.save(folder)
