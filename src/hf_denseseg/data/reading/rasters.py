"""Files whose channels or bits Pillow would cut: TIFF of any number of bands, 16-bit color PNG, `.npy` arrays."""

import io
import logging
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, TiffImagePlugin
from torchvision.io import ImageReadMode, decode_image

from hf_denseseg.errors import InputError

TIFF_MARKS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
NPY_MARK, PNG_MARK = b"\x93NUMPY", b"\x89PNG\r\n\x1a\n"
HEADER_BYTES = 32
_SAMPLES, _BITS, _PLANES, _KIND = 277, 258, 284, 339  # TIFF tags
_COLOR_PNG = (2, 4, 6)  # RGB, gray with opacity, RGBA; gray of 16 bits is read by Pillow
_CUT_BY_PILLOW = "holds more channels or bits than Pillow reads"


def read_raster(source: bytes | Path, header: bytes, name: str) -> np.ndarray | None:
    """Stored values `(H, W, C)` of a file that Pillow would cut or refuse; None for one that it reads as it is.

    Args:
        source: content or path.
        header: the first bytes of the content.
        name: of the image, in messages.

    Raises:
        InputError: damaged, too large, not an array of an image, or rasterio is needed and not installed.
    """
    if header.startswith(NPY_MARK):
        return _read_array(source, name)
    if header.startswith(PNG_MARK) and len(header) > 25 and header[24] == 16 and header[25] in _COLOR_PNG:
        content = source if isinstance(source, bytes) else source.read_bytes()
        width, height = struct.unpack(">II", header[16:24])
        _check_pixels(height, width, name)
        try:
            decoded = decode_image(torch.frombuffer(bytearray(content), dtype=torch.uint8), ImageReadMode.UNCHANGED)
        except RuntimeError as error:
            raise InputError(f"Image {name} is damaged ({error}). Copy it again or remove the pair.") from error
        return decoded.permute(1, 2, 0).numpy()
    if header.startswith(TIFF_MARKS):
        mode = _mode_of_tiff(source)
        if mode is None:
            return _read_tiff(source, name)
        if mode == "RGBA":  # opacity or a fourth band, which only its values tell
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
                return np.asarray(image)
    return None


def raster_size(path: Path) -> tuple[int, int] | None:
    """`(height, width)` that a TIFF or `.npy` file declares; None if it is neither, or damaged."""
    try:
        with path.open("rb") as file:
            header = file.read(HEADER_BYTES)
        if header.startswith(NPY_MARK):
            shape = np.load(path, mmap_mode="r", allow_pickle=False).shape
            return (shape[0], shape[1]) if len(shape) in (2, 3) else None
        if header.startswith(TIFF_MARKS):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # no georeference: most images have none
                with import_rasterio(str(path)).open(path) as raster:
                    return raster.height, raster.width
    except (OSError, ValueError, InputError):
        pass  # reading the file raises the error that explains it
    return None


def _mode_of_tiff(source: bytes | Path) -> str | None:
    """Mode of a TIFF that Pillow reads with all of its samples and bits; None for another one."""
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=["TIFF"]) as image:
            assert isinstance(image, TiffImagePlugin.TiffImageFile)
            tags, mode = image.tag_v2, image.mode
    except Image.DecompressionBombError:
        return "L"  # refused by the reader of all other images
    except (OSError, SyntaxError, ValueError, struct.error):
        return None
    samples, bits, kinds = tags.get(_SAMPLES, 1), tags.get(_BITS, (1,)), tags.get(_KIND, (1,))
    if samples == 1:  # an unsigned 32-bit number would become negative
        return mode if bits[0] <= 16 or mode == "F" or kinds[0] == 2 else None
    complete = set(bits) == {8} and tags.get(_PLANES, 1) == 1 and samples == len(mode.replace("YCbCr", "YCC"))
    return mode if complete else None


def _read_tiff(source: bytes | Path, name: str) -> np.ndarray:
    rasterio = import_rasterio(name)
    from rasterio.errors import RasterioError
    from rasterio.io import MemoryFile

    logging.getLogger("rasterio").setLevel(logging.CRITICAL)  # it logs what it raises
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # no georeference: most images have none
            if isinstance(source, bytes):
                with MemoryFile(source) as file, file.open() as raster:
                    return _bands(raster, name)
            with rasterio.open(source) as raster:
                return _bands(raster, name)
    except RasterioError as error:
        reason = str(error).splitlines()[0].replace(str(source), "the file") if str(error) else type(error).__name__
        raise InputError(f"Image {name} is damaged ({reason}). Copy it again or remove the pair.") from error


def _bands(raster: Any, name: str) -> np.ndarray:
    _check_pixels(raster.height, raster.width, name)
    bands = np.moveaxis(raster.read(), 0, 2)  # (C, H, W) -> (H, W, C)
    return np.ascontiguousarray(bands)


def import_rasterio(name: str) -> Any:
    """The library that reads every TIFF.

    Raises:
        InputError: it is not installed; `name` is the image that needs it.
    """
    try:
        import rasterio
    except ImportError as error:
        raise InputError(
            f"Image {name} {_CUT_BY_PILLOW}. Install rasterio, which reads every TIFF: pip install 'hf-denseseg[geo]'."
        ) from error
    return rasterio


def _read_array(source: bytes | Path, name: str) -> np.ndarray:
    try:
        values = np.load(io.BytesIO(source) if isinstance(source, bytes) else source, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"Image {name} is no array of numbers ({error}). Save it with numpy.save.") from error
    if values.ndim not in (2, 3) or values.dtype.kind not in "uifb":
        raise InputError(
            f"Image {name} is an array of shape {values.shape} and type {values.dtype}; numbers of shape (H, W) or "
            "(H, W, channels) are needed."
        )
    _check_pixels(values.shape[0], values.shape[1], name)
    return values if values.ndim == 3 else values[..., None]


def read_array_ids(source: bytes | Path, name: str) -> np.ndarray:
    """Raw ids `(H, W)` of a label map in a `.npy` file.

    Raises:
        InputError: it is no array of integers `(H, W)`.
    """
    values = _read_array(source, name)
    if values.shape[2] != 1 or values.dtype.kind not in "uib":
        raise InputError(
            f"Label map {name} is an array of shape {values.shape} and type {values.dtype}; integers of shape (H, W) "
            "are needed."
        )
    return values[..., 0].astype(np.uint8) if values.dtype.kind == "b" else values[..., 0]


def _check_pixels(height: int, width: int, name: str) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and height * width > 2 * limit:  # where Pillow draws the line
        raise InputError(
            f"Image {name} is too large to be opened safely ({height}x{width} pixels). Cut it into tiles, or raise "
            "`PIL.Image.MAX_IMAGE_PIXELS` if you trust it."
        )
