"""How long a training loop waits for its data."""

import logging
import time
from collections.abc import Iterator
from typing import Any

from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState

logger = logging.getLogger(__name__)

WARN_ABOVE = 0.2  # fraction of the time


class DataTimeCallback(TrainerCallback):
    """Measures the duration of training steps, and the part of it spent waiting for the next batch.

    Evaluations, checkpoints and the first step, in which the loader starts its workers, do not count. A GPU may still
    compute while the loop waits, so the fraction is an upper bound of its idle time.

    Args:
        trainer: the callback adds itself to it.
    """

    def __init__(self, trainer: Trainer) -> None:
        trainer.add_callback(self)
        self.steps = 0
        self.waited = 0.0
        self.total = 0.0
        self._began: float | None = None
        self._step_waited = 0.0

    @property
    def fraction(self) -> float | None:
        """Seconds waited / seconds in total; None before the second step has ended."""
        return self.waited / self.total if self.total else None

    def timed(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Yield the batches, and add up the time until each is ready."""
        while True:
            started = time.perf_counter()
            self._began = started if self._began is None else self._began
            try:
                batch = next(batches)
            except StopIteration:
                return
            self._step_waited += time.perf_counter() - started
            yield batch

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add the step that has ended."""
        if self._began is not None and self.steps:  # not the first step
            self.total += time.perf_counter() - self._began
            self.waited += self._step_waited
        self.steps += 1
        self._began, self._step_waited = None, 0.0

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Warn if much of the time was spent waiting."""
        if self.fraction is not None and self.fraction > WARN_ABOVE:
            logger.warning(
                "Training waited for its data %.0f %% of the time. Raise --dataloader_num_workers above %d if there "
                "are cores; `denseseg data pack` replaces many small files by a few large ones.",
                100 * self.fraction,
                args.dataloader_num_workers,
            )
