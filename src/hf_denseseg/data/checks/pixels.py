"""What the images of a dataset store, and the `num_channels` and `pixel_range` that fit all of them."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from hf_denseseg.data.reading.pixels import ALPHA_MODES, PixelFormat, Pixels, is_opaque

_BITS = (8, 10, 12, 14)  # depths of sensors whose values are stored in 16 bits


@dataclass
class PixelSurvey:
    """Stored channels, types and values, and mean and deviation of what was read.

    Args:
        channels: number of stored channels, and whether the last one is opacity -> number of images.
        types: numpy type -> number of images.
        least: smallest stored value.
        most: largest stored value.
    """

    channels: Counter[tuple[int, bool]] = field(default_factory=Counter)
    types: Counter[str] = field(default_factory=Counter)
    least: float = np.inf
    most: float = -np.inf
    _sums: np.ndarray | None = None  # (3, C): pixels, sum and sum of squares of each channel

    def add_stored(self, stored: Image.Image | np.ndarray) -> None:
        """Note what a file stores."""
        values = np.asarray(stored)
        values = values if values.ndim == 3 else values[..., None]
        mode = stored.mode if isinstance(stored, Image.Image) else ""
        opacity = mode in ALPHA_MODES or (not mode and values.shape[2] in (2, 4) and is_opaque(values[..., -1]))
        self.channels[3 if mode in ("P", "CMYK") else values.shape[2], opacity] += 1
        self.types["uint8" if values.dtype == bool else values.dtype.name] += 1
        if values.size and values.dtype != np.uint8:
            finite = values[np.isfinite(values)] if values.dtype.kind == "f" else values
            if finite.size:
                self.least, self.most = min(self.least, float(finite.min())), max(self.most, float(finite.max()))

    def add_read(self, image: Pixels) -> None:
        """Add an image as read to mean and deviation."""
        if isinstance(image, Image.Image):
            counts = np.array(image.histogram(), dtype=np.float64).reshape(-1, 256)  # (C, 256)
            levels = np.arange(256) / 255
            sums = np.stack([counts.sum(1), counts @ levels, counts @ levels**2])
        else:
            values = image.reshape(-1, image.shape[2]) / np.iinfo(image.dtype).max
            sums = np.stack([np.full(values.shape[1], len(values)), values.sum(0), (values**2).sum(0)])
        self._sums = sums if self._sums is None else self._sums + sums

    def statistics(self) -> dict[str, list[float]]:
        """`image_mean` and `image_std` of each channel, black is 0 and white 1; empty without images."""
        if self._sums is None:
            return {}
        count, total, squares = self._sums
        mean = total / count
        deviation = np.sqrt(np.maximum(squares / count - mean**2, 0))
        return {"image_mean": mean.round(4).tolist(), "image_std": deviation.round(4).tolist()}

    def note(self, declared: PixelFormat) -> str | None:
        """A proposal, unless what is declared fits everything that was stored."""
        keys = self.keys(declared)
        if not keys and not self._misread(declared):
            return None
        stored = ", ".join(f"{count} images of {name}" for name, count in self.types.most_common())
        values = "" if self.least > self.most else f", values from {self.least:g} to {self.most:g}"
        counts = ", ".join(f"{count} with {number} channels" for (number, _), count in self.channels.most_common())
        if not keys:
            return f"The images have different numbers of channels ({counts}): a dataset has one. {stored}{values}."
        shown = (f"{key}: {_shown(value)}" for key, value in keys.items())
        return f"Stored are {stored}, {counts}{values}. Keys that fit all of them: {', '.join(shown)}."

    def keys(self, declared: PixelFormat) -> dict[str, Any]:
        """`num_channels` and `pixel_range` as recipes take them, as far as what is stored needs others than declared.

        Empty where the images have different numbers of channels.
        """
        channels = self._misread(declared)
        if len(channels) > 1 or (channels and len(self.channels) > 1):
            return {}
        keys: dict[str, Any] = {"num_channels": channels.pop()} if channels else {}
        if self.channels and (fitting := self._fitting_range(declared)) is not None:
            keys["pixel_range"] = fitting
        return keys

    def _misread(self, declared: PixelFormat) -> set[int]:
        """Stored numbers of channels that are not read as declared."""
        return {count for count, opacity in self.channels if not _reads(count, opacity, declared.num_channels)}

    def _fitting_range(self, declared: PixelFormat) -> str | list[float] | None:
        """Range of what is stored; None where the declared one fits."""
        low, high = declared.bounds
        floating = any(name.startswith("float") for name in self.types)
        fits = self.least > self.most or (low <= self.least and self.most <= high)
        in_unit = floating and 0 <= self.least <= self.most <= 1
        if declared.pixel_range == "uint16" and "uint8" in self.types:
            return "uint8" if set(self.types) == {"uint8"} else [0, 255]
        if fits and not (in_unit and high > 1):
            return None
        if in_unit:
            return [0, 1]
        if floating or self.least < 0:
            return [self.least, self.most]
        bits = next((bits for bits in _BITS if self.most < 2**bits), None)
        return "uint16" if bits is None else [0, 2**bits - 1]


def _shown(value: Any) -> str:
    return f"[{', '.join(f'{each:g}' for each in value)}]" if isinstance(value, list) else str(value)


def _reads(stored: int, opacity: bool, declared: int) -> bool:
    """Whether images of `stored` channels are read as `declared`."""
    possible = (stored, stored - 1) if opacity else (stored,)
    return any(count == declared or {count, declared} == {1, 3} for count in possible)
