"""Training augmentation (mmsegmentation's default, without OpenCV) and the datasets that apply it.

A sample is a function of (seed, epoch, index), whatever the number of workers. Images and labels stay integers until
they are on the device, where the images are normalized.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from hf_denseseg.data.augmentation.photometric import PHOTOMETRIC, distorted
from hf_denseseg.data.augmentation.rare_classes import RareClasses
from hf_denseseg.data.augmentation.sampler import RowDataset, TrainRows
from hf_denseseg.data.image_sizes import fit_factor, scaled_size
from hf_denseseg.data.labels import SegmentationData
from hf_denseseg.data.reading.pixels import Pixels, as_tensor, height_width, resize_pixels
from hf_denseseg.errors import InputError

_CROP_TRIES = 10
# Streams of random numbers of a sample (seed, epoch, index) beside that of its augmentation.
_DRAWN_ROW, _PASTED = 1, 2

Targets = Callable[[np.ndarray], dict[str, np.ndarray]]
"""Further training targets, computed from the augmented label map `(h, w)` in the data workers."""


class TrainAugmentation:
    """Resize by a random ratio, crop, flip, distort colors, pad: mmsegmentation's default training pipeline.

    Random numbers are drawn in this order: ratio, (top, left) of each tried crop, flip, color distortion. The order is
    part of the result: a sample is reproducible only as long as it stays.

    Args:
        crop_size: (height, width) of the result.
        base_size: (height, width) into which the image fits at ratio 1, keeping its aspect ratio (mmsegmentation's
            `img_scale`, in either order); None uses the size of the image.
        scale_range: smallest and largest ratio, drawn uniformly.
        scale_step: draw the ratio from a grid with this step, from the smallest to the largest; None draws it from the
            continuous range.
        cat_max_ratio: a crop is drawn again (at most 10 times) while one class covers this fraction of its valid
            pixels or more, or fewer than two classes are visible; 1 disables the rule.
        flip: flip half of the samples horizontally.
        photometric: distort brightness, contrast, saturation and hue.
        photometric_style: `"mmsegmentation"`, `"car"` (HFGD's advanced setting) or `"brightness"` (HFGD's plain
            setting: brightness only).
        pad_color: color of the padding, white is 255, by default the ImageNet mean; one number per channel.
            mmsegmentation pads with 0 after normalization, which is the mean color.

    Raises:
        InputError: a size or range does not consist of two positive numbers, the step does not divide the range, or
            the style is unknown.
    """

    def __init__(
        self,
        crop_size: Sequence[int],
        base_size: Sequence[int] | None = None,
        scale_range: Sequence[float] = (0.5, 2.0),
        cat_max_ratio: float = 0.75,
        flip: bool = True,
        photometric: bool = True,
        pad_color: Sequence[float] = (124, 116, 104),
        scale_step: float | None = None,
        photometric_style: str = "mmsegmentation",
    ) -> None:
        for name, pair in (("crop_size", crop_size), ("base_size", base_size), ("scale_range", scale_range)):
            if pair is not None and (len(pair) != 2 or min(pair) <= 0):
                raise InputError(f"Augmentation: {name} is {list(pair)}. Give two positive numbers.")
        self.crop_size = (int(crop_size[0]), int(crop_size[1]))
        self.base_size = None if base_size is None else (int(base_size[0]), int(base_size[1]))
        self.scale_range = (float(scale_range[0]), float(scale_range[1]))
        self.ratios = None if scale_step is None else _steps(*self.scale_range, scale_step)
        self.cat_max_ratio = cat_max_ratio
        self.flip = flip
        self.photometric = photometric
        if photometric_style not in PHOTOMETRIC:
            names = " or ".join(map(repr, PHOTOMETRIC))
            raise InputError(f"Augmentation: photometric_style is {photometric_style!r}. Give {names}.")
        self.distort = PHOTOMETRIC[photometric_style]
        self.pad_color = tuple(pad_color)

    def __call__(
        self, image: Pixels, label: np.ndarray, rng: np.random.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Augment one pair: image and `(H, W)` train ids -> `(C, h, w)` of its type and `(h, w)` of `label_tensor`."""
        size = self.scaled_size(*height_width(image), rng)
        label_image = Image.fromarray(label)
        # The crop is drawn on the labels, which the class rule needs; then only that window of the image is resized.
        top, left, cut = self._crop(label_image, size, rng)
        pixels = _window(image, size, (top, left, *cut.size[::-1]), Image.Resampling.BILINEAR)
        flip = self.flip and rng.random() < 0.5  # flipped at the very end, when the planes are written
        planes = distorted(pixels, self.distort if self.photometric else None, rng)
        height, width = self.crop_size
        labels = np.full((height, width), np.iinfo(label.dtype).max, dtype=label.dtype)  # ignored
        labels[: cut.height, : cut.width] = np.asarray(cut)[:, ::-1] if flip else np.asarray(cut)
        # Padding lies below and to the right; a flipped sample is flipped within its own window, before padding.
        result = np.empty((len(planes), height, width), dtype=planes[0].dtype)
        for target, plane, color in zip(result, planes, self.pad_color, strict=True):
            target[cut.height :] = target[:, cut.width :] = round(color * (np.iinfo(plane.dtype).max / 255))
            target[: cut.height, : cut.width] = plane[:, ::-1] if flip else plane
        return torch.from_numpy(result), label_tensor(labels)

    def scaled_size(self, height: int, width: int, rng: np.random.Generator) -> tuple[int, int]:
        """Draw the ratio; return the (height, width) to which the image is resized."""
        low, high = self.scale_range
        drawn = rng.random()  # one number in either case
        ratio = drawn * (high - low) + low if self.ratios is None else self.ratios[int(drawn * len(self.ratios))]
        base = self.base_size or (height, width)
        size = (height, width)
        return scaled_size(size, fit_factor(size, int(min(base) * ratio), int(max(base) * ratio)))

    def _crop(
        self, label: Image.Image, size: tuple[int, int], rng: np.random.Generator
    ) -> tuple[int, int, Image.Image]:
        """Draw a window of the resized label map that meets the class rule; return top, left and the window."""
        height, width = min(size[0], self.crop_size[0]), min(size[1], self.crop_size[1])
        for attempt in range(_CROP_TRIES + 1):
            top = int(rng.integers(size[0] - height + 1))
            left = int(rng.integers(size[1] - width + 1))
            cut = _window(label, size, (top, left, height, width), Image.Resampling.NEAREST)
            if self.cat_max_ratio >= 1 or attempt == _CROP_TRIES or self._is_varied(cut):
                break  # after the last try the window is kept, whatever it shows
        return top, left, cut

    def _is_varied(self, cut: Image.Image) -> bool:
        # Pixels per class, ignored ones (the largest id) left out. Pillow counts bytes faster than numpy.
        every = cut.histogram() if cut.mode == "L" else np.bincount(np.asarray(cut).ravel(), minlength=65536)
        counts = np.array(every[:-1])
        return bool(np.count_nonzero(counts) > 1 and counts.max() / counts.sum() < self.cat_max_ratio)


def label_tensor(label: np.ndarray) -> torch.Tensor:
    """Label map `(H, W)` of uint8 as it is, of uint16 as int32: torch has few operations for uint16."""
    return torch.from_numpy(label if label.dtype == np.uint8 else label.astype(np.int32))


def _steps(low: float, high: float, step: float) -> tuple[float, ...]:
    """Ratios from `low` to `high`, such as 0.5, 0.6, ... 2.0 for steps of 0.1."""
    count = round((high - low) / step) if step > 0 else 0
    if abs(low + count * step - high) > 1e-6:
        raise InputError(
            f"Augmentation: scale_step {step} does not divide the range from {low} to {high}. Give a "
            "positive number that divides the difference."
        )
    return tuple(low + k * step for k in range(count + 1))


def _window(image: Any, size: tuple[int, int], window: tuple[int, int, int, int], resample: Image.Resampling) -> Any:
    """Resize to `size` and cut out (top, left, height, width) in one step, so that only the window is computed."""
    top, left, height, width = window
    rows, columns = height_width(image)
    y, x = rows / size[0], columns / size[1]  # source pixels per pixel of the resized image
    box = (left * x, top * y, min((left + width) * x, columns), min((top + height) * y, rows))
    if isinstance(image, np.ndarray):
        return resize_pixels(image, (height, width), resample, box)
    return image.resize((width, height), resample, box=box)


class TrainDataset(TrainRows):
    """Augmented pairs: `{"pixel_values": uint8 or uint16 (C, h, w), "labels": (h, w)}` and further targets.

    Args:
        data: what `load_segmentation` returned.
        augmentation: applied to every pair.
        seed: determines the sample, together with epoch and index.
        targets: computes further targets from each augmented label map (a model's `training_targets`).
        rare_classes: classes and images to draw, which the next two arguments need.
        balanced: make each sample of an image drawn by `rare_classes`, not of the image of its index.
        copy_paste: probability of pasting the pixels of a drawn class from an augmented crop of a drawn image
            (Ghiasi et al., 2021, with classes in place of objects).
    """

    def __init__(
        self,
        data: SegmentationData,
        augmentation: TrainAugmentation,
        seed: int = 0,
        targets: Targets | None = None,
        rare_classes: RareClasses | None = None,
        balanced: bool = False,
        copy_paste: float = 0.0,
    ) -> None:
        super().__init__(data, seed)
        self.augmentation = augmentation
        self.targets = targets
        self.rare_classes = rare_classes
        self.balanced = balanced
        self.copy_paste = copy_paste

    def row_of(self, epoch: int, index: int) -> int:
        """Number of a drawn image with `balanced`, else the index."""
        if self.rare_classes is None or not self.balanced:
            return index
        return self.rare_classes.draw(np.random.default_rng((self.seed, epoch, index, _DRAWN_ROW)))[1]

    def sample(self, row: dict[str, Any], epoch: int, index: int) -> dict[str, torch.Tensor]:
        """Make the sample of one row."""
        rng = np.random.default_rng((self.seed, epoch, index))
        pixel_values, labels = self.augmentation(row["image"], row["label"], rng)
        if self.rare_classes is not None and self.copy_paste:
            self._paste(pixel_values, labels, np.random.default_rng((self.seed, epoch, index, _PASTED)))
        more = {} if self.targets is None else self.targets(labels.numpy())
        return {
            "pixel_values": pixel_values,
            "labels": labels,
            **{key: torch.from_numpy(each) for key, each in more.items()},
        }

    def _paste(self, pixel_values: torch.Tensor, labels: torch.Tensor, rng: np.random.Generator) -> None:
        """Write the pixels of a drawn class of another image over `(C, h, w)` and `(h, w)`, in place."""
        assert self.rare_classes is not None
        if rng.random() >= self.copy_paste:
            return
        drawn, number = self.rare_classes.draw(rng)
        source = self.data.dataset[number]
        for _ in range(_CROP_TRIES):  # until a crop shows the class
            pixels, ids = self.augmentation(source["image"], source["label"], rng)
            pasted = ids == drawn  # (h, w)
            if pasted.any():
                labels[pasted] = drawn
                # numpy writes into the same memory; torch selects no pixels of 16 bits.
                pixel_values.numpy()[:, pasted.numpy()] = pixels.numpy()[:, pasted.numpy()]
                return


class EvalDataset(RowDataset):
    """Pairs at their original size: `{"index", "image": uint8 or uint16 (C, H, W), "label": (H, W), "id"}`.

    Args:
        data: what `load_segmentation` returned.
    """

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.data.dataset[index]
        label = label_tensor(np.array(row["label"]))
        return {"index": index, "image": as_tensor(row["image"]), "label": label, "id": row["id"]}


def collate_train(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Stack augmented pairs: `pixel_values` `(B, C, h, w)`, `labels` and other targets `(B, h, w)`."""
    return {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}
