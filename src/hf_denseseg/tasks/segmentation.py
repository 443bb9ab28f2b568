"""Semantic segmentation: one class per pixel, scored by one exact confusion matrix."""

import functools
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from transformers import EvalPrediction, PreTrainedModel

from hf_denseseg.data.checks import Fault, Scan, check_dataset, scan_source
from hf_denseseg.data.datasets import SegmentationData, load_segmentation
from hf_denseseg.data.labels import LabelSpec
from hf_denseseg.data.transforms import (
    EvalDataset,
    StreamingTrainDataset,
    TrainAugmentation,
    TrainDataset,
    collate_eval,
    collate_train,
)
from hf_denseseg.files import atomic_path
from hf_denseseg.inference import segment
from hf_denseseg.inference_settings import InferenceSettings
from hf_denseseg.losses import segmentation_loss
from hf_denseseg.metrics import confusion_matrix, segmentation_metrics
from hf_denseseg.optimization import load_class_weights
from hf_denseseg.recipe import Recipe
from hf_denseseg.recipe_keys import DataArguments, TaskTrainingArguments
from hf_denseseg.tasks.task import Inspection, Task, sizes_as_json, sizes_of, spread
from hf_denseseg.training import TaskTrainer
from hf_denseseg.visualization import picture_grid


class SegmentationTrainer(TaskTrainer):
    """Trains and evaluates any segmentation model of this package.

    Evaluation runs the test protocol picture by picture at the label's own resolution and hands back one confusion
    matrix per picture, so that its memory stays flat, labels may differ in size, and several processes count every
    picture once.

    Args:
        model: a model of this package.
        args: see `TaskTrainingArguments`.
        spec: label specification; its class names head the per-class table.
        settings: test protocol.
        options: see `TaskTrainer`; `train_dataset` is a `data.transforms.TrainDataset` or its streaming form,
            `eval_dataset` a `data.transforms.EvalDataset`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: TaskTrainingArguments,
        *,
        spec: LabelSpec,
        settings: InferenceSettings,
        **options: Any,
    ) -> None:
        self.settings = settings
        self._matrix = torch.zeros(spec.num_labels, spec.num_labels, dtype=torch.int64)
        of_the_model: str = getattr(model.config, "loss_normalization", "valid")
        self._normalization = args.loss_normalization or of_the_model
        self._class_weights = load_class_weights(args.class_weights, spec.num_labels)
        model.loss_function = functools.partial(
            segmentation_loss,
            normalization=self._normalization,
            class_weights=self._class_weights,
            ohem_threshold=args.ohem_threshold,
            ohem_min_kept=args.ohem_min_kept,
        )
        super().__init__(model, args, spec=spec, train_collator=collate_train, eval_collator=collate_eval, **options)

    @property
    def protocol(self) -> dict[str, Any]:
        """The inference settings."""
        return self.settings.to_dict()

    def loss_weight(self, inputs: dict[str, Any]) -> torch.Tensor:
        """Number (with class weights: summed weight) of the pixels that the loss of a batch is a mean over."""
        labels = inputs["labels"]
        if self._normalization == "all":
            return torch.tensor(float(labels.numel()))
        valid = (labels != 255) & (labels != -100)
        if self._class_weights is None:
            return valid.sum().float()
        weights = self._class_weights.to(labels.device)[torch.where(valid, labels, 0).long()]
        return torch.where(valid, weights, 0.0).sum()

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, torch.Tensor, torch.Tensor]:
        """Confusion matrices `(B, C, C)` of one batch, and the pictures' numbers `(B,)`.

        Only these are gathered: label maps of different widths cannot be, and would cost the network 1,000 times more.
        """
        plain = self.accelerator.unwrap_model(model) if not self.is_fsdp_enabled else model
        device = self.args.device
        matrices = []
        for image, label in zip(inputs["images"], inputs["labels"], strict=True):
            with torch.no_grad(), self.compute_loss_context_manager():
                prediction = segment(
                    plain, image.to(device), self.settings, self.mean, self.std, size=label.shape[-2:]
                )
            matrices.append(confusion_matrix(prediction, label.to(prediction.device), self.spec.num_labels))
        return None, torch.stack(matrices).to(device), inputs["index"].to(device)

    def accumulate(self, prediction: EvalPrediction, compute_result: bool = False) -> dict[str, float]:
        """Add one gathered batch; the last one turns the sum into numbers."""
        self._matrix += torch.as_tensor(prediction.predictions).sum(dim=0).cpu()
        if not compute_result:
            return {}
        self.scores = segmentation_metrics(self._matrix, self.spec.classes)
        self.scores["confusion_matrix"] = self._matrix.tolist()
        self.scores["step"] = self.state.global_step
        self._matrix.zero_()
        return {key: self.scores[key] for key in ("mean_iou", "pixel_accuracy", "mean_accuracy")}

    def reset_scores(self) -> None:
        """Forget the counts."""
        self._matrix.zero_()

    def save_beside(self, folder: Path) -> None:
        """Write the test protocol."""
        self.settings.save(folder)


class SemanticSegmentation(Task):
    """One class per pixel."""

    name = "semantic-segmentation"
    pipeline = "image-segmentation"
    verb = "segment"
    found = 'found["label"], found["mask"].size'
    metrics = {"mean_iou": "mIoU", "pixel_accuracy": "pixel accuracy", "mean_accuracy": "mean accuracy"}
    scored_at = "at the labels' own resolution"
    columns = {"iou": "IoU", "accuracy": "accuracy"}
    counted = ("pixels", "pixels")
    shown = "Picture, truth, prediction; void is black."
    published = ("mean_iou", "mean_iou_multi_scale")
    measured = ("mean_iou",)
    figures = "mIoU in percent, single scale / multi-scale with flip."
    measured_heading = "measured (single scale)"
    counted_size = (512, 512)
    counted_labels = 2
    usual_labels = 19
    examples = "pairs"
    source_options = ("spec", "root", "columns", "revision")

    def load(self, arguments: DataArguments, part: str) -> SegmentationData:
        """Load pairs of pictures and label maps."""
        training = part == "train"
        return load_segmentation(
            arguments.dataset,
            arguments.train_split if training else arguments.eval_split,
            spec=arguments.label_spec,
            columns=arguments.dataset_columns,
            root=arguments.data_root,
            revision=arguments.dataset_revision,
            streaming=arguments.streaming and training,
            limit=arguments.max_train_samples if training else arguments.max_eval_samples,
        )

    def load_split(self, name: str, split: str, limit: int | None, **source: Any) -> SegmentationData:
        """Load pairs by the name of their data set."""
        return load_segmentation(name, split, limit=limit, **source)

    def check(self, data: SegmentationData, limit: int | None) -> list[Fault]:
        """Read pairs; a stream is not looked at, since it would be read twice."""
        return check_dataset(data, limit) if hasattr(data.dataset, "__len__") else []

    def inspect(self, name: str, split: str, limit: int | None, **source: Any) -> Inspection:
        """Read pairs and count their pixels."""
        scan = scan_source(name, split, limit=limit, progress=True, **source)
        return Inspection(scan.faults, scan.notes, scan.images, _table(scan), _statistics(scan))

    def show(self, name: str, split: str, limit: int, **source: Any) -> Image.Image:
        """Pictures beside their label maps in colour."""
        data = self.load_split(name, split, limit, **source)
        rows = [(row["image"], row["label"]) for row in islice(data.dataset, limit)]
        return picture_grid(rows, data.spec, ("picture", "label"))

    def processor_options(self, arguments: DataArguments) -> dict[str, Any]:
        """Resize as the protocol does, or not at all."""
        base = arguments.test_base_size
        size = {} if base is None else {"size": {"shortest_edge": min(base), "longest_edge": max(base)}}
        return {"do_resize": base is not None, **size}

    def build_trainer(
        self,
        recipe: Recipe,
        model: PreTrainedModel,
        processor: Any,
        eval_data: SegmentationData,
        train_data: SegmentationData | None = None,
    ) -> SegmentationTrainer:
        """Crops of augmented pictures for training, whole ones for evaluation."""
        data, seed = recipe.data, recipe.training.seed
        train_dataset = None
        if train_data is not None:
            augmentation = TrainAugmentation(
                tuple(data.crop_size),
                base_size=tuple(data.base_size) if data.base_size else None,
                scale_range=tuple(data.scale_range),
                max_class_ratio=data.max_class_ratio,
                flip=data.flip,
                photometric=data.photometric_distortion,
                scale_step=data.scale_step,
                photometric_style=data.photometric_style,
            )
            kind = StreamingTrainDataset if data.streaming else TrainDataset
            train_dataset = kind(train_data, augmentation, seed, targets=getattr(model, "training_targets", None))
        return SegmentationTrainer(
            model,
            recipe.training,
            image_processor=processor,
            spec=eval_data.spec,
            settings=data.inference_settings(),
            train_dataset=train_dataset,
            eval_dataset=EvalDataset(eval_data),
        )

    def use_protocol_of(self, trainer: SegmentationTrainer, checkpoint: str) -> None:
        """Take the inference settings saved with the checkpoint."""
        trainer.settings = InferenceSettings.load(checkpoint)

    def chance(self, scores: dict[str, Any]) -> str:
        """What the best constant answer gives."""
        miou, name = constant_prediction_miou(scores)
        return f'Always answering "{name}" would give {100 * miou:.1f} % mIoU.'

    def protocol_name(self, protocol: dict[str, Any]) -> str:
        """Window, scales, flip."""
        scales = protocol.get("scales") or [1.0]
        window = "x".join(str(side) for side in protocol["crop_size"] or ())
        parts = ["whole picture" if protocol["mode"] == "whole" else f"window {window}"]
        parts.append("single scale" if len(scales) == 1 else f"{len(scales)} scales")
        return ", ".join(parts + (["flip"] if protocol.get("flip") else []))

    def draw_results(self, trainer: SegmentationTrainer, path: Path) -> None:
        """Pictures, their label maps and the answers."""
        rows = []
        for index in spread(len(trainer.eval_dataset)):
            sample = trainer.eval_dataset[index]
            image = sample["image"].to(trainer.args.device)
            with torch.no_grad():
                prediction = segment(
                    trainer.accelerator.unwrap_model(trainer.model), image, trainer.settings, trainer.mean, trainer.std
                )
            rows.append((sample["image"], sample["label"], prediction.cpu()))
        with atomic_path(path) as aside:
            picture_grid(rows, trainer.spec).save(aside)


def _table(scan: Scan) -> str:
    """Share of each class, void, and the sizes, as lines of text."""
    weights = scan.class_weights()
    lines = [f"{'class':<20}{'share %':>10}{'pictures':>10}{'enet':>10}{'median':>10}"]
    for index, name in enumerate(scan.spec.classes):
        lines.append(
            f"{name:<20}{100 * scan.shares[index]:>10.3f}{scan.images_with[index]:>10}"
            f"{weights['enet'][index]:>10.3f}{weights['median_frequency'][index]:>10.3f}"
        )
    lines.append(f"{'(void, of all)':<20}{100 * scan.void_share:>10.3f}")
    return "\n".join([*lines, sizes_of(scan.sizes)])


def _statistics(scan: Scan) -> dict[str, Any]:
    return {
        "classes": list(scan.spec.classes),
        "pixels": scan.pixels.tolist(),
        "shares": scan.shares.tolist(),
        "pictures_with_class": scan.images_with.tolist(),
        "void_share": scan.void_share,
        "sizes": sizes_as_json(scan.sizes),
        "class_weights": scan.class_weights(),
    }


def constant_prediction_miou(scores: dict[str, Any]) -> tuple[float, str]:
    """Chance level: the mIoU of the best constant answer, and the class it names."""
    pixels = {row["class"]: row["pixels"] for row in scores["per_class"]}
    name = max(pixels, key=lambda key: pixels[key])
    present = sum(count > 0 for count in pixels.values())
    return pixels[name] / sum(pixels.values()) / present, name
