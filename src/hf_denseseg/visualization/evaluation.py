"""Figures of an evaluation: prediction beside ground truth, and which classes were confused."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from hf_denseseg.data.ignore_index import IGNORE_INDEX, ignore_index_of
from hf_denseseg.data.reading.pixels import as_shown
from hf_denseseg.visualization.class_features import class_matrix
from hf_denseseg.visualization.label_maps import colorize
from hf_denseseg.visualization.layout import IGNORED_COLOR, PAPER, PICKED, Palette, fit_width, heat_scale, labeled_rows

CELL_WIDTH = 300  # pixels of each image in a row


def error_map(
    image: torch.Tensor, label: torch.Tensor, prediction: torch.Tensor, ignore_index: int = IGNORE_INDEX
) -> Image.Image:
    """Wrong pixels in red over the darkened image in gray; ignored pixels are black.

    Args:
        image: `(C, H, W)` uint8 or uint16.
        label: `(H, W)` class ids and `ignore_index`.
        prediction: `(H, W)` class ids.
        ignore_index: id of ignored pixels.
    """
    gray = (np.asarray(as_shown(image)).mean(2) / 2).astype(np.uint8)
    painted = np.stack([gray] * 3, axis=-1)
    true = label.cpu().numpy()
    painted[prediction.cpu().numpy() != true] = PICKED
    painted[true == ignore_index] = IGNORED_COLOR
    return Image.fromarray(painted)


def prediction_row(
    image: torch.Tensor, label: torch.Tensor, prediction: torch.Tensor, palette: Palette
) -> Image.Image:
    """Image, ground truth, prediction and mistakes side by side; arguments as for `error_map`."""
    parts = {
        "image": as_shown(image),
        "ground truth": colorize(label, palette),
        "prediction": colorize(prediction, palette),
        "mistakes": error_map(image, label, prediction, ignore_index_of(len(palette))),
    }
    row = []
    for title, part in parts.items():
        # Label colors by nearest pixel, so that no color appears that means another class.
        kind = Image.Resampling.NEAREST if title in ("ground truth", "prediction") else Image.Resampling.BOX
        row.append((title, fit_width(part, CELL_WIDTH, kind)))
    return labeled_rows([row])


def outlined_row(
    image: torch.Tensor, label: torch.Tensor, prediction: np.ndarray, mask: np.ndarray, palette: Palette
) -> Image.Image:
    """The surroundings of a region, which is outlined: image, ground truth and prediction side by side.

    Args:
        image: `(C, H, W)` uint8 or uint16.
        label: `(H, W)` class ids, others ignored.
        prediction: `(H, W)` class ids.
        mask: `(H, W)` bool, the region.
        palette: one color per class.
    """
    window = tuple(_around(np.flatnonzero(mask.any(axis)), mask.shape[1 - axis]) for axis in (1, 0))
    box = (window[1].start, window[0].start, window[1].stop, window[0].stop)
    inside = Image.fromarray(mask[window])
    scale = CELL_WIDTH / inside.width
    size = (CELL_WIDTH, max(round(scale * inside.height), 1))
    region = np.pad(np.asarray(inside.resize(size, Image.Resampling.NEAREST)), 2)
    near = [np.roll(region, (y, x), (0, 1)) for y in range(-2, 3) for x in range(-2, 3)]
    grown, shrunk = np.any(near, 0), np.all([np.roll(region, step, axis) for step in (1, -1) for axis in (0, 1)], 0)
    halo, line = ((outer & ~inner)[2:-2, 2:-2] for outer, inner in ((grown, region), (region, shrunk)))
    parts = {
        "image": (as_shown(image), Image.Resampling.BILINEAR),
        "ground truth": (colorize(label, palette), Image.Resampling.NEAREST),
        "prediction": (colorize(prediction, palette), Image.Resampling.NEAREST),
    }
    row = []
    for title, (part, kind) in parts.items():
        pixels = np.array(part.crop(box).resize(size, kind))
        pixels[halo], pixels[line] = PAPER, PICKED
        row.append((title, Image.fromarray(pixels)))
    return labeled_rows([row])


def _around(places: np.ndarray, length: int) -> slice:
    """The span of places with at least a quarter of the side, and as much as the span, on either side."""
    first, last = int(places[0]), int(places[-1]) + 1
    margin = max(last - first, length // 4)
    return slice(max(first - margin, 0), min(last + margin, length))


def confusion_figure(matrix: torch.Tensor, classes: Sequence[str]) -> Image.Image:
    """Draw a confusion matrix: in each row the fractions of a class's pixels, in percent where a cell is wide enough.

    Args:
        matrix: `(C, C)` counts, rows = ground truth.
        classes: their names.
    """
    fractions = matrix / matrix.sum(1, keepdim=True).clamp(min=1)
    texts = np.vectorize(lambda value: f"{100 * value:.0f}" if value >= 0.005 else "", otypes=[str])(fractions.numpy())
    note = "fraction of a class's pixels (row) that are predicted as a class (column); colors by its square root"
    figure = class_matrix(fractions.sqrt(), texts, classes)
    return labeled_rows([[("ground truth in rows, prediction in columns", figure)]], heat_scale("0", "1", note))
