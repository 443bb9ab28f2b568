"""Draw in metres: a camera over a road, and a canvas that paints the image and its label map together."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from hf_denseseg.data.labels import IGNORE_INDEX

Rgb = tuple[float, float, float]
Point = tuple[float, float]


@dataclass
class Camera:
    """Pinhole camera over a road that may bend: metres (right, up, ahead) -> pixels.

    Args:
        focal: in pixels.
        center: column of the point straight ahead.
        horizon: row of the horizon.
        height: of the camera over the road, metres.
        shift: lateral place of the camera on the road, metres.
        bend: lateral metres per squared metre ahead.
    """

    focal: float
    center: float
    horizon: float
    height: float
    shift: float
    bend: float

    def __call__(self, x: float, y: float, z: float) -> Point:
        """Project one point."""
        return (
            self.center + self.focal * (x - self.shift + self.bend * z * z) / z,
            self.horizon + self.focal * (self.height - y) / z,
        )


class Canvas:
    """An image and its label map, painted with the same shapes.

    Args:
        height: in pixels.
        width: in pixels.
        haze: color that far things fade into.
        visibility: distance in metres at which about two thirds of the color is gone.
    """

    def __init__(self, height: int, width: int, haze: Rgb, visibility: float) -> None:
        self.image = Image.new("RGB", (width, height))
        self.label = Image.new("L", (width, height), IGNORE_INDEX)
        self._paint = ImageDraw.Draw(self.image)
        self._mark = ImageDraw.Draw(self.label)
        self.haze = haze
        self.visibility = visibility

    def _color(self, color: Rgb, z: float) -> tuple[int, int, int]:
        kept = math.exp(-z / self.visibility)
        red, green, blue = (
            min(255, max(0, int(own * kept + far * (1 - kept)))) for own, far in zip(color, self.haze, strict=True)
        )
        return red, green, blue

    def polygon(self, points: list[Point], color: Rgb, class_id: int | None, z: float = 0.0) -> None:
        """Fill a polygon; `class_id` None leaves the label map as it is (windows, markings, lamps)."""
        self._paint.polygon(points, fill=self._color(color, z))
        if class_id is not None:
            self._mark.polygon(points, fill=class_id)

    def ellipse(
        self, x: float, y: float, rx: float, ry: float, color: Rgb, class_id: int | None, z: float = 0.0
    ) -> None:
        """Fill an ellipse around (x, y)."""
        box = (x - rx, y - ry, x + rx, y + ry)
        self._paint.ellipse(box, fill=self._color(color, z))
        if class_id is not None:
            self._mark.ellipse(box, fill=class_id)

    def line(self, points: list[Point], thickness: float, color: Rgb, class_id: int | None, z: float = 0.0) -> None:
        """Draw a line at least one pixel thick."""
        width = max(1, round(thickness))
        self._paint.line(points, fill=self._color(color, z), width=width)
        if class_id is not None:
            self._mark.line(points, fill=class_id, width=width)


def scaled(color: Rgb, factor: float) -> Rgb:
    """The color, brighter or darker."""
    return color[0] * factor, color[1] * factor, color[2] * factor


def pick(rng: np.random.Generator, colors: list[Rgb], spread: float = 18.0) -> Rgb:
    """One of the colors, a little changed."""
    red, green, blue = colors[rng.integers(len(colors))]
    change = (spread * rng.standard_normal(3)).tolist()
    return red + change[0], green + change[1], blue + change[2]


def quad(camera: Camera, corners: Sequence[tuple[float, float, float]]) -> list[Point]:
    """Project the corners of a face."""
    return [camera(*corner) for corner in corners]
