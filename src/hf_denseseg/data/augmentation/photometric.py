"""Random brightness, contrast, saturation and hue, with the ranges and the order of mmsegmentation or of HFGD."""

from collections.abc import Callable

import numpy as np
from PIL import Image

from hf_denseseg.data.reading.pixels import Pixels

BRIGHTNESS = 32  # added, drawn from -32 to 32
CONTRAST = (0.5, 1.5)  # factor
SATURATION = (0.5, 1.5)  # factor
HUE = 18  # added, in steps of 2 degrees
NARROW = (0.75, 1.25)  # factor of contrast and saturation in HFGD
NARROW_HUE = 36.0  # degrees, 0.1 of the hue circle
_ROWS = 128  # rows processed at once, so that the intermediate planes stay in the CPU cache
_DEGREES = 60  # per sector of the hue circle
_STEPS = 7  # fractional bits of a hue shift, in sectors

Planes = list[np.ndarray]


def distort(image: Image.Image, rng: np.random.Generator) -> Planes:
    """Distort an RGB image, each step with probability 1/2; contrast comes either before or after saturation and hue.

    Random numbers: brightness, order, contrast, saturation, hue; a value is drawn only if its step applies.

    Returns:
        The three planes `(H, W)` uint8.
    """
    # Brightness and contrast act on each value alone: they are joined in look-up tables (256,), one applied
    # before and one after saturation and hue, which need all three channels.
    ramp = np.arange(256, dtype=np.float32)
    first = _brightness_table(rng)
    contrast_first = rng.random() < 0.5
    contrast = rng.uniform(*CONTRAST) if rng.random() < 0.5 else 1.0
    if contrast_first:
        first = _clip(first * contrast)
    saturation = rng.uniform(*SATURATION) if rng.random() < 0.5 else 1.0
    degrees = 2 * int(rng.integers(-HUE, HUE)) if rng.random() < 0.5 else 0
    last = ramp if contrast_first else _clip(ramp * contrast)
    if saturation == 1.0 and degrees == 0:  # nothing in between: one table is enough
        first, last = last[first.astype(np.uint8)], ramp
    planes = [np.asarray(band) for band in _apply(image, first).split()]
    if saturation != 1.0 or degrees:
        planes = shift_hue_saturation(planes, degrees, saturation)
    if last is not ramp:
        planes = [np.asarray(_apply(Image.fromarray(plane), last)) for plane in planes]
    return planes


def distort_brightness(image: Image.Image, rng: np.random.Generator) -> Planes:
    """Change only the brightness of an RGB image, by up to 32, with probability 1/2 (HFGD's plain setting)."""
    table = _brightness_table(rng)
    return [np.asarray(band) for band in _apply(image, table).split()]


def distort_like_car(image: Image.Image, rng: np.random.Generator) -> Planes:
    """Brightness, contrast and saturation, each with probability 1/2, then always the hue (HFGD's advanced setting).

    Contrast is scaled around the mean of each channel, as in TensorFlow. The mean is that of the crop; the authors
    use the mean of the image before cropping.
    """
    table = _brightness_table(rng)
    tables = [table, table, table]
    if rng.random() < 0.5:
        factor = rng.uniform(*NARROW)
        counts = np.array(image.histogram()).reshape(3, 256)
        means = counts @ table / counts.sum(axis=1)
        tables = [_clip(mean + (table - mean) * factor) for mean in means]
    saturation = rng.uniform(*NARROW) if rng.random() < 0.5 else 1.0
    changed = image.point(np.concatenate(tables).astype(np.uint8).tolist())
    planes = [np.asarray(band) for band in changed.split()]
    return shift_hue_saturation(planes, rng.uniform(-NARROW_HUE, NARROW_HUE), saturation)


def _brightness_table(rng: np.random.Generator) -> np.ndarray:
    ramp = np.arange(256, dtype=np.float32)
    return _clip(ramp + rng.uniform(-BRIGHTNESS, BRIGHTNESS)) if rng.random() < 0.5 else ramp


PHOTOMETRIC: dict[str, Callable[[Image.Image, np.random.Generator], Planes]] = {
    "mmsegmentation": distort,
    "car": distort_like_car,
    "brightness": distort_brightness,
}
"""Styles of color distortion, by their names in recipes."""


def distorted(
    image: Pixels, distort: Callable[[Image.Image, np.random.Generator], Planes] | None, rng: np.random.Generator
) -> Planes:
    """Distort the first three channels, or the only one as gray, and leave further channels as they are.

    Two channels are no colors and stay as they are. Of 16 bits the upper ones are distorted; what the rounding to 8
    bits leaves is added again.

    Args:
        image: PIL in mode RGB, or `(H, W, C)` uint8 or uint16.
        distort: one of `PHOTOMETRIC`; None changes nothing.
        rng: random numbers.

    Returns:
        The planes `(H, W)` of all channels.
    """
    if isinstance(image, Image.Image):
        return [np.asarray(band) for band in image.split()] if distort is None else distort(image, rng)
    planes = list(np.moveaxis(image, 2, 0))
    if distort is None or len(planes) == 2:
        return planes
    count = min(len(planes), 3)
    colors = image[..., :count]
    upper = colors if colors.dtype == np.uint8 else ((colors.astype(np.uint32) + 128) // 257).astype(np.uint8)
    changed = distort(Image.fromarray(np.ascontiguousarray(upper if count == 3 else upper.repeat(3, axis=2))), rng)
    for index in range(count):
        planes[index] = changed[index]
        if colors.dtype == np.uint16:
            rest = colors[..., index].astype(np.int32) - 257 * upper[..., index].astype(np.int32)  # -128 to 128
            planes[index] = (257 * changed[index].astype(np.int32) + rest).clip(0, 65535).astype(np.uint16)
    return planes


def shift_hue_saturation(planes: Planes, degrees: float, saturation: float) -> Planes:
    """Shift the hue and scale the saturation of HSV, keeping the value; equal to a conversion to HSV up to rounding.

    On the hue hexagon, a channel c is V - C + clip(U, 0, C), where V is the largest channel, C the chroma, and U falls
    linearly with the distance from the channel's own hue; a hue shift adds to U or subtracts from it. So the hue is
    never computed, and 16-bit integers are enough.

    Args:
        planes: red, green, blue `(H, W)` uint8.
        degrees: -60 < degrees < 60.
        saturation: factor; the saturation is clipped at 1.
    """
    result = [np.empty_like(plane) for plane in planes]
    turn = np.int16(round(degrees / _DEGREES * (1 << _STEPS)))
    for start in range(0, len(planes[0]), _ROWS):
        rows = slice(start, start + _ROWS)
        red, green, blue = (plane[rows] for plane in planes)
        top = np.maximum(np.maximum(red, green), blue)
        chroma = top - np.minimum(np.minimum(red, green), blue)
        # Distances of the channels from the value: V - c.
        below = _turned(red, green, blue, chroma, turn) if turn else [top - red, top - green, top - blue]
        if saturation != 1.0:
            scale = _saturation_scale(top, chroma, saturation)
            below = [(distance * scale).astype(np.uint8) for distance in below]
        for target, distance in zip(result, below, strict=True):
            np.subtract(top, distance, out=target[rows])
    return result


def _turned(red: np.ndarray, green: np.ndarray, blue: np.ndarray, chroma: np.ndarray, turn: np.int16) -> Planes:
    """V - c of each channel after the hue shift, uint8."""
    channels = [plane.astype(np.int16) for plane in (red, green, blue)]
    limit = chroma.astype(np.int16)
    move = (limit * turn + np.int16(1 << (_STEPS - 1))) >> _STEPS
    differences = [channels[k] - channels[(k + 1) % 3] for k in range(3)]  # r - g, g - b, b - r
    below = []
    for k in range(3):
        to_next, from_last, opposite = differences[k], differences[k - 1], differences[(k + 1) % 3]
        rise = to_next - from_last
        np.maximum(rise, to_next, out=rise)
        np.maximum(rise, -from_last, out=rise)  # U = max(a, b, a + b); a, b: differences to the other channels
        side = opposite >> 15  # -1 where the hue comes before the channel's own, else 0
        rise -= (move ^ side) - side
        np.clip(rise, 0, limit, out=rise)
        below.append((limit - rise).astype(np.uint8))
    return below


def _saturation_scale(top: np.ndarray, chroma: np.ndarray, saturation: float) -> np.ndarray | np.float32:
    """Factor of V - c: the saturation factor, reduced where the chroma would exceed the value."""
    if saturation <= 1:
        return np.float32(saturation)
    return np.minimum(np.float32(saturation), top / np.maximum(chroma, np.uint8(1)).astype(np.float32))


def _clip(table: np.ndarray) -> np.ndarray:
    """Clip to 0..255 and truncate to integers, as 8-bit images do between the steps."""
    return table.clip(0, 255).astype(np.uint8).astype(np.float32)


def _apply(image: Image.Image, table: np.ndarray) -> Image.Image:
    return image.point(table.astype(np.uint8).tolist() * len(image.getbands()))
