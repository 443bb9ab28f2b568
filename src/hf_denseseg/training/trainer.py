"""`TaskTrainer`: transformers' Trainer with the papers' schedules, averaged weights and exact resumption."""

import json
import logging
import pickle
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BaseImageProcessor, EarlyStoppingCallback, PreTrainedModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from hf_denseseg.data.augmentation.sampler import EpochSampler
from hf_denseseg.data.class_names import ClassNames
from hf_denseseg.data.labels import LabelSpec
from hf_denseseg.data.shards.streaming import stream_loader
from hf_denseseg.errors import InputError, RunError
from hf_denseseg.files import write_atomic
from hf_denseseg.inference.preprocessing import Preprocessing
from hf_denseseg.models.auto.registration import is_own
from hf_denseseg.models.auto.remote_code import write_code
from hf_denseseg.training.adaptation import adapt, load_adapter, merged_state, save_adapter, still_modules
from hf_denseseg.training.arguments import TaskTrainingArguments
from hf_denseseg.training.checkpoints import explain_failed_save, mark_complete, what_is_kept
from hf_denseseg.training.data_time import DataTimeCallback
from hf_denseseg.training.distributed import prepare_fsdp, sync_batch_norms, unsharded_copy
from hf_denseseg.training.ema import EMA_FILE, ExponentialMovingAverage
from hf_denseseg.training.evaluation import EvaluatingTrainer
from hf_denseseg.training.hooks import TrainingHooks
from hf_denseseg.training.log_lines import use_lines
from hf_denseseg.training.optimization import (
    cosine_schedule,
    parameter_groups,
    polynomial_schedule,
    step_schedule,
)

logger = logging.getLogger(__name__)

FSDP_FILE = "pytorch_model_fsdp.bin"
# Maximum seconds between a broken connection and the signal that a loader worker died.
WORKER_DEATH_DELAY = 3.0


class TaskTrainer(EvaluatingTrainer):
    """Training for all tasks; the trainer of a task adds its loss, its batches and its scores.

    Training batches hold integer images, which are normalized here on the device (floating-point images are left as
    are). Evaluation keeps one record per image, so that memory stays constant and processes count every image once.

    Args:
        model: a model with a head for the task.
        args: see `TaskTrainingArguments`.
        image_processor: provides mean and std, and is saved with the checkpoints.
        spec: names of the classes; its `to_dict()` is saved with the checkpoints.
        train_collator: makes a training batch of samples.
        train_dataset: indexed by `(epoch, index)`, see `EpochSampler`.
        eval_dataset: indexed by an integer.
    """

    args: TaskTrainingArguments
    model: PreTrainedModel
    train_dataset: Any
    eval_dataset: Any

    def __init__(
        self,
        model: PreTrainedModel,
        args: TaskTrainingArguments,
        *,
        image_processor: BaseImageProcessor,
        spec: LabelSpec | ClassNames,
        train_collator: Callable[[list[Any]], Any],
        train_dataset: Any = None,
        eval_dataset: Any = None,
        **kwargs: Any,
    ) -> None:
        self.spec = spec
        self.evaluation_cpu_seconds = 0.0
        self._keeps_trained = False
        self._sampler: EpochSampler | None = None
        if train_dataset is not None:
            adapt(model, args)
        if args.sync_batch_norm and args.world_size > 1:
            model = sync_batch_norms(model, args.device)
        self._still = still_modules(model, args)  # of the model with synced BatchNorms
        self.memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
        nn.Module.to(model, memory_format=self.memory_format)  # in place
        self.output = Path(args.output_dir or ".")
        super().__init__(
            model=model,
            args=args,
            data_collator=train_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=image_processor,
            **kwargs,
        )
        self.model_accepts_loss_kwargs = False  # our losses are means, see `compute_loss`
        prepare_fsdp(self.accelerator, args, model)
        self.preprocessing = Preprocessing.from_image_processor(image_processor)
        self.ema = None if args.ema_decay is None else ExponentialMovingAverage(args.ema_decay)
        self.add_callback(TrainingHooks(self))
        use_lines(self)
        if args.early_stopping_patience is not None:
            self.add_callback(EarlyStoppingCallback(args.early_stopping_patience))
        self.data_time = DataTimeCallback(self)

    # Training

    def create_optimizer(self, model: PreTrainedModel | None = None) -> torch.optim.Optimizer:
        """AdamW (or `optim`) over the groups of `parameter_groups`."""
        if self.optimizer is None:
            model = self.model if model is None else model
            groups = parameter_groups(
                model,
                learning_rate=self.args.learning_rate,
                weight_decay=self.args.weight_decay,
                head_multiplier=self.args.head_learning_rate_multiplier,
                layer_decay=self.args.layer_decay,
                decay_everything=self.args.decay_everything,
                no_decay_names=self.args.no_decay_names,
            )
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = optimizer_class(groups, **options)
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """As in transformers, but decays end at one rate for all groups, and a constant rate may drop."""
        optimizer = self.optimizer if optimizer is None else optimizer
        options = self.args.lr_scheduler_kwargs or {}
        kind = str(self.args.lr_scheduler_type.value)  # type: ignore[attr-defined]
        ours: dict[str, Callable[..., Any]] = {"polynomial": polynomial_schedule, "cosine": cosine_schedule}
        if "drop_at" in options:
            ours["constant"] = step_schedule
        if self.lr_scheduler is None and kind in ours:
            assert optimizer is not None
            try:
                self.lr_scheduler = ours[kind](
                    optimizer,
                    warmup_steps=self.args.get_warmup_steps(num_training_steps),
                    total_steps=num_training_steps,
                    **options,
                )
            except TypeError as error:  # an argument that the schedule does not have
                raise InputError(f"lr_scheduler_kwargs {options} of the schedule {kind}: {error}") from error
            self._created_lr_scheduler = True  # transformers replaces a schedule of its own in a second training
        return super().create_scheduler(num_training_steps, optimizer)

    def get_train_dataloader(self) -> Any:
        """As in transformers, but every process reads its own shards of a stream."""
        return super().get_train_dataloader() if (stream := stream_loader(self)) is None else stream

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochSampler:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        self._sampler = EpochSampler(len(dataset), seed)
        return self._sampler

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; errors in the data or in a loader worker are explained in one sentence.

        Raises:
            RunError: an image cannot be read, a loader worker died, or a checkpoint cannot be written.
            InputError: an image cannot be read before the first step, or the checkpoint was saved with another
                setting of FSDP or holds a state that would execute code.
        """
        checkpoint = kwargs.get("resume_from_checkpoint")
        if checkpoint and (Path(checkpoint) / FSDP_FILE).exists() != self.is_fsdp_enabled:
            was = "without" if self.is_fsdp_enabled else "with"
            raise InputError(f"{checkpoint} was saved {was} FSDP: continue {was} it, or give another --output_dir.")
        try:
            with self._explain_loader_faults():
                return super().train(*args, **kwargs)
        except pickle.UnpicklingError as error:  # raised since transformers loads with `weights_only`
            raise InputError(
                f"{checkpoint} holds a state that would execute code when it is loaded, so it was not loaded. "
                "Remove the folder and run the same command again."
            ) from error

    @contextmanager
    def _explain_loader_faults(self) -> Iterator[None]:
        try:
            try:
                yield
            except (ConnectionError, EOFError):
                # A worker that dies while it sends a batch breaks the connection first. When the signal of its death
                # arrives, torch raises the RuntimeError that is explained below.
                time.sleep(WORKER_DEATH_DELAY)
                raise
        except (InputError, RuntimeError) as error:
            if isinstance(error, InputError):
                # The message of an error in a worker is its traceback; the last line holds the original message.
                reason = str(error).strip().splitlines()[-1].removeprefix("hf_denseseg.errors.InputError: ")
                if self.state.global_step == 0:
                    raise InputError(reason) from error
            elif str(error).startswith("DataLoader worker"):
                reason = f"A process that loads data died ({str(error).strip()}), often for lack of memory: lower "
                reason += "dataloader_num_workers or the batch size."
            else:
                raise
            raise RunError(
                f"Stopped after step {self.state.global_step}: {reason} {what_is_kept(self.output)}"
            ) from error

    def loss_weight(self, inputs: dict[str, Any]) -> torch.Tensor:
        """Number of elements, here images, over which the loss of a batch is a mean; a scalar tensor."""
        return torch.tensor(float(len(inputs["pixel_values"])))

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """The batches of one optimizer step, and the mean of their `loss_weight` over all processes."""
        samples, _ = super().get_batch_samples(self.data_time.timed(epoch_iterator), num_batches, device)
        if not samples or (len(samples) == 1 and self.args.world_size == 1):
            return samples, None
        mean = torch.stack([self.loss_weight(batch) for batch in samples]).mean().to(device)
        return samples, self.accelerator.reduce(mean, "mean")

    def batch_loss(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[torch.Tensor, Any]:
        """Loss of one batch as a mean over its elements, and the model's outputs."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        return loss, outputs

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The model's loss, weighted so that the mean over processes and accumulated batches is that of one batch.

        The loss of a batch is a mean over n elements (`loss_weight`): `loss_i * n_i / mean(n)` averaged over all
        batches i is the mean over all elements. A mean of means would weigh the pixels of a batch with many ignored
        pixels more than those of others. `num_items_in_batch` is `mean(n)`, see `get_batch_samples`.
        """
        for module in self._still:  # the Trainer has set the whole model to training mode
            module.eval()
        weight = None if num_items_in_batch is None else self.loss_weight(inputs).to(num_items_in_batch)
        loss, outputs = self.batch_loss(model, inputs)
        if weight is not None:
            loss = loss * torch.where(num_items_in_batch > 0, weight / num_items_in_batch, 1.0)
        return (loss, outputs) if return_outputs else loss

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = super()._prepare_inputs(inputs)
        pixels = inputs.get("pixel_values")  # (B, C, H, W)
        if pixels is not None and not pixels.is_floating_point():
            inputs["pixel_values"] = self.preprocessing.normalize(pixels).contiguous(memory_format=self.memory_format)
        return inputs

    # Evaluation

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate (with the averaged weights, if there are any); `self.scores` keeps the per-class table."""
        started = time.process_time()
        with self._explain_loader_faults(), self.unsharded_model(), self.averaged_weights():
            metrics = super().evaluate(*args, **kwargs)
        self.evaluation_cpu_seconds += time.process_time() - started
        return metrics

    @contextmanager
    def unsharded_model(self) -> Iterator[None]:
        """Run a block with an unsharded copy of the model if it is sharded by FSDP.

        Under FSDP all processes must call the model together; in evaluation the number of calls differs.
        """
        if not self.is_fsdp_enabled:
            yield
            return
        sharded, self.model = self.model, unsharded_copy(self.model, self.args.device)
        self.is_fsdp_enabled = False
        try:
            yield
        finally:
            self.model, self.is_fsdp_enabled = sharded, True

    # Checkpoints

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Save, mark the folder as complete, and then delete older ones."""
        # transformers would delete older checkpoints before this one is marked as complete.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        folder = self.output / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with explain_failed_save(folder):
            try:
                super()._save_checkpoint(*args, **kwargs)
            finally:
                self.args.save_total_limit = limit
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                if self.ema is not None:
                    self.ema.save(folder / EMA_FILE)
                mark_complete(folder)
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=str(self.output),
                save_total_limit=limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
            )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.args.lora_rank is not None:
            return load_adapter(self.model, Path(resume_from_checkpoint))
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_renamed_weights(resume_from_checkpoint, self.model if model is None else model)

    def _load_best_model(self) -> None:
        best = Path(str(self.state.best_model_checkpoint))
        if self.args.lora_rank is not None:
            load_adapter(self.model, best)
        else:
            super()._load_best_model()
            self._load_renamed_weights(str(best), self.model)
        if self.ema is not None:  # the average is what was evaluated, and is saved
            self.ema.load(best / EMA_FILE)

    def _load_renamed_weights(self, checkpoint: str, model: nn.Module) -> None:
        """Load a checkpoint once more, by the names in its file, into a model of transformers.

        `save_pretrained` of SegFormer, BEiT and others writes former names, which transformers' Trainer does not
        translate when it loads: a run would continue, without a word, from random weights.
        """
        if is_own(self.model.config) or self.is_fsdp_enabled:
            return
        saved = type(self.model).from_pretrained(checkpoint, use_safetensors=True)
        model.load_state_dict(saved.state_dict())

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in transformers, plus class names and, outside checkpoints, the code for `trust_remote_code`.

        With adapters a checkpoint (`_internal_call`) holds what is trained, other folders the merged model.
        """
        folder = Path(output_dir) if output_dir else self.output
        if self.args.lora_rank is None or not _internal_call:
            super().save_model(output_dir, _internal_call=_internal_call)
        if self.args.should_save and self.args.lora_rank is not None:
            save_adapter(self.model, folder if _internal_call else folder / "adapter")
        if self.args.should_save:
            write_atomic(folder / "labels.json", json.dumps(self.spec.to_dict(), indent=1) + "\n")
            self.save_beside(folder)
            if is_own(self.model.config) and not _internal_call and (folder / "config.json").exists():
                write_code(folder)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        adapted = self.args.lora_rank is not None
        super()._save(output_dir, merged_state(self.model) if adapted else state_dict)

    def save_beside(self, folder: Path) -> None:
        """Write further files that belong to a checkpoint of the task."""

    def weights_to_keep(self) -> Any:
        """Context in which the model holds the weights to save at the end: the averaged ones, if any."""
        return self.averaged_weights()

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Run a block with the averaged weights in the model, then restore the trained ones."""
        if self.ema is None or self.ema.average is None or self._keeps_trained:
            yield
            return
        with self.ema.swapped_into(self.accelerator.unwrap_model(self.model)):
            yield

    @contextmanager
    def trained_weights(self) -> Iterator[None]:
        """Run a block in which `averaged_weights` leaves the trained ones in the model."""
        self._keeps_trained = True
        try:
            yield
        finally:
            self._keeps_trained = False
