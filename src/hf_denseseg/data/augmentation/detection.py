"""Multi-scale training images with boxes and masks, batches grouped by aspect ratio, and evaluation images.

A sample is a function of (seed, epoch, index), whatever the number of workers. Images stay integers until they are
on the device.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from hf_denseseg.data.augmentation.sampler import EpochSampler, EvalRows, LoadedData, TrainRows
from hf_denseseg.data.image_sizes import fit_factor, scaled_size
from hf_denseseg.data.reading.pixels import height_width, read_options, resize_pixels
from hf_denseseg.data.sources.coco import object_mask, trainable
from hf_denseseg.errors import InputError

SIZE_DIVISOR = 32


class DetectionAugmentation:
    """Resize to a short side drawn from a list, and flip horizontally: mmdet's multi-scale pipeline.

    Random numbers are drawn in this order: short side, flip.

    Args:
        shortest_edge: lengths of the shorter side in pixels; one is drawn for each sample.
        longest_edge: upper limit of the longer side in pixels; where it applies, the shorter side is less than drawn.
        flip: flip half of the samples horizontally.
        masks: whether to make masks too.

    Raises:
        InputError: an edge is not positive, or no shortest edge is given.
    """

    def __init__(
        self, shortest_edge: Sequence[int], longest_edge: int, flip: bool = True, masks: bool = False
    ) -> None:
        if not shortest_edge or min(*shortest_edge, longest_edge) < 1:
            raise InputError(
                f"shortest_edge {list(shortest_edge)}, longest_edge {longest_edge}: give positive numbers of pixels."
            )
        self.shortest_edge = tuple(shortest_edge)
        self.longest_edge = longest_edge
        self.flip = flip
        self.masks = masks

    def __call__(self, row: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """Augment one row.

        Returns:
            `pixel_values` uint8 or uint16 `(C, h, w)`, `class_labels` int64 `(N,)`, `boxes` `(N, 4)` as (center x,
            center y, width, height) relative to the image size, and, if asked for, `masks` bool `(N, h, w)`.
        """
        image, objects = row["image"], row["objects"]
        height, width = own = height_width(image)
        size = self.scaled_size(height, width, self.shortest_edge[rng.integers(len(self.shortest_edge))])
        flipped = self.flip and rng.random() < 0.5
        if isinstance(image, Image.Image):
            pixels = np.array(image.resize((size[1], size[0]), Image.Resampling.BILINEAR))
        else:
            pixels = resize_pixels(image, size, Image.Resampling.BILINEAR)
        trained, corners = trainable(objects, height, width)
        # (N, 4) as left, top, right, bottom: pixels -> fractions of the image, which do not change with its size.
        corners = corners / np.array([width, height] * 2, dtype=np.float32)
        if flipped:
            pixels = pixels[:, ::-1]
            corners = np.stack([1 - corners[:, 2], corners[:, 1], 1 - corners[:, 0], corners[:, 3]], axis=1)
        left_top, right_bottom = corners[:, :2], corners[:, 2:]
        boxes = np.concatenate([(left_top + right_bottom) / 2, right_bottom - left_top], axis=1)
        sample = {
            "pixel_values": torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))),
            "class_labels": torch.tensor([objects[index]["category"] for index in trained], dtype=torch.int64),
            "boxes": torch.from_numpy(boxes.astype(np.float32)),
        }
        if self.masks:
            painted = [object_mask(objects[index]["segmentation"], own, size) for index in trained]
            masks = np.stack(painted) if painted else np.zeros((0, *size), dtype=np.uint8)
            masks = masks[..., ::-1] if flipped else masks  # (N, h, w), drawn at the resized size
            sample["masks"] = torch.from_numpy(np.ascontiguousarray(masks)).bool()
        return sample

    def scaled_size(self, height: int, width: int, shorter_side: int) -> tuple[int, int]:
        """The (height, width) to which an image is resized."""
        size = (height, width)
        return scaled_size(size, fit_factor(size, shorter_side, self.longest_edge))


class TrainDetections(TrainRows):
    """Augmented images with their objects.

    Args:
        data: what `load_detection` returned.
        augmentation: applied to every row.
        seed: determines the sample, together with epoch and index.
    """

    def __init__(self, data: LoadedData, augmentation: DetectionAugmentation, seed: int = 0) -> None:
        super().__init__(data, seed)
        self.augmentation = augmentation

    def sample(self, row: dict[str, Any], epoch: int, index: int) -> dict[str, Any]:
        """Make the sample of one row."""
        return self.augmentation(row, np.random.default_rng((self.seed, epoch, index)))

    def is_wide(self) -> list[bool]:
        """Whether each image is wider than high."""
        sizes = self.data.dataset.with_format(None)
        return [width > height for height, width in zip(sizes["height"], sizes["width"], strict=True)]


class EvalDetections(EvalRows):
    """Images as the image processor returns them: `{"index", "pixel_values" (3, h, w), "pixel_mask", "size"}`."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = self.data.dataset[index]["image"]
        inputs = self.processor(images=[image], return_tensors="pt", **read_options(image))
        return {
            "index": index,
            "pixel_values": inputs["pixel_values"][0],
            "pixel_mask": inputs["pixel_mask"][0],
            "size": height_width(image),
        }


class AspectRatioSampler(EpochSampler):
    """`EpochSampler` whose batches hold either wide or tall images, so that little padding is needed.

    Every image occurs once per epoch; the incomplete batches of both kinds at its end are joined.

    Args:
        is_wide: for each image, whether it is wider than high.
        batch_size: number of images per batch.
        seed: of the order.
    """

    def __init__(self, is_wide: Sequence[bool], batch_size: int, seed: int = 0) -> None:
        super().__init__(len(is_wide), seed)
        self.is_wide = is_wide
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch = self.epoch
        # Index groups that are not yet a full batch; the loader cuts the sequence into batches of the same length.
        waiting: dict[bool, list[tuple[int, int]]] = {True: [], False: []}
        for key in super().__iter__():
            group = waiting[self.is_wide[key[1]]]
            group.append((epoch, key[1]))
            if len(group) == self.batch_size:
                yield from group
                group.clear()
        yield from waiting[True] + waiting[False]


def collate_train(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Pad training samples to one size, a multiple of 32.

    Returns:
        `pixel_values` uint8 or uint16 `(B, C, H, W)`, `pixel_mask` int64 `(B, H, W)` with 1 on the image, and
        `labels`, a list of dicts with `class_labels`, `boxes` and, if made, `masks` at the size of the image before
        padding.
    """
    pixel_values, pixel_mask = _padded([sample["pixel_values"] for sample in samples])
    labels = [{key: value for key, value in sample.items() if key != "pixel_values"} for sample in samples]
    return {"pixel_values": pixel_values, "pixel_mask": pixel_mask, "labels": labels}


def collate_eval(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Pad evaluation samples to one size: `pixel_values`, `pixel_mask`, `index` `(B,)` and the original `sizes`."""
    pixel_values, _ = _padded([sample["pixel_values"] for sample in samples])
    masks, _ = _padded([sample["pixel_mask"][None] for sample in samples])
    return {
        "pixel_values": pixel_values,
        "pixel_mask": masks[:, 0],
        "index": torch.tensor([sample["index"] for sample in samples], dtype=torch.int64),
        "sizes": [sample["size"] for sample in samples],
    }


def _padded(images: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad `(C, h, w)` images at the right and bottom; return the batch `(B, C, H, W)` and its mask `(B, H, W)`."""
    sides = [max(image.shape[axis] for image in images) for axis in (1, 2)]
    height, width = (-(-side // SIZE_DIVISOR) * SIZE_DIVISOR for side in sides)
    batch = images[0].new_zeros(len(images), images[0].shape[0], height, width)
    mask = torch.zeros(len(images), height, width, dtype=torch.int64)
    for i, image in enumerate(images):
        batch[i, :, : image.shape[1], : image.shape[2]] = image
        mask[i, : image.shape[1], : image.shape[2]] = 1
    return batch, mask
