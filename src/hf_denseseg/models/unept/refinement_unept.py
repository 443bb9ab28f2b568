"""Boundary refinement of UN-EPT (Sec. 3.2): pixels at a boundary take the logits of a neighbor inside their region."""

import torch

from hf_denseseg.models.losses import logits_at, segmentation_loss
from hf_denseseg.models.unept.targets_unept import IGNORE_INDEX

# (row, column) step to the neighbor that a direction class points to; class 0 is the angle -180 degrees (left).
DIRECTIONS = ((0, -1), (-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1))


def boundary_offsets(
    boundary_logits: torch.Tensor, direction_logits: torch.Tensor, threshold_on: str = "logit"
) -> torch.Tensor:
    """Predict the (row, column) step of every pixel into its region, 0 away from boundaries.

    Args:
        boundary_logits: `(B, 2, H, W)`.
        direction_logits: `(B, 8, H, W)`.
        threshold_on: the boundary's `"logit"` (released code) or `"probability"` is compared with 0.5.

    Returns:
        `(B, 2, H, W)` int64, each -1, 0 or 1.
    """
    score = boundary_logits.softmax(1) if threshold_on == "probability" else boundary_logits
    steps = torch.tensor(DIRECTIONS, device=boundary_logits.device)[direction_logits.argmax(1)]  # (B, H, W, 2)
    return torch.where((score[:, 1] > 0.5)[:, None], steps.permute(0, 3, 1, 2), 0)


def refinement_sources(offsets: torch.Tensor) -> torch.Tensor:
    """Index (row * W + column) of the pixel that each pixel takes its logits from, clamped to the image: `(B, H, W)`.

    Args:
        offsets: `(B, 2, H, W)` as (row, column).
    """
    height, width = offsets.shape[-2:]
    rows = torch.arange(height, device=offsets.device)[:, None] + offsets[:, 0]
    columns = torch.arange(width, device=offsets.device) + offsets[:, 1]
    return rows.clamp(0, height - 1) * width + columns.clamp(0, width - 1)


def refine(coarse_logits: torch.Tensor, sources: torch.Tensor) -> torch.Tensor:
    """Replace the logits of each pixel by those one offset away (Sec. 3.2, "grid-sample").

    Offsets are whole pixels, so a gather does it: exactly, and with gradients for the coarse logits only.

    Args:
        coarse_logits: `(B, K, H, W)`.
        sources: `(B, H, W)` of `refinement_sources`.
    """
    return logits_at(coarse_logits, sources)


def balanced_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy weighted by 1 - fraction of the class in this batch, a weighted mean; 0 without a valid pixel.

    Args:
        logits: `(B, n, H, W)`.
        targets: `(B, H, W)`; 255 is ignored.
    """
    counts = torch.stack([(targets == number).sum() for number in range(logits.shape[1])])
    weights = 1 - counts / counts.sum().clamp(min=1)
    return segmentation_loss(logits, targets, ignore_index=IGNORE_INDEX, class_weights=weights)


__all__ = ["DIRECTIONS", "balanced_loss", "boundary_offsets", "refine", "refinement_sources"]
