"""Overlapping windows: where they lie, and the mean of their logits, row by row from the top down."""

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from hf_denseseg.inference.settings import InferenceSettings
from hf_denseseg.models.one_logit import two_logits

Size = tuple[int, int]
WindowAt = Callable[[int, int, Size], torch.Tensor]  # pixels `(B, 3, h, w)` of the window at (y, x) of size (h, w)


def window_corners(size: Size, crop_size: Size, stride: Size) -> list[tuple[int, int]]:
    """Top left corners `(y, x)` of windows that cover `size`; the last of a row or column is shifted inside."""
    corners = []
    for length, crop, step in zip(size, crop_size, stride, strict=True):
        # A length below the window's gives one corner, at 0.
        count = max(math.ceil((length - crop) / step), 0) + 1
        corners.append([max(min(k * step, length - crop), 0) for k in range(count)])
    return [(y, x) for y in corners[0] for x in corners[1]]


def slide_rows(
    model: nn.Module, window_at: WindowAt, size: Size, settings: InferenceSettings
) -> Iterator[torch.Tensor]:
    """Average the logits of overlapping windows by visit count, and hand on each row when its last window is added.

    Only the rows that windows are still added to are held: one row of windows, or two where a group of
    `window_batch_size` begins in one and ends in the next.

    Args:
        model: called as `model(pixel_values=...)`, returns `.logits` of any resolution; put it in eval mode first.
        window_at: gives the normalized pixels `(B, 3, h, w)` of the window at `(y, x)` of size `(h, w)`.
        size: `(height, width)` of what the windows cover.
        settings: `crop_size`, `stride`, `window_batch_size` (windows per model call, times B) and
            `accumulation_device` are read.

    Yields:
        `(B, num_labels, n, width)` float32 on the accumulation device; together they are `height` rows.
    """
    crop_size, stride = settings.window()
    crop = (min(crop_size[0], size[0]), min(crop_size[1], size[1]))
    corners = window_corners(size, crop, stride)
    total, visits, top = None, torch.empty(0), 0  # `top` is the first row held
    for start in range(0, len(corners), settings.window_batch_size):
        group = corners[start : start + settings.window_batch_size]
        following = corners[start + len(group) :]
        parts = [window_at(y, x, crop) for y, x in group]
        windows = torch.cat(parts)
        with torch.no_grad():  # as a decorator it would hold on to what was yielded
            logits = upsample(class_logits(model, windows), crop, align_corners_of(model))
        logits = logits.to(settings.accumulation_device or windows.device)
        if total is None:
            total = logits.new_zeros(len(parts[0]), logits.shape[1], 0, size[1])
            visits = logits.new_zeros(0, size[1])
        # Corners are sorted from the top down, so that the last window of a group reaches lowest.
        lacking = max(group[-1][0] + crop[0] - top - len(visits), 0)
        if lacking:
            total, visits = F.pad(total, (0, 0, 0, lacking)), F.pad(visits, (0, 0, 0, lacking))
        for (y, x), part in zip(group, logits.split(len(parts[0])), strict=True):
            total[:, :, y - top : y - top + crop[0], x : x + crop[1]] += part
            visits[y - top : y - top + crop[0], x : x + crop[1]] += 1
        # No later window reaches above the first one that follows.
        done = (following[0][0] if following else size[0]) - top
        if done:
            del logits, part, parts, windows  # the receiver needs the memory
            yield total[:, :, :done].div_(visits[:done])
            total, visits, top = total[:, :, done:].clone(), visits[done:].clone(), top + done


def logit_rows(
    model: nn.Module, window_at: WindowAt, size: Size, settings: InferenceSettings
) -> Iterator[tuple[torch.Tensor, int]]:
    """Run a model on an image of `size`: in windows if `settings` say so and they do not cover it, else once.

    A window that covers the image is the whole image, bit for bit, unless the image is padded to it.

    Args:
        model: see `slide_rows`.
        window_at: see `slide_rows`; beyond the right and lower edge of the image it gives 0.
        size: `(height, width)` of the image.
        settings: test protocol.

    Yields:
        Neighboring rows of logits `(B, num_labels, n, w)` from the top down, and how many rows there are in all. Rows
        of windows have the image's resolution and are on the accumulation device; of a model that is run once all rows
        come together, at its own resolution, on its own device.
    """
    if settings.mode == "slide":
        crop_size, _ = settings.window()
        canvas = padded_size(size, settings)
        if canvas != size or size[0] > crop_size[0] or size[1] > crop_size[1]:
            for rows in slide_rows(model, window_at, canvas, settings):
                yield rows[:, :, : size[0], : size[1]], size[0]
                del rows  # before the next ones are made
            return
    with torch.no_grad():
        logits = class_logits(model, window_at(0, 0, size))
    yield logits, logits.shape[2]


def join_rows(blocks: Iterable[tuple[torch.Tensor, int]]) -> torch.Tensor:
    """All rows of `logit_rows` in one tensor; not a copy if they came together."""
    joined, done = None, 0
    for rows, height in blocks:
        if rows.shape[2] == height:
            return rows
        if joined is None:
            joined = rows.new_empty(*rows.shape[:2], height, rows.shape[3])
        joined[:, :, done : done + rows.shape[2]] = rows
        done += rows.shape[2]
    assert joined is not None  # there is at least one window
    return joined


def slide_logits(model: nn.Module, pixel_values: torch.Tensor, settings: InferenceSettings) -> torch.Tensor:
    """Average the logits of overlapping windows by visit count, see `slide_rows`.

    Args:
        model: called as `model(pixel_values=...)`, returns `.logits` of any resolution; put it in eval mode first.
        pixel_values: `(B, 3, H, W)`, normalized, on the model's device.
        settings: as for `slide_rows`.

    Returns:
        `(B, num_labels, H, W)` float32 on the accumulation device.
    """
    size = size_of(pixel_values)
    return join_rows((rows, size[0]) for rows in slide_rows(model, partial(crop_window, pixel_values), size, settings))


def crop_window(values: torch.Tensor, y: int, x: int, size: Size) -> torch.Tensor:
    """The window `(..., h, w)` at `(y, x)` of a batch; beyond the right and the lower edge it is 0."""
    return pad_right_and_bottom(values[..., y : y + size[0], x : x + size[1]], size)


def pad_right_and_bottom(values: torch.Tensor, size: Size) -> torch.Tensor:
    """Pad `(..., h, w)` with 0 to `size`."""
    height, width = size_of(values)
    return values if (height, width) == size else F.pad(values, (0, size[1] - width, 0, size[0] - height))


def padded_size(size: Size, settings: InferenceSettings) -> Size:
    """With `pad_to_window` no side is below the window's."""
    if not settings.pad_to_window:
        return size
    crop_size, _ = settings.window()
    return max(size[0], crop_size[0]), max(size[1], crop_size[1])


def class_logits(model: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    """Logits of every class `(B, classes, h, w)`: two for a model with one logit, see `two_logits`."""
    return two_logits(model(pixel_values=pixel_values).logits)


def align_corners_of(model: nn.Module) -> bool:
    """How the model's logits are meant to be resized."""
    return bool(getattr(getattr(model, "config", None), "align_corners", False))


def upsample(logits: torch.Tensor, size: Size, align_corners: bool) -> torch.Tensor:
    """Resize logits `(B, num_labels, h, w)` bilinearly to `size`, in float32; as they are if they have it."""
    logits = logits.float()
    if logits.shape[-2:] == size:
        return logits
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=align_corners)


def size_of(image: Any) -> Size:
    """`(height, width)` of an image, a raster or a map."""
    return (image.shape[-2], image.shape[-1]) if isinstance(image, torch.Tensor) else (image.height, image.width)
