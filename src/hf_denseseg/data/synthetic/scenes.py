"""Embedded street scenes, rendered in memory as a function of (split, index), so that everything runs offline.

A road in perspective between pavements, houses, trees, fences, poles and signs, with cars, people and riders that
occlude each other, in varying light, weather and image size. The ego vehicle's hood and unusual objects are ignored.
"""

import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from hf_denseseg.data.ignore_index import IGNORE_INDEX
from hf_denseseg.data.labels import LabelSpec
from hf_denseseg.data.synthetic import street_objects as street
from hf_denseseg.data.synthetic.perspective import Camera, Canvas, Rgb, pick, quad, scaled
from hf_denseseg.errors import InputError

SYNTHETIC_SPEC = LabelSpec(
    name="synthetic-street-11",
    classes=(
        "road", "pavement", "building", "fence", "pole", "sign", "vegetation", "sky", "person", "rider", "car",
    ),
    palette=(
        (128, 64, 128), (244, 35, 232), (100, 70, 70), (190, 153, 153), (180, 180, 180), (220, 200, 0), (107, 142, 35),
        (70, 130, 180), (220, 20, 60), (255, 110, 0), (0, 0, 142),
    ),
    license="Apache-2.0 (drawn by this package)",
)  # fmt: skip
SIZES = ((192, 256), (160, 240), (208, 256), (192, 288), (176, 224))  # (height, width)
SPLITS = ("train", "validation", "test")
DEFAULT_COUNT = 200
_NEAR, _FAR = 2.2, 90.0  # meters
# Strength of coarse (row 0) and fine (row 1) texture per train id; 0.03 for ignored pixels.
_TEXTURE = np.full((2, 256), 0.03, dtype=np.float32)
_TEXTURE[0, :11] = (0.08, 0.08, 0.10, 0.06, 0.05, 0.03, 0.20, 0.03, 0.08, 0.08, 0.06)
_TEXTURE[1, :11] = (0.035, 0.04, 0.03, 0.05, 0.02, 0.02, 0.11, 0.0, 0.04, 0.04, 0.02)


_CLASS_OF = {
    street.draw_car: street.CAR,
    street.draw_person: street.PERSON,
    street.draw_rider: street.RIDER,
    street.draw_sign: street.SIGN,
    street.draw_pole: street.SIGN,  # it may carry a traffic light
}


class SyntheticName(NamedTuple):
    """Number of images per split and image size, as in `synthetic:500@512x1024`."""

    counts: dict[str, int]
    size: tuple[int, int] | None


def parse_name(name: str) -> SyntheticName:
    """Read `synthetic[:COUNT][@HEIGHTxWIDTH]`: COUNT training images, a fifth of that for each other split.

    Raises:
        InputError: the name does not have this form.
    """
    found = re.fullmatch(r"synthetic(?::(\d+))?(?:@(\d+)x(\d+))?", name)
    count = int(found[1] or DEFAULT_COUNT) if found else 0
    size = (int(found[2]), int(found[3])) if found and found[2] else None
    if count < 1 or (size and min(size) < 16):
        raise InputError(
            f"Dataset {name!r} is not understood. Write synthetic, synthetic:COUNT or synthetic:COUNT@HEIGHTxWIDTH, "
            "such as synthetic:500@512x1024 (at least 1 image of 16x16)."
        )
    return SyntheticName({split: count if split == "train" else max(1, count // 5) for split in SPLITS}, size)


def render_scene(split: str, index: int, size: tuple[int, int] | None = None) -> tuple[Image.Image, np.ndarray]:
    """Draw one scene.

    Args:
        split: `"train"`, `"validation"` or `"test"`; their scenes differ.
        index: number of the scene, from 0.
        size: (height, width); None picks one of `SIZES` at random.

    Returns:
        RGB image and `(H, W)` uint8 train ids, 255 for ignored pixels.
    """
    image, canvas = render_scene_on(Canvas, split, index, size)
    return image, np.array(canvas.label)


def render_scene_on(
    canvas_class: Callable[..., Any],
    split: str,
    index: int,
    size: tuple[int, int] | None = None,
    excluded: tuple[int, ...] = (),
) -> tuple[Image.Image, Any]:
    """Draw one scene on a given kind of canvas; other arguments as for `render_scene`.

    Args:
        canvas_class: `Canvas` or a subclass; its method `start_object`, if any, is called before each object.
        split: see `render_scene`.
        index: see `render_scene`.
        size: see `render_scene`.
        excluded: train ids of which no object is drawn.

    Returns:
        RGB image with light and noise, and the canvas it was drawn on.
    """
    rng = np.random.default_rng((SPLITS.index(split), index))
    usual_size = SIZES[rng.integers(len(SIZES))]  # drawn in any case, so that the rest of the scene stays the same
    height, width = size or usual_size
    camera = Camera(
        focal=width * rng.uniform(0.65, 1.0),
        center=width * rng.uniform(0.38, 0.62),
        horizon=height * rng.uniform(0.36, 0.52),
        height=rng.uniform(1.3, 2.0),
        shift=rng.uniform(0.3, 2.2),
        bend=rng.normal(0, 0.0018),
    )
    sky = np.array(pick(rng, [(150, 190, 235), (200, 205, 212), (225, 205, 185), (130, 150, 175)], 8))
    canvas = canvas_class(height, width, (float(sky[0]), float(sky[1]), float(sky[2])), rng.uniform(60, 260))
    draw_sky(canvas, camera, rng, sky)
    half_road, pavement = rng.uniform(3.2, 5.5), rng.uniform(1.5, 3.5)
    draw_ground(canvas, camera, rng, half_road, pavement)
    start_object = getattr(canvas, "start_object", None)
    for draw_object in _arrange(rng, half_road, pavement):
        if _CLASS_OF.get(draw_object.func) in excluded:
            continue
        if start_object is not None:
            start_object()
        draw_object(canvas, camera, rng)
    if rng.random() < 0.4:
        _draw_hood(canvas, rng)
    return shaded(canvas.image, np.array(canvas.label), camera, rng), canvas


def draw_sky(canvas: Canvas, camera: Camera, rng: np.random.Generator, sky: np.ndarray) -> None:
    """A gradient with clouds, and a distant row of houses or trees on the horizon."""
    height, width = canvas.label.height, canvas.label.width
    ramp = np.linspace(rng.uniform(0.7, 0.95), 1.05, height, dtype=np.float32)[:, None, None]
    clouds = _noise(rng, height, width, (5, 4))[..., None].clip(0, None) * rng.uniform(0, 45)
    pixels = sky.astype(np.float32) * ramp + clouds
    canvas.image.paste(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)))
    canvas.label.paste(street.SKY, (0, 0, width, height))
    left, class_id = -5.0, int(rng.choice([street.BUILDING, street.VEGETATION]))
    while left < width:
        right, top = left + width * rng.uniform(0.04, 0.14), camera.horizon - height * rng.uniform(0.02, 0.1)
        color = pick(rng, street.WALLS if class_id == street.BUILDING else [(60, 90, 50), (80, 105, 60)], 10)
        box = [(left, top), (right, top), (right, camera.horizon + 3), (left, camera.horizon + 3)]
        canvas.polygon(box, color, class_id, 70)
        left, class_id = (
            right,
            class_id if rng.random() < 0.7 else int(rng.choice([street.BUILDING, street.VEGETATION])),
        )


def draw_ground(canvas: Canvas, camera: Camera, rng: np.random.Generator, half_road: float, pavement: float) -> None:
    """Grass or paving, the pavements, curbs, the road and its markings."""
    height, width = canvas.label.height, canvas.label.width
    verge_class = street.VEGETATION if rng.random() < 0.5 else street.PAVEMENT
    verge = pick(rng, [(85, 105, 55), (105, 110, 60)] if verge_class == street.VEGETATION else [(150, 140, 130)], 8)
    canvas.polygon(
        [(0, camera.horizon), (width, camera.horizon), (width, height), (0, height)], verge, verge_class, 10
    )
    # Faces are split at distances with equal ratios: short enough near the camera to follow the bend of the road.
    depths = np.geomspace(_FAR, 0.6, 24).tolist()

    def strip(left: float, right: float, color: Rgb, class_id: int | None, zs: list[float] = depths) -> None:
        for far, near in zip(zs, zs[1:], strict=False):
            face = [(left, 0, far), (right, 0, far), (right, 0, near), (left, 0, near)]
            canvas.polygon(quad(camera, face), color, class_id, near)

    gray = rng.uniform(115, 170)
    strip(-half_road - pavement, half_road + pavement, (gray + 8, gray, gray - 8), street.PAVEMENT)
    strip(-half_road - 0.2, half_road + 0.2, (gray + 35,) * 3, street.PAVEMENT)
    asphalt = rng.uniform(65, 115)
    strip(-half_road, half_road, (asphalt, asphalt, asphalt + rng.uniform(-4, 8)), street.ROAD)
    white: Rgb = (215, 215, 208)
    if rng.random() < 0.85:
        for start in np.arange(rng.uniform(0.5, 4), 60, rng.uniform(5, 9)).tolist():
            strip(-0.08, 0.08, white, None, [start + 2.5, start])
    if rng.random() < 0.5:
        strip(-half_road + 0.3, -half_road + 0.42, white, None)
        strip(half_road - 0.42, half_road - 0.3, white, None)
    if rng.random() < 0.25:
        start = rng.uniform(5, 15)
        for bar in np.arange(-half_road + 0.4, half_road - 0.4, 1.0).tolist():
            strip(bar, bar + 0.5, white, None, [start + 3, start])
    if rng.random() < 0.4:  # a patch of darker asphalt
        start, left = rng.uniform(3, 20), rng.uniform(-half_road, 0)
        strip(left, left + rng.uniform(1, 3), (asphalt * 0.8,) * 3, None, [start + rng.uniform(1, 6), start])


def _arrange(rng: np.random.Generator, half_road: float, pavement: float) -> list:
    """Everything that stands on the ground, as functions to call, from far to near (painter's algorithm)."""
    objects: list[tuple[float, partial]] = []

    def add(z: float, draw: Callable[..., None], **where: float | bool) -> None:
        if z >= _NEAR:
            objects.append((z, partial(draw, z=z, **where)))

    # Per side: houses, trees and fences; poles, signs and trees at the curb; parked cars, people, riders, traffic.
    lights = rng.permutation([1.1, 0.75])  # one side of the street is in the shade
    for side, light in zip((-1, 1), lights.tolist(), strict=True):
        edge = half_road + pavement
        built, z = rng.random(), _NEAR  # building density of this side
        setback = edge + rng.uniform(0.1, 4) * (rng.random() < 0.6)
        while z < _FAR:
            length = rng.uniform(7, 20)
            if rng.random() < built + 0.2:
                add(z, street.draw_building, x=side * setback, length=length, light=light)
            elif rng.random() < 0.6:
                add(z + length / 2, street.draw_tree, x=side * (setback + rng.uniform(1, 5)))
            if setback > edge + 0.5 and rng.random() < 0.6:
                low = street.draw_fence if rng.random() < 0.65 else street.draw_hedge
                add(z, low, x=side * edge, length=min(length, 12.0))
            z += length
        curb = half_road + 0.5
        for z in np.arange(rng.uniform(3, 14), 60, rng.uniform(9, 22)).tolist():
            add(z, street.draw_pole, x=side * curb)
        for z in np.arange(rng.uniform(5, 25), 60, rng.uniform(12, 30)).tolist():
            add(z, street.draw_tree if rng.random() < 0.55 else street.draw_sign, x=side * (curb + 0.2))
        if rng.random() < 0.75:
            add(rng.uniform(4, 16), street.draw_sign, x=side * (curb + 0.3))
        for z in np.arange(rng.uniform(5, 30), 70, rng.uniform(5.5, 25)).tolist():  # parked
            if rng.random() < 0.7:
                add(z, street.draw_car, x=side * (half_road - 1.0), oncoming=side < 0)
        for _ in range(rng.poisson(2.2)):
            add(rng.uniform(4, 25), street.draw_person, x=side * rng.uniform(half_road + 0.3, edge))
        if rng.random() < 0.5:
            add(rng.uniform(4, 20), street.draw_ignored, x=side * rng.uniform(half_road + 0.4, edge))
        for _ in range(rng.poisson(0.6)):
            add(rng.uniform(5, 22), street.draw_rider, x=side * (half_road - rng.uniform(0.4, 2.2)))
        for z in np.arange(rng.uniform(7, 45), 80, rng.uniform(9, 30)).tolist():  # driving
            add(z, street.draw_car, x=side * half_road * 0.42, oncoming=side < 0)
    if rng.random() < 0.2:
        add(rng.uniform(6, 15), street.draw_person, x=rng.uniform(-half_road, half_road))
    return [draw for _, draw in sorted(objects, key=lambda each: -each[0])]


def _draw_hood(canvas: Canvas, rng: np.random.Generator) -> None:
    """The hood of the ego vehicle at the lower edge of the image: ignored."""
    height, width = canvas.label.height, canvas.label.width
    rise = height * rng.uniform(0.04, 0.12)
    color = pick(rng, street.PAINTS, 8)
    canvas.ellipse(width / 2, height + rise * 0.3, width * 0.55, rise * 1.3, color, IGNORE_INDEX)
    canvas.ellipse(width / 2, height + rise * 0.6, width * 0.45, rise, scaled(color, 1.25), IGNORE_INDEX)


def _noise(rng: np.random.Generator, height: int, width: int, cells: tuple[int, int]) -> np.ndarray:
    """Smooth noise `(H, W)` on a grid of `cells` (columns, rows), roughly within -1..1."""
    coarse = Image.fromarray(rng.normal(0, 0.6, (cells[1] + 1, cells[0] + 1)).astype(np.float32))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))


def shaded(image: Image.Image, label: np.ndarray, camera: Camera, rng: np.random.Generator) -> Image.Image:
    """Apply textures, shadows on the ground, vignetting, exposure, tint, sensor noise and blur."""
    height, width = label.shape
    pixels = np.array(image, dtype=np.float32)
    # Two extra rows: shifted by 0, 1 and 2 rows, the grain gives different noise to the three channels.
    grain = rng.standard_normal((height + 2, width), dtype=np.float32)
    blotches = _noise(rng, height, width, (width // 12, height // 12))
    light = 1 + _TEXTURE[0][label] * blotches + _TEXTURE[1][label] * grain[:height]
    light *= _ground_light(label, camera, rng)
    rows = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    columns = np.linspace(-1, 1, width, dtype=np.float32)[None, :]
    light *= (1 - rng.uniform(0, 0.25) * (rows**2 + columns**2) / 2 + rng.uniform(-0.12, 0.12) * columns).astype(
        np.float32
    )
    tint = rng.uniform(0.93, 1.07, 3).astype(np.float32) * np.float32(rng.uniform(0.7, 1.12))
    noise = grain * rng.uniform(1, 4)
    pixels *= light[..., None] * tint
    pixels += np.stack([noise[start : start + height] for start in range(3)], axis=-1)
    noisy = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    return noisy.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.8) * height / 192))


def _ground_light(label: np.ndarray, camera: Camera, rng: np.random.Generator) -> np.ndarray:
    """Brightness factors `(H, W)`: paving joints in perspective, and shadows of objects at the roadside."""
    height, width = label.shape
    row = np.arange(height, dtype=np.float32)[:, None]
    # Invert the projection for points on the ground: world position (x, z) of every pixel, both (H, W) once combined.
    z = camera.focal * camera.height / (row - np.float32(camera.horizon)).clip(0.5, None)
    x = (np.arange(width, dtype=np.float32)[None, :] - camera.center) * z / camera.focal - camera.bend * z * z
    joint = ((z % 1.0 < 0.08) | (x % 0.8 < 0.06)) & (label == street.PAVEMENT) & (z < 18)
    light = np.where(joint, np.float32(0.85), np.float32(1))
    if rng.random() < 0.6:
        shade = Image.new("L", (width, height))
        draw, side = ImageDraw.Draw(shade), rng.choice([-1, 1])
        for start in np.arange(rng.uniform(1, 6), 50, rng.uniform(6, 16)).tolist():
            reach = rng.uniform(-2, 4)
            cast = [
                (side * 9, 0, start),
                (side * -reach, 0, start + 2),
                (side * -reach, 0, start + 5),
                (side * 9, 0, start + 4),
            ]
            draw.polygon(quad(camera, cast), fill=255)
        shadow = np.asarray(shade.filter(ImageFilter.GaussianBlur(1.5)), dtype=np.float32) / 255
        on_ground = (label == street.ROAD) | (label == street.PAVEMENT)
        light = light * (1 - np.float32(rng.uniform(0.25, 0.5)) * shadow * on_ground)
    return light
