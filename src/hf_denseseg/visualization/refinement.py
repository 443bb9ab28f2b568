"""Label maps before and after boundary refinement, as Figure 4 of the UN-EPT paper shows them.

This works for every model that takes `output_refined_logits` and then gives `coarse_logits`, `refined_logits` and
`refinement_offsets`.
"""

import colorsys
import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from hf_denseseg.visualization.label_maps import colorize
from hf_denseseg.visualization.layout import PAPER, PICKED, Palette, labeled_rows

STEPS = ((0, -1), (-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1))  # (row, column)
DIAL = 90  # side of the footer that explains the colors
FADED = 0.75  # fraction of white in the image behind boundary and changed pixels


@dataclass
class Refinement:
    """What a model's refinement did to one image.

    Args:
        coarse: `(H, W)` class ids before.
        refined: `(H, W)` class ids after.
        offsets: `(2, H, W)` step (row, column) that was taken, 0 away from boundaries.
    """

    coarse: torch.Tensor
    refined: torch.Tensor
    offsets: torch.Tensor

    @property
    def changed(self) -> torch.Tensor:
        """`(H, W)`: where the class has changed."""
        return self.coarse != self.refined


def step_color(row: float, column: float) -> tuple[int, int, int]:
    """Color of a direction: its angle is the hue."""
    red, green, blue = colorsys.hsv_to_rgb((math.atan2(row, column) / (2 * math.pi)) % 1, 1, 0.9)
    return round(255 * red), round(255 * green), round(255 * blue)


def direction_image(image: Image.Image, offsets: torch.Tensor) -> Image.Image:
    """Paint boundary pixels in the color of their step, over a faded image of the same size."""
    painted = np.array(_faded(image))
    for row, column in STEPS:
        # Steps may be longer than one pixel: the sign is the direction.
        here = (offsets[0].sign() == row) & (offsets[1].sign() == column)
        painted[here.numpy()] = step_color(row, column)
    return Image.fromarray(painted)


def refinement_figure(image: Image.Image, refinement: Refinement, palette: Palette) -> Image.Image:
    """Arrange image, coarse map, boundary with directions, refined map and changed pixels in one row.

    Args:
        image: resized to the maps.
        refinement: what `inspect_refinement` gave.
        palette: one color per class.
    """
    height, width = refinement.coarse.shape
    image = image.convert("RGB").resize((width, height))
    changed = np.array(_faded(image))
    changed[refinement.changed.numpy()] = PICKED
    boundary = float((refinement.offsets != 0).any(0).float().mean())
    row = [
        ("image", image),
        ("coarse", colorize(refinement.coarse, palette)),
        (f"boundary: {boundary:.1%} of the pixels", direction_image(image, refinement.offsets)),
        ("refined", colorize(refinement.refined, palette)),
        (f"changed: {float(refinement.changed.float().mean()):.2%}", Image.fromarray(changed)),
    ]
    return labeled_rows([row], footer=_dial())


def _faded(image: Image.Image) -> Image.Image:
    gray = image.convert("L").convert("RGB")
    return Image.blend(gray, Image.new("RGB", gray.size, PAPER), FADED)


def _dial() -> Image.Image:
    """The eight colors, each where its step leads to from the middle."""
    dial = Image.new("RGB", (DIAL, DIAL), PAPER)
    cell = DIAL // 3
    for row, column in STEPS:
        dial.paste(
            step_color(row, column), ((1 + column) * cell, (1 + row) * cell, (2 + column) * cell, (2 + row) * cell)
        )
    return dial
