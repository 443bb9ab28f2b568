"""Embedded street scenes with boxes and masks of every visible car, person, rider and sign, for detection offline.

The scenes are those of `synthetic`, drawn on a canvas that also records to which object a pixel belongs. Distant
objects that are too small are merged into a crowd, as in COCO, and every tenth scene is an empty street.
"""

import io
import json
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from hf_denseseg.data.class_names import ClassNames
from hf_denseseg.data.sources.coco import encode_mask
from hf_denseseg.data.synthetic import street_objects as street
from hf_denseseg.data.synthetic.perspective import Canvas, Point, Rgb
from hf_denseseg.data.synthetic.scenes import render_scene_on

_CLASSES = {street.CAR: "car", street.PERSON: "person", street.RIDER: "rider", street.SIGN: "sign"}
DETECTION_NAMES = ClassNames(
    "synthetic-street-4", tuple(_CLASSES.values()), license="Apache-2.0 (drawn by this package)"
)
SMALLEST_AREA = 40  # visible pixels; smaller objects are too small to recognize
CROWD = 3  # at least this many too small objects of a class make a crowd
EMPTY_EVERY = 10  # every tenth scene contains no object of these classes


class InstanceCanvas(Canvas):
    """A canvas that also records the instance number of each pixel, `(H, W)`; 0 belongs to none of the classes."""

    def __init__(self, height: int, width: int, haze: Rgb, visibility: float) -> None:
        super().__init__(height, width, haze, visibility)
        self.instances = Image.new("I", (width, height), 0)
        self.classes = [-1]  # class id by instance number; entry 0 is the background
        self._instance_draw = ImageDraw.Draw(self.instances)

    def start_object(self) -> None:
        """Give everything that is drawn from here on a new instance number."""
        self.classes.append(-1)

    def _fill(self, class_id: int) -> int:
        # Other classes write 0: they hide the objects behind them, so that masks cover visible pixels only.
        if class_id not in _CLASSES:
            return 0
        self.classes[-1] = class_id
        return len(self.classes) - 1

    def polygon(self, points: list[Point], color: Rgb, class_id: int | None, z: float = 0.0) -> None:
        """Fill a polygon."""
        super().polygon(points, color, class_id, z)
        if class_id is not None:
            self._instance_draw.polygon(points, fill=self._fill(class_id))

    def ellipse(
        self, x: float, y: float, rx: float, ry: float, color: Rgb, class_id: int | None, z: float = 0.0
    ) -> None:
        """Fill an ellipse around (x, y)."""
        super().ellipse(x, y, rx, ry, color, class_id, z)
        if class_id is not None:
            self._instance_draw.ellipse((x - rx, y - ry, x + rx, y + ry), fill=self._fill(class_id))

    def line(self, points: list[Point], thickness: float, color: Rgb, class_id: int | None, z: float = 0.0) -> None:
        """Draw a line at least one pixel thick."""
        super().line(points, thickness, color, class_id, z)
        if class_id is not None:
            self._instance_draw.line(points, fill=self._fill(class_id), width=max(1, round(thickness)))


@lru_cache(maxsize=2048)
def render_detection_row(split: str, index: int, size: tuple[int, int] | None = None) -> dict[str, Any]:
    """Draw one scene and list its objects.

    Args:
        split: `"train"`, `"validation"` or `"test"`; their scenes differ.
        index: number of the scene, from 0.
        size: (height, width); None picks one of the usual sizes at random.

    Returns:
        A row in the form of `load_detection`, with the image as PNG.
    """
    excluded = tuple(_CLASSES) if index % EMPTY_EVERY == EMPTY_EVERY - 1 else ()
    image, canvas = render_scene_on(InstanceCanvas, split, index, size, excluded)
    numbers = np.asarray(canvas.instances)
    objects: list[dict[str, Any]] = []
    small: dict[int, np.ndarray] = {}
    small_count: dict[int, int] = {}
    for number in np.unique(numbers[numbers > 0]).tolist():
        mask, class_id = numbers == number, canvas.classes[number]
        if mask.sum() >= SMALLEST_AREA:
            objects.append(_object(index, len(objects), class_id, mask, 0))
            continue
        small[class_id] = small.get(class_id, False) | mask
        small_count[class_id] = small_count.get(class_id, 0) + 1
    for class_id, mask in small.items():
        if small_count[class_id] >= CROWD:
            objects.append(_object(index, len(objects), class_id, mask, 1))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return {
        "image": {"bytes": buffer.getvalue(), "path": None},
        "image_id": index,
        "id": f"{split}-{index:05d}",
        "height": image.height,
        "width": image.width,
        "objects": objects,
    }


def _object(index: int, count: int, class_id: int, mask: np.ndarray, crowd: int) -> dict[str, Any]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    left, top = int(columns[0]), int(rows[0])
    return {
        "id": 1000 * index + count + 1,
        "category": list(_CLASSES).index(class_id),
        "bbox": [float(left), float(top), float(columns[-1] + 1 - left), float(rows[-1] + 1 - top)],
        "area": float(mask.sum()),
        "iscrowd": crowd,
        "segmentation": json.dumps(encode_mask(mask)),
    }
