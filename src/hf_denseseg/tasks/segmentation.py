"""Semantic segmentation: one class per pixel, scored by one exact confusion matrix."""

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from torch.utils.data import Subset
from transformers import EvalPrediction, PreTrainedModel

from hf_denseseg.data.checks import Fault, Scan, check_dataset, scan_source
from hf_denseseg.data.datasets import SegmentationData, load_segmentation
from hf_denseseg.data.labels import LabelSpec
from hf_denseseg.data.streaming import StreamingTrainDataset
from hf_denseseg.data.transforms import (
    EvalDataset,
    TrainAugmentation,
    TrainDataset,
    collate_eval,
    collate_train,
)
from hf_denseseg.evaluation import Evaluation, count_picture
from hf_denseseg.evaluation_journal import Journal, Record, content_check, weights_digest
from hf_denseseg.evaluation_pictures import answer_strip
from hf_denseseg.evaluation_report import Drawn, write_page, write_tables
from hf_denseseg.files import atomic_path
from hf_denseseg.inference import segment
from hf_denseseg.inference_settings import InferenceSettings
from hf_denseseg.losses import segmentation_loss
from hf_denseseg.optimization import load_class_weights
from hf_denseseg.recipe import Recipe
from hf_denseseg.recipe_keys import DataArguments, TaskTrainingArguments
from hf_denseseg.tasks.task import Inspection, Task, sizes_as_json, sizes_of, spread
from hf_denseseg.training import TaskTrainer
from hf_denseseg.visualization import picture_grid

logger = logging.getLogger(__name__)

# Arguments of the Trainer that change the last bits of what a model says.
COMPUTATION = ("bf16", "fp16", "bf16_full_eval", "fp16_full_eval", "tf32", "channels_last")
WORST_PICTURES, BEST_PICTURES = 6, 2  # shown on the page of an evaluation


class SegmentationTrainer(TaskTrainer):
    """Trains and evaluates any segmentation model of this package.

    Evaluation runs the test protocol picture by picture at the label's own resolution and hands back the counts of
    each, so that its memory stays flat, labels may differ in size, and several processes count every picture once.

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
        self.evaluation = Evaluation(spec)
        self._journal: Journal | None = None
        self._counted: list[Record] = []  # before this process began
        self.names: dict[int, str] = {}  # of the pictures in the journal
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
        """Counts of one batch, a vector for each picture, and the pictures' numbers `(B,)`.

        Only these are gathered: label maps of different widths cannot be, and would cost the network 1,000 times more.
        """
        plain = self.accelerator.unwrap_model(model) if not self.is_fsdp_enabled else model
        device = self.args.device
        vectors = []
        for k, (image, label) in enumerate(zip(inputs["images"], inputs["labels"], strict=True)):
            with torch.no_grad(), self.compute_loss_context_manager():
                prediction = segment(
                    plain, image.to(device), self.settings, self.mean, self.std, size=label.shape[-2:]
                )
            vectors.append(count_picture(prediction, label, self.spec.num_labels))
            if self._journal is not None:
                number, name = int(inputs["index"][k]), inputs["ids"][k]
                self.names[number] = name
                check = content_check({"id": name, "image": image.cpu(), "label": label.cpu()})
                self._journal.add(Record.of(number, name, check, vectors[-1]))
        return None, torch.stack(vectors).to(device), inputs["index"].to(device)

    def accumulate(self, prediction: EvalPrediction, compute_result: bool = False) -> dict[str, float]:
        """Add one gathered batch; the last one turns the sums into numbers."""
        vectors, numbers = torch.as_tensor(prediction.predictions).cpu(), torch.as_tensor(prediction.label_ids)
        for number, vector in zip(numbers.tolist(), vectors, strict=True):
            self.evaluation.add(number, vector)
        return self._scored() if compute_result else {}

    def _scored(self) -> dict[str, float]:
        self.scores = self.evaluation.scores()
        self.scores["step"] = self.state.global_step
        return {key: self.scores[key] for key in ("mean_iou", "pixel_accuracy", "mean_accuracy")}

    def reset_scores(self) -> None:
        """Begin with what the journal holds, if there is one."""
        self.evaluation = Evaluation(self.spec)
        for record in self._counted:
            self.evaluation.add(record.number, record.counts(self.evaluation.length))

    @contextmanager
    def evaluated(self) -> Iterator[None]:
        """Evaluate, going on from the journal in the output folder, if there is one; then run a block."""
        from accelerate.utils import gather_object

        self._journal = Journal(self.output / "evaluation_journal", self.journal_key(), self.args.process_index)
        if self.accelerator.is_local_main_process:
            self._journal.settle()
        self._counted = self.counted_before(self._journal)
        self.names = {record.number: record.id for record in self._counted}
        there = {record.number for record in self._counted}
        left = [number for number in range(len(self.eval_dataset)) if number not in there]
        if left:
            self.evaluate(Subset(self.eval_dataset, left))
        else:
            self.reset_scores()
            self._scored()
        self.names |= dict(gather_object(list(self.names.items())))
        yield
        # Only now are the results written.
        self.accelerator.wait_for_everyone()
        self._journal.close()
        if self.accelerator.is_local_main_process:
            self._journal.delete()

    def journal_key(self) -> dict[str, Any]:
        """What the answers depend on besides the pictures."""
        return {
            "checkpoint": weights_digest(self.model),
            "labels": self.spec.to_dict(),
            "protocol": self.protocol | {"mean": self.mean.tolist(), "std": self.std.tolist()},
            "computation": {
                "device": self.args.device.type,
                "dtype": str(self.model.dtype),
                "torch": torch.__version__,
                **{name: getattr(self.args, name) for name in COMPUTATION},
            },
        }

    def counted_before(self, journal: Journal) -> list[Record]:
        """What the journals of all machines hold of pictures that are still the same."""
        from accelerate.utils import gather_object

        self.accelerator.wait_for_everyone()  # until what belongs to another evaluation is gone
        lines = journal.read() if self.accelerator.is_local_main_process else []
        records = {record.number: record for record in gather_object(lines)}
        numbers = [number for number in sorted(records) if number < len(self.eval_dataset)]
        # Each process looks at its share of the pictures.
        share = numbers[self.args.process_index :: self.args.world_size]
        same = gather_object([n for n in share if content_check(self.eval_dataset[n]) == records[n].check])
        if records and self.is_world_process_zero():
            changed = len(numbers) - len(same)
            again = f" {changed} have changed since and are done again." if changed else ""
            logger.info("Going on: %d of %d pictures are done.%s", len(same), len(self.eval_dataset), again)
        return [records[number] for number in sorted(same)]

    def answer(self, sample: dict[str, Any]) -> torch.Tensor:
        """Predicted ids `(H, W)` of a sample of the evaluation data, at the label's own resolution, on the CPU."""
        model, image = self.accelerator.unwrap_model(self.model), sample["image"].to(self.args.device)
        with torch.no_grad():
            return segment(model, image, self.settings, self.mean, self.std, sample["label"].shape[-2:]).cpu()

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
    columns = {"iou": "IoU", "accuracy": "accuracy", "boundary_iou": "boundary IoU"}
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
        train_dataset: Any = None
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
            train_dataset = TrainDataset(train_data, augmentation, seed, getattr(model, "training_targets", None))
            train_dataset = StreamingTrainDataset(train_dataset, seed) if data.streaming else train_dataset
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

    @contextmanager
    def evaluated(self, trainer: SegmentationTrainer) -> Iterator[None]:
        """With a journal."""
        with trainer.evaluated():
            yield

    def write_evaluation(self, trainer: SegmentationTrainer, results: dict[str, Any], output: Path) -> None:
        """Tables, and a page with the worst and best pictures."""
        evaluation = trainer.evaluation

        def drawn(number: int) -> Drawn:
            sample = trainer.eval_dataset[number]
            strip = answer_strip(sample["image"], sample["label"], trainer.answer(sample), trainer.spec.palette)
            return Drawn(trainer.names[number], evaluation.pictures[number], strip)

        pictures = [(trainer.names[number], evaluation.pictures[number]) for number in sorted(evaluation.pictures)]
        write_tables(output, results["scores"], pictures)
        worst = evaluation.worst(WORST_PICTURES)
        best = [number for number in evaluation.best(BEST_PICTURES) if number not in worst]
        write_page(
            output,
            results,
            trainer.spec,
            protocol=self.protocol_name(results["protocol"]),
            chance=self.chance(results["scores"]),
            worst=[drawn(number) for number in worst],
            best=[drawn(number) for number in best],
        )

    def draw_results(self, trainer: SegmentationTrainer, path: Path) -> None:
        """Pictures, their label maps and the answers."""
        samples = [trainer.eval_dataset[number] for number in spread(len(trainer.eval_dataset))]
        rows = [(sample["image"], sample["label"], trainer.answer(sample)) for sample in samples]
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
