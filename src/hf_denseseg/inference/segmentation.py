"""From an image to a label map: whole image or sliding window, several scales, flip, at bounded memory.

The evaluation, `denseseg predict` and the pipeline all call these functions. The protocol is the one of mmsegmentation
and SETR: logits of overlapping windows are averaged by visit count, probabilities are averaged over scales and flips.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import nn

from hf_denseseg.inference.preprocessing import Preprocessing, views
from hf_denseseg.inference.settings import DEFAULT_THRESHOLD, InferenceSettings
from hf_denseseg.inference.sliding_window import (
    Size,
    align_corners_of,
    crop_window,
    join_rows,
    logit_rows,
    size_of,
    upsample,
)
from hf_denseseg.inference.strips import result_sizes, score_strips, view_logits

LARGEST_MAP = 2**26  # scores of all classes (256 MiB) that are compared with a label map at once
COMPARED_ROWS = 64  # of a larger map
SMALL_MAP = 2**22  # elements of full-size logits (16 MiB) that are not worth cutting


def predict_logits(model: nn.Module, pixel_values: torch.Tensor, settings: InferenceSettings) -> torch.Tensor:
    """Logits of a normalized batch: the model's own resolution for the whole image, `(H, W)` for sliding windows.

    A window that covers the image is the whole image, bit for bit, unless the image is padded to it.
    """
    return join_rows(logit_rows(model, partial(crop_window, pixel_values), size_of(pixel_values), settings))


def segment(
    model: nn.Module,
    image: torch.Tensor,
    settings: InferenceSettings,
    preprocessing: Preprocessing,
    size: Size | None = None,
) -> torch.Tensor:
    """Predict the class of every pixel of one image.

    Args:
        model: segmentation model in eval mode.
        image: `(3, H, W)` uint8, any device.
        settings: test protocol.
        preprocessing: of the checkpoint.
        size: `(height, width)` of the result; None is the image's own size.

    Returns:
        `(height, width)` int64 class ids.
    """
    if settings.views > 1 or settings.threshold != DEFAULT_THRESHOLD:
        probabilities = _averaged_probabilities(model, image, settings, preprocessing, size)
        return choose_classes(probabilities, settings.threshold)[0]
    logits = _single_view(model, image, settings, preprocessing)
    (height, width), canvas = result_sizes(size_of(image), size, settings)
    # An image that was padded as a whole is resized with its padding, which is cut off last.
    return resize_argmax(logits, canvas, align_corners_of(model), settings.chunk_classes)[0, :height, :width]


def segment_with_confidence(
    model: nn.Module,
    image: torch.Tensor,
    settings: InferenceSettings,
    preprocessing: Preprocessing,
    size: Size | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Class ids as `segment` gives them, and the probability of each pixel's class, float32 of the same size."""
    if settings.views > 1 or settings.threshold != DEFAULT_THRESHOLD:
        probabilities = _averaged_probabilities(model, image, settings, preprocessing, size)
        return choose_classes(probabilities, settings.threshold, settings.temperature)
    logits = _single_view(model, image, settings, preprocessing)
    (height, width), canvas = result_sizes(size_of(image), size, settings)
    ids, confidence = resize_confidence(
        logits, canvas, align_corners_of(model), settings.chunk_classes, settings.temperature
    )
    return ids[0, :height, :width], confidence[0, :height, :width]


def class_probabilities(
    model: nn.Module,
    image: torch.Tensor,
    settings: InferenceSettings,
    preprocessing: Preprocessing,
    size: Size | None = None,
) -> torch.Tensor:
    """Probabilities `(num_labels, height, width)` of one image, averaged over all scales and flips.

    Each view's logits are resized to `size` first. With `average="logits"` these are averaged and the softmax comes
    last. The temperature is applied to the average.
    """
    return tempered(_averaged_probabilities(model, image, settings, preprocessing, size), settings.temperature)


def _averaged_probabilities(
    model: nn.Module, image: torch.Tensor, settings: InferenceSettings, preprocessing: Preprocessing, size: Size | None
) -> torch.Tensor:
    """Probabilities `(num_labels, height, width)` before the temperature, by which classes are chosen."""
    _, scores = next(score_strips(model, image, settings, preprocessing, size))  # all rows are one strip
    return (scores.softmax(1) if settings.views == 1 else scores)[0]


def log_probability_strips(
    model: nn.Module,
    image: torch.Tensor,
    settings: InferenceSettings,
    preprocessing: Preprocessing,
    size: Size,
    num_labels: int,
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Class ids and log-probabilities of one image, from the top down.

    Args:
        model: segmentation model in eval mode.
        image: `(C, H, W)` uint8 or uint16, any device.
        settings: test protocol.
        preprocessing: of the checkpoint.
        size: `(height, width)` of the result.
        num_labels: number of classes; a map of at most `LARGEST_MAP` scores is one strip.

    Yields:
        First row, class ids `(n, width)` int64 as `segment` gives them, and log-probabilities `(num_labels, n, width)`
        float32 of each strip, before the temperature.
    """
    strip_rows = None if num_labels * size[0] * size[1] <= LARGEST_MAP else COMPARED_ROWS
    for top, scores in score_strips(model, image, settings, preprocessing, size, strip_rows):
        scores = scores[0]  # (num_labels, n, width); logits of a single view, else probabilities
        if settings.threshold == DEFAULT_THRESHOLD:
            ids = scores.argmax(0)
        else:
            ids, _ = choose_classes(scores.softmax(0) if settings.views == 1 else scores, settings.threshold)
        yield top, ids, scores.log_softmax(0) if settings.views == 1 else scores.log()
        del scores, ids  # before the next ones are made


def choose_classes(
    probabilities: torch.Tensor, threshold: float = DEFAULT_THRESHOLD, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Class of each pixel and its probability.

    Args:
        probabilities: `(C, ...)` of all classes.
        threshold: of two classes the second is chosen above it; at the default the likeliest class is.
        temperature: of the returned probabilities.

    Returns:
        Ids, int64, and probabilities, both of the shape that follows C.
    """
    ids = probabilities.argmax(0) if threshold == DEFAULT_THRESHOLD else (probabilities[1] > threshold).long()
    return ids, tempered(probabilities, temperature).gather(0, ids[None])[0]


def tempered(probabilities: torch.Tensor, temperature: float) -> torch.Tensor:
    """Probabilities `(C, ...)` whose logits are divided by a temperature."""
    return probabilities if temperature == 1 else (probabilities.log() / temperature).softmax(0)


def _single_view(
    model: nn.Module, image: torch.Tensor, settings: InferenceSettings, preprocessing: Preprocessing
) -> torch.Tensor:
    """Logits of the only view, not resized: for the argmax that needs only a few classes at full resolution."""
    return join_rows(view_logits(model, next(views(model, image, settings, preprocessing)), settings))


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
    logits: torch.Tensor, size: Size, align_corners: bool = False, chunk_classes: int = 8, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `resize_argmax`, with the softmax probability `(B, height, width)` of the class that won."""
    ids, best, log_sum = _winners(logits, size, align_corners, chunk_classes, temperature)
    return ids, (best / temperature - log_sum).exp_()


@torch.no_grad()
def _winners(
    logits: torch.Tensor, size: Size, align_corners: bool, chunk_classes: int, temperature: float | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Best class, its logit and (with a temperature) the log of the summed exponentials, `(B, height, width)` each."""
    best = torch.full((len(logits), *size), -torch.inf, device=logits.device)
    log_sum = best if temperature is None else best.clone()
    kind = torch.int16 if logits.shape[1] < 2**15 else torch.int32
    ids = torch.zeros(best.shape, dtype=kind, device=logits.device)
    for start, values in _resized_chunks(logits, size, align_corners, chunk_classes):
        if temperature is not None:
            divided = values if temperature == 1 else values / temperature
            torch.logaddexp(log_sum, divided.logsumexp(1), out=log_sum)
            del divided
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
