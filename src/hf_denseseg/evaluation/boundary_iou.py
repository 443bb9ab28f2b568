"""Boundary IoU (Cheng et al., "Boundary IoU: Improving Object-Centric Image Segmentation Evaluation", CVPR 2021).

A class's mask is a set of pixels; its boundary region is what lies within `boundary_width` of a pixel that is not in
the mask, or of the image's edge. Boundary IoU is the IoU of the two boundary regions. The distance is the authors':
the larger of the two coordinate differences, since they erode with squares.

Whether a pixel is in the boundary region of its own class does not depend on which class that is: it is if the square
around it holds another id. So one pass over the label map serves all classes.
"""

import math

import torch

from hf_denseseg.data.labels import VOID

WIDTH_SHARE = 0.02  # of the image's diagonal; the authors' setting for COCO, Cityscapes and others


def boundary_width(size: tuple[int, int]) -> int:
    """Width of the boundary region in pixels for an image of `(height, width)`: 2 % of its diagonal, at least 1."""
    return max(round(WIDTH_SHARE * math.hypot(*size)), 1)


def boundary_region(ids: torch.Tensor, width: int) -> torch.Tensor:
    """Mark the pixels that lie in the boundary region of their own class.

    Args:
        ids: `(H, W)` integers, any device.
        width: see `boundary_width`.

    Returns:
        `(H, W)` bool: whether the square that reaches `width` pixels to each side holds another id or leaves the
        image.
    """
    height, wide = ids.shape
    margin = width - 1
    # Place j of a row of edges lies between the pixels j - 1 and j; the image's two edges are places 0 and `wide`.
    edges = torch.zeros(height, wide + 1 + 2 * margin, dtype=torch.bool, device=ids.device)
    row = edges[:, margin : margin + wide + 1]
    row[:, 1:wide] = ids[:, 1:] != ids[:, :-1]
    row[:, [0, wide]] = True
    crossed = _any_of(edges, 2 * width, dim=1)  # by the row of `width` pixels to each side
    edges = torch.zeros(height + 1 + 2 * margin, wide, dtype=torch.bool, device=ids.device)
    column = edges[margin : margin + height + 1]
    column[1:height] = ids[1:] != ids[:-1]
    column[[0, height]] = True
    # A square is of one id if its middle column is, and all its rows are.
    column[:height] |= crossed
    column[1:] |= crossed
    return _any_of(edges, 2 * width, dim=0)


def boundary_counts(prediction: torch.Tensor, label: torch.Tensor, num_labels: int) -> torch.Tensor:
    """Pixels of the boundary regions of one image, which add up over images.

    Void belongs to no mask: the prediction is void where the label is, so that both masks end at the same place.

    Args:
        prediction: `(H, W)` class ids, integers below 256.
        label: `(H, W)` class ids and 255 = void, on the same device.
        num_labels: number of classes C.

    Returns:
        `(3, C)` int64: in both regions, in the prediction's, in the label's.
    """
    width = boundary_width((label.shape[0], label.shape[1]))
    label = label.to(torch.uint8)
    prediction = _void_where(label == VOID, prediction.to(torch.uint8))
    predicted = _void_where(~boundary_region(prediction, width), prediction)
    true = _void_where(~boundary_region(label, width), label)
    both = _void_where(predicted != true, true)
    return torch.stack([torch.bincount(ids.flatten(), minlength=256)[:num_labels] for ids in (both, predicted, true)])


def boundary_iou(counts: torch.Tensor) -> list[float | None]:
    """Boundary IoU per class of summed `boundary_counts`; None for a class that is nowhere."""
    both, predicted, true = counts.tolist()
    unions = [p + t - b for b, p, t in zip(both, predicted, true, strict=True)]
    return [b / union if union else None for b, union in zip(both, unions, strict=True)]


def _void_where(mask: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Bytes with 255 where the mask is set: as bits, since `torch.where` takes six times as long on bytes."""
    return ids | mask.view(torch.uint8).neg()


def _any_of(flags: torch.Tensor, length: int, dim: int) -> torch.Tensor:
    """Whether any of `length` flags from each place on is set; `length - 1` places fewer.

    Spans are doubled, so that the work grows with the logarithm of the length.
    """
    span = 1
    while span < length:
        step = min(span, length - span)
        rest = flags.shape[dim] - step
        flags = flags.narrow(dim, 0, rest) | flags.narrow(dim, step, rest)
        span += step
    return flags
