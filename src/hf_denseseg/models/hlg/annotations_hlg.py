"""COCO annotations -> labels of a detector: clipped boxes, and masks from polygons, run lengths or arrays."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from hf_denseseg.errors import InputError
from hf_denseseg.models.hlg.detections_hlg import SMALLEST_EXTENT, to_normalized


def to_labels(
    annotation: Mapping[str, Any], original: tuple[int, int], size: tuple[int, int], masks: bool
) -> dict[str, torch.Tensor]:
    """Turn the annotation of one image into labels.

    Crowds (`iscrowd`) are dropped, as in the released training; boxes are clipped to the image, and those without
    extent are dropped.

    Args:
        annotation: `image_id`, and `annotations` with one COCO object each: `bbox` (x, y, width, height) in pixels,
            `category_id`, with `masks` also `segmentation`, and `area` and `iscrowd` if known.
        original: (height, width) of the image that the annotation belongs to.
        size: (height, width) that the image is resized to.
        masks: whether `segmentation` becomes masks of that size.

    Returns:
        `class_labels` `(N,)`, `boxes` `(N, 4)` normalized (center x, center y, width, height), `area` `(N,)` in
        resized pixels, `iscrowd` `(N,)`, `image_id`, `orig_size` and `size` (height, width), and `masks`
        `(N, height, width)` bool.

    Raises:
        InputError: a value is missing or no number, with the image and the object.
    """
    if not isinstance(annotation, Mapping) or not {"image_id", "annotations"} <= annotation.keys():
        raise InputError(
            "An annotation must be a dictionary with `image_id` and `annotations`, a list of COCO objects; found "
            f"{sorted(annotation) if isinstance(annotation, Mapping) else type(annotation).__name__}."
        )
    image_id = annotation["image_id"]
    chosen = [(index, each) for index, each in enumerate(annotation["annotations"]) if not each.get("iscrowd", 0)]
    for index, each in chosen:
        _check(each, f"Image {image_id}, object {index}", masks)
    corners = torch.tensor([each["bbox"] for _, each in chosen], dtype=torch.float32).reshape(-1, 4)
    corners[:, 2:] += corners[:, :2]  # (x, y, width, height) -> (left, top, right, bottom)
    limits = torch.tensor([original[1], original[0]] * 2)
    corners = corners.clamp(min=torch.zeros(4), max=limits)
    boxes = to_normalized(corners, original)
    kept = (boxes[:, 2:] > SMALLEST_EXTENT).all(1)  # (N,), objects with an extent after clipping
    areas = [each.get("area", each["bbox"][2] * each["bbox"][3]) for _, each in chosen]
    scale = size[0] / original[0] * size[1] / original[1]
    labels = {
        "image_id": torch.tensor([int(image_id)]),
        "class_labels": torch.tensor([int(each["category_id"]) for _, each in chosen], dtype=torch.int64)[kept],
        "boxes": boxes[kept],
        "area": torch.tensor(areas, dtype=torch.float32)[kept] * scale,
        "iscrowd": torch.zeros(int(kept.sum()), dtype=torch.int64),
        "orig_size": torch.tensor(original),
        "size": torch.tensor(size),
    }
    if masks:
        drawn = [
            torch.from_numpy(to_mask(each["segmentation"], original, f"Image {image_id}, object {index}"))
            for (index, each), inside in zip(chosen, kept.tolist(), strict=True)
            if inside
        ]
        stack = torch.stack(drawn) if drawn else torch.zeros(0, *original, dtype=torch.bool)
        labels["masks"] = resize_masks(stack, size)
    return labels


def resize_masks(masks: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize `(N, H, W)` bool masks to (height, width): each pixel takes the value at its center."""
    if len(masks) == 0:
        return masks.new_zeros(0, *size)
    return F.interpolate(masks[None].to(torch.uint8), size=size, mode="nearest-exact")[0].bool()


def _check(each: Mapping[str, Any], where: str, masks: bool) -> None:
    needed = ("bbox", "category_id", *(("segmentation",) if masks else ()))
    missing = [name for name in needed if name not in each]
    if missing:
        raise InputError(f"{where} lacks {', '.join(map(repr, missing))}; found {sorted(each)}.")
    box = each["bbox"]
    if len(box) != 4 or not all(math.isfinite(value) for value in box):
        raise InputError(f"{where} has the bbox {list(box)}; four numbers (x, y, width, height) are needed.")


def to_mask(segmentation: Any, size: tuple[int, int], where: str) -> np.ndarray:
    """Draw one object as a `(height, width)` bool mask.

    Args:
        segmentation: `(height, width)` array, COCO run lengths (`{"size", "counts"}`, as numbers or compressed), or
            polygons, lists of x, y, x, y, ... in pixels.
        size: (height, width) of the image.
        where: image and object, for the message.

    Raises:
        InputError: it is none of these, has another size, or needs a library that is not installed.
    """
    # COCO's three forms: run lengths (plain or compressed), polygons, and an array.
    if isinstance(segmentation, Mapping):
        if tuple(segmentation["size"]) != tuple(size):
            raise InputError(
                f"{where}: run lengths of size {segmentation['size']} for an image of "
                f"{list(size)}. Encode the mask at "
                "the size of the image."
            )
        counts = segmentation["counts"]
        if not isinstance(counts, str | bytes):
            values = np.arange(len(counts)) % 2 == 1  # runs of zeros and ones alternate, column by column
            flat = np.repeat(values, counts)
            if flat.size != size[0] * size[1]:
                raise InputError(
                    f"{where}: the run lengths add up to {flat.size}, not to {size[0] * size[1]} "
                    "pixels. Encode the mask "
                    "again."
                )
            return flat.reshape(size[1], size[0]).T.copy()
        return _coco_masks(where).decode(segmentation).astype(bool)
    if isinstance(segmentation, Sequence) and segmentation and np.ndim(segmentation[0]) == 1:
        tools = _coco_masks(where)
        runs = tools.frPyObjects([list(map(float, polygon)) for polygon in segmentation], *size)
        return tools.decode(tools.merge(runs)).astype(bool)
    mask = np.asarray(segmentation)
    if mask.shape != tuple(size):
        raise InputError(
            f"{where}: the segmentation is a {type(segmentation).__name__} of shape "
            f"{list(mask.shape)}. Give polygons, "
            f"run lengths, or an array of {list(size)}."
        )
    return mask.astype(bool)


def _coco_masks(where: str) -> Any:
    try:
        from pycocotools import mask
    except ImportError as error:
        raise InputError(
            f"{where} has polygons or compressed run lengths, which pycocotools decodes: `pip install "
            "pycocotools`, or give an array or plain run lengths."
        ) from error
    return mask


__all__ = ["resize_masks", "to_labels", "to_mask"]
