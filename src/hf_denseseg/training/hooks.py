"""What a run does at the beginning of training and of an epoch, and after each step."""

from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_denseseg.training.ema import EMA_FILE
from hf_denseseg.training.optimization import refuse_single_values, warn_of_stale_statistics


class TrainingHooks(TrainerCallback):
    """Set the epoch of the sampler, and update the averaged weights after every step.

    Args:
        trainer: a `TaskTrainer`.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Refuse batches of one value, and start the average, or load that of the checkpoint."""
        warn_of_stale_statistics(self.trainer.model.config, state.max_steps)
        if hasattr(self.trainer.train_dataset, "__len__"):  # a stream has no last batch
            refuse_single_values(
                self.trainer.model, len(self.trainer.train_dataset), self.trainer.args, state.max_steps
            )
        ema = self.trainer.ema
        if ema is not None:
            ema.warn_if_not_reached(state.max_steps)
            ema.start(self.trainer.accelerator.unwrap_model(self.trainer.model))
            checkpoint = self.trainer.output / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}" / EMA_FILE
            if checkpoint.exists():
                ema.load(checkpoint)

    def on_epoch_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Tell the sampler the epoch."""
        # Not all versions of transformers set the epoch of a sampler inside a skipped or sharded batch sampler.
        if self.trainer._sampler is not None:
            self.trainer._sampler.set_epoch(int(state.epoch or 0))

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Update the average."""
        if self.trainer.ema is not None:
            self.trainer.ema.update(self.trainer.accelerator.unwrap_model(self.trainer.model))
