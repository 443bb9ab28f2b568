"""Boundary IoU (Cheng et al., "Boundary IoU: Improving Object-Centric Image Segmentation Evaluation", CVPR 2021).

The boundary region of a class's mask is the part of it within `boundary_width` of a pixel outside the mask, or of the
image's edge. Boundary IoU is the IoU of the boundary regions of prediction and label. Distance is the larger of the
two coordinate differences, as in the authors' code, which erodes with squares.

A pixel lies in the boundary region of its own class if the square around it holds another id, whichever class that
is. So one pass over the label map serves all classes.
"""

import math

import torch

from hf_denseseg.data.ignore_index import IGNORE_INDEX, ignore_index_of

WIDTH_FRACTION = 0.02  # of the image's diagonal; the authors' setting for COCO, Cityscapes and others


def boundary_width(size: tuple[int, int]) -> int:
    """Width of the boundary region in pixels for an image of `(height, width)`: 2 % of its diagonal, at least 1."""
    return max(round(WIDTH_FRACTION * math.hypot(*size)), 1)


def boundary_region(ids: torch.Tensor, width: int) -> torch.Tensor:
    """Mark the pixels that lie in the boundary region of their own class.

    Args:
        ids: `(H, W)` integers, any device.
        width: see `boundary_width`.

    Returns:
        `(H, W)` bool: whether the square that reaches `width` pixels to each side holds another id or extends beyond
        the image.
    """
    rows, columns = ids.shape
    margin = width - 1
    # Edge j of a row lies between its pixels j - 1 and j; edges 0 and `columns` are those of the image. Outside it lie
    # `margin` edges on each side that are never set, so that all windows below are equally long.
    edges = torch.zeros(rows, columns + 1 + 2 * margin, dtype=torch.bool, device=ids.device)
    inner = edges[:, margin : margin + columns + 1]
    inner[:, 1:columns] = ids[:, 1:] != ids[:, :-1]
    inner[:, [0, columns]] = True
    # The `width` pixels to each side of pixel j, and j itself, have the 2 * width edges j + 1 - width to j + width
    # between them: the row of the square around j holds one id if none of these is set.
    crossed = _any_of(edges, 2 * width, dim=1)  # (H, W)
    edges = torch.zeros(rows + 1 + 2 * margin, columns, dtype=torch.bool, device=ids.device)
    inner = edges[margin : margin + rows + 1]
    inner[1:rows] = ids[1:] != ids[:-1]
    inner[[0, rows]] = True
    # The square holds one id if its middle column does and each of its rows does. A row that does not sets the edges
    # above and below it, so one pass over the columns finds both.
    inner[:rows] |= crossed
    inner[1:] |= crossed
    return _any_of(edges, 2 * width, dim=0)  # (H, W)


def boundary_counts(prediction: torch.Tensor, label: torch.Tensor, num_labels: int) -> torch.Tensor:
    """Count the pixels of the boundary regions of one image; the counts add up over images.

    Ignored pixels belong to no mask: the prediction is ignored where the label is, so that both masks end there.

    Args:
        prediction: `(H, W)` class ids.
        label: `(H, W)` class ids and `ignore_index_of(num_labels)`, on the same device.
        num_labels: number of classes C.

    Returns:
        `(3, C)` int64: in both regions, in the prediction's, in the label's.
    """
    width = boundary_width((label.shape[0], label.shape[1]))
    ignored = ignore_index_of(num_labels)
    kind = torch.uint8 if ignored == IGNORE_INDEX else torch.int32
    label = label.to(kind)
    prediction = _ignored_where(label == ignored, prediction.to(kind), ignored)
    # Label maps (H, W) of the boundary regions alone: everything else is ignored, which is not counted below.
    predicted = _ignored_where(~boundary_region(prediction, width), prediction, ignored)
    true = _ignored_where(~boundary_region(label, width), label, ignored)
    both = _ignored_where(predicted != true, true, ignored)
    maps = (both, predicted, true)
    return torch.stack([torch.bincount(ids.flatten(), minlength=ignored + 1)[:num_labels] for ids in maps])


def boundary_iou(counts: torch.Tensor) -> list[float | None]:
    """Boundary IoU per class of summed `boundary_counts`; None for a class that occurs in neither."""
    both, predicted, true = counts.tolist()
    unions = [p + t - b for b, p, t in zip(both, predicted, true, strict=True)]
    return [b / union if union else None for b, union in zip(both, unions, strict=True)]


def _ignored_where(mask: torch.Tensor, ids: torch.Tensor, ignored: int) -> torch.Tensor:
    """Ids, ignored where the mask is; bytes by bit operations, since `torch.where` takes six times as long on them."""
    if ids.dtype == torch.uint8:
        return ids | mask.view(torch.uint8).neg()  # True is the byte 1, whose negative is 255
    return torch.where(mask, ignored, ids)


def _any_of(flags: torch.Tensor, length: int, dim: int) -> torch.Tensor:
    """Whether any flag is set in each window of `length` flags; `length - 1` positions fewer along `dim`.

    The window is doubled until it is long enough, so that the work grows with the logarithm of its length.
    """
    span = 1
    while span < length:
        step = min(span, length - span)
        rest = flags.shape[dim] - step
        flags = flags.narrow(dim, 0, rest) | flags.narrow(dim, step, rest)
        span += step
    return flags
