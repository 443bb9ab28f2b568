"""Keys of a recipe about the data, the augmentation of training images, and the test protocol."""

from dataclasses import dataclass, field

from hf_denseseg.data.reading.pixels import PixelFormat
from hf_denseseg.data.sources.folder_options import FolderOptions
from hf_denseseg.models.auto.tasks import DETECTION_TASKS, IMAGE_CLASSIFICATION, SEMANTIC_SEGMENTATION

# Values of `metadata["tasks"]`: the tasks that a key applies to; without it, all of them.
SEGMENTATION, CLASSIFICATION, DETECTION = (SEMANTIC_SEGMENTATION,), (IMAGE_CLASSIFICATION,), DETECTION_TASKS


@dataclass
class DataArguments:
    """The data, the augmentation of training images, and the test protocol."""

    # The dataset.
    dataset: str = field(
        default="synthetic",
        metadata={
            "help": "'synthetic', a benchmark (`denseseg data list`), a folder, export or archive, or a hub dataset id"
        },
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
    overlap: str | None = field(
        default=None,
        metadata={
            "tasks": SEGMENTATION,
            "help": "exports with polygons: the 'last' of overlapping objects is on top (default), or the 'smaller'",
        },
    )
    empty_images: str | None = field(
        default=None,
        metadata={
            "tasks": SEGMENTATION,
            "help": "exports with polygons: an image without objects is 'background' (default) or 'ignored'",
        },
    )
    mask_suffix: str | None = field(
        default=None,
        metadata={
            "tasks": SEGMENTATION,
            "help": "what the file of a mask has after the name of its image: _mask (default: found by itself)",
        },
    )
    streaming: bool = field(
        default=False,
        metadata={
            "tasks": SEGMENTATION + CLASSIFICATION,
            "help": "stream shards (`denseseg data pack`); every process reads its own",
        },
    )
    num_channels: int | None = field(
        default=None, metadata={"help": "channels of the images (default: the checkpoint's, else 3)"}
    )
    pixel_range: str | list[float] | None = field(
        default=None,
        metadata={
            "help": "stored values of black and white: uint8, uint16, or two numbers: 0 4095 (default: the "
            "checkpoint's, else uint8); `denseseg data check` proposes it"
        },
    )
    image_mean: list[float] | None = field(
        default=None,
        metadata={"help": "mean of each channel, black is 0 and white 1 (default: the checkpoint's, else ImageNet's)"},
    )
    image_std: list[float] | None = field(default=None, metadata={"help": "standard deviation of each, likewise"})
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
    class_balanced_sampling: bool = field(
        default=False,
        metadata={
            "tasks": SEGMENTATION,
            "help": "draw training images by the rare classes that they show (DAFormer, Sec. 3.3)",
        },
    )
    copy_paste: float = field(
        default=0.0,
        metadata={
            "tasks": SEGMENTATION,
            "help": "probability of pasting the pixels of a rare class from another training image",
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
    test_threshold: float = field(
        default=0.5,
        metadata={
            "tasks": SEGMENTATION,
            "help": "one logit (`config_overrides: {num_labels: 1}`): probability above which a pixel is foreground",
        },
    )
    test_temperature: float = field(
        default=1.0,
        metadata={
            "tasks": SEGMENTATION,
            "help": "divide the logits by it: probabilities change, classes do not (`denseseg evaluate "
            "--fit_temperature` finds and saves it)",
        },
    )
    test_flip: bool = field(
        default=False, metadata={"tasks": SEGMENTATION, "help": "average with the horizontally flipped image"}
    )

    calibration: bool = field(
        default=False,
        metadata={
            "tasks": SEGMENTATION,
            "help": "evaluations also measure the probabilities: calibration error (ECE), Brier score, log-likelihood",
        },
    )

    @property
    def pixel_format(self) -> PixelFormat:
        """Channels and range of the images."""
        return PixelFormat(self.num_channels or 3, self.pixel_range or "uint8")  # type: ignore[arg-type]

    @property
    def folder_options(self) -> FolderOptions:
        """How the files of a folder become label maps."""
        return FolderOptions(self.overlap, self.empty_images, self.mask_suffix)

    def split_of(self, part: str) -> tuple[str, int | None]:
        """Name of the split of `part` (`"train"` or `"eval"`), and how many of its images are used; None is all."""
        if self.eval_fraction is not None:
            return self.train_split, None  # the number counts after the division, see `training.run.load_data`
        if part == "train":
            return self.train_split, self.max_train_samples
        return self.eval_split, self.max_eval_samples
