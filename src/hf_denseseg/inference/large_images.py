"""Segment an image that is too large for its scores to be held at once: from the top down, a strip of rows at a time.

What is held grows with the width of the image and the height of a window, not with the height of the image: for each
scale and flip the scores of one row of windows. The image itself stays in memory, once for each scale; of a raster
only windows are read if it is not resized.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn

from hf_denseseg.data.reading.georeferenced import Raster
from hf_denseseg.errors import InputError
from hf_denseseg.inference.preprocessing import Preprocessing, Source, canvas_size, view_size
from hf_denseseg.inference.segmentation import choose_classes, resize_confidence
from hf_denseseg.inference.settings import DEFAULT_THRESHOLD, InferenceSettings
from hf_denseseg.inference.sliding_window import size_of, window_corners
from hf_denseseg.inference.strips import score_strips

BLOCK_COLUMNS = 4096  # about as many columns of a raster are segmented together
STRIP_ROWS = 64  # most rows that are resized, averaged and segmented at once
LARGEST_VIEW = 2**26  # pixels that a model is run on at once, without windows


class Strip(NamedTuple):
    """Predictions of neighboring rows, on the device where the scores are summed."""

    top: int
    ids: torch.Tensor  # (rows, width) int64
    confidence: torch.Tensor  # (rows, width) float32, the probability of the class
    left: int = 0  # its first column


def segment_in_columns(
    model: nn.Module, raster: Raster, settings: InferenceSettings, preprocessing: Preprocessing
) -> Iterator[Strip]:
    """Predict a raster as `segment_in_strips` does, some of its columns after the other.

    What is held does not grow with the width then. The windows are the same, and those that two blocks of columns
    share are computed twice, so that the ids are the same. With several views, or resized, a strip is as wide as the
    raster.

    Args:
        model: segmentation model in eval mode.
        raster: of any size.
        settings: test protocol.
        preprocessing: of the checkpoint.
    """
    size = size_of(raster)
    (_, crop), (_, stride) = settings.window()
    plain = settings.mode == "slide" and settings.views == 1 and view_size(size, settings.scales[0], settings) == size
    if not plain or canvas_size(size, settings) != size or size[1] <= max(BLOCK_COLUMNS, crop):
        yield from segment_in_strips(model, raster, settings, preprocessing)
        return
    # A block has other sides than the raster, which must not resize it.
    settings = replace(settings, scales=(1.0,), base_size=None, raise_short_side=False)
    starts = sorted({x for _, x in window_corners((1, size[1]), (1, crop), (1, stride))})
    block = max(BLOCK_COLUMNS // stride, 1) * stride
    for left in range(0, size[1], block):
        right = min(left + block, size[1])
        covering = [x for x in starts if x < right and x + crop > left]
        first, last = covering[0], min(covering[-1] + crop, size[1])
        for strip in segment_in_strips(model, raster.columns(first, last), settings, preprocessing):
            inside = slice(left - first, right - first)
            yield Strip(strip.top, strip.ids[:, inside], strip.confidence[:, inside], left)


def segment_in_strips(
    model: nn.Module, image: Source, settings: InferenceSettings, preprocessing: Preprocessing
) -> Iterator[Strip]:
    """Predict the class of every pixel of one image as `segment_with_confidence` does, strip after strip.

    With one scale, at the size of the image, the ids are the same bit for bit, since windows and batches are the
    same. Where scores are resized or averaged they are the same up to rounding.

    Args:
        model: segmentation model in eval mode.
        image: PIL image, raster, or `(C, H, W)` uint8 or uint16.
        settings: test protocol; windows (`mode="slide"`) are what bounds the memory.
        preprocessing: of the checkpoint.

    Raises:
        InputError: without windows the model would have to be run on more than `LARGEST_VIEW` pixels at once.
    """
    canvas = canvas_size(size_of(image), settings)
    for scale in settings.scales:
        height, width = view_size(canvas, scale, settings)
        if settings.mode == "whole" and height * width > LARGEST_VIEW:
            raise InputError(
                f"the model would be run on {height}x{width} pixels at once. Give windows (--test_crop_size 512 512), "
                "or --test_base_size with a box to shrink the image into."
            )
    for top, scores in score_strips(model, image, settings, preprocessing, strip_rows=STRIP_ROWS):
        if settings.views == 1 and settings.threshold == DEFAULT_THRESHOLD:  # logits, of the right size already
            chunk, temperature = settings.chunk_classes, settings.temperature
            both = resize_confidence(scores, size_of(scores), chunk_classes=chunk, temperature=temperature)
            ids, confidence = (each[0] for each in both)
        else:
            probabilities = scores.softmax(1) if settings.views == 1 else scores
            ids, confidence = choose_classes(probabilities[0], settings.threshold, settings.temperature)
            del probabilities
        del scores  # before the next ones are made
        yield Strip(top, ids, confidence)
