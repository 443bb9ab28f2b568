"""Evaluation of a trainer by the runner of prediction: shared between processes, resumable, one record per image.

A task defines the record of an image, how records add up, and the scores.
"""

import functools
import logging
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import EvalLoopOutput

from hf_denseseg.data.class_names import ClassNames
from hf_denseseg.data.labels import LabelSpec
from hf_denseseg.inference.predict.journal import Entry, Journal, Key, content_check, weights_digest
from hf_denseseg.inference.predict.processes import Processes
from hf_denseseg.inference.predict.runner import Work, run
from hf_denseseg.inference.preprocessing import Preprocessing

logger = logging.getLogger(__name__)

# Arguments of the Trainer that change the last bits of a prediction.
COMPUTATION = (
    *("bf16", "fp16", "bf16_full_eval", "fp16_full_eval", "tf32", "channels_last"),
    "per_device_eval_batch_size",
)


def processes_of(trainer: Trainer) -> Processes:
    """The processes that train together."""
    return Processes(trainer.args.process_index, trainer.args.world_size, trainer.args.local_process_index)


def batches_of_process(trainer: Trainer, dataset: Any) -> DataLoader:
    """Lists of samples for this process.

    The batches are the same for any number of processes and are assigned in turn, so that the prediction for an image
    does not depend on the number of processes.
    """
    args, count = trainer.args, len(dataset)
    batches = [
        range(first, min(first + args.eval_batch_size, count)) for first in range(0, count, args.eval_batch_size)
    ]
    workers = args.dataloader_num_workers
    return DataLoader(
        dataset,
        batch_sampler=batches[args.process_index :: args.world_size],  # type: ignore[arg-type]
        collate_fn=list,
        num_workers=workers,
        prefetch_factor=args.dataloader_prefetch_factor if workers else None,
    )


def work_of(batches: DataLoader, with_states: bool) -> Iterator[Work]:
    """Batches as work for the runner; states are needed only with a journal."""
    for samples in batches:
        states = [content_check(sample) if with_states else None for sample in samples]
        yield Work([sample["index"] for sample in samples], states, samples)


def open_journal(
    trainer: "EvaluatingTrainer", name: str, options: dict[str, Any] | None = None
) -> tuple[Journal, dict[Key, Entry], bool]:
    """Open the journal of this process in the output folder.

    Machines may have output folders of their own: the entries on all of them are used.

    Args:
        trainer: model, protocol and data.
        name: of the journal's folder.
        options: what else the records depend on, as JSON values.

    Returns:
        The journal, the entries of earlier runs by key, and whether this machine's journal was kept.
    """
    made_with = {
        "checkpoint": weights_digest(trainer.model),
        "labels": trainer.spec.to_dict(),
        "protocol": trainer.protocol,
        "preprocessing": trainer.preprocessing.to_dict(),
        "computation": {
            "device": trainer.args.device.type,
            "dtype": str(trainer.model.dtype),
            "torch": torch.__version__,
            **{name: getattr(trainer.args, name) for name in COMPUTATION},
        },
        **(options or {}),
    }
    journal = Journal(trainer.output / name, made_with, trainer.args.process_index)
    first = trainer.accelerator.is_local_main_process
    kept = journal.prepare() if first else True
    trainer.accelerator.wait_for_everyone()  # until the journals of other evaluations are deleted
    gathered = processes_of(trainer).gather(journal.read() if first else [])
    known = {entry.key: entry for entries in gathered for entry in entries}
    if known and trainer.is_world_process_zero():
        logger.info("Continuing: %d of %d images finished before.", len(known), len(trainer.eval_dataset))
    return journal, known, kept


def prepare_model(trainer: "EvaluatingTrainer") -> nn.Module:
    """The model in eval mode, prepared as in `Trainer.evaluation_loop`: device, precision, autocast."""
    model: nn.Module = trainer.model
    if not trainer.is_in_train:  # otherwise the model is prepared already
        if not trainer.accelerator._models:
            model = trainer.accelerator.prepare_model(model, evaluation_mode=True)
        dtype = (
            torch.float16 if trainer.args.fp16_full_eval else torch.bfloat16 if trainer.args.bf16_full_eval else None
        )
        if dtype is not None:
            model = model.to(dtype=dtype, device=trainer.args.device)
    return trainer.accelerator.unwrap_model(model).eval()


class EvaluatingTrainer(Trainer):
    """transformers' Trainer with an evaluation in which every image gives one record, and records add up to scores.

    Processes exchange records only: label maps of different sizes cannot be gathered as tensors, and are about 1,000
    times larger.

    Attributes:
        logged_scores: keys of the scores that are logged in training.
        scores: result of the last evaluation.
    """

    logged_scores: tuple[str, ...]
    eval_dataset: Any
    model: PreTrainedModel
    output: Path
    preprocessing: Preprocessing
    spec: LabelSpec | ClassNames

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.scores: dict[str, Any] = {}
        self._journal: Journal | None = None
        self._known: dict[Key, Entry] = {}
        super().__init__(*args, **kwargs)

    @property
    @abstractmethod
    def protocol(self) -> dict[str, Any]:
        """The test protocol as JSON values, for `results.json`."""

    @property
    def record_options(self) -> dict[str, Any]:
        """What records depend on besides the protocol, as JSON values."""
        return {}

    @abstractmethod
    def predict_samples(self, model: nn.Module, samples: list[dict[str, Any]]) -> list[Any]:
        """Run the model on a batch of the evaluation data; returns one record per image, as JSON values."""

    @abstractmethod
    def reset_scores(self) -> None:
        """Remove all records."""

    @abstractmethod
    def add_record(self, number: int, record: Any) -> None:
        """Add the record of an image, given its number in the evaluation data."""

    @abstractmethod
    def compute_scores(self) -> dict[str, Any]:
        """Merge the records of all processes, and score them."""

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Lists of samples for this process, see `batches_of_process`."""
        return batches_of_process(self, self.eval_dataset if eval_dataset is None else eval_dataset)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Score the model image by image with the runner of prediction; sets `scores`."""
        self.callback_handler.eval_dataloader = dataloader
        self.reset_scores()
        predict = functools.partial(self.predict_samples, prepare_model(self))
        kept = 0
        for entry, is_new in run(self._work(dataloader), predict, self._journal, self._known):
            self.add_record(int(entry.key), entry.record)
            kept += not is_new
        # An entry that was not kept belongs to an image whose content differs from that of the earlier run.
        changed = len(self._known) - sum(processes_of(self).gather(kept))
        if changed and self.is_world_process_zero():
            logger.info("%d images have changed since, and were predicted again.", changed)
        self.scores = self.compute_scores() | {"step": self.state.global_step}
        logged = {name: self.scores[name] for name in self.logged_scores if self.scores[name] is not None}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in logged.items()}
        return EvalLoopOutput(None, None, metrics, len(dataloader.dataset))  # type: ignore[arg-type]

    def _work(self, dataloader: DataLoader) -> Iterator[Work]:
        for work in work_of(dataloader, with_states=self._journal is not None):
            yield work
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)

    @contextmanager
    def resumable_evaluation(self) -> Iterator[None]:
        """Evaluate, continuing from the journal in the output folder; then run a block that writes the results.

        An exception in the block leaves the journal for the next run.
        """
        self._journal, self._known, _ = open_journal(self, "evaluation_journal", self.record_options)
        self.evaluate()
        yield
        self.accelerator.wait_for_everyone()  # the journal is deleted after the results are written
        self._journal.close()
        if self.accelerator.is_local_main_process:
            self._journal.delete()
