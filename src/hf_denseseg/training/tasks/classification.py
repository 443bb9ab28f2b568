"""Image classification: one class per image, top-1 and top-5 accuracy."""

from contextlib import nullcontext
from typing import Any

import torch
from PIL import Image
from torch import nn
from transformers import PreTrainedModel

from hf_denseseg.data.augmentation.classification import (
    EvalImages,
    MixedBatch,
    TrainImages,
    collate_eval,
    training_transform,
)
from hf_denseseg.data.checks.classification import scan_classification
from hf_denseseg.data.class_names import ClassNames
from hf_denseseg.data.classification import ClassificationData, load_classification
from hf_denseseg.data.reading.images import Fault
from hf_denseseg.data.shards.streaming import StreamingTrainDataset
from hf_denseseg.evaluation.classification_metrics import AccuracyMeter, true_class_rank
from hf_denseseg.evaluation.score_names import SCORE_NAMES
from hf_denseseg.models.auto.tasks import IMAGE_CLASSIFICATION
from hf_denseseg.models.losses import classification_loss
from hf_denseseg.training.arguments import TaskTrainingArguments
from hf_denseseg.training.data_arguments import DataArguments
from hf_denseseg.training.evaluation import processes_of
from hf_denseseg.training.tasks.task import Inspection, Task, sizes_as_json, spread, table_of
from hf_denseseg.training.trainer import TaskTrainer
from hf_denseseg.visualization.layout import thumbnail_grid

BICUBIC = 3  # PIL's number
DRAWN_CANDIDATES = 48  # images predicted for the figure, which shows 12 of them


class ClassificationTrainer(TaskTrainer):
    """Trains and evaluates any image classification model.

    Trained and averaged weights are both evaluated, and the better ones are reported and saved: with a decay of
    0.99996 the average lags far behind in short runs.

    Args:
        model: with `logits` `(B, num_labels)`.
        args: see `TaskTrainingArguments`.
        spec: names of the classes.
        protocol: resize and crop of the image processor, for `results.json`.
        options: see `TaskTrainer`.
    """

    logged_scores = SCORE_NAMES[IMAGE_CLASSIFICATION].logged
    spec: ClassNames

    def __init__(
        self, model: PreTrainedModel, args: TaskTrainingArguments, *, spec: ClassNames, protocol: dict, **options: Any
    ) -> None:
        self._protocol = protocol
        self._ranks: list[list[int]] = []
        model.loss_function = classification_loss
        super().__init__(model, args, spec=spec, **options)

    @property
    def protocol(self) -> dict[str, Any]:
        """Resize and crop of the image processor."""
        return self._protocol

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate the averaged weights, if there are any, and the trained ones; keep the better scores."""
        averaged_metrics = super().evaluate(*args, **kwargs)
        if self.ema is None or self.ema.average is None:
            return averaged_metrics
        averaged = self.scores
        with self.trained_weights():
            trained_metrics = super().evaluate(*args, **{**kwargs, "metric_key_prefix": "eval_trained"})
        trained = self.scores
        better, name = (trained, "trained") if trained["top1"] > averaged["top1"] else (averaged, "averaged")
        self.scores = better | {
            "weights": name,
            "top1_averaged": averaged["top1"],
            "top1_trained": trained["top1"],
        }
        return averaged_metrics | trained_metrics

    def weights_to_keep(self) -> Any:
        """The weights with the better scores."""
        return nullcontext() if self.scores.get("weights") == "trained" else self.averaged_weights()

    def predict_samples(self, model: nn.Module, samples: list[dict[str, Any]]) -> list[list[int]]:
        """Rank of the true class among the scores, and the true class itself, of each image."""
        inputs = self._prepare_inputs(collate_eval(samples))
        with torch.no_grad(), self.compute_loss_context_manager():
            logits = model(pixel_values=inputs["pixel_values"]).logits
        ranks = true_class_rank(logits.float(), inputs["labels"])
        return torch.stack([ranks, inputs["labels"]], 1).tolist()  # B pairs

    def reset_scores(self) -> None:
        """Remove all ranks."""
        self._ranks = []

    def add_record(self, number: int, record: list[int]) -> None:
        """Store rank and class of an image."""
        self._ranks.append(record)

    def compute_scores(self) -> dict[str, Any]:
        """Count the ranks of all processes."""
        meter = AccuracyMeter(self.spec.num_labels)
        for ranks in processes_of(self).gather(self._ranks):  # of each process (N, 2): rank, true class
            meter.update(*torch.tensor(ranks, dtype=torch.int64).view(-1, 2).unbind(1))
        return meter.compute(self.spec.classes)


class ImageClassification(Task):
    """One class per image."""

    name = "image-classification"
    source_options = ("spec", "root", "columns", "revision", "pixel_format")

    def load(self, arguments: DataArguments, part: str) -> ClassificationData:
        """Load images and their classes."""
        split, limit = arguments.split_of(part)
        return load_classification(
            arguments.dataset,
            split,
            root=arguments.data_root,
            names=arguments.label_spec,
            columns=arguments.dataset_columns,
            revision=arguments.dataset_revision,
            streaming=arguments.streaming and part == "train",
            limit=limit,
            pixel_format=arguments.pixel_format,
        )

    def load_split(
        self, name: str, split: str, limit: int | None, spec: str | None = None, **source: Any
    ) -> ClassificationData:
        """Load images by the name of their dataset."""
        return load_classification(name, split, names=spec, limit=limit, **source)

    def check(self, data: ClassificationData, limit: int | None) -> list[Fault]:
        """Read images; a stream is not checked, since it would be read twice."""
        return scan_classification(data, limit).faults if hasattr(data.dataset, "__len__") else []

    def inspect(self, name: str, split: str, limit: int | None, **source: Any) -> Inspection:
        """Read images and count classes and sizes."""
        scan = scan_classification(self.load_split(name, split, None, **source), limit, progress=True)
        rows = list(zip(scan.spec.classes, scan.images_with_class.tolist(), strict=True))
        statistics = {
            "classes": list(scan.spec.classes),
            "images_with_class": scan.images_with_class.tolist(),
            "sizes": sizes_as_json(scan.sizes),
            **scan.survey.statistics(),
        }
        table = table_of(("class", "images"), rows, scan.sizes)
        return Inspection(scan.faults, scan.notes, scan.images, table, statistics)

    def show(self, name: str, split: str, limit: int, **source: Any) -> Image.Image:
        """Images, drawn from the split, with the names of their classes."""
        data = self.load_split(name, split, limit, **source)
        cells = [(data.spec.classes[row["label"]], row["image"]) for row in data.dataset]
        return thumbnail_grid(cells)

    def processor_options(self, arguments: DataArguments) -> dict[str, Any]:
        """Resize so that the central crop covers `crop_pct` of the shortest edge, then crop."""
        height, width = arguments.crop_size
        return {
            "do_resize": True,
            "size": {"shortest_edge": int(min(height, width) / arguments.crop_pct)},
            "resample": BICUBIC,
            "do_center_crop": True,
            "crop_size": {"height": height, "width": width},
        }

    def build_trainer(
        self,
        data: DataArguments,
        args: TaskTrainingArguments,
        model: PreTrainedModel,
        processor: Any,
        eval_data: ClassificationData,
        train_data: ClassificationData | None = None,
    ) -> ClassificationTrainer:
        """timm's augmentation for training, the image processor for evaluation."""
        train_dataset: Any = None
        if train_data is not None:
            transform = training_transform(
                data.crop_size,
                scale=data.scale,
                flip=data.flip,
                auto_augment=data.auto_augment,
                color_jitter=data.color_jitter,
                random_erasing=data.random_erasing,
                mean=processor.image_mean,
                std=processor.image_std,
                pixel_format=data.pixel_format,
            )
            train_dataset = TrainImages(train_data, transform, args.seed)
            train_dataset = StreamingTrainDataset(train_dataset, args.seed) if data.streaming else train_dataset
        collator = MixedBatch(
            eval_data.spec.num_labels,
            mixup=data.mixup,
            cutmix=data.cutmix,
            switch_probability=data.mixup_switch_probability,
            label_smoothing=args.label_smoothing,
            seed=args.seed,
        )
        return ClassificationTrainer(
            model,
            args,
            image_processor=processor,
            spec=eval_data.spec,
            protocol=_protocol_of(processor),
            train_collator=collator,
            train_dataset=train_dataset,
            eval_dataset=EvalImages(eval_data, processor),
        )

    def draw_results(self, trainer: ClassificationTrainer) -> Image.Image:
        """Draw some images with prediction, confidence and ground truth; wrong predictions first."""
        model = trainer.accelerator.unwrap_model(trainer.model).eval()
        dataset, names = trainer.eval_dataset, trainer.spec.classes
        drawn = []
        for index in spread(len(dataset), DRAWN_CANDIDATES):
            pixels = dataset[index]["pixel_values"][None].to(trainer.args.device)
            with torch.no_grad():
                confidence, predicted = model(pixel_values=pixels).logits.float().softmax(-1)[0].max(0)
            row = dataset.data.dataset[index]
            drawn.append((row["image"], names[int(predicted)], float(confidence), names[row["label"]]))
        wrong = [each for each in drawn if each[1] != each[3]]
        right = [each for each in drawn if each[1] == each[3]]
        return thumbnail_grid([_captioned(*each) for each in wrong[:6] + right[: 12 - len(wrong[:6])]])


def _captioned(image: Image.Image, predicted: str, confidence: float, true: str) -> tuple[str, Image.Image]:
    """Caption (predicted class, confidence, and the true class if it differs) and image."""
    return f"{predicted} {100 * confidence:.0f} %" + ("" if predicted == true else f" (is {true})"), image


def _protocol_of(processor: Any) -> dict[str, Any]:
    """Resize and crop of an image processor as plain values."""
    size = {key: value for key, value in dict(processor.size or {}).items() if value is not None}
    crop = processor.crop_size if getattr(processor, "do_center_crop", False) else None
    return {"size": size, "crop_size": None if crop is None else [crop["height"], crop["width"]]}
