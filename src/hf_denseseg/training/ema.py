"""Exponential moving average of a model's weights."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from hf_denseseg.errors import InputError

logger = logging.getLogger(__name__)

EMA_FILE = "ema.safetensors"  # in a checkpoint


def highest_decay(updates: int) -> float:
    """What the decay is limited to after a number of updates."""
    return (1 + updates) / (10 + updates)


class ExponentialMovingAverage:
    """Exponential moving average of weights and BatchNorm statistics (`torch.optim.swa_utils`), saved with a run.

    The first update copies the model; after n updates the decay is `min(decay, (1 + n) / (10 + n))`, as in TensorFlow
    and diffusers. With the full decay from the start, an average of 0.99 would hold a third of the first weights after
    100 steps.
    """

    def __init__(self, decay: float) -> None:
        if not 0 < decay < 1:
            raise InputError(f"ema_decay is {decay}: give a number between 0 and 1, such as 0.999.")
        self.decay = decay
        self.average: AveragedModel | None = None

    def warn_if_not_reached(self, steps: int) -> None:
        """Warn if a run of `steps` is too short for the decay: a lower one would give the same average."""
        if (highest := highest_decay(steps - 1)) < self.decay:
            logger.warning(
                "ema_decay %g is not reached in %d steps: it grows with them, here to %.3g, so that the average is "
                "one of about the last %d.",
                self.decay,
                steps,
                highest,
                max(1, round(1 / (1 - highest))),
            )

    def start(self, model: nn.Module) -> None:
        """Start from a copy of `model`."""
        # `use_buffers` also averages the running statistics of BatchNorm.
        self.average = AveragedModel(model, multi_avg_fn=self._move, use_buffers=True)

    def _move(self, averages: Any, weights: Any, count: torch.Tensor | int) -> None:
        """Move lists of averaged tensors towards those of the model."""
        assert self.average is not None
        updates = int(self.average.n_averaged)  # on the CPU, unlike `count`, its copy on the GPU: nothing waits
        get_ema_multi_avg_fn(min(self.decay, highest_decay(updates)))(averages, weights, count)

    def update(self, model: nn.Module) -> None:
        """Update the average with the weights of `model`."""
        assert self.average is not None
        self.average.update_parameters(model)

    def save(self, path: Path) -> None:
        """Write the averaged state as safetensors."""
        from safetensors.torch import save_file

        assert self.average is not None
        save_file({name: value.contiguous() for name, value in self.average.state_dict().items()}, path)

    def load(self, path: Path) -> None:
        """Read a file written by `save`."""
        from safetensors.torch import load_file

        assert self.average is not None
        self.average.load_state_dict(load_file(path))

    @contextmanager
    def swapped_into(self, model: nn.Module) -> Iterator[None]:
        """Run a block with the averaged state in `model`."""
        assert self.average is not None
        trained = {name: value.detach().clone() for name, value in model.state_dict().items()}
        model.load_state_dict(self.average.module.state_dict())
        try:
            yield
        finally:
            model.load_state_dict(trained)
