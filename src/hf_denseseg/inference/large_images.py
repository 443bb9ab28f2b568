"""Label a picture that is too large for its scores to be held at once: from the top down, a few rows at a time.

What is held grows with the width of the picture and the height of a window, not with the height of the picture: for
each scale and flip the scores of one row of windows. The picture itself stays in memory, once for each scale.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision.transforms.v2.functional import pil_to_tensor, resize, to_pil_image

from hf_denseseg.errors import InputError
from hf_denseseg.inference.preprocessing import Preprocessing, pad_with_mean, view_size
from hf_denseseg.inference.segmentation import resize_confidence
from hf_denseseg.inference.settings import InferenceSettings
from hf_denseseg.inference.sliding_window import Size, align_corners_of, padded_size, slide_rows, upsample

BAND_ROWS = 64  # rows that are resized, averaged and labelled at once
LARGEST_VIEW = 2**26  # pixels that a model is shown at once, without windows


class Band(NamedTuple):
    """Labels of neighbouring rows, on the device where the scores are summed."""

    top: int
    ids: torch.Tensor  # (rows, width) int64
    confidence: torch.Tensor  # (rows, width) float32, the probability of the class


@torch.no_grad()
def segment_in_bands(
    model: nn.Module, image: Image.Image, settings: InferenceSettings, preprocessing: Preprocessing
) -> Iterator[Band]:
    """Label every pixel of one picture as `segment_with_confidence` does, band after band.

    With one scale, at the picture's own size, the ids are the same bit for bit. Where scores are resized or averaged
    they are the same up to rounding.

    Args:
        model: segmentation model in eval mode.
        image: RGB picture.
        settings: how to look at it; windows (`mode="slide"`) are what bounds the memory.
        preprocessing: of the checkpoint.

    Raises:
        InputError: without windows the model would have to look at more than `LARGEST_VIEW` pixels at once.
    """
    own = (image.height, image.width)
    canvas = padded_size(own, settings) if settings.mode == "whole" else own
    if canvas != own:
        image = to_pil_image(pad_with_mean(pil_to_tensor(image), canvas, preprocessing.mean))
    views = []
    for scale in settings.scales:
        size = view_size(canvas, scale, settings)
        _check_view(size, settings)
        # The same antialiased bytes as `segment` makes.
        picture = image if size == canvas else to_pil_image(resize(pil_to_tensor(image), list(size), antialias=True))
        for mirrored in (False, True) if settings.flip else (False,):
            view = _View(model, picture, preprocessing, mirrored)
            views.append(_Rows(_resized_rows(view.logits(settings), canvas, align_corners_of(model))))
    top = 0
    while top < own[0]:
        count = min(BAND_ROWS, own[0] - top, *(view.available() for view in views))
        parts = [view.take(count)[..., : own[1]] for view in views]
        band = Band(top, *_label(parts, settings))
        del parts  # a part keeps all rows of its block from being freed
        yield band
        top += count


def _check_view(size: Size, settings: InferenceSettings) -> None:
    if settings.mode == "whole" and size[0] * size[1] > LARGEST_VIEW:
        raise InputError(
            f"the model would look at {size[0]}x{size[1]} pixels at once. Give windows (--crop_size 512 512), or "
            "--base_size with a box to shrink the picture into"
        )


def _label(parts: list[torch.Tensor], settings: InferenceSettings) -> tuple[torch.Tensor, torch.Tensor]:
    """Class and its probability from the logits `(1, num_labels, n, width)` of all views."""
    if len(parts) == 1:
        ids, confidence = resize_confidence(parts[0], (parts[0].shape[2], parts[0].shape[3]))
        return ids[0], confidence[0]
    total = None
    for logits in parts:
        part = logits.softmax(1) if settings.average == "probabilities" else logits
        total = part if total is None else total + part
    assert total is not None  # the settings hold at least one scale
    total = (total / len(parts))[0]
    confidence, ids = (total if settings.average == "probabilities" else total.softmax(0)).max(0)
    return ids, confidence


class _View:
    """A picture at one scale, perhaps mirrored, as the model is shown it."""

    def __init__(self, model: nn.Module, picture: Image.Image, preprocessing: Preprocessing, mirrored: bool) -> None:
        self.model, self.picture, self.preprocessing, self.mirrored = model, picture, preprocessing, mirrored
        self.weight = next(model.parameters(), torch.empty(0))

    def logits(self, settings: InferenceSettings) -> Iterator[tuple[torch.Tensor, int]]:
        """Rows of logits `(1, num_labels, n, w)` from the top down, and the number of rows that there are in all."""
        height, width = size = self.picture.height, self.picture.width
        canvas = padded_size(size, settings)
        if settings.mode == "slide" and (canvas != size or _is_larger(size, settings.window()[0])):
            for rows in slide_rows(self.model, self._window, canvas, settings):
                rows = rows[:, :, :height, :width]
                yield (rows.flip(-1) if self.mirrored else rows), height
                del rows
        else:
            rows = self.model(pixel_values=self._window(0, 0, size)).logits
            yield (rows.flip(-1) if self.mirrored else rows), rows.shape[2]

    def _window(self, y: int, x: int, size: Size) -> torch.Tensor:
        """Normalised pixels `(1, 3, h, w)`; beyond the picture's edge they are 0."""
        left, right = x, min(x + size[1], self.picture.width)
        if self.mirrored:
            left, right = self.picture.width - right, self.picture.width - left
        box = (left, y, right, min(y + size[0], self.picture.height))
        pixels = pil_to_tensor(self.picture.crop(box)).to(self.weight.device)
        values = self.preprocessing.normalize(pixels, self.weight.dtype)
        values = values.flip(-1) if self.mirrored else values
        return F.pad(values, (0, size[1] - values.shape[2], 0, size[0] - values.shape[1]))[None]


def _is_larger(size: Size, window: Size) -> bool:
    return size[0] > window[0] or size[1] > window[1]


def _resized_rows(
    blocks: Iterator[tuple[torch.Tensor, int]], size: Size, align_corners: bool
) -> Iterator[torch.Tensor]:
    """Resize logits that come in rows to `size`, bilinearly as `upsample` does, as soon as two source rows are there.

    Args:
        blocks: rows `(1, num_labels, n, w)`, and how many there are in all.
        size: `(height, width)` of the result.
        align_corners: see `torch.nn.functional.interpolate`.
    """
    held, first, done = None, 0, 0  # `first` is the source row that `held` begins with
    for block, height in blocks:
        if (height, block.shape[3]) == size:
            yield block.float()
            del block
            continue
        lower, upper, share = _source_rows(height, size[0], align_corners, block.device)
        held = block if held is None else torch.cat([held, block], 2)
        known = first + held.shape[2]
        ready = int((upper < known).sum())
        for start in range(done, ready, BAND_ROWS):
            part = slice(start, min(start + BAND_ROWS, ready))
            above, below, weight = lower[part] - first, upper[part] - first, share[part, None]
            span = held[:, :, int(above[0]) : int(below[-1]) + 1]
            wide = upsample(span, (span.shape[2], size[1]), align_corners)
            yield wide[:, :, above - above[0]] * (1 - weight) + wide[:, :, below - above[0]] * weight
        done = ready
        if done < size[0]:
            keep = min(int(lower[done]), known)  # a result with fewer rows may leave some out
            held, first = held[:, :, keep - first :], keep


def _source_rows(
    height: int, wanted: int, align_corners: bool, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For each wanted row the two source rows it lies between, and the share of the second."""
    rows = torch.arange(wanted, device=device, dtype=torch.float32)
    if align_corners:
        place = rows * ((height - 1) / max(wanted - 1, 1))
    else:
        place = ((rows + 0.5) * (height / wanted) - 0.5).clamp(min=0)
    lower = place.long().clamp(max=height - 1)
    return lower, (lower + 1).clamp(max=height - 1), place - lower


class _Rows:
    """Rows from an iterator over blocks `(1, num_labels, n, width)`, any number at a time."""

    def __init__(self, blocks: Iterator[torch.Tensor]) -> None:
        self.blocks, self.held = blocks, torch.empty(1, 1, 0, 0)

    def available(self) -> int:
        """Number of rows that are there; the next block is made when there are none."""
        if not self.held.shape[2]:
            self.held = torch.empty(1, 1, 0, 0)  # lets go of the old block first
            self.held = next(self.blocks)
        return self.held.shape[2]

    def take(self, count: int) -> torch.Tensor:
        """The next rows, of those that are available."""
        taken, self.held = self.held[:, :, :count], self.held[:, :, count:]
        return taken
