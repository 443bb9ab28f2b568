"""Train a segmentation model, and evaluate it picture by picture with a journal."""

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Subset
from transformers import EvalPrediction, PreTrainedModel

from hf_denseseg.data.augmentation.segmentation import collate_eval, collate_train
from hf_denseseg.data.labels import VOID, LabelSpec
from hf_denseseg.evaluation.segmentation_scores import Evaluation, count_picture
from hf_denseseg.evaluation.size_recall import check_installed
from hf_denseseg.inference.predict.journal import Journal, Record, content_check, weights_digest
from hf_denseseg.inference.segmentation import segment
from hf_denseseg.inference.settings import InferenceSettings
from hf_denseseg.models.losses import segmentation_loss
from hf_denseseg.training.arguments import TaskTrainingArguments
from hf_denseseg.training.optimization import load_class_weights
from hf_denseseg.training.trainer import TaskTrainer

logger = logging.getLogger(__name__)

# Arguments of the Trainer that change the last bits of what a model says.
COMPUTATION = ("bf16", "fp16", "bf16_full_eval", "fp16_full_eval", "tf32", "channels_last")


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
        check_installed()
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
        valid = (labels != VOID) & (labels != -100)
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
