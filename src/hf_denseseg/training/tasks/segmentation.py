"""Semantic segmentation: one class per pixel, scored by an exact confusion matrix."""

from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BaseImageProcessor, PreTrainedModel

from hf_denseseg.data.augmentation.rare_classes import RareClasses, count_pixels
from hf_denseseg.data.augmentation.segmentation import (
    EvalDataset,
    TrainAugmentation,
    TrainDataset,
)
from hf_denseseg.data.checks.proposal import propose_spec
from hf_denseseg.data.checks.segmentation import SegmentationScan, scan_segmentation, scan_segmentation_source
from hf_denseseg.data.labels import SegmentationData
from hf_denseseg.data.reading.images import Fault
from hf_denseseg.data.segmentation import load_segmentation
from hf_denseseg.data.shards.streaming import StreamingTrainDataset
from hf_denseseg.data.sources.exports.formats import recognize_export
from hf_denseseg.data.sources.folder_options import NO_OPTIONS
from hf_denseseg.data.sources.folders import NoLabelSpecError
from hf_denseseg.errors import InputError
from hf_denseseg.evaluation.score_names import chance_level, describe_protocol
from hf_denseseg.files import atomic_path
from hf_denseseg.inference.predict.processes import Processes
from hf_denseseg.inference.preprocessing import Preprocessing
from hf_denseseg.inference.settings import InferenceSettings, check_threshold
from hf_denseseg.reports.evaluation_page import Drawn, write_page, write_tables
from hf_denseseg.training.arguments import TaskTrainingArguments
from hf_denseseg.training.data_arguments import DataArguments
from hf_denseseg.training.tasks.doubt import doubt
from hf_denseseg.training.tasks.segmentation_trainer import SegmentationTrainer
from hf_denseseg.training.tasks.submission import image_names
from hf_denseseg.training.tasks.task import Inspection, Task, sizes_as_json, sizes_of, spread
from hf_denseseg.visualization.evaluation import prediction_row
from hf_denseseg.visualization.label_maps import prediction_grid

CLASS_PIXELS = "class_pixels.npz"
WORST_IMAGES, BEST_IMAGES = 6, 2  # shown on the page of an evaluation


class SemanticSegmentation(Task):
    """One class per pixel."""

    name = "semantic-segmentation"
    examples = "pairs"
    source_options = ("spec", "root", "columns", "revision", "pixel_format", "options")

    def check_keys(self, data: DataArguments) -> None:
        """Refuse test keys that contradict each other, and rare classes of a stream."""
        inference_settings(data)
        if not 0 <= data.copy_paste <= 1:
            raise InputError(f"copy_paste is {data.copy_paste}: give a probability from 0 to 1.")
        if data.streaming and (data.class_balanced_sampling or data.copy_paste):
            raise InputError(
                "class_balanced_sampling and copy_paste read images out of order, which a stream cannot do. Leave "
                "them out, or streaming."
            )

    def load(self, arguments: DataArguments, part: str) -> SegmentationData:
        """Load pairs of images and label maps."""
        split, limit = arguments.split_of(part)
        return load_segmentation(
            arguments.dataset,
            split,
            spec=arguments.label_spec,
            columns=arguments.dataset_columns,
            root=arguments.data_root,
            revision=arguments.dataset_revision,
            streaming=arguments.streaming and part == "train",
            limit=limit,
            pixel_format=arguments.pixel_format,
            options=arguments.folder_options,
        )

    def load_split(self, name: str, split: str, limit: int | None, **source: Any) -> SegmentationData:
        """Load pairs by the name of their dataset."""
        return load_segmentation(name, split, limit=limit, **source)

    def check(self, data: SegmentationData, limit: int | None) -> list[Fault]:
        """Read pairs; a stream is not checked, since it would be read twice."""
        if not hasattr(data.dataset, "__len__"):
            return []
        scan = scan_segmentation(data, limit)
        if scan.images and not scan.pixels.any():
            message = (
                "all pixels of the label maps are ignored: there is nothing to score. If the labels are not public, "
                "`denseseg evaluate ... --submission ZIP` writes the predictions for the evaluation server."
            )
            return [Fault(data.spec.name, message)]
        return scan.faults

    def inspect(self, name: str, split: str, limit: int | None, **source: Any) -> Inspection:
        """Read pairs and count their pixels; where a specification is missing or does not fit, propose one."""
        suffix = source.get("options", NO_OPTIONS).mask_suffix
        try:
            scan = scan_segmentation_source(name, split, limit=limit, progress=True, **source)
        except NoLabelSpecError as error:
            return Inspection([Fault(name, str(error))], [], 0, "", {}, propose_spec(name, split, None, limit, suffix))
        own_names = recognize_export(Path(name).expanduser()) is not None
        proposal = propose_spec(name, split, scan.spec, limit, suffix) if scan.faults and not own_names else None
        return Inspection(scan.faults, scan.notes, scan.images, _table(scan), _statistics(scan), proposal)

    def show(self, name: str, split: str, limit: int, **source: Any) -> Image.Image:
        """Images beside their label maps in color."""
        data = self.load_split(name, split, limit, **source)
        rows = [(row["image"], row["label"]) for row in islice(data.dataset, limit)]
        return prediction_grid(rows, data.spec, ("image", "label"))

    def processor_options(self, arguments: DataArguments) -> dict[str, Any]:
        """Resize as the protocol does, or not at all."""
        base = arguments.test_base_size
        size = {} if base is None else {"size": {"shortest_edge": min(base), "longest_edge": max(base)}}
        return {"do_resize": base is not None, **size}

    def build_trainer(
        self,
        data: DataArguments,
        args: TaskTrainingArguments,
        model: PreTrainedModel,
        processor: BaseImageProcessor,
        eval_data: SegmentationData,
        train_data: SegmentationData | None = None,
    ) -> SegmentationTrainer:
        """Augmented crops for training, whole images for evaluation."""
        train_dataset: Any = None
        if train_data is not None:
            augmentation = TrainAugmentation(
                tuple(data.crop_size),
                pad_color=[255 * mean for mean in Preprocessing.from_image_processor(processor).mean_color],
                base_size=tuple(data.base_size) if data.base_size else None,
                scale_range=tuple(data.scale_range),
                cat_max_ratio=data.cat_max_ratio,
                flip=data.flip,
                photometric=data.photometric_distortion,
                scale_step=data.scale_step,
                photometric_style=data.photometric_style,
            )
            rare = data.class_balanced_sampling or data.copy_paste > 0
            train_dataset = TrainDataset(
                train_data,
                augmentation,
                args.seed,
                getattr(model, "training_targets", None),
                rare_classes=_rare_classes(train_data, args) if rare else None,
                balanced=data.class_balanced_sampling,
                copy_paste=data.copy_paste,
            )
            train_dataset = StreamingTrainDataset(train_dataset, args.seed) if data.streaming else train_dataset
        trainer = SegmentationTrainer(
            model,
            args,
            image_processor=processor,
            spec=eval_data.spec,
            settings=inference_settings(data),
            calibration=data.calibration,
            train_dataset=train_dataset,
            eval_dataset=EvalDataset(eval_data),
        )
        if train_data is not None:
            height, width = data.crop_size
            trainer.try_sizes((height, width))
        return trainer

    def use_class_order(self, trainer: SegmentationTrainer, order: list[int]) -> None:
        """Translate predicted ids to those of the dataset."""
        trainer.class_order = torch.tensor(order)

    def use_protocol_of(self, trainer: SegmentationTrainer, checkpoint: str) -> None:
        """Use the inference settings saved with the checkpoint."""
        trainer.settings = InferenceSettings.load(checkpoint)
        check_threshold(trainer.settings.threshold, trainer.model.config.num_labels or 0)

    def write_evaluation(self, trainer: SegmentationTrainer, results: dict[str, Any], output: Path) -> None:
        """Tables, and a page with the worst and best images."""
        evaluation = trainer.evaluation

        def drawn(number: int) -> Drawn:
            sample = trainer.eval_dataset[number]
            figure = prediction_row(
                sample["image"], sample["label"], trainer.predict_labels(sample), trainer.spec.palette
            )
            return Drawn(trainer.names[number], evaluation.images[number], figure)

        images = [(trainer.names[number], evaluation.images[number]) for number in sorted(evaluation.images)]
        write_tables(output, results["scores"], images)
        worst = evaluation.worst(WORST_IMAGES)
        best = [number for number in evaluation.best(BEST_IMAGES) if number not in worst]
        write_page(
            output,
            results,
            trainer.spec,
            protocol=describe_protocol(self.name, results["protocol"]),
            chance=chance_level(self.name, results["scores"]),
            worst=[drawn(number) for number in worst],
            best=[drawn(number) for number in best],
        )

    def rank_doubts(self, trainer: SegmentationTrainer, min_pixels: int) -> None:
        """Table and page of the doubtful regions."""
        doubt(trainer, min_pixels)

    def draw_results(self, trainer: SegmentationTrainer) -> Image.Image:
        """Draw images, their label maps and the predictions."""
        samples = [trainer.eval_dataset[number] for number in spread(len(trainer.eval_dataset))]
        rows = [(sample["image"], sample["label"], trainer.predict_labels(sample)) for sample in samples]
        return prediction_grid(rows, trainer.spec)


def _rare_classes(data: SegmentationData, args: TaskTrainingArguments) -> RareClasses:
    """Count the classes of all training images, every process in its part of them; the run folder keeps the counts."""
    rank, count, file = args.process_index, args.world_size, Path(args.output_dir or ".") / CLASS_PIXELS
    processes = Processes(rank, count, args.local_process_index)
    names = np.array(image_names(data.dataset), dtype=str)
    pixels = processes.gather(_kept_counts(file, names) if rank == 0 else None)[0]
    if pixels is None:
        own = count_pixels(data, rank, count, args.dataloader_num_workers, progress=rank == 0)
        pixels = np.zeros((len(names), data.spec.num_labels), np.int64)
        for first, part in enumerate(processes.gather(own)):
            pixels[first::count] = part
        if rank == 0:
            with atomic_path(file) as aside:
                np.savez_compressed(aside, pixels=pixels, names=names)
    return RareClasses(pixels)


def _kept_counts(file: Path, names: np.ndarray) -> np.ndarray | None:
    """Counts of an earlier start of the run; None without any, or if they are of other images."""
    if not file.exists():
        return None
    with np.load(file) as kept:
        return kept["pixels"] if np.array_equal(kept["names"], names) else None


def _table(scan: SegmentationScan) -> str:
    """Fraction of each class, ignored pixels, and the sizes, as lines of text."""
    weights = scan.class_weights()
    lines = [f"{'class':<20}{'pixels %':>10}{'images':>10}{'enet':>10}{'median':>10}"]
    for index, name in enumerate(scan.spec.classes):
        lines.append(
            f"{name:<20}{100 * scan.fractions[index]:>10.3f}{scan.images_with_class[index]:>10}"
            f"{weights['enet'][index]:>10.3f}{weights['median_frequency'][index]:>10.3f}"
        )
    lines.append(f"{'(ignored, of all)':<20}{100 * scan.ignored_fraction:>10.3f}")
    channels = [f"{name}: {values}" for name, values in scan.survey.statistics().items()]
    return "\n".join([*lines, sizes_of(scan.sizes), *channels])


def _statistics(scan: SegmentationScan) -> dict[str, Any]:
    return {
        "classes": list(scan.spec.classes),
        "pixels": scan.pixels.tolist(),
        "fractions": scan.fractions.tolist(),
        "images_with_class": scan.images_with_class.tolist(),
        "ignored_fraction": scan.ignored_fraction,
        "sizes": sizes_as_json(scan.sizes),
        "class_weights": scan.class_weights(),
        **scan.survey.statistics(),
    }


def inference_settings(data: DataArguments) -> InferenceSettings:
    """The test protocol given by the keys of a recipe.

    Raises:
        InputError: keys that contradict each other.
    """
    names = (field.name for field in fields(data) if field.name.startswith("test_"))
    return InferenceSettings.from_dict({name.removeprefix("test_"): getattr(data, name) for name in names})
