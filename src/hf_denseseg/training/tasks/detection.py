"""Object detection and instance segmentation: boxes, with or without masks, scored by COCO's average precision."""

from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from PIL import Image
from torch import nn
from transformers import BaseImageProcessor, PreTrainedModel

from hf_denseseg.data.augmentation.detection import (
    AspectRatioSampler,
    DetectionAugmentation,
    EvalDetections,
    TrainDetections,
    collate_eval,
    collate_train,
)
from hf_denseseg.data.checks.detection import scan_detection, scan_detection_source
from hf_denseseg.data.class_names import ClassNames
from hf_denseseg.data.detection import DetectionData, load_detection
from hf_denseseg.data.reading.images import Fault
from hf_denseseg.data.sources.coco import encode_mask, object_mask
from hf_denseseg.errors import InputError
from hf_denseseg.evaluation.detection_metrics import detection_metrics
from hf_denseseg.evaluation.score_names import SCORE_NAMES
from hf_denseseg.reports.run_page import SHOWN_SCORE
from hf_denseseg.training.arguments import TaskTrainingArguments
from hf_denseseg.training.data_arguments import DataArguments
from hf_denseseg.training.evaluation import processes_of
from hf_denseseg.training.tasks.task import Inspection, Task, sizes_as_json, spread, table_of
from hf_denseseg.training.trainer import TaskTrainer
from hf_denseseg.visualization.detections import draw_objects
from hf_denseseg.visualization.layout import labeled_rows, thumbnail_grid


class DetectionTrainer(TaskTrainer):
    """Trains and evaluates detectors that follow transformers' conventions (`labels` as a list of dicts).

    In evaluation every process keeps the predictions for its images; at the end the main process gets all of them,
    each image once, and computes the scores.

    Args:
        model: takes `pixel_values`, `pixel_mask` and `labels`.
        args: see `TaskTrainingArguments`.
        masks: whether masks are trained and scored.
        options: see `TaskTrainer`.
    """

    spec: ClassNames

    def __init__(
        self, model: PreTrainedModel, args: TaskTrainingArguments, *, masks: bool = False, **options: Any
    ) -> None:
        self.masks = masks
        self._found: dict[int, list[dict[str, Any]]] = {}
        super().__init__(model, args, train_collator=collate_train, **options)

    @property
    def logged_scores(self) -> tuple[str, ...]:  # type: ignore[override]
        """Average precision of boxes and, if they are trained, of masks."""
        return SCORE_NAMES["instance-segmentation" if self.masks else "object-detection"].logged

    @property
    def protocol(self) -> dict[str, Any]:
        """Edges of the images after the image processor's resize."""
        size = dict(self.processing_class.size)  # type: ignore[union-attr]
        return {key: size.get(key) for key in ("shortest_edge", "longest_edge")}

    def _get_train_sampler(self, train_dataset: Any = None) -> AspectRatioSampler:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        # Batches of wide or of tall images only need little padding.
        self._sampler = AspectRatioSampler(dataset.is_wide(), self._train_batch_size, seed)
        return self._sampler

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Normalize the images, and set the padding to 0."""
        inputs = super()._prepare_inputs(inputs)
        if "labels" in inputs:
            # (B, 3, H, W) * (B, 1, H, W): normalization has turned the zeros of the padding into -mean / std.
            inputs["pixel_values"] = inputs["pixel_values"] * inputs["pixel_mask"][:, None].to(torch.float32)
        return inputs

    def predict_samples(self, model: nn.Module, samples: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
        """The objects detected in each image, see `detect`."""
        return self.detect(model, collate_eval(samples))

    def reset_scores(self) -> None:
        """Remove all objects."""
        self._found = {}

    def add_record(self, number: int, record: list[dict[str, Any]]) -> None:
        """Store the objects of an image."""
        self._found[number] = record

    def compute_scores(self) -> dict[str, Any]:
        """Gather the objects of all processes; the main process computes the scores and broadcasts them."""
        found = {number: each for part in processes_of(self).gather(self._found) for number, each in part.items()}
        self.reset_scores()
        scores: list[Any] = [None]
        if self.is_world_process_zero():
            columns = ["height", "width", "objects"]
            # Columns of values -> rows; the images themselves are not read.
            rows = self.eval_dataset.data.dataset.select_columns(columns)[:]
            rows = [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]
            scores = [detection_metrics(rows, found, self.spec.classes, self.masks)]
        return broadcast_object_list(scores)[0]

    def detect(self, model: nn.Module, inputs: dict[str, Any], threshold: float = 0.0) -> list[list[dict[str, Any]]]:
        """Detect objects in a batch of `collate_eval`.

        Returns:
            Per image its objects: `category`, `score`, `bbox` (x, y, width, height in pixels) and, with masks,
            `segmentation` (RLE).
        """
        plain = self.accelerator.unwrap_model(model) if not self.is_fsdp_enabled else model
        device = self.args.device
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = plain(pixel_values=inputs["pixel_values"].to(device), pixel_mask=inputs["pixel_mask"].to(device))
        processor: Any = self.processing_class
        post_process = processor.post_process_object_detection
        if self.masks:
            post_process = processor.post_process_detections_with_masks
        return [
            _as_predictions(found)
            for found in post_process(outputs, threshold=threshold, target_sizes=inputs["sizes"])
        ]


def _as_predictions(found: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
    """The image processor's result for one image in the form of COCO's result files."""
    boxes = found["boxes"].float().cpu().numpy().astype(np.float64)
    boxes[:, 2:] -= boxes[:, :2]  # (left, top, right, bottom) -> (left, top, width, height)
    predictions: list[dict[str, Any]] = [
        {"category": category, "score": score, "bbox": box}
        for category, score, box in zip(
            found["labels"].tolist(), found["scores"].tolist(), boxes.tolist(), strict=True
        )
    ]
    for prediction, mask in zip(predictions, found.get("masks", ()), strict=False):
        prediction["segmentation"] = encode_mask(mask.cpu().numpy())
    return predictions


class ObjectDetection(Task):
    """A box and a class for every object."""

    name = "object-detection"
    source_options = ("root", "pixel_format")
    masks = False

    def load(self, arguments: DataArguments, part: str) -> DetectionData:
        """Load images and their objects."""
        split, limit = arguments.split_of(part)
        return load_detection(
            arguments.dataset,
            split,
            root=arguments.data_root,
            masks=self.masks,
            filter_empty=arguments.filter_empty and part == "train",
            limit=limit,
            pixel_format=arguments.pixel_format,
        )

    def load_split(self, name: str, split: str, limit: int | None, **source: Any) -> DetectionData:
        """Load images and their objects by the name of their dataset."""
        return load_detection(name, split, masks=self.masks, limit=limit, **source)

    def check(self, data: DetectionData, limit: int | None) -> list[Fault]:
        """Read images and compare them with their entries."""
        return scan_detection(data, limit).faults

    def inspect(self, name: str, split: str, limit: int | None, **source: Any) -> Inspection:
        """Read entries and images and count objects and sizes."""
        scan = scan_detection_source(name, split, masks=self.masks, limit=limit, progress=True, **source)
        columns = (scan.objects.tolist(), scan.images_with_class.tolist(), scan.crowds.tolist())
        statistics = {
            "classes": list(scan.spec.classes),
            **dict(zip(("objects", "images_with_class", "crowds"), columns, strict=True)),
            "images_without_objects": scan.images_without_objects,
            "sizes": sizes_as_json(scan.sizes),
            **scan.survey.statistics(),
        }
        rows = list(zip(scan.spec.classes, *columns, strict=True))
        table = table_of(("class", "objects", "images", "crowds"), rows, scan.sizes)
        return Inspection(scan.faults, scan.notes, scan.images, table, statistics)

    def show(self, name: str, split: str, limit: int, **source: Any) -> Image.Image:
        """Images with boxes (and masks) and names."""
        data = self.load_split(name, split, limit, **source)
        return thumbnail_grid(
            [(row["id"], self._drawn(row, row["objects"], data.spec)) for row in data.dataset], 3, 400
        )

    def processor_options(self, arguments: DataArguments) -> dict[str, Any]:
        """Shortest and longest edge of the test."""
        base = arguments.test_base_size
        if base is None:
            return {}
        return {"do_resize": True, "size": {"shortest_edge": min(base), "longest_edge": max(base)}}

    def build_trainer(
        self,
        data: DataArguments,
        args: TaskTrainingArguments,
        model: PreTrainedModel,
        processor: BaseImageProcessor,
        eval_data: DetectionData,
        train_data: DetectionData | None = None,
    ) -> DetectionTrainer:
        """Multi-scale images for training, the image processor for evaluation."""
        train_dataset = None
        if train_data is not None:
            if train_data.spec.classes != eval_data.spec.classes:
                raise InputError(
                    f"{data.train_split} has the categories {', '.join(train_data.spec.classes[:4])} ..., "
                    f"{data.eval_split} has {', '.join(eval_data.spec.classes[:4])} ... Give files with the same ones."
                )
            augmentation = DetectionAugmentation(data.shortest_edge, data.longest_edge, data.flip, self.masks)
            train_dataset = TrainDetections(train_data, augmentation, args.seed)
        return DetectionTrainer(
            model,
            args,
            masks=self.masks,
            image_processor=processor,
            spec=eval_data.spec,
            train_dataset=train_dataset,
            eval_dataset=EvalDetections(eval_data, processor),
        )

    def draw_results(self, trainer: DetectionTrainer) -> Image.Image:
        """Draw images with the true and with the predicted objects."""
        model = trainer.accelerator.unwrap_model(trainer.model).eval()
        lines = []
        for index in spread(len(trainer.eval_dataset)):
            row = trainer.eval_dataset.data.dataset[index]
            found = trainer.detect(model, collate_eval([trainer.eval_dataset[index]]), SHOWN_SCORE)[0]
            true = [each for each in row["objects"] if not each["iscrowd"]]
            lines.append(
                [
                    ("ground truth", self._drawn(row, true, trainer.spec)),
                    ("prediction", self._drawn(row, found, trainer.spec)),
                ]
            )
        return labeled_rows(lines)

    def _drawn(self, row: dict[str, Any], objects: list[dict[str, Any]], spec: ClassNames) -> Image.Image:
        import json

        boxes = [(x, y, x + wide, y + high) for x, y, wide, high in (each["bbox"] for each in objects)]
        names = [
            spec.classes[each["category"]] + (f" {100 * each['score']:.0f} %" if "score" in each else "")
            for each in objects
        ]
        colors = [spec.palette[each["category"]] for each in objects]
        size = (row["height"], row["width"])
        texts = [each.get("segmentation", "") for each in objects] if self.masks else []
        masks = [object_mask(text if isinstance(text, str) else json.dumps(text), size) for text in texts]
        return draw_objects(row["image"], boxes, names, colors, masks or None, width=400)


class InstanceSegmentation(ObjectDetection):
    """A box, a class and a mask for every object."""

    name = "instance-segmentation"
    masks = True
