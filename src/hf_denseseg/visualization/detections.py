"""Boxes and masks over images, with names and scores."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from hf_denseseg.data.reading.pixels import Pixels, as_shown
from hf_denseseg.visualization.layout import Palette, fit_width

_MASK_OPACITY = 0.45


def draw_objects(
    image: Pixels,
    boxes: Sequence[Sequence[float]],
    names: Sequence[str],
    colors: Palette,
    masks: Sequence[np.ndarray] | None = None,
    width: int | None = None,
) -> Image.Image:
    """Draw boxes with names, and masks under them, over an image.

    Args:
        image: as read.
        boxes: left, top, right, bottom in pixels of the image.
        names: text above each box.
        colors: of each box.
        masks: `(H, W)` of each box, 0 outside the object.
        width: of the result in pixels; None keeps the size.
    """
    drawn = as_shown(image).copy()
    if masks is not None and len(masks):
        painted = np.array(drawn, dtype=np.float32)
        for mask, color in zip(masks, colors, strict=True):
            inside = np.asarray(mask).astype(bool)
            painted[inside] += _MASK_OPACITY * (np.array(color, dtype=np.float32) - painted[inside])
        drawn = Image.fromarray(painted.round().astype(np.uint8))
    factor = 1.0 if width is None else width / drawn.width
    if width is not None:
        drawn = fit_width(drawn, width, Image.Resampling.BILINEAR)
    draw, font = ImageDraw.Draw(drawn), ImageFont.load_default(size=11)
    for box, name, color in zip(boxes, names, colors, strict=True):
        left, top, right, bottom = (value * factor for value in box)
        draw.rectangle((left, top, max(left, right), max(top, bottom)), outline=color, width=2)
        text = draw.textbbox((left, max(top, 12)), name, font=font, anchor="lb")
        draw.rectangle(text, fill=color)
        dark = sum(color) > 380  # dark text on a light background
        draw.text((left, max(top, 12)), name, fill=(0, 0, 0) if dark else (255, 255, 255), font=font, anchor="lb")
    return drawn
