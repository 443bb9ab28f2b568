"""Every key of a recipe: type, default, meaning, and the tasks that it applies to."""

import logging
import sys
from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments

from hf_denseseg.errors import InputError, unknown_name
from hf_denseseg.models.auto.tasks import DETECTION_TASKS, IMAGE_CLASSIFICATION, SEMANTIC_SEGMENTATION, TASKS
from hf_denseseg.models.losses import LOSSES

logger = logging.getLogger(__name__)

# Former names of keys, which recipes and run folders may still use -> current names.
RENAMED_KEYS = {
    "max_class_ratio": "cat_max_ratio",
    "crop_area_range": "scale",
    "short_sides": "shortest_edge",
    "long_side": "longest_edge",
    "test_crop_share": "crop_pct",
}

# Values of `metadata["tasks"]`: the tasks that a key applies to; without it, all of them.
SEGMENTATION, CLASSIFICATION, DETECTION = (SEMANTIC_SEGMENTATION,), (IMAGE_CLASSIFICATION,), DETECTION_TASKS


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
class DataArguments:
    """The data, the augmentation of training images, and the test protocol."""

    # The dataset.
    dataset: str = field(
        default="synthetic",
        metadata={"help": "'synthetic', a benchmark (`denseseg data list`), a folder or archive, or a hub dataset id"},
    )
    data_root: str | None = field(
        default=None,
        metadata={
            "help": "folder of the benchmark `dataset`, with its archives or unpacked (default: $DENSESEG_DATA_ROOT)"
        },
    )
    label_spec: str | None = field(
        default=None,
        metadata={
            "tasks": SEGMENTATION + CLASSIFICATION,
            "help": "label specification: a YAML or JSON file, or the name of a benchmark",
        },
    )
    dataset_columns: dict | None = field(
        default=None,
        metadata={
            "tasks": SEGMENTATION + CLASSIFICATION,
            "help": "our name of a column: its name in the dataset, '{label: mask}'",
        },
    )
    dataset_revision: str | None = field(
        default=None, metadata={"tasks": SEGMENTATION + CLASSIFICATION, "help": "revision of a hub dataset"}
    )
    streaming: bool = field(
        default=False,
        metadata={
            "tasks": SEGMENTATION + CLASSIFICATION,
            "help": "stream shards (`denseseg data pack`); every process reads its own",
        },
    )
    train_split: str = field(default="train", metadata={"help": "split to train on, or several: train+val"})
    eval_split: str = field(default="validation", metadata={"help": "split to evaluate"})
    eval_fraction: float | None = field(
        default=None,
        metadata={
            "help": "data without a validation split: evaluate on this fraction of `train_split`, chosen by the ids "
            "of the images, and train on the rest"
        },
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "train on the first N images only"})
    max_eval_samples: int | None = field(default=None, metadata={"help": "evaluate the first N images only"})

    # Training images of segmentation, in the order of the steps: resize, scale, crop, flip, distort.
    crop_size: list[int] = field(
        default_factory=lambda: [512, 512],
        metadata={
            "tasks": SEGMENTATION + CLASSIFICATION,
            "help": "training crop (for a classifier also the test crop) in pixels: height width",
        },
    )
    base_size: list[int] | None = field(
        default=None,
        metadata={
            "tasks": SEGMENTATION,
            "help": "box (height width) that an image is resized into before random scaling; None: original size",
        },
    )
    scale_range: list[float] = field(
        default_factory=lambda: [0.5, 2.0],
        metadata={"tasks": SEGMENTATION, "help": "range of the random scale: minimum maximum"},
    )
    scale_step: float | None = field(
        default=None,
        metadata={"tasks": SEGMENTATION, "help": "step between random scales; None: any scale in the range"},
    )
    cat_max_ratio: float = field(
        default=0.75,
        metadata={"tasks": SEGMENTATION, "help": "maximum fraction of a crop for a single class (10 tries)"},
    )
    flip: bool = field(default=True, metadata={"help": "flip horizontally with probability 0.5"})
    photometric_distortion: bool = field(
        default=True, metadata={"tasks": SEGMENTATION, "help": "random brightness, contrast, saturation and hue"}
    )
    photometric_style: str = field(
        default="mmsegmentation",
        metadata={
            "tasks": SEGMENTATION,
            "help": "'mmsegmentation'; HFGD: 'car' (smaller ranges, hue always changed) or 'brightness' alone",
        },
    )

    # Training images of classification: timm's augmentation.
    scale: list[float] = field(
        default_factory=lambda: [0.08, 1.0],
        metadata={
            "tasks": CLASSIFICATION,
            "help": "fraction of the image area that a training crop covers: minimum maximum",
        },
    )
    auto_augment: str | None = field(
        default=None, metadata={"tasks": CLASSIFICATION, "help": "policy in timm's notation: rand-m9-mstd0.5-inc1"}
    )
    color_jitter: float | None = field(
        default=None,
        metadata={"tasks": CLASSIFICATION, "help": "random brightness, contrast, saturation: +- fraction"},
    )
    random_erasing: float = field(
        default=0.0, metadata={"tasks": CLASSIFICATION, "help": "probability of replacing a box of the image by noise"}
    )
    mixup: float = field(default=0.0, metadata={"tasks": CLASSIFICATION, "help": "alpha of Mixup; 0: off"})
    cutmix: float = field(default=0.0, metadata={"tasks": CLASSIFICATION, "help": "alpha of CutMix; 0: off"})
    mixup_switch_probability: float = field(
        default=0.5,
        metadata={"tasks": CLASSIFICATION, "help": "probability of CutMix instead of Mixup, if both are on"},
    )
    label_smoothing: float = field(
        default=0.0,
        metadata={"tasks": CLASSIFICATION, "help": "label smoothing: target weight distributed over all classes"},
    )

    # Training images of detection.
    filter_empty: bool = field(
        default=True, metadata={"tasks": DETECTION, "help": "leave images without objects out of training"}
    )
    shortest_edge: list[int] = field(
        default_factory=lambda: [800],
        metadata={
            "tasks": DETECTION,
            "help": "shortest edge of a training image in pixels; one of several is drawn at random",
        },
    )
    longest_edge: int = field(
        default=1333, metadata={"tasks": DETECTION, "help": "maximum longest edge of a training image in pixels"}
    )

    # The test protocol; an evaluation of a checkpoint uses the saved one unless these are given.
    crop_pct: float = field(
        default=0.9,
        metadata={
            "tasks": CLASSIFICATION,
            "help": "side of the central test crop / shortest edge of the resized image",
        },
    )
    test_mode: str = field(
        default="whole", metadata={"tasks": SEGMENTATION, "help": "'whole' image, or 'slide' a window"}
    )
    test_crop_size: list[int] | None = field(
        default=None, metadata={"tasks": SEGMENTATION, "help": "sliding window in pixels: height width"}
    )
    test_stride: list[int] | None = field(
        default=None, metadata={"tasks": SEGMENTATION, "help": "stride of the window: height width"}
    )
    test_base_size: list[int] | None = field(
        default=None,
        metadata={"tasks": SEGMENTATION + DETECTION, "help": "box (height width) that an image is resized into"},
    )
    test_scales: list[float] = field(
        default_factory=lambda: [1.0], metadata={"tasks": SEGMENTATION, "help": "scales of the multi-scale test"}
    )
    test_raise_short_side: bool = field(
        default=False,
        metadata={
            "tasks": SEGMENTATION,
            "help": "SETR: enlarge images whose shortest edge is below the window's; no maximum of the longest edge "
            "with several scales",
        },
    )
    test_keep_odd: bool = field(
        default=False,
        metadata={"tasks": SEGMENTATION, "help": "HFGD: scale each side separately, odd sides stay odd: 513 to 257"},
    )
    test_pad_to_window: bool = field(
        default=False,
        metadata={
            "tasks": SEGMENTATION,
            "help": "pad images smaller than `test_crop_size`, in the mode whole too; otherwise the window shrinks",
        },
    )
    test_average: str = field(
        default="probabilities",
        metadata={"tasks": SEGMENTATION, "help": "average 'probabilities' or 'logits' over scales and flips"},
    )
    test_flip: bool = field(
        default=False, metadata={"tasks": SEGMENTATION, "help": "average with the horizontally flipped image"}
    )

    def split_of(self, part: str) -> tuple[str, int | None]:
        """Name of the split of `part` (`"train"` or `"eval"`), and how many of its images are used; None is all."""
        if self.eval_fraction is not None:
            return self.train_split, None  # the number counts after the division, see `training.run.load_data`
        if part == "train":
            return self.train_split, self.max_train_samples
        return self.eval_split, self.max_eval_samples


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
    loss: str = field(default="ce", metadata={"tasks": SEGMENTATION, "help": f"one of {', '.join(LOSSES)}"})
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
        default=None, metadata={"help": "exponential moving average of the weights with this decay"}
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
