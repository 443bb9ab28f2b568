"""Every key of a recipe: its type, default, meaning, and the tasks it belongs to."""

import logging
import sys
from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments

from hf_denseseg.errors import InputError
from hf_denseseg.models.auto.tasks import DETECTION_TASKS, IMAGE_CLASSIFICATION, SEMANTIC_SEGMENTATION, TASKS

logger = logging.getLogger(__name__)

# Tasks in which a key has a meaning.
SEGMENTATION, CLASSIFICATION, DETECTION = (SEMANTIC_SEGMENTATION,), (IMAGE_CLASSIFICATION,), DETECTION_TASKS


@dataclass
class ModelArguments:
    """Which model is trained, and from what it starts."""

    task: str = field(default=SEMANTIC_SEGMENTATION, metadata={"help": f"what is learned: {', '.join(TASKS)}"})
    model: str = field(
        default="dsct-tiny-sac", metadata={"help": "published name (`denseseg models`), checkpoint folder or hub id"}
    )
    config_overrides: dict | None = field(
        default=None, metadata={"help": "config fields that differ from the published ones: '{drop_path_rate: 0.2}'"}
    )
    encoder_weights: str | None = field(
        default=None, metadata={"help": "official ImageNet checkpoint of the encoder; None starts from random weights"}
    )
    published: dict | None = field(
        default=None, metadata={"help": "the paper's numbers for this row, as fractions: '{mean_iou: 0.4866}'"}
    )


@dataclass
class DataArguments:
    """What the model is trained and tested on, how pictures are augmented and how they are tested."""

    dataset: str = field(
        default="synthetic",
        metadata={"help": "'synthetic', a benchmark (`denseseg data list`), a folder or archive, or a hub dataset id"},
    )
    data_root: str | None = field(
        default=None,
        metadata={
            "help": "where the benchmark named by dataset lies, in archives or not (default: $DENSESEG_DATA_ROOT)"
        },
    )
    label_spec: str | None = field(
        default=None,
        metadata={
            "tasks": SEGMENTATION + CLASSIFICATION,
            "help": "label specification file (YAML or JSON), or a benchmark's",
        },
    )
    dataset_columns: dict | None = field(
        default=None,
        metadata={"tasks": SEGMENTATION + CLASSIFICATION, "help": "our column: its name in the data, '{label: mask}'"},
    )
    dataset_revision: str | None = field(
        default=None, metadata={"tasks": SEGMENTATION + CLASSIFICATION, "help": "revision of a hub dataset"}
    )
    streaming: bool = field(
        default=False,
        metadata={
            "tasks": SEGMENTATION + CLASSIFICATION,
            "help": "train on shards (`denseseg data pack`) in order, every process on its own",
        },
    )
    train_split: str = field(default="train", metadata={"help": "split that is trained on, or several: train+val"})
    eval_split: str = field(default="validation", metadata={"help": "split that is evaluated"})
    max_train_samples: int | None = field(default=None, metadata={"help": "use only the first pictures"})
    max_eval_samples: int | None = field(default=None, metadata={"help": "use only the first pictures"})

    crop_size: list[int] = field(
        default_factory=lambda: [512, 512],
        metadata={"tasks": SEGMENTATION + CLASSIFICATION, "help": "training crop in pixels: height width"},
    )
    base_size: list[int] | None = field(
        default=None,
        metadata={
            "tasks": SEGMENTATION,
            "help": "box (height width) into which a picture is fitted before random scaling; None: own size",
        },
    )
    scale_range: list[float] = field(
        default_factory=lambda: [0.5, 2.0], metadata={"tasks": SEGMENTATION, "help": "random scale: smallest largest"}
    )
    scale_step: float | None = field(
        default=None, metadata={"tasks": SEGMENTATION, "help": "step between random scales; None: any in the range"}
    )
    max_class_ratio: float = field(
        default=0.75, metadata={"tasks": SEGMENTATION, "help": "no class may fill more of a crop (10 tries)"}
    )
    flip: bool = field(default=True, metadata={"help": "mirror every second picture"})
    photometric_distortion: bool = field(
        default=True, metadata={"tasks": SEGMENTATION, "help": "random brightness, contrast, saturation and hue"}
    )
    photometric_style: str = field(
        default="mmsegmentation",
        metadata={
            "tasks": SEGMENTATION,
            "help": "'mmsegmentation'; HFGD: 'car' (narrower, always the hue) or 'brightness' alone",
        },
    )
    crop_area_range: list[float] = field(
        default_factory=lambda: [0.08, 1.0],
        metadata={"tasks": CLASSIFICATION, "help": "share of the picture's area that a training crop covers"},
    )
    auto_augment: str | None = field(
        default=None, metadata={"tasks": CLASSIFICATION, "help": "timm's words for it: rand-m9-mstd0.5-inc1"}
    )
    color_jitter: float | None = field(
        default=None, metadata={"tasks": CLASSIFICATION, "help": "random brightness, contrast, saturation: +- share"}
    )
    random_erasing: float = field(
        default=0.0, metadata={"tasks": CLASSIFICATION, "help": "share of pictures with a box of noise in them"}
    )
    mixup: float = field(default=0.0, metadata={"tasks": CLASSIFICATION, "help": "alpha of Mixup; 0: off"})
    cutmix: float = field(default=0.0, metadata={"tasks": CLASSIFICATION, "help": "alpha of CutMix; 0: off"})
    mixup_switch_probability: float = field(
        default=0.5, metadata={"tasks": CLASSIFICATION, "help": "share of batches with CutMix, if both are on"}
    )
    label_smoothing: float = field(
        default=0.0, metadata={"tasks": CLASSIFICATION, "help": "weight spread over all classes"}
    )
    filter_empty: bool = field(
        default=True, metadata={"tasks": DETECTION, "help": "leave pictures without objects out of training"}
    )
    short_sides: list[int] = field(
        default_factory=lambda: [800],
        metadata={"tasks": DETECTION, "help": "short side of a training picture in pixels; of several one is drawn"},
    )
    long_side: int = field(default=1333, metadata={"tasks": DETECTION, "help": "long side in training at most"})

    test_crop_share: float = field(
        default=0.9, metadata={"tasks": CLASSIFICATION, "help": "side of the central test crop / short side"}
    )
    test_mode: str = field(
        default="whole", metadata={"tasks": SEGMENTATION, "help": "'whole' picture, or 'slide' a window"}
    )
    test_crop_size: list[int] | None = field(
        default=None, metadata={"tasks": SEGMENTATION, "help": "window in pixels: height width"}
    )
    test_stride: list[int] | None = field(
        default=None, metadata={"tasks": SEGMENTATION, "help": "step of the window: height width"}
    )
    test_base_size: list[int] | None = field(
        default=None, metadata={"tasks": SEGMENTATION + DETECTION, "help": "box into which a picture is fitted"}
    )
    test_scales: list[float] = field(
        default_factory=lambda: [1.0], metadata={"tasks": SEGMENTATION, "help": "multi-scale ratios"}
    )
    test_raise_short_side: bool = field(
        default=False,
        metadata={
            "tasks": SEGMENTATION,
            "help": "SETR: no short side below the window's; of several scales no long limit",
        },
    )
    test_keep_odd: bool = field(
        default=False,
        metadata={"tasks": SEGMENTATION, "help": "HFGD: scale each side by itself, odd stays odd: 513 to 257"},
    )
    test_pad_to_window: bool = field(
        default=False,
        metadata={
            "tasks": SEGMENTATION,
            "help": "pad a picture smaller than the window to it, also a whole one; else the window shrinks",
        },
    )
    test_average: str = field(
        default="probabilities",
        metadata={"tasks": SEGMENTATION, "help": "average 'probabilities' or 'logits' over scales and flips"},
    )
    test_flip: bool = field(
        default=False, metadata={"tasks": SEGMENTATION, "help": "average with the mirrored picture"}
    )


@dataclass
class TaskTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments` with what the papers' schedules need besides."""

    output_dir: str | None = field(default=None, metadata={"help": "run folder (default: runs/<recipe name>)"})
    max_steps: int = field(default=1000, metadata={"help": "optimizer steps; the budget of a run"})
    learning_rate: float = field(default=1.0e-4, metadata={"help": "peak learning rate"})
    lr_scheduler_type: str = field(default="polynomial", metadata={"help": "schedule; see transformers"})
    lr_scheduler_kwargs: dict | None = field(
        default=None,
        metadata={
            "help": "polynomial (power: 0.9) and cosine: lr_end = the floor; constant: drop_at = share(s) of steps, "
            "factor; all: warmup_start = first rate of the warm-up"
        },
    )
    weight_decay: float = field(default=0.01, metadata={"help": "AdamW decay of the weights that decay"})
    decay_everything: bool = field(
        default=False, metadata={"help": "weight decay also on norms, biases, tokens and tables"}
    )
    no_decay_names: list[str] | None = field(
        default=None, metadata={"help": "only names that hold one of these words do not decay: [norm]"}
    )
    max_grad_norm: float = field(default=0.0, metadata={"help": "clip the gradient norm; 0 does not clip"})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "pictures per device and step"})
    per_device_eval_batch_size: int = field(default=1, metadata={"help": "pictures per device in evaluation"})
    eval_strategy: str = field(default="steps", metadata={"help": "when to evaluate: no, steps, epoch"})
    eval_steps: float | None = field(default=None, metadata={"help": "evaluate every so many steps (default: 10 x)"})
    save_steps: float = field(default=0, metadata={"help": "checkpoint every so many steps (default: eval_steps)"})
    save_total_limit: int | None = field(default=2, metadata={"help": "checkpoints kept, oldest deleted first"})
    logging_steps: float = field(default=0, metadata={"help": "log every so many steps (default: 100 x)"})
    seed: int = field(default=0, metadata={"help": "seed of weights, order, augmentation and drop-out"})

    head_learning_rate_multiplier: float = field(
        default=1.0, metadata={"help": "factor on the learning rate of all heads"}
    )
    layer_decay: float | None = field(
        default=None, metadata={"help": "factor on the learning rate per layer below the head; None: off"}
    )
    loss_normalization: str | None = field(
        default=None,
        metadata={
            "tasks": SEGMENTATION,
            "help": "divide the loss by the 'valid' pixels or by 'all' (default: as the model's config says)",
        },
    )
    class_weights: str | list[float] | None = field(
        default=None,
        metadata={"tasks": SEGMENTATION, "help": "JSON file of `denseseg data stats`, as FILE:enet or FILE:median"},
    )
    ohem_threshold: float | None = field(
        default=None, metadata={"tasks": SEGMENTATION, "help": "probability below which a pixel is hard"}
    )
    ohem_min_kept: int = field(
        default=100_000, metadata={"tasks": SEGMENTATION, "help": "pixels kept per picture at least"}
    )
    channels_last: bool = field(
        default=False, metadata={"help": "keep maps as (batch, height, width, channels) in memory; faster on CPUs"}
    )
    sync_batch_norm: bool = field(default=True, metadata={"help": "BatchNorm statistics over all GPUs"})
    ema_decay: float | None = field(default=None, metadata={"help": "average the weights with this decay"})
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "see DistributedDataParallel"})

    def __post_init__(self) -> None:
        """Derive the steps that were left open, then let transformers check the rest."""
        if self.max_steps < 1:
            raise InputError(f"max_steps is {self.max_steps}: give the number of optimizer steps, at least 1.")
        if self.loss_normalization not in (None, "valid", "all"):
            raise InputError(f"loss_normalization is {self.loss_normalization!r}: use 'valid' or 'all'.")
        if self.warmup_steps >= self.max_steps:
            logger.warning(
                "warmup_steps is cut from %d to %d, since max_steps is %d.",
                self.warmup_steps,
                self.max_steps - 1,
                self.max_steps,
            )
            self.warmup_steps = self.max_steps - 1
        if self.lr_scheduler_kwargs is None and self.lr_scheduler_type == "polynomial":
            self.lr_scheduler_kwargs = {"power": 0.9, "lr_end": 0.0}
        self.eval_steps = self.eval_steps or max(1, self.max_steps // 10)
        self.save_steps = self.save_steps or self.eval_steps
        self.logging_steps = self.logging_steps or max(1, self.max_steps // 100)
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.cuda.is_available()
        if self.disable_tqdm is None:
            self.disable_tqdm = not sys.stderr.isatty()
        # A recipe with bf16 can be read, and tried, where there is only a CPU; transformers wants that said.
        self.use_cpu = self.use_cpu or (bool(self.bf16) and not torch.accelerator.is_available())
        # Ours, not the user's: tensors are made and named by the data part, statistics are summed batch by batch.
        self.remove_unused_columns = False
        self.label_names = ["labels"]
        self.batch_eval_metrics = True
        super().__post_init__()
