"""Number of channels and range of pixel values: one declaration for a dataset and for the checkpoints trained on it.

How bright a stored value is cannot be seen from one file: 4095 may be white in a 12-bit image or almost black in a
16-bit one. So the range is declared once and saved with a checkpoint's image processor, and every file is read by it.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from hf_denseseg.errors import InputError

NAMED_RANGES = {"uint8": (0.0, 255.0), "uint16": (0.0, 65535.0)}
ALPHA_MODES = ("RGBA", "LA", "PA", "RGBa", "La")
UNIT_LIMIT = 100.0  # a range this wide is not that of floating-point images between 0 and 1

Pixels = Image.Image | np.ndarray
"""An image as read: PIL in mode RGB for three channels of 8 bits, else `(H, W, C)` uint8 or uint16."""


@dataclass(frozen=True)
class PixelFormat:
    """Channels of the images, and the stored values that are black and white.

    Args:
        num_channels: from 1 up. Gray images have three equal channels where three are needed.
        pixel_range: `"uint8"` (0 to 255), `"uint16"` (0 to 65535), or `(low, high)`; values beyond `low` and `high`
            are clipped to them, those beyond a named range are an error.

    Raises:
        InputError: fewer than one channel, or no range.
    """

    num_channels: int = 3
    pixel_range: str | tuple[float, float] = "uint8"

    def __post_init__(self) -> None:
        if isinstance(self.num_channels, bool) or not isinstance(self.num_channels, int) or self.num_channels < 1:
            raise InputError(f"num_channels is {self.num_channels!r}: give the number of channels, at least 1.")
        given = self.pixel_range
        if isinstance(given, str) and given in NAMED_RANGES:
            return
        if not isinstance(given, str) and given is not None and len(given) == 2:
            low, high = (float(value) for value in given)
            if np.isfinite(low) and np.isfinite(high) and low < high:
                object.__setattr__(self, "pixel_range", (low, high))
                return
        raise InputError(
            f"pixel_range is {given!r}: give uint8, uint16, or the values that are black and white, such as [0, 4095]."
        )

    @classmethod
    def of_processor(cls, image_processor: Any, **values: Any) -> "PixelFormat":
        """The format that an image processor was saved with, or has with other `values` of its fields.

        The processors of transformers take 8 bits.
        """
        mean = values.get("image_mean") or getattr(image_processor, "image_mean", None)
        channels = len(mean) if isinstance(mean, list | tuple) else 3
        return cls(channels, values.get("pixel_range") or getattr(image_processor, "pixel_range", None) or "uint8")

    @property
    def bounds(self) -> tuple[float, float]:
        """The values that are black and white."""
        return NAMED_RANGES[self.pixel_range] if isinstance(self.pixel_range, str) else self.pixel_range

    @property
    def shown_range(self) -> str:
        """The range as messages and recipes write it."""
        low, high = self.bounds
        return self.pixel_range if isinstance(self.pixel_range, str) else f"[{low:g}, {high:g}]"

    def read(self, raw: Image.Image | np.ndarray, name: str) -> Pixels:
        """Bring an upright image to this format.

        Args:
            raw: PIL image of any mode, or stored values `(H, W, C)`.
            name: of the image, in messages.

        Raises:
            InputError: another number of channels, or values that contradict the range.
        """
        if isinstance(raw, Image.Image):
            if self == RGB_BYTES and raw.mode not in ("I", "F") and not raw.mode.startswith("I;16"):
                return _rgb(raw)
            raw = _stored_values(raw, self.num_channels)
        values = self.scale(_fitting_channels(raw, self.num_channels, name), name)
        return Image.fromarray(values) if self == RGB_BYTES else values

    def scale(self, raw: np.ndarray, name: str) -> np.ndarray:
        """Stored values of any type -> uint8 for the range `"uint8"`, else uint16, whose 65535 is white.

        NaN, with which many files mark missing values, becomes black.

        Raises:
            InputError: values that contradict the range.
        """
        if raw.dtype == np.uint8 and self.pixel_range == "uint8":
            return raw
        low, high = self.bounds
        if raw.dtype.kind not in "uifb":
            raise InputError(f"Image {name} holds values of type {raw.dtype}; numbers are needed.")
        values = np.nan_to_num(raw.astype(np.float64), nan=low, posinf=np.inf, neginf=-np.inf)
        least, most = (float(values.min()), float(values.max())) if values.size else (low, low)
        self._check(raw.dtype, least, most, name)
        white = 255 if self.pixel_range == "uint8" else 65535
        kind = np.uint8 if white == 255 else np.uint16
        return ((values.clip(low, high) - low) * (white / (high - low))).round().astype(kind)

    def _check(self, dtype: np.dtype, least: float, most: float, name: str) -> None:
        low, high = self.bounds
        fix = "Declare the range of the dataset, such as pixel_range: {}; `denseseg data check` reads all images."
        if dtype.kind == "f" and least >= 0 and 0 < most <= 1 and high - low >= UNIT_LIMIT:
            raise InputError(
                f"Image {name} holds floating-point values from {least:g} to {most:g}, but pixel_range is "
                f"{self.shown_range}, in which all of them are black. {fix.format('[0, 1]')}"
            )
        if not isinstance(self.pixel_range, str):
            return
        if least < low or most > high:
            proposed = "uint16" if dtype == np.uint16 else f"[{least:g}, {most:g}]"
            raise InputError(
                f"Image {name} holds values from {least:g} to {most:g}, but pixel_range is {self.shown_range} "
                f"({low:g} to {high:g}). {fix.format(proposed)}"
            )
        if self.pixel_range == "uint16" and dtype == np.uint8:
            raise InputError(
                f"Image {name} has 8 bits, but pixel_range is uint16, in which all of it is black. "
                f"{fix.format('uint8')}"
            )


RGB_BYTES = PixelFormat()
"""Three channels of 8 bits: the format of photographs, and of every checkpoint that does not say otherwise."""


def read_open_image(image: Image.Image, name: str, pixel_format: PixelFormat = RGB_BYTES) -> Pixels:
    """Bring an open PIL image to a format, upright according to its EXIF tag; errors as in `PixelFormat.read`."""
    return pixel_format.read(ImageOps.exif_transpose(image), name)


def as_tensor(image: Pixels | torch.Tensor) -> torch.Tensor:
    """An image as `(C, H, W)` uint8 or uint16."""
    if isinstance(image, torch.Tensor):
        return image
    values = np.array(image)  # a copy: torch warns of arrays that it must not write to
    return torch.from_numpy(values if values.ndim == 3 else values[..., None]).permute(2, 0, 1).contiguous()


def as_shown(image: Pixels | torch.Tensor) -> Image.Image:
    """What a figure shows of an image: its first three channels, or its first in gray, with 8 bits."""
    if isinstance(image, Image.Image):
        return image if image.mode == "RGB" else image.convert("RGB")
    values = image.permute(1, 2, 0).cpu().numpy() if isinstance(image, torch.Tensor) else image
    values = values[..., :3] if values.shape[2] >= 3 else values[..., :1].repeat(3, axis=2)
    if values.dtype == np.uint16:
        values = (values / 257).round().astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(values))


def read_options(image: Pixels) -> dict[str, Any]:
    """What tells an image processor that an image was read already: its type says what is white."""
    if isinstance(image, Image.Image):
        return {}
    return {"pixel_range": image.dtype.name, "input_data_format": "channels_last"}


def height_width(image: Any) -> tuple[int, int]:
    """`(height, width)` of an image as read, or of one that is read window by window."""
    return (image.shape[0], image.shape[1]) if isinstance(image, np.ndarray) else (image.height, image.width)


def resize_pixels(
    image: np.ndarray,
    size: tuple[int, int],
    resample: Image.Resampling,
    box: tuple[float, float, float, float] | None = None,
) -> np.ndarray:
    """Resize `(H, W, C)` numbers channel by channel, as PIL resizes RGB images; integers are rounded.

    Args:
        image: of any number of channels.
        size: `(height, width)` of the result.
        resample: filter.
        box: (left, top, right, bottom) of the part to resize; None is all of it.
    """
    planes = []
    for plane in np.moveaxis(image, 2, 0):
        # Pillow resizes 16-bit planes by the nearest pixel only; float32 holds all their values.
        source = Image.fromarray(plane if plane.dtype == np.uint8 else plane.astype(np.float32))
        resized = np.asarray(source.resize((size[1], size[0]), resample, box=box))
        if plane.dtype != np.uint8 and plane.dtype.kind in "ui":
            resized = resized.round().clip(np.iinfo(plane.dtype).min, np.iinfo(plane.dtype).max)
        planes.append(resized.astype(plane.dtype))
    return np.stack(planes, axis=2)


def _rgb(image: Image.Image) -> Image.Image:
    """Gray, palette, CMYK and other color models -> RGB; a transparent pixel keeps its color."""
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # avoids a warning of Pillow about palette transparency
    return image if image.mode == "RGB" else image.convert("RGB")


def _stored_values(image: Image.Image, num_channels: int) -> np.ndarray:
    """Values `(H, W, C)` of a PIL image; an opacity channel only where it is one of the channels asked for."""
    if image.mode in ALPHA_MODES and len(image.getbands()) != num_channels:
        image = image.convert("RGB" if image.mode in ("RGBA", "RGBa", "PA") else "L")
    elif image.mode not in ("1", "L", "LA", "I", "F", "RGB", "RGBA") and not image.mode.startswith("I;16"):
        image = _rgb(image)
    values = np.asarray(image)
    values = values.astype(np.uint8) * 255 if values.dtype == bool else values
    return values if values.ndim == 3 else values[..., None]


def _fitting_channels(values: np.ndarray, count: int, name: str) -> np.ndarray:
    """Gray <-> three equal channels, and an opaque last channel left out; everything else must have `count`."""
    found = values.shape[2]
    if found == count + 1 and found in (2, 4) and is_opaque(values[..., -1]):
        return values[..., :-1]
    if found == 1 and count == 3:
        return values.repeat(3, axis=2)
    if found == 3 and count == 1 and (values == values[..., :1]).all():
        return values[..., :1]
    if found != count:
        raise InputError(
            f"Image {name} has the wrong number of channels: {found}, but num_channels is {count}. Give num_channels: "
            f"{found}, or images with {count}."
        )
    return values


def is_opaque(plane: np.ndarray) -> bool:
    """Whether every value of a channel is the largest, as opacity of an image without transparent parts is."""
    most = np.iinfo(plane.dtype).max if plane.dtype.kind in "ui" else 1.0
    return bool((plane == most).all())
