"""Keys of a recipe about the model and its training: type, default, meaning, and the tasks that they apply to."""

import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import TrainingArguments

from hf_denseseg.errors import InputError, unknown_name
from hf_denseseg.models.auto.tasks import SEMANTIC_SEGMENTATION, TASKS
from hf_denseseg.models.losses import LOSSES
from hf_denseseg.training.data_arguments import CLASSIFICATION, SEGMENTATION

logger = logging.getLogger(__name__)

# Former names of keys, which recipes and run folders may still use -> current names.
RENAMED_KEYS = {
    "max_class_ratio": "cat_max_ratio",
    "crop_area_range": "scale",
    "short_sides": "shortest_edge",
    "long_side": "longest_edge",
    "test_crop_share": "crop_pct",
}


@dataclass
class ModelArguments:
    """The model to train, and the weights it starts from."""

    task: str = field(default=SEMANTIC_SEGMENTATION, metadata={"help": f"one of {', '.join(TASKS)}"})
    model: str = field(
        default="dsct-tiny-sac",
        metadata={"help": "published name (`denseseg models`), folder or hub id; segformer-b0 ..."},
    )
    config_overrides: dict | None = field(
        default=None, metadata={"help": "config fields that differ from the published ones: '{drop_path_rate: 0.2}'"}
    )
    encoder_weights: str | None = field(
        default=None, metadata={"help": "ImageNet checkpoint of the encoder; None starts from random weights"}
    )
    published: dict | list | None = field(
        default=None,
        metadata={"help": "the paper's numbers for this row, as fractions: '{mean_iou: 0.4866}', or a list of such"},
    )


@dataclass
class TaskTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments`, and further keys that the papers' schedules need."""

    # Keys of transformers with other defaults or types.
    output_dir: str | None = field(default=None, metadata={"help": "run folder (default: runs/<recipe name>)"})
    max_steps: int = field(default=1000, metadata={"help": "optimizer steps of the run"})
    learning_rate: float = field(default=1.0e-4, metadata={"help": "peak learning rate"})
    lr_scheduler_type: str = field(default="polynomial", metadata={"help": "schedule; see transformers"})
    lr_scheduler_kwargs: dict | None = field(
        default=None,
        metadata={
            "help": "polynomial (power: 0.9) and cosine: lr_end = final rate; constant: drop_at = fraction(s) of the "
            "steps, factor; all: warmup_start = first rate of the warmup"
        },
    )
    weight_decay: float = field(default=0.01, metadata={"help": "weight decay of AdamW"})
    decay_everything: bool = field(
        default=False, metadata={"help": "weight decay also on norms, biases, tokens and position tables"}
    )
    no_decay_names: list[str] | None = field(
        default=None,
        metadata={
            "help": "no weight decay for parameters whose name contains one of these, and for no others: [norm]"
        },
    )
    max_grad_norm: float = field(default=0.0, metadata={"help": "maximum gradient norm; 0: no clipping"})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "images per device and forward pass"})
    per_device_eval_batch_size: int = field(default=1, metadata={"help": "images per device in evaluation"})
    eval_strategy: str = field(default="steps", metadata={"help": "when to evaluate: no, steps, epoch"})
    eval_steps: float | None = field(
        default=None, metadata={"help": "evaluate every N steps (default: ten times in a run)"}
    )
    save_steps: float = field(default=0, metadata={"help": "save a checkpoint every N steps (default: eval_steps)"})
    save_total_limit: int | None = field(
        default=2, metadata={"help": "number of checkpoints to keep; the oldest are deleted"}
    )
    logging_steps: float = field(default=0, metadata={"help": "log every N steps (default: 100 times in a run)"})
    seed: int = field(default=0, metadata={"help": "seed of initial weights, order, augmentation and dropout"})

    # Keys of this package.
    head_learning_rate_multiplier: float = field(
        default=1.0, metadata={"help": "factor on the learning rate of the heads"}
    )
    layer_decay: float | None = field(
        default=None,
        metadata={"help": "layer-wise decay of the learning rate: factor per layer below the head; None: off"},
    )
    freeze: str | None = field(
        default=None,
        metadata={"help": "'encoder': its weights and BatchNorm statistics stay, only the heads are trained"},
    )
    lora_rank: int | None = field(
        default=None,
        metadata={
            "tasks": SEGMENTATION,
            "help": "train adapters of this rank (LoRA) in the encoder, and the heads; needs the extra `peft`",
        },
    )
    lora_alpha: int | None = field(
        default=None,
        metadata={"tasks": SEGMENTATION, "help": "scale of the adapters: alpha / rank (default: the rank)"},
    )
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={
            "tasks": SEGMENTATION,
            "help": "layers of the encoder with adapters, by the ends of their names (default: all linear layers, in "
            "encoders without any the convolutions)",
        },
    )
    loss: str = field(default="ce", metadata={"tasks": SEGMENTATION, "help": f"one of {', '.join(LOSSES)}"})
    loss_normalization: str | None = field(
        default=None,
        metadata={
            "tasks": SEGMENTATION,
            "help": "divide the loss by the 'valid' pixels or by 'all' (default: as the model's config says)",
        },
    )
    label_smoothing: float = field(
        default=0.0,
        metadata={
            "tasks": (*SEGMENTATION, *CLASSIFICATION),
            "help": "label smoothing of the cross-entropy: target weight distributed over all classes",
        },
    )
    class_weights: str | list[float] | None = field(
        default=None,
        metadata={"tasks": SEGMENTATION, "help": "JSON file of `denseseg data stats`, as FILE:enet or FILE:median"},
    )
    ohem_threshold: float | None = field(
        default=None,
        metadata={"tasks": SEGMENTATION, "help": "OHEM: pixels whose true class has a lower probability are hard"},
    )
    ohem_min_kept: int = field(
        default=100_000, metadata={"tasks": SEGMENTATION, "help": "OHEM: minimum number of pixels kept per image"}
    )
    channels_last: bool = field(default=False, metadata={"help": "channels_last memory format; faster on CPUs"})
    sync_batch_norm: bool = field(default=True, metadata={"help": "compute BatchNorm statistics over all processes"})
    early_stopping_patience: int | None = field(
        default=None,
        metadata={"help": "stop after this many evaluations without a better score, see `metric_for_best_model`"},
    )
    ema_decay: float | None = field(
        default=None,
        metadata={"help": "exponential moving average of the weights with this decay, less in the first steps"},
    )
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "see DistributedDataParallel"})

    def __post_init__(self) -> None:
        """Fill in the intervals that were not given, then let transformers check the rest."""
        if self.max_steps < 1:
            raise InputError(f"max_steps is {self.max_steps}: give the number of optimizer steps, at least 1.")
        if self.loss not in LOSSES:
            raise InputError(unknown_name("loss", self.loss, LOSSES))
        if self.loss in ("dice", "lovasz") and (
            self.ohem_threshold is not None or self.loss_normalization is not None
        ):
            raise InputError(
                f"ohem_threshold and loss_normalization are for losses of single pixels; {self.loss} judges regions. "
                f"Leave them out, or use 'ce+{self.loss}'."
            )
        if not 0 <= self.label_smoothing < 1:
            raise InputError(f"label_smoothing is {self.label_smoothing}: a number from 0 up and below 1 is needed.")
        if self.label_smoothing and not self.loss.startswith("ce"):
            raise InputError(
                f"label_smoothing is for cross-entropy, and the loss is {self.loss!r}. Leave it out, or use a loss "
                "with 'ce'."
            )
        if self.loss_normalization not in (None, "valid", "all"):
            raise InputError(f"loss_normalization is {self.loss_normalization!r}: use 'valid' or 'all'.")
        if self.warmup_steps >= self.max_steps:
            logger.warning(
                "warmup_steps is reduced from %d to %d, since max_steps is %d.",
                self.warmup_steps,
                self.max_steps - 1,
                self.max_steps,
            )
            self.warmup_steps = self.max_steps - 1
        if self.lr_scheduler_kwargs is None and self.lr_scheduler_type == "polynomial":
            self.lr_scheduler_kwargs = {"power": 0.9, "lr_end": 0.0}
        if self.run_name is None and self.output_dir is not None:
            # Trackers go on with the run of this name when it continues, and in the evaluation after the last step.
            self.run_name = Path(self.output_dir).resolve().name
        self.eval_steps = self.eval_steps or max(1, self.max_steps // 10)
        self.save_steps = self.save_steps or self.eval_steps
        self.logging_steps = self.logging_steps or max(1, self.max_steps // 100)
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.cuda.is_available()
        if self.disable_tqdm is None:  # progress bars on terminals only
            self.disable_tqdm = not sys.stderr.isatty()
        # Recipes with bf16 shall run on CPUs too: without an accelerator transformers allows bf16 only with `use_cpu`.
        self.use_cpu = self.use_cpu or (bool(self.bf16) and not torch.accelerator.is_available())
        # Not the user's choice: the datasets determine the names of the tensors.
        self.remove_unused_columns = False
        self.label_names = ["labels"]
        super().__post_init__()
