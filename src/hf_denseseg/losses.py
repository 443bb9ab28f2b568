"""Per-pixel losses that all families share: cross-entropy over valid pixels, with class weights and OHEM."""

import torch
import torch.nn.functional as F


def segmentation_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    ignore_index: int = 255,
    align_corners: bool = False,
    normalization: str = "valid",
    class_weights: torch.Tensor | None = None,
    ohem_threshold: float | None = None,
    ohem_min_kept: int = 100_000,
) -> torch.Tensor:
    """Upsample the logits to the labels and take the cross-entropy in float32.

    Args:
        logits: `(B, num_labels, h, w)`, any resolution and floating dtype.
        labels: `(B, H, W)`, any integer dtype; `ignore_index` and -100 mark void pixels.
        ignore_index: train id of void.
        align_corners: how the logits are resized, see `torch.nn.functional.interpolate`.
        normalization: `"valid"` divides by the number (with class weights: the summed weight) of kept pixels,
            `"all"` by the number of all pixels, void included (mmsegmentation's `avg_non_ignore=False`).
        class_weights: `(num_labels,)`, or None for equal weights.
        ohem_threshold: online hard example mining keeps the pixels whose probability of the true class is below this
            number, and never fewer than `ohem_min_kept` per image; None keeps every valid pixel.
        ohem_min_kept: smallest number of pixels kept per image (mmsegmentation's `min_kept`).

    Returns:
        Scalar float32. A batch without any valid pixel gives 0 with zero (finite) gradients.

    Raises:
        ValueError: `normalization` is neither `"valid"` nor `"all"`.
    """
    if normalization not in ("valid", "all"):
        raise ValueError(f"Loss normalization {normalization!r} is unknown. Use 'valid' or 'all'.")
    labels = labels.long()
    labels = torch.where(labels == -100, ignore_index, labels)
    logits = logits.float()
    if logits.shape[-2:] != labels.shape[-2:]:
        logits = F.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=align_corners)
    weights = None if class_weights is None else class_weights.to(logits)
    loss = F.cross_entropy(logits, labels, weight=weights, ignore_index=ignore_index, reduction="none")
    valid = labels != ignore_index
    if ohem_threshold is not None:
        valid = valid & _hard_pixels(logits.detach(), labels, valid, ohem_threshold, ohem_min_kept)
    kept = torch.where(valid, loss, 0.0).sum()
    if normalization == "all":
        return kept / labels.numel()
    pixel_weight = torch.ones_like(loss) if weights is None else weights[torch.where(valid, labels, 0)]
    # A weight below one must still divide: only the empty sum is replaced by 1, which gives 0 and not NaN.
    total = torch.where(valid, pixel_weight, 0.0).sum()
    return kept / torch.where(total > 0, total, 1.0)


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
