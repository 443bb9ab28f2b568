"""Draw in world coordinates (meters): a camera over a road, and a canvas that paints image and label map together."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from hf_denseseg.data.ignore_index import IGNORE_INDEX

Rgb = tuple[float, float, float]
Point = tuple[float, float]


@dataclass
class Camera:
    """Pinhole camera over a road that may bend: (x right, y up, z ahead) in meters -> (column, row) in pixels.

    Args:
        focal: focal length in pixels.
        center: column of the point straight ahead.
        horizon: row of the horizon.
        height: height of the camera above the road in meters.
        shift: lateral position of the camera on the road in meters.
        bend: curvature of the road: lateral meters per squared meter ahead.
    """

    focal: float
    center: float
    horizon: float
    height: float
    shift: float
    bend: float

    def __call__(self, x: float, y: float, z: float) -> Point:
        """Project one point."""
        # (x - shift) / z is the pinhole; bend * z * z moves a point sideways as the road curves away.
        return (
            self.center + self.focal * (x - self.shift + self.bend * z * z) / z,
            self.horizon + self.focal * (self.height - y) / z,
        )


class Canvas:
    """An image and its label map, painted with the same shapes; later shapes cover earlier ones.

    Args:
        height: in pixels.
        width: in pixels.
        haze: color into which distant objects fade.
        visibility: distance in meters at which 1/e of the original color is left.
    """

    def __init__(self, height: int, width: int, haze: Rgb, visibility: float) -> None:
        self.image = Image.new("RGB", (width, height))
        self.label = Image.new("L", (width, height), IGNORE_INDEX)
        self._paint = ImageDraw.Draw(self.image)
        self._mark = ImageDraw.Draw(self.label)
        self.haze = haze
        self.visibility = visibility

    def _color(self, color: Rgb, z: float) -> tuple[int, int, int]:
        visible = math.exp(-z / self.visibility)
        red, green, blue = (
            min(255, max(0, int(near * visible + far * (1 - visible))))
            for near, far in zip(color, self.haze, strict=True)
        )
        return red, green, blue

    def polygon(self, points: list[Point], color: Rgb, class_id: int | None, z: float = 0.0) -> None:
        """Fill a polygon; `class_id` None does not change the label map (windows, markings, lamps)."""
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
    """One of the colors, slightly varied."""
    red, green, blue = colors[rng.integers(len(colors))]
    change = (spread * rng.standard_normal(3)).tolist()
    return red + change[0], green + change[1], blue + change[2]


def quad(camera: Camera, corners: Sequence[tuple[float, float, float]]) -> list[Point]:
    """Project the corners of a face."""
    return [camera(*corner) for corner in corners]
