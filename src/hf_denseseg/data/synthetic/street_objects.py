"""Objects of an embedded street scene: each function draws one object on the image and on the label map.

Positions are in meters: `x` to the right, `z` ahead. The order of the random draws is part of the dataset: changing it
changes every scene.
"""

import math

import numpy as np

from hf_denseseg.data.ignore_index import IGNORE_INDEX
from hf_denseseg.data.synthetic.perspective import Camera, Canvas, Rgb, pick, quad, scaled

ROAD, PAVEMENT, BUILDING, FENCE, POLE, SIGN, VEGETATION, SKY, PERSON, RIDER, CAR = range(11)

# fmt: off
WALLS: list[Rgb] = [
    (150, 120, 100), (180, 165, 145), (125, 75, 60), (165, 160, 160), (200, 190, 165), (110, 105, 105), (170, 140, 95),
]
CLOTHES: list[Rgb] = [(40, 45, 60), (140, 40, 40), (60, 90, 140), (190, 180, 170), (60, 60, 55), (200, 150, 60)]
PAINTS: list[Rgb] = [
    (30, 30, 35), (200, 200, 205), (130, 135, 140), (150, 30, 30), (35, 60, 130), (230, 230, 225), (70, 85, 70),
]
# fmt: on
SKIN: list[Rgb] = [(215, 170, 140), (150, 105, 80), (95, 65, 50)]


def draw_building(
    canvas: Canvas, camera: Camera, rng: np.random.Generator, x: float, z: float, length: float, light: float
) -> None:
    """A house whose front runs along the road from `z` to `z + length`, at the lateral position `x`."""
    height, wall = rng.uniform(5, 20), scaled(pick(rng, WALLS), light)
    side = math.copysign(1.0, x)
    # Gable (towards the camera), roof, front along the road, then details on the front without a class of their own.
    gable = [(x, 0, z), (x + side * 14, 0, z), (x + side * 14, height, z), (x, height, z)]
    canvas.polygon(quad(camera, gable), scaled(wall, 0.75), BUILDING, z)
    if rng.random() < 0.4:  # pitched roof
        ridge = [(x, height, z), (x + side * 14, height, z), (x + side * 7, height + 4, z)]
        canvas.polygon(quad(camera, ridge), scaled(wall, 0.6), BUILDING, z)
    end = z + length
    front = [(x, 0, z), (x, 0, end), (x, height, end), (x, height, z)]
    canvas.polygon(quad(camera, front), wall, BUILDING, z)
    eaves = [(x, height - 0.4, z), (x, height - 0.4, end), (x, height, end), (x, height, z)]
    canvas.polygon(quad(camera, eaves), scaled(wall, 0.7), None, z)
    if rng.random() < 0.5:  # shop on the ground floor
        shop = [(x, 0.4, z + 0.5), (x, 0.4, end - 0.5), (x, 2.8, end - 0.5), (x, 2.8, z + 0.5)]
        canvas.polygon(quad(camera, shop), pick(rng, [(50, 55, 60), (90, 70, 50)]), None, z)
    glass = pick(rng, [(60, 70, 85), (35, 40, 48), (150, 165, 180)], 10)
    columns, wide = max(1, int(length / rng.uniform(2.6, 4.0))), rng.uniform(0.35, 0.65)
    for floor in range(1, int(height / 3)):
        for column in range(columns):
            start = z + (column + 0.5 - wide / 2) * length / columns
            stop = start + wide * length / columns
            low, high = floor * 3 + 0.8, floor * 3 + 2.3
            if camera.focal / start * wide * length / columns > 1 and camera(x, low, start)[1] > 0:
                window = [(x, low, start), (x, low, stop), (x, high, stop), (x, high, start)]
                canvas.polygon(quad(camera, window), scaled(glass, rng.uniform(0.8, 1.3)), None, z)


def draw_tree(canvas: Canvas, camera: Camera, rng: np.random.Generator, x: float, z: float) -> None:
    """A trunk and a crown of many overlapping leaves."""
    scale, height = camera.focal / z, rng.uniform(3.5, 9)
    foot, fork = camera(x, 0, z), camera(x, height * 0.55, z)
    canvas.line([foot, fork], scale * rng.uniform(0.2, 0.4), (75, 60, 45), VEGETATION, z)
    green = pick(rng, [(60, 95, 45), (85, 110, 50), (45, 75, 45), (130, 110, 45)], 10)
    radius = height * rng.uniform(0.25, 0.38) * scale
    middle = camera(x, height * 0.75, z)
    leaves = 26 if radius > 8 else 9  # fewer where the crown is only a few pixels wide
    for step, (turn, reach, size) in enumerate(rng.random((leaves, 3)).tolist()):
        turn, reach, size = 2 * math.pi * turn, radius * math.sqrt(reach), radius * (0.2 + 0.25 * size)
        center = middle[0] + reach * math.cos(turn), middle[1] + 1.1 * reach * math.sin(turn)
        brightness = 0.75 + 0.5 * step / leaves - 0.25 * (center[1] - middle[1]) / max(radius, 1)
        canvas.ellipse(*center, size, size * 0.8, scaled(green, brightness), VEGETATION, z)


def draw_hedge(canvas: Canvas, camera: Camera, rng: np.random.Generator, x: float, z: float, length: float) -> None:
    """A hedge along the road."""
    green, height = pick(rng, [(50, 80, 40), (75, 100, 45)], 10), rng.uniform(0.7, 1.8)
    side = math.copysign(1.0, x)
    near = [(x, 0, z), (x + side, 0, z), (x + side, height, z), (x, height, z)]
    canvas.polygon(quad(camera, near), scaled(green, 0.8), VEGETATION, z)
    front = [(x, 0, z), (x, 0, z + length), (x, height, z + length), (x, height, z)]
    canvas.polygon(quad(camera, front), green, VEGETATION, z)
    for _ in range(14):
        at = z + rng.random() * length
        spot, size = camera(x, height * rng.random(), at), camera.focal / at * 0.25
        canvas.ellipse(*spot, size, size, scaled(green, rng.uniform(0.7, 1.3)), VEGETATION, at)


def draw_pole(canvas: Canvas, camera: Camera, rng: np.random.Generator, x: float, z: float) -> None:
    """A lamp post, or the mast of a traffic light."""
    scale, height = camera.focal / z, rng.uniform(3.5, 8)
    metal = pick(rng, [(95, 100, 100), (60, 65, 65), (140, 140, 135)], 10)
    top = camera(x, height, z)
    canvas.line([camera(x, 0, z), top], scale * rng.uniform(0.12, 0.22), metal, POLE, z)
    inward = -math.copysign(1.0, x)
    if rng.random() < 0.5:
        arm = camera(x + inward * rng.uniform(0.8, 2.0), height + 0.2, z)
        canvas.line([top, arm], scale * 0.1, metal, POLE, z)
        canvas.ellipse(*arm, scale * 0.35, scale * 0.14, (225, 222, 205), POLE, z)
    elif rng.random() < 0.6:
        left, up = camera(x - 0.22, 3.4, z)
        right, down = camera(x + 0.22, 2.3, z)
        canvas.polygon([(left, up), (right, up), (right, down), (left, down)], (35, 38, 36), SIGN, z)
        lit, lamps = rng.integers(3), [(230, 60, 50), (240, 190, 60), (70, 220, 120)]
        for lamp in range(3):
            y = up + (lamp + 0.5) * (down - up) / 3
            color: Rgb = lamps[lamp] if lamp == lit else (60, 55, 50)
            canvas.ellipse((left + right) / 2, y, scale * 0.13, scale * 0.13, color, None, z)


def draw_sign(canvas: Canvas, camera: Camera, rng: np.random.Generator, x: float, z: float) -> None:
    """A traffic sign on its post: round, triangular or a board."""
    scale, height = camera.focal / z, rng.uniform(1.9, 2.8)
    canvas.line([camera(x, 0, z), camera(x, height, z)], scale * 0.08, (130, 132, 132), POLE, z)
    u, v = camera(x, height, z)
    r = scale * rng.uniform(0.32, 0.5)
    red, blue = pick(rng, [(190, 35, 35)], 8), pick(rng, [(35, 80, 165), (30, 110, 70)], 8)
    form = rng.integers(4)
    if form == 0:
        canvas.ellipse(u, v, r, r, red, SIGN, z)
        canvas.ellipse(u, v, r * 0.65, r * 0.65, (235, 235, 230), None, z)
    elif form == 1:
        canvas.polygon([(u, v - r), (u + r, v + 0.75 * r), (u - r, v + 0.75 * r)], red, SIGN, z)
        canvas.polygon(
            [(u, v - 0.5 * r), (u + 0.5 * r, v + 0.5 * r), (u - 0.5 * r, v + 0.5 * r)], (238, 236, 228), None, z
        )
    elif form == 2:
        canvas.ellipse(u, v, r, r, blue, SIGN, z)
        canvas.polygon(
            [(u, v - 0.6 * r), (u + 0.5 * r, v + 0.3 * r), (u - 0.5 * r, v + 0.3 * r)], (240, 240, 240), None, z
        )
    else:
        wide = r * rng.uniform(1.0, 2.4)
        canvas.polygon([(u - wide, v - r), (u + wide, v - r), (u + wide, v + r), (u - wide, v + r)], blue, SIGN, z)
        canvas.line([(u - 0.7 * wide, v), (u + 0.7 * wide, v)], r * 0.25, (240, 240, 240), None, z)


def draw_fence(canvas: Canvas, camera: Camera, rng: np.random.Generator, x: float, z: float, length: float) -> None:
    """Posts, bars and rails along the road; the complete panel is labeled as fence."""
    height, color = rng.uniform(0.9, 1.6), pick(rng, [(110, 85, 60), (80, 85, 85), (190, 190, 185)], 12)
    end = z + length
    if rng.random() < 0.35:  # boards without gaps
        panel = [(x, 0, z), (x, 0, end), (x, height, end), (x, height, z)]
        canvas.polygon(quad(camera, panel), scaled(color, 0.85), FENCE, z)
    else:
        panel = [(x, 0.1, z), (x, 0.1, end), (x, height, end), (x, height, z)]
        canvas.polygon(quad(camera, panel), scaled(color, 0.45), FENCE, z)
    for y in (0.15, height):
        canvas.line([camera(x, y, z), camera(x, y, end)], camera.focal / z * 0.07, color, FENCE, z)
    for at in np.arange(z, end, max(0.35, z * 0.03)):
        foot, tip = camera(x, 0, at), camera(x, height, at)
        canvas.line([foot, tip], camera.focal / at * 0.06, scaled(color, rng.uniform(0.85, 1.15)), FENCE, float(at))


def draw_car(canvas: Canvas, camera: Camera, rng: np.random.Generator, x: float, z: float, oncoming: bool) -> None:
    """A car along the road: lower body, cabin, panes, wheels, lamps."""
    paint = pick(rng, PAINTS, 12)
    wide, long, tall = rng.uniform(0.8, 0.95), rng.uniform(3.6, 4.8), rng.uniform(1.35, 1.6)
    if rng.random() < 0.15:  # van
        wide, long, tall = 1.0, 5.5, 2.4
    scale, waist, sill = camera.focal / z, tall * 0.6, 0.28
    left, right, back = x - wide, x + wide, z + long
    # The visible side: the left one if the car is to the right of the camera, else the right one.
    flank = left if camera(x, 0, z)[0] > camera.center + camera.focal * camera.bend * z else right
    inset = math.copysign(0.12, x - flank)  # the cabin is narrower than the body
    # From back to front: shadowed ground, visible side with cabin and wheels, then rear or front with roof and lamps.
    wheel_face = [(left, 0, z), (right, 0, z), (right, 0, back), (left, 0, back)]
    canvas.polygon(quad(camera, wheel_face), (25, 25, 27), CAR, z)
    side = [(flank, sill, z), (flank, sill, back), (flank, waist, back), (flank, waist, z)]
    canvas.polygon(quad(camera, side), scaled(paint, 0.75), CAR, z)
    pillar = flank + inset
    cabin = [(pillar, waist, z + 0.5), (pillar, waist, back - 1), (pillar, tall, back - 1.5), (pillar, tall, z + 0.9)]
    canvas.polygon(quad(camera, cabin), scaled(paint, 0.6), CAR, z)
    pane = [(pillar, waist, z + 0.9), (pillar, waist, back - 1.4), (pillar, tall - 0.1, back - 1.8)]
    canvas.polygon(quad(camera, [*pane, (pillar, tall - 0.1, z + 1.1)]), (45, 52, 60), None, z)
    for at in (z + 0.7, back - 0.8):
        u, v = camera(flank, 0.3, at)
        size = camera.focal / at * 0.32
        canvas.ellipse(u, v, size * 0.55, size, (22, 22, 24), CAR, at)
    canvas.polygon(
        quad(camera, [(left, sill, z), (right, sill, z), (right, waist, z), (left, waist, z)]), paint, CAR, z
    )
    roof = [
        (left + 0.1, waist, z),
        (right - 0.1, waist, z),
        (right - 0.25, tall, z + 0.7),
        (left + 0.25, tall, z + 0.7),
    ]
    canvas.polygon(quad(camera, roof), scaled(paint, 0.9), CAR, z)
    glass = [(left + 0.2, waist + 0.04, z), (right - 0.2, waist + 0.04, z)]
    glass += [(right - 0.33, tall - 0.1, z + 0.6), (left + 0.33, tall - 0.1, z + 0.6)]
    canvas.polygon(quad(camera, glass), pick(rng, [(50, 58, 68), (90, 105, 120)], 6), None, z)
    lamp: Rgb = (250, 248, 220) if oncoming else (200, 30, 30)
    for lamp_x in (left + 0.22, right - 0.22):
        canvas.ellipse(*camera(lamp_x, waist - 0.2, z), scale * 0.17, scale * 0.1, lamp, None, z)
        low = [(lamp_x - 0.15, 0, z), (lamp_x + 0.15, 0, z), (lamp_x + 0.15, sill, z), (lamp_x - 0.15, sill, z)]
        canvas.polygon(quad(camera, low), (22, 22, 24), CAR, z)
    plate = [
        (x - 0.25, sill + 0.1, z),
        (x + 0.25, sill + 0.1, z),
        (x + 0.25, sill + 0.24, z),
        (x - 0.25, sill + 0.24, z),
    ]
    canvas.polygon(quad(camera, plate), (225, 222, 200), None, z)


def draw_person(
    canvas: Canvas,
    camera: Camera,
    rng: np.random.Generator,
    x: float,
    z: float,
    class_id: int = PERSON,
    up: float = 0.0,
) -> None:
    """A walking (or, raised by `up` meters, riding) person."""
    tall, scale = rng.uniform(1.5, 1.9), camera.focal / z
    coat, trousers = pick(rng, CLOTHES, 14), pick(rng, CLOTHES[:3] + CLOTHES[4:5], 10)
    stride = rng.uniform(0.05, 0.3)
    hip, shoulder = up + tall * 0.48, up + tall * 0.82
    for foot in (-stride, stride):
        leg = [camera(x + foot * 0.3, hip, z), camera(x + foot, up, z)]
        canvas.line(leg, scale * 0.15, scaled(trousers, 1 + foot), class_id, z)
    body = [(x - 0.17, hip - 0.08, z), (x + 0.17, hip - 0.08, z), (x + 0.22, shoulder, z), (x - 0.22, shoulder, z)]
    canvas.polygon(quad(camera, body), coat, class_id, z)
    for arm in (-1, 1):
        hand = camera(x + arm * rng.uniform(0.22, 0.4), hip, z)
        canvas.line([camera(x + arm * 0.2, shoulder, z), hand], scale * 0.1, scaled(coat, 0.85), class_id, z)
    skin = pick(rng, SKIN, 8)
    u, v = camera(x, up + tall * 0.92, z)
    canvas.ellipse(u, v, scale * 0.1, scale * 0.13, skin, class_id, z)
    canvas.ellipse(
        u, v - scale * 0.05, scale * 0.11, scale * 0.09, pick(rng, [(40, 30, 25), (120, 90, 50)], 10), None, z
    )


def draw_rider(canvas: Canvas, camera: Camera, rng: np.random.Generator, x: float, z: float) -> None:
    """A person on a bicycle, seen from behind or from the side."""
    scale, frame = camera.focal / z, pick(rng, PAINTS, 10)
    if rng.random() < 0.5:
        canvas.line([camera(x, 0, z), camera(x, 0.75, z)], scale * 0.09, (28, 28, 28), RIDER, z)
        canvas.line([camera(x - 0.28, 1.0, z), camera(x + 0.28, 1.0, z)], scale * 0.06, frame, RIDER, z)
    else:
        for wheel in (-0.5, 0.5):
            u, v = camera(x + wheel, 0.34, z)
            canvas.ellipse(u, v, scale * 0.34, scale * 0.34, (30, 30, 30), RIDER, z)
            canvas.ellipse(u, v, scale * 0.26, scale * 0.26, (120, 120, 118), None, z)
        spine = [
            camera(x - 0.5, 0.34, z),
            camera(x - 0.1, 0.85, z),
            camera(x + 0.45, 0.85, z),
            camera(x + 0.5, 0.34, z),
        ]
        canvas.line(spine, scale * 0.07, frame, RIDER, z)
    draw_person(canvas, camera, rng, x, z, RIDER, up=0.3)


def draw_ignored(canvas: Canvas, camera: Camera, rng: np.random.Generator, x: float, z: float) -> None:
    """A bin, crate or heap, which belongs to no class: ignored."""
    wide, tall = rng.uniform(0.25, 0.6), rng.uniform(0.6, 1.4)
    color = pick(rng, [(70, 75, 70), (120, 95, 60), (90, 60, 110), (50, 90, 60)])
    box = [(x - wide, 0, z), (x + wide, 0, z), (x + wide, tall, z), (x - wide, tall, z)]
    canvas.polygon(quad(camera, box), color, IGNORE_INDEX, z)
    lid = [(x - wide, tall, z), (x + wide, tall, z), (x + wide, tall, z + 0.6), (x - wide, tall, z + 0.6)]
    canvas.polygon(quad(camera, lid), scaled(color, 1.25), IGNORE_INDEX, z)
