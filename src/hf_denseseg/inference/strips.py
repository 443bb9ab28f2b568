"""The engine of inference: class scores of an image from the top down, averaged over its views, strip by strip.

A strip is some rows of the image at its full width. An image whose scores fit into memory is one strip, of all rows.
Of a larger one a strip has a few rows: what is held then grows with the width of the image and the height of a window,
not with the height of the image.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import nn

from hf_denseseg.inference.preprocessing import Preprocessing, Source, View, canvas_size, views
from hf_denseseg.inference.settings import InferenceSettings
from hf_denseseg.inference.sliding_window import Size, align_corners_of, join_rows, logit_rows, size_of, upsample


def score_strips(
    model: nn.Module,
    image: Source,
    settings: InferenceSettings,
    preprocessing: Preprocessing,
    size: Size | None = None,
    strip_rows: int | None = None,
) -> Iterator[tuple[int, torch.Tensor]]:
    """Class scores of an image, strip by strip from the top down.

    Args:
        model: segmentation model in eval mode.
        image: `(C, H, W)`, a PIL image or a raster, see `views`.
        settings: test protocol; windows (`mode="slide"`) are what bounds the memory.
        preprocessing: of the checkpoint.
        size: `(height, width)` of the result; None is the image's own size.
        strip_rows: most rows of a strip; None is all of them.

    Yields:
        First row and scores `(1, num_labels, n, width)` of each strip: the probabilities averaged over the views; of a
        single view its logits.
    """
    (height, width), canvas = result_sizes(size_of(image), size, settings)
    # Of an image in one strip the views are made one after the other; strips need all of them at the same time.
    rows: Iterable[_Rows] = (
        _Rows(_resized_rows(view_logits(model, view, settings), canvas, align_corners_of(model), settings, strip_rows))
        for view in views(model, image, settings, preprocessing)
    )
    if strip_rows is not None:
        rows = list(rows)
    top = 0
    while top < height:
        count = height - top
        if strip_rows is not None:
            count = min(strip_rows, count, *(each.available() for each in rows))
        yield top, _average((each.take(count)[..., :width] for each in rows), settings)
        top += count


def view_logits(model: nn.Module, view: View, settings: InferenceSettings) -> Iterator[tuple[torch.Tensor, int]]:
    """Rows of the logits of a view as `logit_rows` gives them, flipped back."""
    for rows, height in logit_rows(model, view.window, view.size, settings):
        yield (rows.flip(-1) if view.flipped else rows), height
        del rows


def result_sizes(own: Size, size: Size | None, settings: InferenceSettings) -> tuple[Size, Size]:
    """Size of the result, and of the larger map it is cut from when the image as a whole was padded."""
    wanted = size or own
    canvas = canvas_size(own, settings)
    height, width = (round(w * c / o) for w, c, o in zip(wanted, canvas, own, strict=True))
    return wanted, (height, width)


def _average(parts: Iterable[torch.Tensor], settings: InferenceSettings) -> torch.Tensor:
    """Mean over the views of a strip's logits `(1, num_labels, n, width)`, see `score_strips`."""
    total = None
    for part in parts:
        if settings.views == 1:
            return part
        if settings.average == "probabilities":
            part = part.softmax(1)
        total = part if total is None else total.add_(part)
        del part  # before the next one is made
    assert total is not None  # the settings hold at least one scale
    total = total.div_(settings.views)
    return total if settings.average == "probabilities" else total.softmax(1)


def _resized_rows(
    blocks: Iterator[tuple[torch.Tensor, int]],
    size: Size,
    align_corners: bool,
    settings: InferenceSettings,
    strip_rows: int | None,
) -> Iterator[torch.Tensor]:
    """Resize logits that come in rows to `size`, on the accumulation device.

    All rows at once are resized by `upsample`. Strips are resized as soon as the two source rows that each row lies
    between are there; that is the same up to rounding.

    Args:
        blocks: rows `(1, num_labels, n, w)`, and how many there are in all.
        size: `(height, width)` of the result.
        align_corners: see `torch.nn.functional.interpolate`.
        settings: `accumulation_device` is read.
        strip_rows: most rows that are resized at once; None is all.
    """
    if strip_rows is None:
        yield upsample(_moved(join_rows(blocks), settings), size, align_corners)
        return
    held, first, done = None, 0, 0  # `first` is the source row that `held` begins with
    for block, height in blocks:
        block = _moved(block, settings)
        if (height, block.shape[3]) == size:
            yield block.float()
            del block  # before the next one is made
            continue
        lower, upper, fraction = _source_rows(height, size[0], align_corners, block.device)
        held = block if held is None else torch.cat([held, block], 2)
        known = first + held.shape[2]
        ready = int((upper < known).sum())
        for start in range(done, ready, strip_rows):
            part = slice(start, min(start + strip_rows, ready))
            above, below, weight = lower[part] - first, upper[part] - first, fraction[part, None]
            # Bilinear is separable: widths are resized by torch, rows are mixed of two each.
            span = held[:, :, int(above[0]) : int(below[-1]) + 1]
            wide = upsample(span, (span.shape[2], size[1]), align_corners)
            yield wide[:, :, above - above[0]] * (1 - weight) + wide[:, :, below - above[0]] * weight
        done = ready
        if done < size[0]:
            keep = min(int(lower[done]), known)  # a result with fewer rows may leave some out
            held, first = held[:, :, keep - first :], keep


def _moved(logits: torch.Tensor, settings: InferenceSettings) -> torch.Tensor:
    return logits.to(settings.accumulation_device or logits.device)


def _source_rows(
    height: int, wanted: int, align_corners: bool, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For each wanted row the two source rows it lies between, and the weight of the second."""
    # The two rules of `interpolate`: with `align_corners` the middles of the corner pixels coincide, else their edges.
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
        """The next rows, at most as many as are available."""
        self.available()
        taken, self.held = self.held[:, :, :count], self.held[:, :, count:]
        return taken
