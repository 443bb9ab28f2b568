"""Label maps as images: colors, overlays, legends, and grids of image, ground truth and prediction."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from hf_denseseg.data.labels import LabelSpec
from hf_denseseg.data.reading.pixels import as_shown
from hf_denseseg.errors import InputError
from hf_denseseg.visualization.layout import GAP, INK, LINE, PAPER, Palette, fit_width


def colorize(ids: torch.Tensor | np.ndarray, palette: Palette) -> Image.Image:
    """Paint class ids `(H, W)` with their colors; ignored pixels and every id beyond the palette are black."""
    # The last entry stays black, for every id that has no color.
    table = np.zeros((max(len(palette), 256) + 1, 3), dtype=np.uint8)
    table[: len(palette)] = np.asarray(palette, dtype=np.uint8)
    indices = _array(ids).astype(np.int64)
    beyond = (indices < 0) | (indices >= len(table))
    return Image.fromarray(table[np.where(beyond, len(table) - 1, indices)])


def _array(ids: torch.Tensor | np.ndarray) -> np.ndarray:
    """A label map as an array; torch warns of read-only ones, as Pillow's are."""
    return ids.cpu().numpy() if isinstance(ids, torch.Tensor) else np.asarray(ids)


def overlay(
    image: Image.Image | torch.Tensor, ids: torch.Tensor | np.ndarray, palette: Palette, opacity: float = 0.5
) -> Image.Image:
    """Lay the colors of `ids` over an image of the same size; ignored pixels stay as they are.

    Args:
        image: PIL image, or `(3, H, W)` uint8.
        ids: `(H, W)` class ids.
        palette: one color per class.
        opacity: 0 shows the image alone, 1 the colors alone.

    Raises:
        InputError: the sizes differ, or `opacity` is outside 0..1.
    """
    shown, ids = as_shown(image), _array(ids)
    if not 0 <= opacity <= 1:
        raise InputError(f"Overlay opacity is {opacity}. Give a number from 0 to 1.")
    if ids.shape != (shown.height, shown.width):
        raise InputError(
            f"The label map is {ids.shape[0]}x{ids.shape[1]}, the image {shown.height}x{shown.width} "
            "(height x width). Segment at the image's own size."
        )
    blended = Image.blend(shown, colorize(ids, palette), opacity)
    known = Image.fromarray(((ids >= 0) & (ids < len(palette))).astype(np.uint8) * 255)
    return Image.composite(blended, shown, known)


def legend(spec: LabelSpec, width: int = 640) -> Image.Image:
    """Swatches and names of the classes, in as many columns as `width` pixels allow."""
    font = ImageFont.load_default(size=13)
    cell = max(int(font.getlength(name)) for name in spec.classes) + LINE + 2 * GAP
    columns = max(width // cell, 1)
    rows = -(-len(spec.classes) // columns)
    swatches = Image.new("RGB", (max(width, cell), rows * LINE + GAP), PAPER)
    draw = ImageDraw.Draw(swatches)
    for index, (name, color) in enumerate(zip(spec.classes, spec.palette, strict=True)):
        x, y = index % columns * cell + GAP, index // columns * LINE + GAP
        draw.rectangle((x, y, x + LINE - GAP, y + LINE - GAP), fill=color)
        draw.text((x + LINE, y), name, fill=INK, font=font)
    return swatches


def prediction_grid(
    rows: Iterable[Sequence[Any]],
    spec: LabelSpec,
    titles: Sequence[str] = ("image", "ground truth", "prediction"),
    cell_width: int = 320,
) -> Image.Image:
    """Arrange results in a grid: one row per image, its label maps beside it in color, the legend below.

    Args:
        rows: per image the image itself (as read, or `(C, H, W)`), then one or more `(H, W)` label maps.
        spec: names and colors.
        titles: heading of each column; surplus ones are not shown.
        cell_width: width of an image in pixels.
    """
    font = ImageFont.load_default(size=13)
    cells = [[as_shown(image), *(colorize(ids, spec.palette) for ids in maps)] for image, *maps in rows]
    scaled = [
        [
            fit_width(image, cell_width, Image.Resampling.BILINEAR),
            *(fit_width(label_map, cell_width, Image.Resampling.NEAREST) for label_map in maps),
        ]
        for image, *maps in cells
    ]
    columns = max((len(row) for row in scaled), default=1)
    width = columns * (cell_width + GAP) + GAP
    names = legend(spec, width)
    height = LINE + sum(row[0].height + GAP for row in scaled) + names.height
    grid = Image.new("RGB", (max(width, names.width), height), PAPER)
    draw = ImageDraw.Draw(grid)
    for column, title in enumerate(titles[:columns]):
        draw.text((GAP + column * (cell_width + GAP), 2), title, fill=INK, font=font)
    y = LINE
    for row in scaled:
        for column, cell in enumerate(row):
            grid.paste(cell, (GAP + column * (cell_width + GAP), y))
        y += row[0].height + GAP
    grid.paste(names, (0, y))
    return grid
