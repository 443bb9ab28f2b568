"""From a picture to a label map: whole image or sliding window, several scales, flip, at bounded memory.

The evaluation, `denseseg predict` and the pipeline all call these functions. The protocol is the one of mmsegmentation
and SETR: logits of overlapping windows are averaged by visit count, probabilities are averaged over scales and flips.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from hf_denseseg.inference.preprocessing import Preprocessing, _views
from hf_denseseg.inference.settings import InferenceSettings
from hf_denseseg.inference.sliding_window import Size, align_corners_of, padded_size, size_of, slide_logits, upsample

SMALL_MAP = 2**22  # elements of full-size logits (16 MiB) that are not worth cutting


@torch.no_grad()
def predict_logits(model: nn.Module, pixel_values: torch.Tensor, settings: InferenceSettings) -> torch.Tensor:
    """Logits of a normalised batch: the model's own resolution for the whole image, `(H, W)` for sliding windows.

    A window that covers the image is the whole image, bit for bit, unless the image is padded to it.
    """
    if settings.mode == "slide":
        crop_size, _ = settings.window()
        height, width = size_of(pixel_values)
        canvas = padded_size((height, width), settings)
        if canvas != (height, width):
            padded = F.pad(pixel_values, (0, canvas[1] - width, 0, canvas[0] - height))
            return slide_logits(model, padded, settings)[..., :height, :width]
        if pixel_values.shape[-2] > crop_size[0] or pixel_values.shape[-1] > crop_size[1]:
            return slide_logits(model, pixel_values, settings)
    return model(pixel_values=pixel_values).logits


def segment(
    model: nn.Module,
    image: torch.Tensor,
    settings: InferenceSettings,
    preprocessing: Preprocessing,
    size: Size | None = None,
) -> torch.Tensor:
    """Label every pixel of one picture.

    Args:
        model: segmentation model in eval mode.
        image: `(3, H, W)` uint8, any device.
        settings: how to look at the picture.
        preprocessing: of the checkpoint.
        size: `(height, width)` of the result; None is the picture's own size.

    Returns:
        `(height, width)` int64 class ids.
    """
    if settings.views > 1:
        return class_probabilities(model, image, settings, preprocessing, size).argmax(0)
    logits = _single_view(model, image, settings, preprocessing)
    (height, width), canvas = _result_sizes(image, size, settings)
    return resize_argmax(logits, canvas, align_corners_of(model), settings.chunk_classes)[0, :height, :width]


def segment_with_confidence(
    model: nn.Module,
    image: torch.Tensor,
    settings: InferenceSettings,
    preprocessing: Preprocessing,
    size: Size | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Class ids as `segment` gives them, and the probability of each pixel's class, float32 of the same size."""
    if settings.views > 1:
        confidence, ids = class_probabilities(model, image, settings, preprocessing, size).max(0)
        return ids, confidence
    logits = _single_view(model, image, settings, preprocessing)
    (height, width), canvas = _result_sizes(image, size, settings)
    ids, confidence = resize_confidence(logits, canvas, align_corners_of(model), settings.chunk_classes)
    return ids[0, :height, :width], confidence[0, :height, :width]


@torch.no_grad()
def class_probabilities(
    model: nn.Module,
    image: torch.Tensor,
    settings: InferenceSettings,
    preprocessing: Preprocessing,
    size: Size | None = None,
) -> torch.Tensor:
    """Probabilities `(num_labels, height, width)` of one picture, averaged over all scales and flips.

    Each view's logits are resized to `size` first. With `average="logits"` these are averaged and the softmax comes
    last.
    """
    (height, width), canvas = _result_sizes(image, size, settings)
    total = None
    for pixel_values, flipped in _views(model, image, settings, preprocessing):
        logits = predict_logits(model, pixel_values, settings)
        if flipped:
            logits = logits.flip(-1)
        if settings.accumulation_device:
            logits = logits.to(settings.accumulation_device)
        logits = upsample(logits, canvas, align_corners_of(model))[..., :height, :width]
        part = logits.softmax(1) if settings.average == "probabilities" else logits
        total = part if total is None else total.add_(part)
    assert total is not None  # the settings hold at least one scale
    total = total.div_(settings.views)[0]
    return total if settings.average == "probabilities" else total.softmax(0)


def resize_argmax(
    logits: torch.Tensor, size: Size, align_corners: bool = False, chunk_classes: int = 8
) -> torch.Tensor:
    """Resize logits bilinearly and take the argmax, a few classes at a time.

    Equal to `F.interpolate(logits, size, mode="bilinear").argmax(1)` for finite logits, ties included (first class
    wins), but holds `chunk_classes` instead of all classes at full resolution.

    Args:
        logits: `(B, num_labels, h, w)`, any floating dtype; compared in float32.
        size: `(height, width)` of the result.
        align_corners: see `torch.nn.functional.interpolate`.
        chunk_classes: classes held at once; at least 4 are.

    Returns:
        `(B, height, width)` int64.
    """
    ids, _, _ = _winners(logits, size, align_corners, chunk_classes)
    return ids


def resize_confidence(
    logits: torch.Tensor, size: Size, align_corners: bool = False, chunk_classes: int = 8
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `resize_argmax`, with the softmax probability `(B, height, width)` of the class that won."""
    ids, best, log_sum = _winners(logits, size, align_corners, chunk_classes, with_sum=True)
    return ids, (best - log_sum).exp_()


def _result_sizes(image: torch.Tensor, size: Size | None, settings: InferenceSettings) -> tuple[Size, Size]:
    """Size of the result, and of the larger map it is cut from when the picture as a whole was padded."""
    own = size_of(image)
    wanted = size or own
    canvas = padded_size(own, settings) if settings.mode == "whole" else own
    height, width = (round(w * c / o) for w, c, o in zip(wanted, canvas, own, strict=True))
    return wanted, (height, width)


@torch.no_grad()
def _single_view(
    model: nn.Module, image: torch.Tensor, settings: InferenceSettings, preprocessing: Preprocessing
) -> torch.Tensor:
    pixel_values, _ = next(_views(model, image, settings, preprocessing))
    return predict_logits(model, pixel_values, settings)


@torch.no_grad()
def _winners(
    logits: torch.Tensor, size: Size, align_corners: bool, chunk_classes: int, with_sum: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Best class, its logit and (if wanted) the log of the summed exponentials, each `(B, height, width)`."""
    best = torch.full((len(logits), *size), -torch.inf, device=logits.device)
    log_sum = best.clone() if with_sum else best
    ids = torch.zeros(best.shape, dtype=torch.int16, device=logits.device)
    for start, values in _resized_chunks(logits, size, align_corners, chunk_classes):
        if with_sum:
            torch.logaddexp(log_sum, values.logsumexp(1), out=log_sum)
        for number, value in enumerate(values.unbind(1), start):
            ids.masked_fill_(value > best, number)
            torch.maximum(best, value, out=best)
        del values, value  # before the next chunk is made
    return ids.long(), best, log_sum


def _resized_chunks(
    logits: torch.Tensor, size: Size, align_corners: bool, chunk_classes: int
) -> Iterator[tuple[int, torch.Tensor]]:
    """First class and full-size logits of each chunk.

    On the CPU the last bit of an interpolated value depends on the memory format and, for small maps, on the number
    of channels. So the logits are made contiguous, small maps are done at once, and all chunks have the same size:
    the last one begins earlier, and what it repeats is cut off.
    """
    logits = logits.contiguous()
    classes, (height, width) = logits.shape[1], size
    # Three channels are interpolated by another routine.
    chunk = min(max(chunk_classes, 4), classes)
    if len(logits) * classes * height * width <= SMALL_MAP or logits.shape[-2:].numel() == 1:
        chunk = classes
    for start in range(0, classes, chunk):
        first = min(start, classes - chunk)
        yield start, upsample(logits[:, first : first + chunk], size, align_corners)[:, start - first :]
