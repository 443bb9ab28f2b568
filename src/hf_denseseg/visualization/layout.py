"""What figures share: colors, spacing, heat maps, labeled rows of images."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from hf_denseseg.data.image_sizes import scaled_size
from hf_denseseg.data.reading.pixels import Pixels, as_shown

Palette = Sequence[tuple[int, int, int]]
GAP = 6  # pixels between cells
LINE = 20  # height of a line of text
INK = (40, 40, 40)
PAPER = (255, 255, 255)
IGNORED_COLOR = (0, 0, 0)
PICKED = (255, 0, 0)
# Color map "viridis", from dark blue through green to yellow: even steps of value look even, in gray and to the
# color-blind too.
VIRIDIS = (
    (68, 1, 84), (72, 26, 108), (71, 47, 125), (65, 68, 135), (57, 86, 140), (49, 104, 142), (42, 120, 142),
    (35, 136, 142), (31, 152, 139), (34, 168, 132), (53, 183, 121), (84, 197, 104), (122, 209, 81), (165, 219, 54),
    (210, 226, 27), (253, 231, 37),
)  # fmt: skip


def heat_map(values: torch.Tensor, size: tuple[int, int] | None = None) -> Image.Image:
    """Paint `(h, w)` values from 0 (dark blue) to 1 (yellow); others count as the nearer of the two.

    Args:
        values: any floating dtype.
        size: (height, width) of the result, values interpolated; None paints one pixel per value.
    """
    values = values.float().cpu().clamp(0, 1)
    if size is not None:
        values = F.interpolate(values[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]
    steps = np.linspace(0, 1, len(VIRIDIS))
    channels = [np.interp(values.numpy(), steps, channel) for channel in np.array(VIRIDIS).T]
    return Image.fromarray(np.stack(channels, axis=-1).round().astype(np.uint8))


def heat_scale(low: str, high: str, meaning: str) -> Image.Image:
    """The color bar of `heat_map` between the values of its ends, and what they mean."""
    font = ImageFont.load_default(size=13)
    start = int(font.getlength(low)) + GAP
    end = start + 128
    text = f"{high}   ({meaning})"
    scale = Image.new("RGB", (end + 2 * GAP + int(font.getlength(text)), LINE), PAPER)
    draw = ImageDraw.Draw(scale)
    draw.text((0, 2), low, fill=INK, font=font)
    scale.paste(heat_map(torch.linspace(0, 1, end - start).expand(LINE - GAP, -1)), (start, GAP // 2))
    draw.text((end + GAP, 2), text, fill=INK, font=font)
    return scale


def labeled_rows(rows: Sequence[Sequence[tuple[str, Image.Image]]], footer: Image.Image | None = None) -> Image.Image:
    """Arrange images of any size in rows, a line of text above each, a footer below all."""
    font = ImageFont.load_default(size=13)
    widths = [[max(image.width, int(font.getlength(label)) + 1) for label, image in row] for row in rows]
    heights = [max(image.height for _, image in row) for row in rows]
    width = max(GAP + sum(each + GAP for each in row) for row in widths)
    below = footer.height + GAP if footer else 0
    figure = Image.new(
        "RGB",
        (max(width, footer.width + 2 * GAP if footer else 0), sum(LINE + each + GAP for each in heights) + below),
        PAPER,
    )
    draw, y = ImageDraw.Draw(figure), 0
    for row, row_widths, height in zip(rows, widths, heights, strict=True):
        x = GAP
        for (label, image), cell in zip(row, row_widths, strict=True):
            draw.text((x, y + 2), label, fill=INK, font=font)
            figure.paste(image, (x, y + LINE))
            x += cell + GAP
        y += LINE + height + GAP
    if footer:
        figure.paste(footer, (GAP, y))
    return figure


def thumbnail_grid(cells: Sequence[tuple[str, Pixels]], columns: int = 6, side: int = 160) -> Image.Image:
    """Arrange images of any size in rows of `columns`, the longest side of each `side` pixels, a text above each."""
    scaled = [(text, fit_into(as_shown(image), side)) for text, image in cells]
    return labeled_rows([scaled[start : start + columns] for start in range(0, len(scaled), columns)])


def fit_width(image: Image.Image, width: int, resample: Image.Resampling) -> Image.Image:
    """Resize to a width, the ratio kept.

    Take `NEAREST` for label colors, so that no color appears that means another class.
    """
    height, _ = scaled_size((image.height, image.width), width / image.width)
    return image.resize((width, height), resample)


def fit_into(image: Image.Image, side: int) -> Image.Image:
    """Resize so that the longest side has `side` pixels."""
    height, width = scaled_size((image.height, image.width), side / max(image.size))
    return image.resize((width, height))
