"""Checks of the images and labels that models are given: each error says what was given and what is needed.

Compiled and exported programs leave them out. On a GPU the ids are checked without waiting for the device, which
then stops with the same sentence.
"""

import torch
from transformers import PreTrainedConfig

from hf_denseseg.data.ignore_index import IGNORE_INDEX, ignore_index_of
from hf_denseseg.errors import InputError

IGNORED = -100
"""Marks ignored pixels in every model, beside `ignored_id`."""


def ignored_id(config: PreTrainedConfig) -> int:
    """Train id that the losses of a model leave out: `semantic_loss_ignore_index`.

    255, its default, means 65535 with more than 254 classes, of which 255 may be one.
    """
    chosen = int(config.semantic_loss_ignore_index)
    return ignore_index_of(int(config.num_labels or 0)) if chosen == IGNORE_INDEX else chosen


def check_images(pixel_values: torch.Tensor, smallest_side: int, reason: str = "") -> None:
    """Refuse a batch without images, or with images that are too small.

    Args:
        pixel_values: `(B, C, H, W)`.
        smallest_side: in pixels.
        reason: why, as in "a token covers 16 pixels, so ".

    Raises:
        InputError: another number of dimensions, no image, or a side below `smallest_side`.
    """
    if torch.compiler.is_compiling():
        return
    if pixel_values.ndim != 4 or len(pixel_values) == 0:
        raise InputError(
            f"`pixel_values` has the shape {tuple(pixel_values.shape)}; a batch of at least one image "
            "(B, channels, H, W) is needed."
        )
    height, width = pixel_values.shape[-2:]
    if min(height, width) < smallest_side:
        raise InputError(
            f"Images of {height}x{width} pixels are too small: {reason}both sides need at least {smallest_side}. "
            "Enlarge or pad the image."
        )


def segmentation_labels(
    labels: torch.Tensor | None, pixel_values: torch.Tensor, config: PreTrainedConfig
) -> torch.Tensor | None:
    """Check label maps and bring them to one form.

    Args:
        labels: `(B, H, W)` train ids of any integer dtype, or None; -100 is ignored too.
        pixel_values: `(B, C, H, W)`; label maps may have another height and width.
        config: of the model, for `num_labels` and `ignored_id`.

    Returns:
        `(B, H, W)` int64 with `ignored_id` at every ignored pixel; None without labels.

    Raises:
        InputError: another shape, no integers, an id that is no class, or an ignored id that is one.
    """
    if labels is None:
        return None
    # One logit tells two classes apart.
    count, ignored = max(int(config.num_labels or 0), 2), ignored_id(config)
    if not torch.compiler.is_compiling() and 0 <= ignored < count:
        raise InputError(
            f"`semantic_loss_ignore_index` {ignored} is one of the {count} classes, whose pixels would be ignored. "
            "Set it to an id that is no class, such as -100."
        )
    return label_maps(labels, (len(pixel_values), "H", "W"), count, ignored)


def label_maps(
    labels: torch.Tensor, shape: tuple[int | str, ...], count: int, ignored: int, name: str = "labels"
) -> torch.Tensor:
    """As `segmentation_labels`, for maps of any `count` of ids; `shape` has text where any number will do."""
    if not torch.compiler.is_compiling():
        _check_form(labels, shape, name)
    labels = labels.long()  # uint8 cannot hold -100
    labels = torch.where(labels == IGNORED, ignored, labels)
    if not torch.compiler.is_compiling():
        legal = ((labels >= 0) & (labels < count)) | (labels == ignored)
        _check_ids(labels, legal, f"0 to {count - 1}, and {ignored} or {IGNORED} for ignored pixels", name)
    return labels


def classification_labels(labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Check the labels of images.

    Args:
        labels: `(B,)` class ids of any integer dtype, or floating `(B, num_labels)`.
        logits: `(B, num_labels)`.

    Returns:
        Ids as int64, others as float32.

    Raises:
        InputError: another shape, or an id that is no class.
    """
    if labels.is_floating_point():
        if not torch.compiler.is_compiling() and labels.shape != logits.shape:
            raise InputError(
                f"Labels of shape {tuple(labels.shape)} hold one number per class; {tuple(logits.shape)} is needed."
            )
        return labels.float()
    if not torch.compiler.is_compiling():
        _check_form(labels, (len(logits),))
        count = logits.shape[1]
        _check_ids(labels, (labels >= 0) & (labels < count), f"0 to {count - 1}")
    return labels.long()


def _check_form(labels: torch.Tensor, needed: tuple[int | str, ...], name: str = "labels") -> None:
    """Refuse labels of another shape than `needed`, where text stands for any number, and floating ones."""
    fits = labels.ndim == len(needed) and all(
        isinstance(side, str) or side == found for side, found in zip(needed, labels.shape, strict=True)
    )
    if not fits or labels.is_floating_point() or labels.is_complex():
        listed = ", ".join(map(str, needed))
        raise InputError(
            f"`{name}` has the shape {tuple(labels.shape)} and type {labels.dtype}; "
            f"({listed}{',' if len(needed) == 1 else ''}) of an integer type is needed, without a channel axis."
        )


def _check_ids(labels: torch.Tensor, legal: torch.Tensor, needed: str, name: str = "labels") -> None:
    """Refuse ids that are not `legal`; a GPU does so when it gets there, with the sentence on standard error."""
    fix = "Map raw ids to these" + (", or set `num_labels`." if name == "labels" else ".")
    sentence = f"The {name} hold ids that are no class: legal are {needed}. {fix}"
    if labels.device.type == "cuda":
        torch._assert_async(legal.all(), sentence)
    elif not legal.all():
        found = labels[~legal].unique().tolist()
        listed = ", ".join(map(str, found[:8])) + (", ..." if len(found) > 8 else "")
        raise InputError(sentence.replace("that are no class", f"{listed} that are no class"))


__all__ = ["check_images", "classification_labels", "ignored_id", "label_maps", "segmentation_labels"]
