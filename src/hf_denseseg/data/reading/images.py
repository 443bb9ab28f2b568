"""Read one image or label map from a file or from bytes; errors name the file and what is wrong with it."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from hf_denseseg.data.labels import LabelSpec, equal_channels
from hf_denseseg.data.reading.areas import SCHEME, draw_areas
from hf_denseseg.data.reading.matlab import MATLAB_MARK, read_matlab_ids
from hf_denseseg.data.reading.pixels import RGB_BYTES, PixelFormat, Pixels, height_width
from hf_denseseg.data.reading.rasters import HEADER_BYTES, NPY_MARK, raster_size, read_array_ids, read_raster
from hf_denseseg.data.reading.references import describe_reference, file_name, is_reference, read_reference
from hf_denseseg.errors import InputError

_ORIENTATION = 0x0112  # EXIF tag
# Its values that swap height and width -> what brings an array upright.
_TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    5: lambda label: label.T,
    6: lambda label: np.rot90(label, -1),
    7: lambda label: np.rot90(label, 2).T,
    8: np.rot90,
}
# Pillow modes whose pixel values can be read as class ids. For any other mode we would have to guess.
_ID_MODES = {"1", "L", "P", "I", "I;16", "I;16B", "I;16L"}


def read_image(source: Any, name: str = "", pixel_format: PixelFormat = RGB_BYTES) -> Pixels:
    """Read an image with the channels and the range that were declared, upright according to its EXIF tag.

    Training, evaluation, image processors, pipelines and `denseseg predict` all read images here.

    Args:
        source: path, reference into an archive, bytes, a `{"bytes", "path"}` row of an Image column, or an open
            image.
        name: name of the image in messages; its path when empty.
        pixel_format: channels and range; by default 8-bit RGB, for which gray, palette and CMYK are converted and
            transparency is dropped (an RGBA pixel keeps its color).

    Raises:
        InputError: the file is missing, empty, truncated, too large or not an image, or contradicts `pixel_format`.
    """
    return pixel_format.read(stored_image(source, name), _display_name(source, name))


def stored_image(source: Any, name: str = "") -> Image.Image | np.ndarray:
    """What a file stores, upright: a PIL image, or `(H, W, C)` values where Pillow would cut channels or bits.

    Arguments and errors as for `read_image`.
    """
    if not isinstance(source, Image.Image):
        source, shown_name = _located(source, name)
        if isinstance(source, bytes):
            header = source[:HEADER_BYTES]
        else:
            with source.open("rb") as file:
                header = file.read(HEADER_BYTES)
        if (values := read_raster(source, header, shown_name)) is not None:
            return values
    return ImageOps.exif_transpose(_open(source, name))


def read_label(source: Any, spec: LabelSpec, name: str = "") -> np.ndarray:
    """Read a label map as train ids, `(H, W)` of `spec.dtype`; in a palette image, the palette index is the raw id.

    Three equal channels count as one, unless the specification has colors.

    Args:
        source: as for `read_image`; also a .mat file (Pascal Context, COCO-Stuff 10k) or a .npy array.
        spec: what the raw ids (or colors) mean.
        name: name of the label map in messages; its path when empty.

    Raises:
        InputError: the file cannot be read, contains ids or colors that `spec` does not name, or has an image mode
            without ids.
    """
    raw = read_raw_label(source, name)
    if raw.ndim == 3 and spec.color_to_raw is None and equal_channels(raw):
        raw = raw[..., 0]
    try:
        return spec.encode(raw) if raw.ndim == 2 else spec.encode_colors(raw)
    except InputError as error:
        raise InputError(f"Label map {_display_name(source, name)}: {error}") from error


def read_raw_label(source: Any, name: str = "") -> np.ndarray:
    """Read a label map without mapping it: ids `(H, W)` or colors `(H, W, 3)` uint8; arguments as in `read_label`.

    Raises:
        InputError: the file cannot be read, or its image mode has neither ids nor colors.
    """
    if (drawn := _drawn(source)) is not None:
        return draw_areas(drawn).ids
    if (content := _matlab_bytes(source)) is not None:
        return read_matlab_ids(content, _display_name(source, name))
    if (array := _array_source(source)) is not None:
        return read_array_ids(array, _display_name(source, name))
    image = _open(source, name)
    if image.mode in _ID_MODES:
        raw = np.asarray(image)
        return raw.astype(np.uint8) if raw.dtype == bool else raw
    if image.mode in ("RGB", "RGBA"):
        return np.asarray(image)[..., :3]
    raise InputError(
        f"Label map {_display_name(source, name)} has image mode {image.mode}, which holds no class ids. "
        "Save it as a single-channel 8-bit PNG."
    )


def palette_of(source: Any) -> np.ndarray | None:
    """Colors `(256, 3)` of a label map that is a palette image, else None; decodes only the image header."""
    if _drawn(source) is not None or _matlab_bytes(source) is not None or _array_source(source) is not None:
        return None
    source, _ = _located(source, "")
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
        if image.mode != "P":
            return None
        colors = np.array(image.getpalette("RGB") or [], dtype=np.uint8).reshape(-1, 3)
    return np.pad(colors, ((0, 256 - len(colors)), (0, 0)))


def upright_label(label: np.ndarray, image: Pixels, source: Any, name: str) -> np.ndarray:
    """Turn a label map that has the size of the stored image, not of the upright one, as the image's EXIF tag says.

    Args:
        label: `(H, W)`.
        image: as `read_image` gave it.
        source: of the image.
        name: of the pair, in messages.

    Raises:
        InputError: the label map has neither size.
    """
    height, width = height_width(image)
    if (height, width) == label.shape:
        return label
    if (width, height) == label.shape and (turn := _TURNS.get(orientation_of(source))) is not None:
        return np.ascontiguousarray(turn(label))
    raise InputError(
        f"Sizes differ for {name}: image {height}x{width}, label {label.shape[0]}x{label.shape[1]} "
        "(height x width). Export the label map at the size of the image."
    )


def orientation_of(source: Any) -> int:
    """EXIF orientation of an image file, 1 for an upright one or one without the tag; reads the header only."""
    if not isinstance(source, Image.Image):
        source, _ = _located(source, "")
        try:
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
                return image.getexif().get(_ORIENTATION, 1)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            return 1  # not of Pillow: a raster, which has no such tag
    return source.getexif().get(_ORIENTATION, 1)


def upright_size(path: Path) -> tuple[int, int]:
    """`(height, width)` of an image file as `read_image` gives it; reads the header only.

    Raises:
        InputError: the file is missing, empty or not an image.
    """
    if (size := raster_size(path)) is not None:
        return size
    source, shown_name = _located(path, "")
    try:
        with Image.open(source if isinstance(source, Path) else io.BytesIO(source)) as image:
            turned = image.getexif().get(_ORIENTATION) in _TURNS
            return image.size if turned else image.size[::-1]
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"File {shown_name} is not a readable image. Convert it to PNG or JPEG.") from error


def _located(source: Any, name: str) -> tuple[bytes | Path, str]:
    """Content or existing path of an image file, and its name in messages."""
    if isinstance(source, dict):
        source = source["path"] if source.get("bytes") is None else source["bytes"]
    shown_name = _display_name(source, name)
    if isinstance(source, str) and is_reference(source):
        source = read_reference(source)
    source = source if isinstance(source, bytes) else Path(source)
    if len(source) == 0 if isinstance(source, bytes) else _is_empty(source, shown_name):
        raise InputError(f"File {shown_name} is empty (0 bytes). Copy it again or remove the pair.")
    return source, shown_name


def _open(source: Any, name: str) -> Image.Image:
    if isinstance(source, Image.Image):
        return source
    source, shown_name = _located(source, name)
    try:
        image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
        image.load()
    except Image.DecompressionBombError as error:
        raise InputError(
            f"Image {shown_name} is too large to be opened safely ({error}). Cut it into tiles, or raise "
            "`PIL.Image.MAX_IMAGE_PIXELS` if you trust it."
        ) from error
    except UnidentifiedImageError as error:
        raise InputError(f"File {shown_name} is not a readable image. Convert it to PNG or JPEG.") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"Image {shown_name} is damaged ({error}). Copy it again or remove the pair.") from error
    return image


def _matlab_bytes(source: Any) -> bytes | None:
    """Content of a .mat file; None if the source is not one."""
    if isinstance(source, dict):
        source = source["path"] if source.get("bytes") is None else source["bytes"]
    if isinstance(source, (str, Path)) and file_name(str(source)).endswith(".mat"):
        return read_reference(str(source))
    return source if isinstance(source, bytes) and source.startswith(MATLAB_MARK) else None


def _drawn(source: Any) -> str | None:
    """Reference to a label map that is drawn; None if the source is another one."""
    path = source["path"] if isinstance(source, dict) and source.get("bytes") is None else source
    return path if isinstance(path, str) and path.startswith(SCHEME) else None


def _array_source(source: Any) -> bytes | Path | None:
    """Content or path of a .npy file; None if the source is not one."""
    if isinstance(source, dict):
        source = source["path"] if source.get("bytes") is None else source["bytes"]
    if isinstance(source, (str, Path)) and file_name(str(source)).lower().endswith(".npy"):
        return _located(source, "")[0]
    return source if isinstance(source, bytes) and source.startswith(NPY_MARK) else None


def _is_empty(path: Path, shown_name: str) -> bool:
    try:
        return path.stat().st_size == 0
    except OSError as error:
        raise InputError(
            f"File {shown_name} cannot be read: {error.strerror}. Check the path and its permissions."
        ) from error


def _display_name(source: Any, name: str) -> str:
    if isinstance(source, dict) and not name:
        name = str(source.get("path") or "")
    name = name or (str(source) if isinstance(source, (str, Path)) else "(bytes)")
    return describe_reference(name)


class Fault(NamedTuple):
    """A problem in the data.

    Args:
        item: file or id.
        message: the problem and how to fix it.
    """

    item: str
    message: str

    def __str__(self) -> str:
        return self.message if self.item in self.message else f"{self.item}: {self.message}"
