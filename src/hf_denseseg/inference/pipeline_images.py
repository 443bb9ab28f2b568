"""Read the images given to a pipeline as training reads them: transformers' loader makes all of them 8-bit RGB."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from hf_denseseg.data.reading.images import read_image, stored_image
from hf_denseseg.data.reading.pixels import RGB_BYTES, PixelFormat, height_width
from hf_denseseg.errors import InputError


def loaded_image(image: Any) -> Any:
    """An image for the pipelines of transformers: PIL in mode RGB, read as in training where it is a file or open.

    Addresses and base64 text are left to transformers.

    Raises:
        InputError: an image that contradicts the declared range.
    """
    if not isinstance(image, Image.Image) and not (isinstance(image, str | os.PathLike) and os.path.isfile(image)):
        return image
    return read_image(image, "given to the pipeline" if isinstance(image, Image.Image) else "")


def declared_inputs(image: Any, image_processor: Any) -> tuple[Any, Sequence[int]] | None:
    """What an image processor makes of an image of another format than 8-bit RGB, and (height, width) of the image.

    Args:
        image: file, open image, or the stored values `(H, W, C)`.
        image_processor: of the model; its `pixel_range` and `image_mean` declare the format.

    Returns:
        None if the format is 8-bit RGB, which the pipelines of transformers handle.

    Raises:
        InputError: an address or text, whose channels and bits would be lost, or an image that contradicts the format.
    """
    pixel_format = PixelFormat.of_processor(image_processor)
    if pixel_format == RGB_BYTES:
        return None
    if isinstance(image, str | os.PathLike) and not os.path.isfile(image):
        raise InputError(
            f"{str(image)[:80]!r} is no file. Images with num_channels {pixel_format.num_channels} and pixel_range "
            f"{pixel_format.shown_range} are read from files; download it first."
        )
    stored = image if isinstance(image, np.ndarray | torch.Tensor) else stored_image(image)
    options = {} if isinstance(stored, Image.Image) else {"input_data_format": "channels_last"}
    stored = stored.numpy() if isinstance(stored, torch.Tensor) else stored
    return image_processor(images=[stored], return_tensors="pt", **options), height_width(stored)
