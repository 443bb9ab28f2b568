"""A recipe for data that has none: every key follows from the statistics of the data and from the machine.

The rules extend two recipes, `scripts/recipes/dsct/dsct_tiny_sac_camvid_cpu.yaml` for a CPU, which was measured, and
`dsct_small_sac_camvid.yaml` for a GPU, which was not, to other sizes and class fractions.
"""

import logging
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hf_denseseg.data.checks.segmentation import scan_segmentation_source
from hf_denseseg.data.reading.pixels import PixelFormat
from hf_denseseg.data.segmentation import load_segmentation
from hf_denseseg.data.splits import NoSplitError, held_back
from hf_denseseg.errors import InputError
from hf_denseseg.models.auto.tasks import SEMANTIC_SEGMENTATION
from hf_denseseg.training.recipe import Recipe, make_recipe, read_yaml

logger = logging.getLogger(__name__)

GIB = 2**30
READ_IMAGES = 2000  # of larger data the first ones are counted
CPU_MODEL = {
    "stem_channels": 32,
    "spatial_hidden_sizes": [32, 64, 128],
    "hidden_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 2,
    "decoder_hidden_size": 128,
    "drop_path_rate": 0.0,
    "classifier_dropout_prob": 0.0,
}
SMALL_CROP, CPU_CROP, GPU_CROP = 160 * 208, 128 * 192, 512 * 512  # pixels of a training crop
SMALL_EDGE, CPU_EDGE = 240, 512  # longest edge of an image
GPU_PER_CROP = 2 * GIB  # memory of a training crop of GPU_CROP pixels, estimated on the safe side
HIGHEST_WEIGHT = 10.0
STEP, SMALL_STEP = 32, 16  # sides of crops are multiples of it


class Statistics(NamedTuple):
    """What is known of the data.

    Args:
        images: in the training split.
        eval_images: in the validation split, or held back.
        sizes: (height, width) -> number of images.
        fractions: of each class among the labeled pixels.
        num_channels: of the images, None for 3.
        pixel_range: of the images as the key takes it, None for 8 bits.
        eval_fraction: of the training split that is held back, without a validation split.
    """

    images: int
    eval_images: int
    sizes: Mapping[tuple[int, int], int]
    fractions: Sequence[float]
    num_channels: int | None = None
    pixel_range: str | list[float] | None = None
    eval_fraction: float | None = None


class Machine(NamedTuple):
    """What a run can use; `gpu_bytes` is 0 without a GPU."""

    cores: int
    ram_bytes: int
    gpu_bytes: int = 0
    has_bf16: bool = False


class Choice(NamedTuple):
    """A key of the recipe, and the reason for its value."""

    key: str
    value: Any
    reason: str


def derive(statistics: Statistics, machine: Machine, given: Mapping[str, Any]) -> list[Choice]:
    """Choose the keys of a recipe; a given key stays, and the others follow from it.

    Args:
        statistics: of the data.
        machine: that the run is for.
        given: keys that the user has set.

    Returns:
        All keys, the given ones among them, in the order of a recipe.
    """
    choices: list[Choice] = []

    def choose(key: str, value: Any, reason: str) -> Any:
        """Take a value unless the key is given; returns the one that holds."""
        if key in given:
            value, reason = given[key], "given on the command line"
        if value is not None:
            choices.append(Choice(key, value, reason))
        return value

    _choose_model(choose, statistics, machine, given)
    _choose_data(choose, statistics)
    _choose_crops(choose, statistics, machine, given)
    _choose_schedule(choose, statistics, machine, given)
    chosen = {choice.key for choice in choices}
    return [
        *choices,
        *(Choice(key, value, "given on the command line") for key, value in given.items() if key not in chosen),
    ]


def _is_small(machine: Machine, given: Mapping[str, Any]) -> bool:
    """Whether the run trains `CPU_MODEL` from random weights."""
    return not machine.gpu_bytes and given.get("encoder_weights") is None and "model" not in given


def _choose_model(choose: Any, statistics: Statistics, machine: Machine, given: Mapping[str, Any]) -> None:
    weights = given.get("encoder_weights")
    start = "it starts from the given encoder weights" if weights else "it starts from random weights, as no "
    start += "" if weights else "encoder_weights are given, and nothing is downloaded"
    overrides = dict[str, Any]()
    if not machine.gpu_bytes:
        small = _is_small(machine, given)
        overrides = dict(CPU_MODEL) if small else {}
        what = "no GPU: DSCT at 1.4 million parameters, so that there is time for many steps" if small else "no GPU"
        choose("model", "dsct-tiny-sac", f"{what}; {start}")
    else:
        base = machine.gpu_bytes >= 40 * GIB and statistics.images >= 2000
        size = "base" if base else "small" if machine.gpu_bytes >= 20 * GIB else "tiny"
        why = f"a GPU of {machine.gpu_bytes / GIB:.0f} GiB and {statistics.images:,} images"
        choose("model", f"dsct-{size}-sac", f"{why}; {start}")
    reason = "the smaller layers of that size"
    if len(statistics.fractions) == 2:
        overrides["num_labels"] = 1
        reason = "two classes: one logit, whose threshold can be moved later" + (
            f"; {reason}" if len(overrides) > 1 else ""
        )
    choose("config_overrides", overrides or None, reason)


def _choose_data(choose: Any, statistics: Statistics) -> None:
    choose("num_channels", statistics.num_channels, "stored in the images")
    choose("pixel_range", statistics.pixel_range, "the values that the images store")
    choose("train_split", "train", f"{statistics.images:,} images")
    if statistics.eval_fraction is not None:
        reason = f"there is no validation split: {statistics.eval_images:,} images of train are held back"
        choose("eval_fraction", statistics.eval_fraction, reason)
    else:
        choose("eval_split", "val", f"{statistics.eval_images:,} images")


def _choose_crops(choose: Any, statistics: Statistics, machine: Machine, given: Mapping[str, Any]) -> None:
    height, width = median_size(statistics.sizes)
    small = _is_small(machine, given)
    area = GPU_CROP if machine.gpu_bytes else SMALL_CROP if small else CPU_CROP
    box = None
    if small and max(height, width) > SMALL_EDGE:
        reason = f"images of {height}x{width}: in a short run from random weights context counts more than detail"
        box = choose("base_size", [SMALL_EDGE, SMALL_EDGE], reason)
    elif not machine.gpu_bytes and max(height, width) > 640:
        reason = f"images of {height}x{width} are too large for a CPU: longest edge {CPU_EDGE}"
        box = choose("base_size", [CPU_EDGE, CPU_EDGE], reason)
    if box:
        choose("test_base_size", box, "as in training")
        scale = min(max(box) / max(height, width), min(box) / min(height, width))
        height, width = round(scale * height), round(scale * width)
    step = SMALL_STEP if small else STEP
    sides = [min(_multiple(math.sqrt(area * height / width), step), _floor(height, step))]
    sides.append(min(_multiple(area / sides[0], step), _floor(width, step)))
    where = "a GPU" if machine.gpu_bytes else "a CPU"
    crop = choose(
        "crop_size", sides, f"about {area:,} pixels for {where}, in the shape of the images ({height}x{width})"
    )
    share, shown = (1.5, "the whole image") if small else (0.5, "half of an image")
    low = math.sqrt(crop[0] * crop[1] / (share * height * width))
    low = min(max(math.floor(20 * low) / 20, 0.25), 0.75)
    high = 2.0 if machine.gpu_bytes else 1.6 if small else 1.25
    choose("scale_range", [low, high], f"at the lower end a crop shows about {shown}")
    if not machine.gpu_bytes:
        choose("photometric_distortion", False, "it takes a third of the time of the data on a CPU")


def _choose_schedule(choose: Any, statistics: Statistics, machine: Machine, given: Mapping[str, Any]) -> None:
    gpu, images = machine.gpu_bytes, statistics.images
    if gpu:
        crop = given.get("crop_size") or [1, GPU_CROP]
        fits = 0.7 * gpu / (GPU_PER_CROP * math.prod(crop) / GPU_CROP)
        size = min(max(2 ** int(math.log2(max(fits, 1))), 2), 16)
        batch = choose("per_device_train_batch_size", size, f"what fits into {gpu / GIB:.0f} GiB")
    else:
        size = 8 if machine.ram_bytes >= 4 * GIB else 4
        batch = choose(
            "per_device_train_batch_size", size, f"small crops, {machine.ram_bytes / GIB:.0f} GiB of memory"
        )
    small = _is_small(machine, given)
    epochs, least, most = (430, 4000, 80_000) if gpu else (23, 400, 1080) if small else (30, 400, 1400)
    steps = min(max(round(epochs * images / batch, -1), least), most)
    where = "a GPU" if gpu else "a CPU"
    steps = choose(
        "max_steps", int(steps), f"{epochs} passes over {images:,} images, within {least} to {most} on {where}"
    )
    # A published name of a model starts from random weights; a folder or a hub id is a checkpoint.
    trained = given.get("encoder_weights") is not None or "/" in given.get("model", "")
    if trained:
        rate = 1.0e-4 if gpu else 3.0e-4  # there are fewer steps on a CPU
        choose("learning_rate", rate * min(batch / 8, 1), f"a trained start, on {where}")
        choose("head_learning_rate_multiplier", 10.0, "the head for these classes is new")
    else:
        rate = 5.0e-4 if gpu else 3.0e-3
        choose("learning_rate", rate * min(batch / 8, 1), f"random weights on {where}")
    choose("warmup_steps", max(steps // 20, 1), "the first twentieth of the steps")
    if small:
        choose("weight_decay", 0.01, "a short run")
    else:
        choose("weight_decay", 0.05, "as the recipes of the papers from random weights")
    decay = round(min(max(1 - 14 / steps, 0.9), 0.999), 4)
    choose("ema_decay", decay, "the average of the last steps, a 14th of all, is evaluated and saved")
    _choose_weights(choose, statistics, given)
    by_steps = all(given.get(key, "steps") == "steps" for key in ("eval_strategy", "save_strategy"))
    if by_steps and "save_steps" not in given:  # else the best one may not be saved
        interval = choose("eval_steps", max(steps // 5, 1), "five evaluations")
        choose("save_steps", interval, "as often, so that the best one can be kept")
        choose("early_stopping_patience", 2, "stops when two evaluations in a row are no better")
        choose("load_best_model_at_end", True, "the best evaluation is kept")
    choose("save_total_limit", 1, "the newest checkpoint, besides the best one")
    workers = min(max(machine.cores - 1, 0), 8 if gpu else 1, int(machine.ram_bytes / GIB))
    choose("dataloader_num_workers", workers, f"{machine.cores} cores")
    if gpu or small:
        choose("max_grad_norm", 1.0, "a high learning rate")
    if machine.has_bf16:
        choose("bf16", True, "the GPU has it")


def _choose_weights(choose: Any, statistics: Statistics, given: Mapping[str, Any]) -> None:
    present = [fraction for fraction in statistics.fractions if fraction > 0]
    regions = given.get("loss") in ("dice", "lovasz")  # which weigh all classes alike
    if not present or regions or max(present) < 4 * min(present):
        choose("class_weights", None, "")
        return
    weights = [fraction**-0.5 if fraction else 0.0 for fraction in statistics.fractions]
    mean = sum(fraction * weight for fraction, weight in zip(statistics.fractions, weights, strict=True))
    values = [round(min(weight / mean, HIGHEST_WEIGHT), 2) if weight else 1.0 for weight in weights]
    reason = f"the rarest class has {100 * min(present):.2g} % of the pixels: 1 / sqrt(fraction), mean over pixels 1"
    choose("class_weights", values, reason)


def median_size(sizes: Mapping[tuple[int, int], int]) -> tuple[int, int]:
    """Median height and median width of the images."""
    heights, widths = (sorted(size[axis] for size in Counter(sizes).elements()) for axis in (0, 1))
    return heights[len(heights) // 2], widths[len(widths) // 2]


def _multiple(length: float, step: int) -> int:
    return max(round(length / step), 1) * step


def _floor(length: int, step: int) -> int:
    return max(length // step, 1) * step


def this_machine(use_cpu: bool) -> Machine:
    """Cores, memory and GPU of this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if use_cpu or not torch.cuda.is_available():
        return Machine(cores, ram)
    return Machine(cores, ram, torch.cuda.get_device_properties(0).total_memory, torch.cuda.is_bf16_supported())


def statistics_of(dataset: str, given: Mapping[str, Any]) -> Statistics:
    """Read the training split, of large data the first `READ_IMAGES` images.

    Raises:
        InputError: the data cannot be loaded, or no label map can be used.
    """
    options = ("spec", "root", "columns", "revision")
    names_of_keys = ("label_spec", "data_root", "dataset_columns", "dataset_revision")
    source: dict[str, Any] = {option: given.get(key) for option, key in zip(options, names_of_keys, strict=True)}
    source["pixel_format"] = PixelFormat(given.get("num_channels", 3), given.get("pixel_range", "uint8"))
    split = given.get("train_split", "train")
    scan = scan_segmentation_source(dataset, split, limit=READ_IMAGES, progress=True, **source)
    keys = scan.survey.keys(source["pixel_format"])
    if not scan.pixels.any():
        fault = f" The first fault: {scan.faults[0]}" if scan.faults else ""
        raise InputError(f"{dataset}: no label map of {split!r} has a class. `denseseg data check` lists why.{fault}")
    names = [str(name) for name in load_segmentation(dataset, split, **source).dataset.with_format(None)["id"]]
    fraction: float | None = given.get("eval_fraction")
    if fraction is None:
        try:
            held = len(load_segmentation(dataset, given.get("eval_split", "val"), **source).dataset)
        except NoSplitError:
            if "eval_split" in given:
                raise
            fraction = _fraction_to_hold_back(names)
    if fraction is not None:
        held = sum(held_back(name, fraction) for name in names)
        names = names[held:]
    return Statistics(len(names), held, scan.sizes, scan.fractions.tolist(), **keys, eval_fraction=fraction)


def _fraction_to_hold_back(names: Sequence[str]) -> float:
    """A tenth of many images, a fifth of few; of very few as much as leaves images on both sides."""
    for fraction in (0.1 if len(names) >= 500 else 0.2, 0.3, 0.4, 0.5, 0.7, 0.9):
        if 0 < sum(held_back(name, fraction) for name in names) < len(names):
            return fraction
    raise InputError(f"{len(names)} images and no validation split: nothing can be held back. Add images.")


def check_derivable(given: Mapping[str, Any]) -> None:
    """Refuse keys that the derived recipe cannot hold.

    Raises:
        InputError: another task, or another dataset than the first argument.
    """
    if (task := given.get("task", SEMANTIC_SEGMENTATION)) != SEMANTIC_SEGMENTATION:
        raise InputError(
            f"Without a recipe only {SEMANTIC_SEGMENTATION} is trained; for {task} give --model and --dataset."
        )
    if "dataset" in given:
        raise InputError("The dataset is the first argument of `denseseg train`; take --dataset out.")


def derived_recipe(dataset: str, given: Mapping[str, Any]) -> Recipe:
    """The recipe of a dataset; that of its run folder, if there is one.

    Args:
        dataset: as the key takes it.
        given: keys that the user has set.

    Raises:
        InputError: a key or the data cannot be used.
    """
    check_derivable(given)
    output = _folder_of(dataset, given)
    keys = {**given, "dataset": dataset, "output_dir": str(output)}
    if (note := output / "recipe.yaml").exists():
        logger.info("%s holds the recipe of this run; another --output_dir derives it again.", note)
        return make_recipe(read_yaml(note) | keys, f"Recipe {note}")
    make_recipe(keys, "Command line")  # refuses before the data is read
    choices = derive(statistics_of(dataset, given), this_machine(bool(given.get("use_cpu"))), given)
    derived = {choice.key: choice.value for choice in choices}
    comments = {choice.key: choice.reason for choice in choices}
    return make_recipe({"dataset": dataset, **derived, "output_dir": str(output)}, f"Recipe of {dataset}", comments)


def _folder_of(dataset: str, given: Mapping[str, Any]) -> Path:
    """The run folder of a derived recipe."""
    name = Path(dataset).expanduser().resolve().name if Path(dataset).expanduser().exists() else dataset
    return Path(given.get("output_dir", f"runs/{name.split('.')[0].replace(':', '-')}"))
