"""Training images for classification: timm's augmentation per image, then Mixup and CutMix per batch.

A sample is a function of (seed, epoch, index), and the mixing of a batch one of (seed, epoch, index of its first
sample), whatever the number of workers.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2

from hf_denseseg.data.augmentation.sampler import EvalRows, LoadedData, TrainRows
from hf_denseseg.data.reading.pixels import RGB_BYTES, PixelFormat, Pixels, as_tensor, read_options
from hf_denseseg.errors import InputError

BICUBIC = v2.InterpolationMode.BICUBIC


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Seed the global generators of Python, numpy and torch (CPU) with `key` for a block, and restore them afterwards.

    timm draws from all three.
    """
    before = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.random.set_rng_state(before[2])


def training_transform(
    crop_size: Sequence[int],
    *,
    scale: Sequence[float] = (0.08, 1.0),
    flip: bool = True,
    auto_augment: str | None = None,
    color_jitter: float | None = None,
    random_erasing: float = 0.0,
    mean: Sequence[float],
    std: Sequence[float],
    pixel_format: PixelFormat = RGB_BYTES,
) -> Callable[[Any], torch.Tensor]:
    """timm's training transform: random resized crop (bicubic), flip, RandAugment or color jitter, random erasing.

    With `auto_augment`, timm omits the color jitter unless the policy string asks for it.

    Args:
        crop_size: (height, width) of the result.
        scale: smallest and largest fraction of the image's area that the crop covers.
        flip: flip half of the samples horizontally.
        auto_augment: policy string of timm, such as `rand-m9-mstd0.5-inc1`.
        color_jitter: largest relative change of brightness, contrast and saturation.
        random_erasing: probability that a box of the sample is filled with noise.
        mean: mean per channel for the normalization, for pixel values from 0 to 1.
        std: standard deviation per channel, likewise.
        pixel_format: of the images. In all but 8-bit RGB there are no colors to distort: crop, flip and erasing only.

    Returns:
        Function from an image to normalized `(C, height, width)`.

    Raises:
        InputError: a value is out of range, or timm does not accept it.
    """
    from timm.data import create_transform

    if len(crop_size) != 2 or min(crop_size) < 1:
        raise InputError(f"crop_size is {list(crop_size)}. Give height and width in pixels.")
    if len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1:
        raise InputError(f"scale is {list(scale)}. Give two fractions between 0 and 1, the smaller first.")
    if pixel_format != RGB_BYTES:
        if auto_augment or color_jitter:
            raise InputError(
                "auto_augment and color_jitter are for 8-bit images of three channels; these have num_channels "
                f"{pixel_format.num_channels} and pixel_range {pixel_format.shown_range}. Leave them out."
            )
        return _channel_transform(crop_size, scale, flip, random_erasing, mean, std)
    try:
        transform = create_transform(
            (int(crop_size[0]), int(crop_size[1])),
            is_training=True,
            scale=(scale[0], scale[1]),
            hflip=0.5 if flip else 0.0,
            color_jitter=color_jitter or 0.0,
            auto_augment=auto_augment,
            interpolation="bicubic",
            re_prob=random_erasing,
            re_mode="pixel",
            mean=tuple(mean),
            std=tuple(std),
        )
    except (AssertionError, ValueError, KeyError) as error:
        raise InputError(
            f"auto_augment {auto_augment!r} is not understood by timm ({error}). Give a policy such as "
            "rand-m9-mstd0.5-inc1."
        ) from error
    _fix_posterize(transform)
    return transform


def _channel_transform(
    crop_size: Sequence[int],
    scale: Sequence[float],
    flip: bool,
    random_erasing: float,
    mean: Sequence[float],
    std: Sequence[float],
) -> Callable[[Pixels], torch.Tensor]:
    """The transform of `training_transform` for images of any number of channels and bits."""
    from timm.data.random_erasing import RandomErasing

    crop = v2.RandomResizedCrop(list(crop_size), scale=(scale[0], scale[1]), interpolation=BICUBIC)
    steps = [
        v2.RandomHorizontalFlip(0.5 if flip else 0.0),
        v2.Normalize(list(mean), list(std)),
        RandomErasing(random_erasing, mode="pixel", device="cpu"),
    ]

    def transform(image: Pixels) -> torch.Tensor:
        values = as_tensor(image)
        values = values.float() / torch.iinfo(values.dtype).max  # (C, H, W) from 0 to 1
        values = crop(values).clamp(0, 1)  # bicubic interpolation overshoots
        for step in steps:
            values = step(values)
        return values

    return transform


def _fix_posterize(transform: Any) -> None:
    """Make timm's posterize accept 0 bits, its strongest level: older Pillow gave black, Pillow 13 raises an error."""
    for step in transform.transforms:
        ops = [*getattr(step, "ops", ()), *(op for policy in getattr(step, "policy", ()) for op in policy)]
        for op in ops:
            if op.name.startswith("Posterize"):
                op.aug_fn = posterize


def posterize(image: Image.Image, bits: int, **kwargs: Any) -> Image.Image:
    """Keep the `bits` highest bits of each channel, 0 to 8."""
    mask = 0xFF & ~(2 ** (8 - bits) - 1)
    return image.point([value & mask for value in range(256)] * len(image.getbands()))


class TrainImages(TrainRows):
    """Augmented images: `{"pixel_values" (3, h, w), "label", "epoch", "index"}`.

    Args:
        data: what `load_classification` returned.
        transform: applied to every image.
        seed: determines the sample, together with epoch and index.
    """

    def __init__(self, data: LoadedData, transform: Callable[[Image.Image], torch.Tensor], seed: int = 0) -> None:
        super().__init__(data, seed)
        self.transform = transform

    def sample(self, row: dict[str, Any], epoch: int, index: int) -> dict[str, Any]:
        """Make the sample of one row."""
        with seeded(self.seed, epoch, index):
            pixels = self.transform(row["image"])
        return {"pixel_values": pixels, "label": row["label"], "epoch": epoch, "index": index}


class EvalImages(EvalRows):
    """Images as the image processor returns them: `{"pixel_values" (3, h, w), "label", "index"}`."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.data.dataset[index]
        inputs = self.processor(images=row["image"], return_tensors="pt", **read_options(row["image"]))
        pixels = inputs["pixel_values"][0]
        return {"pixel_values": pixels, "label": row["label"], "index": index}


class MixedBatch:
    """Collate training samples, mix them (timm's Mixup or CutMix, drawn once per batch) and smooth their labels.

    timm mixes sample i with sample B - 1 - i and needs an even number of samples: the last one of an odd batch stays
    unmixed.

    Args:
        num_labels: number of classes.
        mixup: alpha of Mixup; 0 disables it.
        cutmix: alpha of CutMix; 0 disables it.
        switch_probability: probability that a batch gets CutMix, if both are enabled.
        label_smoothing: weight that is spread evenly over all classes.
        seed: determines the mixing, together with epoch and index of the first sample.

    Raises:
        InputError: a value outside its range.
    """

    def __init__(
        self,
        num_labels: int,
        *,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        switch_probability: float = 0.5,
        label_smoothing: float = 0.0,
        seed: int = 0,
    ) -> None:
        from timm.data import Mixup

        if min(mixup, cutmix) < 0 or not 0 <= switch_probability <= 1 or not 0 <= label_smoothing < 1:
            raise InputError(
                f"mixup {mixup}, cutmix {cutmix}, mixup_switch_probability {switch_probability}, label_smoothing "
                f"{label_smoothing}: give alphas of at least 0, and fractions between 0 and 1."
            )
        self.num_labels = num_labels
        self.label_smoothing = label_smoothing
        self.seed = seed
        self.mix = None
        if mixup or cutmix:
            self.mix = Mixup(
                mixup_alpha=mixup,
                cutmix_alpha=cutmix,
                switch_prob=switch_probability,
                label_smoothing=label_smoothing,
                num_classes=num_labels,
            )

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Return `pixel_values` `(B, 3, h, w)` and `labels`: ids `(B,)`, or, mixed or smoothed, `(B, num_labels)`."""
        from timm.data.mixup import mixup_target

        pixels = torch.stack([sample["pixel_values"] for sample in samples])
        ids = torch.tensor([sample["label"] for sample in samples], dtype=torch.int64)
        if self.mix is None and not self.label_smoothing:
            return {"pixel_values": pixels, "labels": ids}
        # Smoothed one-hot targets for every sample, (B, num_labels); mixing overwrites all but an odd last one.
        labels = mixup_target(ids, self.num_labels, lam=1.0, smoothing=self.label_smoothing)
        even = len(samples) // 2 * 2
        if self.mix is not None and even:
            first = samples[0]
            # Keyed by the first sample of the batch; the 1 keeps this seed apart from that of the sample itself.
            with seeded(self.seed, first["epoch"], first["index"], 1):
                pixels[:even], labels[:even] = self.mix(pixels[:even].clone(), ids[:even])
        return {"pixel_values": pixels, "labels": labels}


def collate_eval(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Stack evaluation samples: `pixel_values` `(B, 3, h, w)`, `labels` and `index` `(B,)`."""
    return {
        "pixel_values": torch.stack([sample["pixel_values"] for sample in samples]),
        "labels": torch.tensor([sample["label"] for sample in samples], dtype=torch.int64),
        "index": torch.tensor([sample["index"] for sample in samples], dtype=torch.int64),
    }
