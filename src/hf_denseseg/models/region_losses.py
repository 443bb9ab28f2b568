"""Losses of whole regions: soft Dice and Lovász follow overlap scores where cross-entropy counts pixels.

Those of several logits average over the classes that occur in the batch's labels, so that absent classes cost nothing;
those of one logit are of the foreground. They know no pixels but valid ones: the gradient at ignored pixels is 0.
"""

import torch
import torch.nn.functional as F


def _one_hot(labels: torch.Tensor, valid: torch.Tensor, num_labels: int) -> torch.Tensor:
    """`(B, H, W)` -> `(num_labels, pixels)` float32, all 0 at ignored pixels."""
    classes = torch.where(valid, labels, 0)
    return (F.one_hot(classes, num_labels) * valid[..., None]).flatten(0, -2).T.float()


def _mean_over_classes(
    losses: torch.Tensor, present: torch.Tensor, class_weights: torch.Tensor | None
) -> torch.Tensor:
    weights = present.float() if class_weights is None else present * class_weights
    total = weights.sum()
    return (losses * weights).sum() / torch.where(total > 0, total, 1.0)


def dice_loss(
    logits: torch.Tensor, labels: torch.Tensor, valid: torch.Tensor, class_weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Soft Dice loss (Milletari et al., 2016) of the batch: 1 - 2 |p g| / (|p| + |g|), mean over the present classes.

    Args:
        logits: `(B, num_labels, H, W)` float32.
        labels: `(B, H, W)` int64.
        valid: `(B, H, W)`, False at ignored pixels.
        class_weights: `(num_labels,)` weights of the mean.

    Returns:
        Scalar in 0..1; 0 without any valid pixel.
    """
    target = _one_hot(labels, valid, logits.shape[1])
    probabilities = logits.softmax(1).transpose(0, 1).flatten(1) * valid.flatten()
    overlap, size = (probabilities * target).sum(1), probabilities.sum(1) + target.sum(1)
    losses = 1 - 2 * overlap / torch.where(size > 0, size, 1.0)
    return _mean_over_classes(losses, target.any(1), class_weights)


def lovasz_loss(
    logits: torch.Tensor, labels: torch.Tensor, valid: torch.Tensor, class_weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Lovász-softmax loss (Berman et al., 2018, Eq. 11 and Algorithm 1) over the batch, mean over the present classes.

    Arguments and result as of `dice_loss`. Memory is that of the logits for each class in turn.
    """
    target = _one_hot(labels, valid, logits.shape[1])
    probabilities = logits.softmax(1).transpose(0, 1).flatten(1)
    losses = []
    for probability, positive in zip(probabilities, target, strict=True):
        # An ignored pixel has error 0: it comes last, adds 0, and sends no gradient.
        errors = torch.where(valid.flatten(), (positive - probability).abs(), 0.0)
        errors, order = errors.sort(descending=True)
        losses.append((errors * _jaccard_steps(positive[order])).sum())
    return _mean_over_classes(torch.stack(losses), target.any(1), class_weights)


def binary_dice_loss(
    logits: torch.Tensor, labels: torch.Tensor, valid: torch.Tensor, class_weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Soft Dice loss of the foreground: 1 - 2 |p g| / (|p| + |g|) with p = sigmoid of `(B, 1, H, W)` logits.

    Arguments and result as of `dice_loss`, without effect of weights; 0 without a valid pixel of the foreground.
    """
    target = (valid & (labels == 1)).flatten().float()
    probabilities = logits.sigmoid().flatten() * valid.flatten()
    loss = 1 - 2 * (probabilities * target).sum() / (probabilities.sum() + target.sum()).clamp(min=1e-12)
    return loss * target.any()


def lovasz_hinge_loss(
    logits: torch.Tensor, labels: torch.Tensor, valid: torch.Tensor, class_weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Lovász hinge loss of the foreground (Berman et al., 2018, Sec. 3.1) over the batch.

    The margin of a pixel is 1 - z with the logit z, or 1 + z in the background. Arguments as of `binary_dice_loss`.
    """
    target = (valid & (labels == 1)).flatten().float()
    margins = (1 - logits.flatten() * (2 * target - 1)).relu()
    # An ignored pixel has margin 0: it comes last, adds 0, and sends no gradient.
    margins, order = torch.where(valid.flatten(), margins, 0.0).sort(descending=True)
    return (margins * _jaccard_steps(target[order])).sum() * target.any()


def _jaccard_steps(target: torch.Tensor) -> torch.Tensor:
    """Growth of the Jaccard loss with each pixel that is wrong, `(pixels,)`, the largest error first."""
    missed = target.sum() - target.cumsum(0)
    union = target.sum() + (1 - target).cumsum(0)
    jaccard = 1 - missed / union  # loss if the pixels up to here are wrong
    return torch.cat([jaccard[:1], jaccard.diff()])


__all__ = ["binary_dice_loss", "dice_loss", "lovasz_hinge_loss", "lovasz_loss"]
