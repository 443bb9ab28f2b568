"""Losses of all families: per pixel, with class weights and OHEM, of regions, and of image labels."""

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import FunctionCtx
from transformers import PreTrainedConfig
from transformers.loss.loss_utils import LOSS_MAPPING

from hf_denseseg.data.ignore_index import ignore_index_of
from hf_denseseg.models.inputs import classification_labels
from hf_denseseg.models.one_logit import two_logits
from hf_denseseg.models.region_losses import binary_dice_loss, dice_loss, lovasz_hinge_loss, lovasz_loss

LOSSES = ("ce", "focal", "dice", "lovasz", "ce+dice", "ce+lovasz")
FOCAL_GAMMA = 2.0  # the value of Lin et al., 2017
REGIONS = {"dice": dice_loss, "lovasz": lovasz_loss}
BINARY_REGIONS = {"dice": binary_dice_loss, "lovasz": lovasz_hinge_loss}


def classification_loss(
    labels: torch.Tensor, logits: torch.Tensor, config: PreTrainedConfig, **kwargs: Any
) -> torch.Tensor:
    """Loss of image labels in float32, by `config.problem_type` as in transformers.

    Args:
        labels: by problem type: None and `"single_label_classification"` take the mean cross-entropy with class ids
            `(B,)` of any integer dtype, or with the probability of each class `(B, num_labels)` (mixup, CutMix);
            `"multi_label_classification"` the binary cross-entropy with `(B, num_labels)` numbers from 0 to 1;
            `"regression"`, also None with one label, the mean squared error with `(B, num_labels)` or, with one
            label, `(B,)` numbers.
        logits: `(B, num_labels)`, any floating dtype.
        config: of the model.
        kwargs: further arguments that models of transformers pass to their loss; ignored.

    Returns:
        Scalar float32.

    Raises:
        InputError: labels of another shape, or an id that is no class.
    """
    problem = config.problem_type or ("regression" if config.num_labels == 1 else "single_label_classification")
    logits = logits.float()
    if problem == "single_label_classification":
        return F.cross_entropy(logits, classification_labels(labels, logits))
    labels = labels.float()
    if problem == "regression" and config.num_labels == 1 and labels.ndim == 1:
        labels = labels[:, None]
    loss: Any = LOSS_MAPPING["ForImageClassification"]
    return loss(classification_labels(labels, logits), logits, config)


def segmentation_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    ignore_index: int | None = None,
    align_corners: bool = False,
    normalization: str = "valid",
    class_weights: torch.Tensor | None = None,
    ohem_threshold: float | None = None,
    ohem_min_kept: int = 100_000,
    sources: torch.Tensor | None = None,
    kind: str = "ce",
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Upsample the logits to the labels and take the loss in float32, by default the cross-entropy.

    Args:
        logits: `(B, num_labels, h, w)`, any resolution and floating dtype; with one label the logit of class 1
            (foreground) against class 0, so that the cross-entropy is the binary one.
        labels: `(B, H, W)`, any integer dtype; `ignore_index` and -100 mark ignored pixels.
        ignore_index: train id that the loss leaves out; None is 255, or 65535 with more than 254 classes.
        align_corners: how the logits are resized, see `torch.nn.functional.interpolate`.
        normalization: `"valid"` divides by the number (with class weights: the summed weight) of kept pixels,
            `"all"` by the number of all pixels, ignored ones included (mmsegmentation's `avg_non_ignore=False`).
        class_weights: `(num_labels,)`, for one logit `(2,)`, or None for equal weights.
        ohem_threshold: online hard example mining keeps the pixels whose probability of the true class is below this
            number, and never fewer than `ohem_min_kept` per image; None keeps every valid pixel.
        ohem_min_kept: smallest number of pixels kept per image (mmsegmentation's `min_kept`).
        sources: `(B, H, W)`, index (row * W + column) of the pixel whose logits each label is compared with; None for
            its own pixel. Equals the loss of gathered logits, without gathering `num_labels` numbers per pixel, and
            takes less memory than `F.cross_entropy` (see `_LossAt`).
        kind: one of `LOSSES`: cross-entropy, focal loss (Lin et al., 2017), soft Dice or Lovász-softmax (see
            `region_losses`; `normalization` does not concern these two), or the sum of two. With one logit Dice
            and Lovász judge the foreground only, and Lovász is the hinge loss; class weights do not concern them.
        label_smoothing: part of the target that is spread evenly over all classes, for kinds with cross-entropy.

    Returns:
        Scalar float32. A batch without any valid pixel gives 0 with zero (finite) gradients.

    Raises:
        ValueError: `normalization` is neither `"valid"` nor `"all"`, `kind` is not one of `LOSSES`, or has no
            cross-entropy to smooth.
    """
    if kind not in LOSSES:
        raise ValueError(f"Loss {kind!r} is unknown. Use one of {', '.join(LOSSES)}.")
    if label_smoothing and not kind.startswith("ce"):
        raise ValueError(f"Label smoothing {label_smoothing} smooths cross-entropy, and the loss is {kind!r}.")
    if normalization not in ("valid", "all"):
        raise ValueError(f"Loss normalization {normalization!r} is unknown. Use 'valid' or 'all'.")
    if ignore_index is None:
        ignore_index = ignore_index_of(logits.shape[1])
    labels = labels.long()  # uint8 cannot hold -100
    labels = torch.where(labels == -100, ignore_index, labels)
    logits = logits.float()
    if logits.shape[-2:] != labels.shape[-2:]:
        logits = F.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=align_corners)
    weights = None if class_weights is None else class_weights.to(logits)
    valid = labels != ignore_index
    binary = logits.shape[1] == 1
    of_regions: torch.Tensor | float = 0.0
    if (region := (BINARY_REGIONS if binary else REGIONS).get(kind.removeprefix("ce+"))) is not None:
        of_regions = region(logits if sources is None else logits_at(logits, sources), labels, valid, weights)
        if not kind.startswith("ce+"):
            return of_regions
    if binary:
        logits = two_logits(logits)
    classes = torch.where(valid, labels, 0)  # any class will do: ignored pixels are masked below
    if sources is None:
        loss = F.cross_entropy(
            logits, labels, ignore_index=ignore_index, reduction="none", label_smoothing=label_smoothing
        )
    else:
        loss = _LossAt.apply(logits, classes, sources)
        if label_smoothing:
            uniform = (logits.logsumexp(1) - logits.mean(1)).flatten(1)  # (B, H*W), loss of a target with all classes
            uniform = uniform.gather(1, sources.flatten(1)).view(loss.shape)
            loss = (1 - label_smoothing) * loss + label_smoothing * uniform
    if kind == "focal":
        loss = loss * (1 - torch.exp(-loss)) ** FOCAL_GAMMA
    pixel_weight = torch.ones_like(loss) if weights is None else weights[classes]
    if ohem_threshold is not None:
        at_labels = logits.detach() if sources is None else logits_at(logits.detach(), sources)
        valid = valid & _hard_pixels(at_labels, labels, valid, ohem_threshold, ohem_min_kept)
    kept = torch.where(valid, loss * pixel_weight, 0.0).sum()
    if normalization == "all":
        return kept / labels.numel() + of_regions
    # A weight below one must still divide: only the empty sum is replaced by 1, which gives 0 and not NaN.
    total = torch.where(valid, pixel_weight, 0.0).sum()
    return kept / torch.where(total > 0, total, 1.0) + of_regions


def logits_at(logits: torch.Tensor, sources: torch.Tensor) -> torch.Tensor:
    """Gather for each pixel the logits of another, given by its index (row * W + column).

    Args:
        logits: `(B, num_labels, H, W)`.
        sources: `(B, H, W)`.

    Returns:
        `(B, num_labels, H, W)`.
    """
    index = sources.flatten(1)[:, None].expand(-1, logits.shape[1], -1)
    return logits.flatten(2).gather(2, index).view(*logits.shape[:2], *sources.shape[1:])


class _LossAt(torch.autograd.Function):
    """Cross-entropy `(B, H, W)` of the logits at `sources` against the `classes`, both `(B, H, W)`.

    Saves one number per pixel for the backward pass and allocates one tensor of the size of the logits there; autograd
    of `cross_entropy` saves one such tensor and allocates three, most of the memory of a step with 150 classes at full
    size.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, logits: torch.Tensor, classes: torch.Tensor, sources: torch.Tensor) -> torch.Tensor:
        places = sources.flatten(1)  # (B, H*W)
        normalizer = logits.logsumexp(1).flatten(1)  # (B, H*W)
        index = classes.flatten(1) * normalizer.shape[1] + places  # in the flattened (num_labels, H*W)
        ctx.save_for_backward(logits, normalizer, index, places)
        return (normalizer.gather(1, places) - logits.flatten(1).gather(1, index)).view(classes.shape)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        logits, normalizer, index, places = ctx.saved_tensors
        grad = grad.flatten(1)
        weight = torch.zeros_like(normalizer).scatter_add_(1, places, grad)  # of each pixel's logits
        # The gradient is softmax * weight - one-hot * grad. Contiguous, because it is flattened in place below.
        result = logits.new_empty(logits.shape)
        torch.sub(logits.flatten(2), normalizer[:, None], out=result.flatten(2))
        result.flatten(2).exp_().mul_(weight[:, None])
        result.flatten(1).scatter_add_(1, index, -grad)
        return result, None, None


def _hard_pixels(
    logits: torch.Tensor, labels: torch.Tensor, valid: torch.Tensor, threshold: float, min_kept: int
) -> torch.Tensor:
    """Mask `(B, H, W)` of the pixels below the probability threshold, raised until `min_kept` per image pass."""
    probability = logits.softmax(dim=1).gather(1, torch.where(valid, labels, 0).unsqueeze(1)).squeeze(1)
    flat = torch.where(valid, probability, torch.inf).flatten()
    kept = min(min_kept * len(labels), int(valid.sum()))
    if kept == 0:
        return torch.zeros_like(valid)
    smallest = flat.kthvalue(kept).values.clamp(min=threshold)
    return (probability <= smallest) & valid
