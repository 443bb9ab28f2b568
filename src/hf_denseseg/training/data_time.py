"""How long a training loop waits for its data."""

import logging
import time
from collections.abc import Iterator
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState

logger = logging.getLogger(__name__)

MUCH = 0.2


class WaitMeter(TrainerCallback):
    """Time of the steps of a training loop, and the part of it in which the next batch was not there yet.

    Evaluations, checkpoints and the first step, in which the loader starts its workers, do not count. On a GPU, which
    works on while the loop already waits, the share is an upper bound of its idle time.

    Args:
        trainer: tells the meter when a step ends.
    """

    def __init__(self, trainer: Any) -> None:
        trainer.add_callback(self)
        self.steps = 0
        self.waited = 0.0
        self.total = 0.0
        self._began: float | None = None
        self._step_waited = 0.0

    @property
    def share(self) -> float | None:
        """Seconds waited / seconds in all; None before the second step has ended."""
        return self.waited / self.total if self.total else None

    def timed(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Pass batches on and count the time until each is there."""
        while True:
            started = time.perf_counter()
            self._began = started if self._began is None else self._began
            try:
                batch = next(batches)
            except StopIteration:
                return
            self._step_waited += time.perf_counter() - started
            yield batch

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Note that a step has ended."""
        if self._began is not None and self.steps:
            self.total += time.perf_counter() - self._began
            self.waited += self._step_waited
        self.steps += 1
        self._began, self._step_waited = None, 0.0

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Say so if much of the time was waited."""
        if self.share is not None and self.share > MUCH:
            logger.warning(
                "Training waited for its data in %.0f %% of the time. Give more than --dataloader_num_workers %d, if "
                "there are cores for them; `denseseg data pack` spares them many small files.",
                100 * self.share,
                args.dataloader_num_workers,
            )
