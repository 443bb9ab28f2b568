"""What a checkpoint's image processor does to an image, and the views of it that a protocol asks for."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import nn
from torchvision.transforms.v2.functional import pil_to_tensor, resize

from hf_denseseg.data.image_sizes import fit_factor, scaled_size
from hf_denseseg.data.reading.georeferenced import Raster
from hf_denseseg.data.reading.pixels import RGB_BYTES, PixelFormat, as_tensor
from hf_denseseg.inference.settings import InferenceSettings
from hf_denseseg.inference.sliding_window import Size, pad_right_and_bottom, padded_size, size_of

Source = torch.Tensor | Image.Image | Raster
"""An image `(C, H, W)` in memory, or one of which only windows become tensors."""


class Preprocessing(NamedTuple):
    """What a checkpoint's image processor does to an image: training, evaluation and prediction all use this.

    Args:
        mean: channel means of images scaled to 0..1.
        std: channel deviations of the same.
        base_size: (short, long) limit of a resize that keeps the ratio; None is no resize.
        pixel_format: channels and range of the images.
        is_bgr: whether the model takes the channels in the order blue, green, red (MobileViT), as `mean` and `std` do.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    base_size: Size | None = None
    pixel_format: PixelFormat = RGB_BYTES
    is_bgr: bool = False

    @classmethod
    def from_image_processor(cls, image_processor: Any) -> "Preprocessing":
        """Read mean, deviation and size; of a fixed `height` and `width` the smaller becomes the short side."""
        # `pixel * factor` equals `pixel / 255 * gain`; the gain is folded into mean and deviation.
        gain = 255 * image_processor.rescale_factor if image_processor.do_rescale else 255.0
        pixel_format = PixelFormat.of_processor(image_processor)
        mean, std = (0.0,) * pixel_format.num_channels, (1.0,) * pixel_format.num_channels
        if image_processor.do_normalize:
            mean, std = tuple(image_processor.image_mean), tuple(image_processor.image_std)
        base_size = None
        if image_processor.do_resize:
            size = dict(image_processor.size)
            short = size.get("shortest_edge") or min(size["height"], size["width"])
            base_size = (short, size.get("longest_edge") or 4 * short)
        mean, std = (tuple(value / gain for value in values) for values in (mean, std))
        is_bgr = bool(getattr(image_processor, "do_flip_channel_order", False))
        return cls(mean, std, base_size, pixel_format, is_bgr)

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON values."""
        return {**self._asdict(), "pixel_format": asdict(self.pixel_format)}

    @property
    def mean_color(self) -> tuple[float, ...]:
        """`mean` in the order of the channels of an image as read."""
        return self.mean[::-1] if self.is_bgr else self.mean

    def normalize(self, pixels: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """uint8 or uint16 `(..., C, H, W)` -> what the model is given, computed in float32 on their device."""
        pixels = pixels.flip(-3) if self.is_bgr else pixels
        mean, std = (torch.tensor(each, device=pixels.device).view(-1, 1, 1) for each in (self.mean, self.std))
        return ((pixels.float() / torch.iinfo(pixels.dtype).max - mean) / std).to(dtype)

    def bytes_of(self, values: torch.Tensor) -> torch.Tensor:
        """The uint8 pixels that `normalize` made these values from; what was padded with 0 becomes the mean color."""
        mean, std = (torch.tensor(each, device=values.device).view(-1, 1, 1) for each in (self.mean, self.std))
        pixels = ((values.float() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
        return pixels.flip(-3) if self.is_bgr else pixels


def view_size(size: Size, scale: float, settings: InferenceSettings) -> Size:
    """Size of one scale: the ratio is kept inside `scale * base_size` (its short and long limit, in any order).

    Without a base size the image's own size is multiplied. With `raise_short_side` a short side below the window's is
    raised to it, the ratio still kept; if there are several scales, the long limit does not count (SETR). With
    `keep_odd` each side of what scale 1 gives is scaled by itself, its even part only, so that 513 becomes 257 (HFGD).
    """
    if settings.keep_odd and scale != 1:
        height, width = view_size(size, 1.0, settings)
        return _scale_even_part(height, scale), _scale_even_part(width, scale)
    factor = scale
    if settings.base_size:
        short, long = sorted(int(limit * scale) for limit in settings.base_size)
        unlimited = settings.raise_short_side and len(settings.scales) > 1
        factor = fit_factor(size, short, math.inf if unlimited else long)
    if settings.raise_short_side:  # a window of the full size fits into the view then
        factor = max(factor, min(settings.window()[0]) / min(size))
    return scaled_size(size, factor)


def _scale_even_part(length: int, scale: float) -> int:
    odd = length % 2
    return max(int(scale * (length - odd)) + odd, 1)


class View(NamedTuple):
    """An image at one scale, perhaps flipped, of which a model is given windows.

    Args:
        image: uint8 or uint16 `(C, h, w)`, a PIL image or a raster; it may stay where it is, for windows are moved
            one by one.
        flipped: whether the model sees it flipped from left to right.
        preprocessing: of the checkpoint.
        weight: any weight of the model; decides device and dtype of the windows.
    """

    image: Source
    flipped: bool
    preprocessing: Preprocessing
    weight: torch.Tensor

    @property
    def size(self) -> Size:
        """`(height, width)`."""
        return size_of(self.image)

    def window(self, y: int, x: int, size: Size) -> torch.Tensor:
        """Normalized pixels `(1, C, h, w)`, 0 beyond the right and the lower edge."""
        height, width = self.size
        bottom, left, right = min(y + size[0], height), x, min(x + size[1], width)
        if self.flipped:  # the window at x shows the columns that lie as far from the right edge
            left, right = width - right, width - left
        if isinstance(self.image, Image.Image):
            pixels = pil_to_tensor(self.image.crop((left, y, right, bottom)))
        elif isinstance(self.image, Raster):
            pixels = as_tensor(self.image.window(y, left, bottom, right))
        else:
            pixels = self.image[:, y:bottom, left:right]
        values = self.preprocessing.normalize(pixels.to(self.weight.device), self.weight.dtype)[None]
        return pad_right_and_bottom(values.flip(-1) if self.flipped else values, size)


def views(
    model: nn.Module, image: Source, settings: InferenceSettings, preprocessing: Preprocessing
) -> Iterator[View]:
    """Each scale of an image, and each flipped too with `flip`.

    Args:
        model: decides device and dtype of what it is given.
        image: uint8 or uint16 `(C, H, W)`, moved to the model's device at once; or a large PIL image or
            a raster, which stay where they are.
        settings: test protocol.
        preprocessing: of the checkpoint.
    """
    weight = next(model.parameters(), torch.empty(0))  # a model without parameters runs on the CPU in float32
    image = image.to(weight.device) if isinstance(image, torch.Tensor) else image
    canvas = canvas_size(size_of(image), settings)
    if canvas != size_of(image):
        image = pad_with_mean(_loaded(image), canvas, preprocessing.mean_color)
    for scale in settings.scales:
        view = View(resized(image, view_size(canvas, scale, settings)), False, preprocessing, weight)
        yield view
        if settings.flip:
            yield view._replace(flipped=True)


def canvas_size(size: Size, settings: InferenceSettings) -> Size:
    """Size that an image is padded to before it is resized: with `pad_to_window` and without windows the window's."""
    return padded_size(size, settings) if settings.mode == "whole" else size


def _loaded(image: Source) -> torch.Tensor:
    """All pixels `(C, H, W)`; a raster is read at once."""
    return as_tensor(image.load() if isinstance(image, Raster) else image)


def resized(image: Source, size: Size) -> Source:
    """An image at another size; antialiased and in integers, so that it is what the image processors make of it."""
    if size == size_of(image):
        return image
    pixels = _loaded(image)
    if pixels.dtype == torch.uint8:
        return resize(pixels, list(size), antialias=True)
    return resize(pixels.float(), list(size), antialias=True).round_().clamp_(0, 65535).to(pixels.dtype)


def pad_with_mean(image: torch.Tensor, size: Size, mean: Sequence[float]) -> torch.Tensor:
    """`(C, H, W)`, padded at the right and bottom with the mean color in whole numbers, as training crops are."""
    height, width = size_of(image)
    white = torch.iinfo(image.dtype).max
    color = (torch.tensor(mean) * white).round().clamp(0, white).to(image)
    padded = color.view(-1, 1, 1).repeat(1, *size)
    padded[:, :height, :width] = image
    return padded
