"""Train a segmentation model, and evaluate it image by image with its test protocol."""

import functools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from hf_denseseg.data.augmentation.segmentation import collate_train
from hf_denseseg.data.labels import LabelSpec
from hf_denseseg.errors import InputError
from hf_denseseg.evaluation.calibration import LENGTH as CALIBRATION_LENGTH
from hf_denseseg.evaluation.calibration import (
    TEMPERATURES,
    Calibration,
    best_temperature,
    calibration_scores,
    sampled_places,
    slopes,
)
from hf_denseseg.evaluation.score_names import SCORE_NAMES
from hf_denseseg.evaluation.segmentation_scores import Evaluation, count_image
from hf_denseseg.evaluation.size_recall import check_installed
from hf_denseseg.inference.segmentation import log_probability_strips, segment
from hf_denseseg.inference.settings import InferenceSettings, check_threshold
from hf_denseseg.models.auto.registration import is_own
from hf_denseseg.models.auto.tasks import SEMANTIC_SEGMENTATION
from hf_denseseg.models.channels import image_channels
from hf_denseseg.models.losses import segmentation_loss
from hf_denseseg.training.arguments import TaskTrainingArguments
from hf_denseseg.training.evaluation import processes_of
from hf_denseseg.training.optimization import load_class_weights
from hf_denseseg.training.trainer import TaskTrainer


def _keep_logits(kept: list[torch.Tensor], head: nn.Module, inputs: Any, logits: torch.Tensor) -> None:
    """Forward hook of an auxiliary head; `kept` is emptied before each batch."""
    if head.training:
        kept.append(logits)


class SegmentationTrainer(TaskTrainer):
    """Trains and evaluates any segmentation model of this package, and per-pixel ones of transformers.

    Models of transformers compute losses of their own, which know neither class weights nor hard examples and are NaN
    on crops without labels. Here all models have the same loss: that of the logits, plus that of the logits of
    `auxiliary_head`, if there is one, times the configuration's `auxiliary_loss_weight`.

    Evaluation predicts each image at the resolution of its label map and keeps counts only: memory stays constant, and
    label maps may differ in size.

    Args:
        model: returns `logits` `(B, num_labels, h, w)` of any size.
        args: see `TaskTrainingArguments`.
        spec: label specification, with the class names of the per-class table.
        settings: test protocol.
        image_processor: saved with the model.
        calibration: evaluations measure the probabilities too.
        options: see `TaskTrainer`; `train_dataset` is a `data.augmentation.segmentation.TrainDataset` or its
            streaming form, `eval_dataset` an `EvalDataset`.
    """

    logged_scores = SCORE_NAMES[SEMANTIC_SEGMENTATION].logged
    spec: LabelSpec

    def __init__(
        self,
        model: PreTrainedModel,
        args: TaskTrainingArguments,
        *,
        spec: LabelSpec,
        settings: InferenceSettings,
        image_processor: Any,
        calibration: bool = False,
        **options: Any,
    ) -> None:
        check_installed()
        self.settings = settings
        check_threshold(settings.threshold, model.config.num_labels or 0)
        if model.config.num_labels == 1 and args.class_weights is not None and args.loss in ("dice", "lovasz"):
            raise InputError(
                f"class_weights: with one logit, {args.loss} judges the foreground only. Leave them out, or use "
                f"'ce+{args.loss}', where they weigh the pixels of ce."
            )
        if is_own(model.config):  # saved beside the model
            image_processor.threshold, image_processor.ignore_index = settings.threshold, spec.ignore_index
        self.evaluation = Evaluation(spec)
        self.names: dict[int, str] = {}  # of the images that were evaluated
        self.measures = {"calibration": CALIBRATION_LENGTH} if calibration else dict[str, int]()  # name -> length
        self.sums: dict[str, np.ndarray] = {}
        self.class_order: torch.Tensor | None = None  # train id of each class of the model, where they differ
        default: str = getattr(model.config, "loss_normalization", "valid")
        self._normalization = args.loss_normalization or default
        self._class_weights = load_class_weights(args.class_weights, spec.num_labels)
        self._loss = functools.partial(
            segmentation_loss,
            normalization=self._normalization,
            class_weights=self._class_weights,
            ohem_threshold=args.ohem_threshold,
            ohem_min_kept=args.ohem_min_kept,
            kind=args.loss,
            label_smoothing=args.label_smoothing,
        )
        self._auxiliary_logits: list[torch.Tensor] = []  # of the batch, from a model of transformers
        self._computes_loss = is_own(model.config)
        if self._computes_loss:
            model.loss_function = self._loss
        elif (head := getattr(model, "auxiliary_head", None)) is not None:
            # No method of the trainer, which a copy of the model (the averaged one) would copy too.
            head.register_forward_hook(functools.partial(_keep_logits, self._auxiliary_logits))
        super().__init__(
            model, args, spec=spec, image_processor=image_processor, train_collator=collate_train, **options
        )

    @property
    def protocol(self) -> dict[str, Any]:
        """The inference settings."""
        return self.settings.to_dict()

    @property
    def record_options(self) -> dict[str, Any]:
        """What is measured besides the counts; a record with more serves as well."""
        return dict.fromkeys(self.measures, True)

    def fit_temperature(self) -> None:
        """Let evaluations measure the probabilities at temperature 1, and find the best temperature."""
        self.settings = replace(self.settings, temperature=1.0)
        self.measures = {"calibration": CALIBRATION_LENGTH, "slopes": len(TEMPERATURES)}

    def loss_weight(self, inputs: dict[str, Any]) -> torch.Tensor:
        """Number (with class weights: summed weight) of the pixels over which the loss of a batch is a mean."""
        labels = inputs["labels"]
        if self._normalization == "all":
            return torch.tensor(float(labels.numel()))
        valid = (labels != self.spec.ignore_index) & (labels != -100)  # (B, H, W)
        if self._class_weights is None:
            return valid.sum().float()
        weights = self._class_weights.to(labels.device)[torch.where(valid, labels, 0).long()]
        return torch.where(valid, weights, 0.0).sum()

    def batch_loss(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[torch.Tensor, Any]:
        """The model's loss if it is of this package, else the loss of its logits and auxiliary logits."""
        if self._computes_loss:
            return super().batch_loss(model, inputs)
        self._auxiliary_logits.clear()
        outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
        loss = self._loss(logits=outputs.logits, labels=inputs["labels"])
        weight = getattr(self.model.config, "auxiliary_loss_weight", 0.4)
        for logits in self._auxiliary_logits[:1]:
            loss = loss + weight * self._loss(logits=logits, labels=inputs["labels"])
        return loss, outputs

    def try_sizes(self, crop_size: tuple[int, int]) -> None:
        """Run a training crop and a test image through a model of transformers; those of this package take any size.

        Raises:
            InputError: the model refuses one of the two sizes.
        """
        if self._computes_loss:
            return
        sample = self.eval_dataset[0]
        crop = torch.zeros(1, image_channels(self.model.config), *crop_size, device=self.args.device)
        height, width = sample["image"].shape[-2:]
        what, fix = f"training crops of {crop_size[0]}x{crop_size[1]}", "Give its own size as --crop_size."
        self.model.eval()
        try:
            with torch.no_grad():
                self.model(crop)
            what = f"the test image {sample['id']} of {height}x{width} pixels in the mode {self.settings.mode}"
            fix = "Test in windows of its own size: --test_mode slide --test_crop_size H W --test_stride H W."
            self.predict_labels(sample)
        except (RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(f"{type(self.model).__name__} does not take {what} ({reason}). {fix}") from error

    def predict_samples(self, model: nn.Module, samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Name and counts of each image: the nonzero counts, and their places in the vector of `count_image`."""
        records = []
        for sample in samples:
            ids, sums = self._measure(model, sample) if self.measures else (self._predict(model, sample), {})
            counts = count_image(ids, sample["label"], self.spec.num_labels)
            places = counts.nonzero().flatten()
            records.append({"id": sample["id"], "places": places.tolist(), "counts": counts[places].tolist(), **sums})
        return records

    def _measure(self, model: nn.Module, sample: dict[str, Any]) -> tuple[torch.Tensor, dict[str, list[int]]]:
        """Predicted ids `(H, W)`, and for each of `measures` its sums over the image."""
        label, width = sample["label"], sample["label"].shape[1]
        calibration, fitted = Calibration(self.spec.num_labels), sampled_places(label, self.spec.num_labels)
        parts, chosen, temperature = [], [], self.settings.temperature
        for top, ids, scores in self.label_scores(model, sample):
            inside = fitted[(fitted >= top * width) & (fitted < (top + len(ids)) * width)] - top * width
            chosen.append(scores.flatten(1)[:, inside.to(scores.device)].cpu())
            scores = scores if temperature == 1 else (scores / temperature).log_softmax(0)
            calibration.add(ids, scores, label[top : top + len(ids)])
            parts.append(ids)
        sums = {"calibration": calibration.counts()}
        if "slopes" in self.measures:
            sums["slopes"] = slopes(torch.cat(chosen, 1), label.flatten()[fitted].long())
        return torch.cat(parts), sums

    def reset_scores(self) -> None:
        """Remove all counts."""
        self.evaluation, self.names = Evaluation(self.spec), {}
        self.sums = {name: np.zeros(length, dtype=np.int64) for name, length in self.measures.items()}

    def add_record(self, number: int, record: dict[str, Any]) -> None:
        """Add the counts of an image; only their sum and the image's score are kept."""
        counts = torch.zeros(self.evaluation.length, dtype=torch.int64)
        counts[record["places"]] = torch.tensor(record["counts"], dtype=torch.int64)
        self.evaluation.add(number, counts)
        self.names[number] = record["id"]
        for name, total in self.sums.items():
            total += np.array(record[name], dtype=np.int64)

    def compute_scores(self) -> dict[str, Any]:
        """Sum the counts of all processes."""
        joined = Evaluation(self.spec)
        parts = processes_of(self).gather((self.evaluation, self.names, self.sums))
        for evaluation, names, _ in parts:
            joined.merge(evaluation)
            self.names |= names
        self.evaluation, scores = joined, joined.scores()
        sums = {name: sum(each[name] for _, _, each in parts) for name in self.measures}
        if "calibration" in sums:
            scores |= calibration_scores(sums["calibration"].tolist())
        if "slopes" in sums:
            scores["fitted_temperature"] = best_temperature(sums["slopes"].tolist())
        return scores

    def _predict(self, model: nn.Module, sample: dict[str, Any]) -> torch.Tensor:
        image = sample["image"].to(self.args.device)
        with torch.no_grad(), self.compute_loss_context_manager():
            ids = segment(model, image, self.settings, self.preprocessing, size=sample["label"].shape[-2:])
        return ids if self.class_order is None else self.class_order.to(ids.device)[ids]

    def label_scores(
        self, model: nn.Module, sample: dict[str, Any]
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """First row, ids and log-probabilities of each strip of an image, see `log_probability_strips`.

        Ids and classes are in the order of the data, at the size of the label map, on the device.
        """
        image, size = sample["image"].to(self.args.device), sample["label"].shape[-2:]
        order = self.class_order
        with torch.no_grad(), self.compute_loss_context_manager():
            for top, ids, scores in log_probability_strips(
                model, image, self.settings, self.preprocessing, size, self.spec.num_labels
            ):
                if order is not None:
                    ids, scores = order.to(ids.device)[ids], scores[order.argsort().to(scores.device)]
                yield top, ids, scores

    def predict_labels(self, sample: dict[str, Any]) -> torch.Tensor:
        """Predicted ids `(H, W)` of a sample of the evaluation data, at the size of its label map, on the CPU."""
        return self._predict(self.accelerator.unwrap_model(self.model), sample).cpu()

    def save_beside(self, folder: Path) -> None:
        """Write the test protocol."""
        self.settings.save(folder)
