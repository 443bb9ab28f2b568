"""Top-1 and top-5 accuracy from exact counts; memory does not grow with the number of images."""

from collections.abc import Sequence
from typing import Any

import torch

from hf_denseseg.errors import InputError


def true_class_rank(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Rank of the true class among the scores of an image, from 0; of equal scores the smaller id comes first.

    So rank 0 means that `argmax` gives the true class, also where scores are equal.

    Args:
        logits: `(B, num_labels)`.
        labels: `(B,)` int64.

    Returns:
        `(B,)` int64.

    Raises:
        InputError: the shapes do not match, or a label is not a class.
    """
    count = logits.shape[-1]
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise InputError(f"Logits {tuple(logits.shape)} and labels {tuple(labels.shape)}: give (B, C) and (B,).")
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < count:
        raise InputError(
            f"Labels from {int(labels.min())} to {int(labels.max())} for {count} classes. Map them "
            f"to 0 to {count - 1} first."
        )
    own = logits.gather(1, labels[:, None])
    earlier = torch.arange(count, device=logits.device)[None] < labels[:, None]
    # The rank is the number of classes that come before the true one; a NaN score ranks it last.
    before = (logits > own) | ((logits == own) & earlier)
    return torch.where(own[:, 0].isnan(), count - 1, before.sum(1))


class AccuracyMeter:
    """Counts, per class, of images, and of those whose true class has rank 0 or is among the first five."""

    def __init__(self, num_labels: int) -> None:
        self.counts = torch.zeros(3, num_labels, dtype=torch.int64)  # images, rank 0, rank below 5

    def update(self, ranks: torch.Tensor, labels: torch.Tensor) -> None:
        """Add images, given rank `(B,)` (see `true_class_rank`) and label `(B,)` of each."""
        for row, chosen in zip(self.counts, (ranks >= 0, ranks < 1, ranks < 5), strict=True):
            row += torch.bincount(labels[chosen].cpu(), minlength=len(row))

    def compute(self, classes: Sequence[str]) -> dict[str, Any]:
        """Fractions: `top1`, `top5`, `images` and `per_class`; None where a class has no image."""
        images, first, among = (row.tolist() for row in self.counts)
        total = sum(images)
        return {
            "top1": sum(first) / total if total else None,
            "top5": sum(among) / total if total else None,
            "images": total,
            "per_class": [
                {
                    "class": name,
                    "accuracy": first[k] / images[k] if images[k] else None,
                    "top5": among[k] / images[k] if images[k] else None,
                    "images": images[k],
                }
                for k, name in enumerate(classes)
            ],
        }
