"""From scored boxes to detections: box formats, thresholds, non-maximum suppression, masks pasted into the image.

The test settings of the released detection configurations (mmdetection): at most 1000 candidates per pyramid level,
scores above 0.05, suppression within a class at IoU 0.5, the best 100, masks at 0.5.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torchvision.ops import batched_nms, box_convert

CANDIDATES_PER_LEVEL = 1000
SCORE_THRESHOLD = 0.05
NMS_THRESHOLD = 0.5
MAX_DETECTIONS = 100
ALIGNMENT = 32  # pixels: images of a batch are padded to a common multiple of it
SMALLEST_EXTENT = 1e-6  # of a training box, as a fraction of the image; smaller ones are empty in float32 pixels

PASTED_ELEMENTS = 2**25
"""Mask values pasted at once: 128 MiB in float32; as in mmdetection this bounds memory, not the number of masks."""


def to_corners(boxes: torch.Tensor, size: Sequence[int] = (1, 1)) -> torch.Tensor:
    """Turn normalized (center x, center y, width, height) `(..., 4)` into corners in pixels of (height, width)."""
    left, top, right, bottom = box_convert(boxes, "cxcywh", "xyxy").unbind(-1)
    return torch.stack((left * size[1], top * size[0], right * size[1], bottom * size[0]), dim=-1)


def to_normalized(boxes: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Turn corners `(..., 4)` in pixels into (center x, center y, width, height) as fractions of the image."""
    left, top, right, bottom = boxes.unbind(-1)
    sides = torch.stack((left / size[1], top / size[0], right / size[1], bottom / size[0]), dim=-1)
    return box_convert(sides, "xyxy", "cxcywh")


def suppress(
    boxes: torch.Tensor, scores: torch.Tensor, labels: torch.Tensor, limit: int = MAX_DETECTIONS
) -> torch.Tensor:
    """Return the indices of the detections to keep, best first, from `(N, 4)` corners, `(N,)` scores and labels."""
    return batched_nms(boxes, scores, labels, NMS_THRESHOLD)[:limit]


def retinanet_detections(
    logits: torch.Tensor, boxes: torch.Tensor, per_level: Sequence[int], threshold: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Select the detections of one image.

    Args:
        logits: `(A, num_labels)` of all anchors, level by level.
        boxes: `(A, 4)` normalized (center x, center y, width, height).
        per_level: number of anchors of each level; anchors beyond their sum are padding.
        threshold: smallest score; values below 0.05 count as 0.05.

    Returns:
        Scores `(N,)`, labels `(N,)` and normalized corners `(N, 4)` inside the image, best first, N <= 100.
    """
    num_labels, start = logits.shape[-1], 0
    scores, labels, corners = [], [], []
    for count in per_level:
        # A candidate is a pair (anchor, class), flattened to anchor * num_labels + class; an anchor may have several.
        level = logits[start : start + count].flatten().float().sigmoid()
        pairs = (level > max(threshold, SCORE_THRESHOLD)).nonzero().squeeze(1)
        best, order = level[pairs].topk(min(CANDIDATES_PER_LEVEL, len(pairs)))
        chosen = pairs[order]
        scores.append(best)
        labels.append(chosen % num_labels)
        corners.append(to_corners(boxes[start + chosen // num_labels].float()).clamp(0, 1))
        start += count
    score, label, corner = torch.cat(scores), torch.cat(labels), torch.cat(corners)
    kept = suppress(corner, score, label)
    return score[kept], label[kept], corner[kept]


def paste_masks(masks: torch.Tensor, boxes: torch.Tensor, size: Sequence[int], threshold: float) -> torch.Tensor:
    """Paste masks into their boxes, as mmdetection does: sampled at pixel centers, bilinear, zero outside.

    Args:
        masks: `(N, m, m)` probabilities within each box.
        boxes: `(N, 4)` corners in pixels.
        size: (height, width) of the image.
        threshold: probability from which on a pixel belongs to the object.

    Returns:
        `(N, height, width)` bool.
    """
    height, width = int(size[0]), int(size[1])
    pasted = torch.zeros(len(masks), height, width, dtype=torch.bool, device=masks.device)
    rows = torch.arange(height, device=masks.device) + 0.5
    columns = torch.arange(width, device=masks.device) + 0.5
    step = max(1, PASTED_ELEMENTS // max(height * width, 1))
    for start in range(0, len(masks), step):
        left, top, right, bottom = boxes[start : start + step].float().unbind(1)
        y = (rows - top[:, None]) / (bottom - top)[:, None] * 2 - 1  # (n, height), -1 and 1 at the edges of the box
        x = (columns - left[:, None]) / (right - left)[:, None] * 2 - 1
        # A box without extent has no finite coordinates; 2 lies outside every mask.
        y, x = y.nan_to_num(2, 2, 2), x.nan_to_num(2, 2, 2)
        grid = torch.stack((x[:, None].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)), dim=3)
        values = F.grid_sample(masks[start : start + step, None].float(), grid, align_corners=False)
        pasted[start : start + step] = values[:, 0] >= threshold
    return pasted


__all__ = ["paste_masks", "retinanet_detections", "suppress", "to_corners", "to_normalized"]
