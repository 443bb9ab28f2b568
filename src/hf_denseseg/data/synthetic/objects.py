"""Embedded images of one object each, rendered as a function of (split, index), for classification offline."""

from collections.abc import Callable

import numpy as np
from PIL import Image

from hf_denseseg.data.class_names import ClassNames
from hf_denseseg.data.synthetic import street_objects as street
from hf_denseseg.data.synthetic.perspective import Camera, Canvas, pick
from hf_denseseg.data.synthetic.scenes import SPLITS, draw_ground, draw_sky, shaded

# Name -> (function that draws it, its height in meters, further arguments).
_KINDS: dict[str, tuple[Callable[..., None], float, dict[str, float | bool]]] = {
    "car from behind": (street.draw_car, 1.5, {"oncoming": False}),
    "car from the front": (street.draw_car, 1.5, {"oncoming": True}),
    "person": (street.draw_person, 1.8, {}),
    "rider": (street.draw_rider, 2.0, {}),
    "traffic sign": (street.draw_sign, 2.8, {}),
    "tree": (street.draw_tree, 6.0, {}),
    "fence": (street.draw_fence, 1.4, {"length": 8.0}),
    "bin": (street.draw_ignored, 1.2, {}),
}
OBJECT_NAMES = ClassNames("synthetic-objects-8", tuple(_KINDS), license="Apache-2.0 (drawn by this package)")
OBJECT_SIZES = ((96, 128), (112, 112), (128, 96), (104, 136))  # (height, width)


def render_object(split: str, index: int, size: tuple[int, int] | None = None) -> tuple[Image.Image, int]:
    """Draw one object in a street, close enough to be clearly visible; all classes have equally many images.

    Args:
        split: `"train"`, `"validation"` or `"test"`; their images differ.
        index: number of the image, from 0.
        size: (height, width); None picks one of `OBJECT_SIZES` at random.

    Returns:
        RGB image and its class id.
    """
    rng = np.random.default_rng((SPLITS.index(split), index, len(_KINDS)))
    usual_size = OBJECT_SIZES[rng.integers(len(OBJECT_SIZES))]  # drawn in any case, so that the rest stays the same
    height, width = size or usual_size
    label = index % len(_KINDS)
    draw, tall, options = list(_KINDS.values())[label]
    camera = Camera(
        focal=max(height, width) * rng.uniform(0.8, 1.3),
        center=width * rng.uniform(0.35, 0.65),
        horizon=height * rng.uniform(0.3, 0.55),
        height=rng.uniform(1.0, 2.0),
        shift=rng.uniform(-1.5, 1.5),
        bend=rng.normal(0, 0.001),
    )
    sky = np.array(pick(rng, [(150, 190, 235), (200, 205, 212), (225, 205, 185), (130, 150, 175)], 8))
    canvas = Canvas(height, width, (float(sky[0]), float(sky[1]), float(sky[2])), rng.uniform(60, 260))
    draw_sky(canvas, camera, rng, sky)
    half_road = rng.uniform(2.5, 5.5)
    draw_ground(canvas, camera, rng, half_road, rng.uniform(1.5, 3.5))
    for side in (-1.0, 1.0):
        if rng.random() < 0.6:
            street.draw_building(
                canvas, camera, rng, x=side * (half_road + 5), z=rng.uniform(12, 30), length=20.0, light=1.0
            )
    # The object covers 45 to 90 % of the image height; its distance follows from that.
    z = camera.focal * tall / (height * rng.uniform(0.45, 0.9))
    # The image column is drawn at random; inverting the projection gives the lateral position x.
    x = camera.shift - camera.bend * z * z + (width * rng.uniform(0.3, 0.7) - camera.center) * z / camera.focal
    draw(canvas, camera, rng, x=x, z=z, **options)
    return shaded(canvas.image, np.array(canvas.label), camera, rng), label
