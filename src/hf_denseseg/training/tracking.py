"""Sample images for experiment trackers; losses and scores are sent by transformers."""

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image
from transformers import Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import TrainerControl, TrainerState

TAG = "samples"


class SampleImages(TrainerCallback):
    """Send images with their ground truth and prediction to the trackers at each evaluation of a training.

    Args:
        trainer: in training.
        draw: makes one image of them.
    """

    def __init__(self, trainer: Trainer, draw: Callable[[], Image.Image]) -> None:
        self.trainer, self.draw = trainer, draw
        self._drawn_at = -1  # step; a classifier with averaged weights is evaluated twice

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Draw, and send to tensorboard, trackio and wandb, as far as `report_to` names them."""
        wanted = {"tensorboard", "trackio", "wandb"} & set(args.report_to)
        if not wanted or not state.is_world_process_zero or not self.trainer.is_in_train:
            return  # transformers closes the trackers at the end of the training
        if state.global_step == self._drawn_at:
            return
        self._drawn_at = step = state.global_step
        image = self.draw()
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                callback.tb_writer.add_image(TAG, np.asarray(image), step, dataformats="HWC")
        for name in sorted(wanted - {"tensorboard"}):
            tracker = importlib.import_module(name)
            tracker.log({TAG: tracker.Image(image), "train/global_step": step})


__all__ = ["SampleImages"]
