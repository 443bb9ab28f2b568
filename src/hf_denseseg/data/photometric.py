"""Brightness, contrast, saturation and hue at random, in the ranges and the order of mmsegmentation."""

import numpy as np
from PIL import Image

BRIGHTNESS = 32  # added, drawn from +-
CONTRAST = (0.5, 1.5)  # factor
SATURATION = (0.5, 1.5)  # factor
HUE = 18  # added, in steps of 2 degrees


def distort(image: Image.Image, rng: np.random.Generator) -> list[np.ndarray]:
    """Distort an RGB picture, each step with probability 1/2; contrast comes first or last by coin.

    Returns:
        The three planes `(H, W)` uint8.
    """
    table: np.ndarray = np.arange(256, dtype=np.float32)
    if rng.random() < 0.5:
        table = _clip(table + rng.uniform(-BRIGHTNESS, BRIGHTNESS))
    contrast_first = rng.random() < 0.5
    contrast = rng.uniform(*CONTRAST) if rng.random() < 0.5 else None
    if contrast is not None and contrast_first:
        table = _clip(table * contrast)
    saturation = rng.uniform(*SATURATION) if rng.random() < 0.5 else None
    hue = int(rng.integers(-HUE, HUE)) if rng.random() < 0.5 else 0
    image = _apply(image, table, 3)
    if saturation is not None or hue:
        ramp = np.arange(256, dtype=np.float32)
        tables = [(ramp + hue / 180 * 255) % 255, _clip(ramp * (saturation or 1.0)), ramp]
        image = image.convert("HSV").point(np.concatenate(tables).round().astype(np.uint8).tolist()).convert("RGB")
    if contrast is not None and not contrast_first:
        image = _apply(image, _clip(np.arange(256, dtype=np.float32) * contrast), 3)
    return [np.asarray(band) for band in image.split()]


def _clip(table: np.ndarray) -> np.ndarray:
    """Keep 0..255 and whole numbers, as 8-bit pictures do between the steps."""
    return table.clip(0, 255).astype(np.uint8).astype(np.float32)


def _apply(image: Image.Image, table: np.ndarray, bands: int) -> Image.Image:
    return image.point(table.astype(np.uint8).tolist() * bands)
