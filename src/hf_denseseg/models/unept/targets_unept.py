"""Ground truth of boundary and direction from a label map (Sec. 3.2; the generator of SegFix, run on the fly).

The released code reads maps that were made at the original image size, flips them without flipping the angles, and
counts ignored pixels as boundary. Made from the crop after augmentation, they stay correct under scaling and flip.
"""

from typing import Any

import numpy as np
import torch

from hf_denseseg.errors import InputError

IGNORE_INDEX = 255
"""Marks pixels that boundary and direction loss leave out."""

FAR = 250.0  # distance of a class without an edge, and the largest one in the released maps
REACH = 5  # a boundary pixel lies less than REACH + 1 pixels from an edge
NUM_DIRECTIONS = 8


def _kernel() -> np.ndarray:
    """Row and column gradient `(2, 5, 5)`: offset / squared length."""
    offsets = np.mgrid[-2:3, -2:3].astype(np.float64)
    squared = (offsets**2).sum(0)  # (5, 5), 0 at the center
    return offsets / np.where(squared == 0, 1, squared)


_KERNEL = _kernel()


def distance_fields(
    labels: np.ndarray, min_class_pixels: int = 100, ignore_index: int = IGNORE_INDEX
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distance of each pixel to the nearest pixel of another class, and the direction in which it grows.

    Each class is computed in its bounding box grown by one pixel: nothing outside it changes distance or gradient.
    The border of the image is no edge; that of an ignored region is.

    Args:
        labels: `(H, W)` train ids.
        min_class_pixels: smaller classes are left out, with distance and gradient 0.
        ignore_index: id of ignored pixels, left out too.

    Returns:
        `(H, W)` distance in pixels (at an edge 1; `FAR` in a class that fills the whole map), its gradient
        `(H, W, 2)` as (row, column), and whether the pixel's class was counted `(H, W)`.

    Raises:
        InputError: scipy is not installed.
    """
    try:
        from scipy.ndimage import correlate, distance_transform_edt, find_objects
    except ImportError as error:
        raise InputError(
            "The boundary targets of UN-EPT need scipy. Install hf-denseseg[train], or give `boundary_labels` and "
            "`direction_labels` beside `labels`."
        ) from error
    distance = np.zeros(labels.shape, np.float32)
    gradient = np.zeros((*labels.shape, 2), np.float32)
    counted = np.zeros(labels.shape, bool)
    classes, numbers, counts = np.unique(labels, return_inverse=True, return_counts=True)
    boxes = find_objects(numbers.reshape(labels.shape) + 1)
    for name, box, count in zip(classes.tolist(), boxes, counts.tolist(), strict=True):
        if name == ignore_index or count < min_class_pixels:
            continue
        grown = tuple(slice(max(side.start - 1, 0), side.stop + 1) for side in box)
        inside = labels[grown] == name
        counted[grown] |= inside
        if inside.all():  # without an edge scipy would measure the distance to a corner of the map
            distance[grown] = FAR
            continue
        own = distance_transform_edt(inside)
        distance[grown] += own
        for axis in range(2):
            gradient[grown][..., axis] += np.where(inside, correlate(own, _KERNEL[axis], mode="constant"), 0)
    return distance, gradient, counted


def direction_classes(angle: np.ndarray) -> np.ndarray:
    """Angle in degrees from -180 to 180 -> bin 0 to 7 of 45 degrees; bin 0 lies around -180, upper ends included."""
    return np.ceil((angle + 180 - 22.5) / 45).astype(np.int64) % NUM_DIRECTIONS


def boundary_targets(
    labels: np.ndarray,
    min_class_pixels: int = 100,
    ignore_small_classes: bool = True,
    official: bool = False,
    ignore_index: int = IGNORE_INDEX,
) -> dict[str, np.ndarray]:
    """Make both targets of a label map.

    Args:
        labels: `(H, W)` train ids.
        min_class_pixels: classes with fewer pixels have no edge of their own.
        ignore_small_classes: mark them as ignored; else they are boundary, in direction 4 (released maps).
        official: count ignored pixels as boundary too, as the released losses do.
        ignore_index: id of ignored pixels.

    Returns:
        `boundary_labels` `(H, W)`, 1 at less than 6 pixels from an edge on either side, else 0; `direction_labels`
        `(H, W)`, bin of the angle into the region. Both uint8 with 255 where there is no ground truth.
    """
    distance, gradient, counted = distance_fields(labels, min_class_pixels, ignore_index)
    angle = np.degrees(np.arctan2(gradient[..., 0], gradient[..., 1]))  # 0 points right, 90 down
    boundary = (distance < REACH + 1).astype(np.uint8)
    direction = direction_classes(angle).astype(np.uint8)
    if not official:
        unknown = labels == ignore_index
        if ignore_small_classes:
            unknown |= ~counted
        boundary[unknown] = direction[unknown] = IGNORE_INDEX
        direction[distance == FAR] = IGNORE_INDEX  # a class that fills the crop has no direction
    return {"boundary_labels": boundary, "direction_labels": direction}


@torch.library.custom_op("hf_denseseg::unept_boundary_targets", mutates_args=())
def batched_targets(
    labels: torch.Tensor, min_class_pixels: int, ignore_small_classes: bool, official: bool, ignore_index: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`boundary_targets` of a batch `(B, H, W)` as one operator for the compiler; copies the labels to the CPU."""
    settings = (min_class_pixels, ignore_small_classes, official, ignore_index)
    made = [boundary_targets(label, *settings) for label in labels.cpu().numpy()]
    boundary, direction = (np.stack([each[name] for each in made]) for name in made[0])
    return torch.from_numpy(boundary).to(labels.device), torch.from_numpy(direction).to(labels.device)


@batched_targets.register_fake
def _(labels: torch.Tensor, *settings: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(labels, dtype=torch.uint8), torch.empty_like(labels, dtype=torch.uint8)


__all__ = ["IGNORE_INDEX", "batched_targets", "boundary_targets", "direction_classes", "distance_fields"]
