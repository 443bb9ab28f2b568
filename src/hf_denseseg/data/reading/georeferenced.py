"""Rasters of map data: windows read from the file as they are needed, and the place of their pixels on the earth."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, TiffImagePlugin

from hf_denseseg.data.reading.pixels import PixelFormat, Pixels, is_opaque
from hf_denseseg.data.reading.rasters import HEADER_BYTES, TIFF_MARKS, import_rasterio
from hf_denseseg.errors import InputError

_GEO_TAGS = (33550, 33922, 34264, 34735)  # pixel scale, tie points, transformation, keys of the coordinate system
CACHE_MIB = 64  # of decoded tiles; by default 5 % of the machine's memory
_LOOKED_AT = 512  # longest side of the reduced band in which opacity is looked for


@dataclass(frozen=True)
class Georeference:
    """Place of an image on the earth.

    Args:
        crs: coordinate reference system, as `EPSG:32633` or WKT; empty if the file names none.
        transform: (a, b, c, d, e, f): x = a * column + b * row + c, y = d * column + e * row + f.
    """

    crs: str
    transform: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """Values as JSON holds them."""
        return {"crs": self.crs, "transform": list(self.transform)}


@dataclass
class Raster:
    """A raster file that is read window by window.

    Args:
        path: the file.
        pixel_format: channels and range that are read.
        height: in pixels.
        width: in pixels.
        georeference: where it lies.
        left: column of the file that is column 0 here.
    """

    path: str
    pixel_format: PixelFormat
    height: int
    width: int
    georeference: Georeference
    left: int = 0
    _file: Any = field(default=None, repr=False)
    _bands: list[int] = field(default_factory=list, repr=False)

    @classmethod
    def open(cls, path: str, pixel_format: PixelFormat) -> "Raster":
        """Open a file without reading its pixels.

        Raises:
            InputError: damaged, another number of channels, or rasterio is not installed.
        """
        with _explained(path):
            file = import_rasterio(path).open(path)
            crs = "" if file.crs is None else file.crs.to_string()
            place = Georeference(crs, tuple(file.transform)[:6])
            raster = cls(path, pixel_format, file.height, file.width, place, _file=file)
            raster._bands = raster._chosen_bands()
        return raster

    def _chosen_bands(self) -> list[int]:
        found, count = self._file.count, self.pixel_format.num_channels
        if found == count + 1 and found in (2, 4):
            scale = min(_LOOKED_AT / max(self.height, self.width), 1)
            shape = tuple(max(round(side * scale), 1) for side in (self.height, self.width))
            if is_opaque(self._file.read(found, out_shape=shape)):
                return list(range(1, found))
        return list(range(1, found + 1))

    def window(self, top: int, left: int, bottom: int, right: int) -> Pixels:
        """The pixels of some rows and columns, as `read_image` reads a whole file."""
        rows, columns = (top, bottom), (self.left + left, self.left + right)
        with _explained(self.path):
            values = self._file.read(self._bands, window=(rows, columns))  # (C, h, w)
        return self.pixel_format.read(np.moveaxis(values, 0, 2), self.path)

    def columns(self, left: int, right: int) -> "Raster":
        """The part between two columns, as a raster of its own."""
        return replace(self, left=self.left + left, width=right - left)

    def load(self) -> Pixels:
        """All pixels."""
        return self.window(0, 0, self.height, self.width)

    def reduced(self, longest_edge: int) -> Pixels:
        """The whole image, its nearest pixels, with sides of at most `longest_edge`."""
        scale = min(longest_edge / max(self.height, self.width), 1)
        shape = tuple(max(round(side * scale), 1) for side in (self.height, self.width))
        with _explained(self.path):
            values = self._file.read(self._bands, out_shape=(len(self._bands), *shape))
        return self.pixel_format.read(np.moveaxis(values, 0, 2), self.path)


def is_georeferenced(path: str) -> bool:
    """Whether a file is a TIFF with a place on the earth; only its tags are read."""
    try:
        with Path(path).open("rb") as file:
            mark = file.read(HEADER_BYTES)
        if not mark.startswith(TIFF_MARKS):
            return False
        with Image.open(path, formats=["TIFF"]) as image:
            assert isinstance(image, TiffImagePlugin.TiffImageFile)
            return any(tag in image.tag_v2 for tag in _GEO_TAGS)
    except (OSError, SyntaxError, ValueError):
        pass  # more bands or bits than Pillow knows
    try:
        with _explained(path), import_rasterio(path).open(path) as raster:
            return raster.crs is not None or not raster.transform.is_identity
    except InputError:
        return False  # reading the file raises the error that explains it


def save_geotiff(
    path: Path, ids: np.ndarray, georeference: Georeference, colors: dict[int, tuple[int, int, int]]
) -> None:
    """Write a label map as a GeoTIFF.

    Args:
        path: file to write.
        ids: `(H, W)` uint8 or uint16.
        georeference: of the image that it belongs to.
        colors: id -> color; a palette for 8-bit maps.
    """
    rasterio = import_rasterio(str(path))
    options = {"crs": georeference.crs or None, "transform": rasterio.Affine(*georeference.transform)}
    size = {"count": 1, "height": ids.shape[0], "width": ids.shape[1], "dtype": ids.dtype.name}
    layout = {"compress": "deflate", "tiled": True, "blockxsize": 256, "blockysize": 256, "BIGTIFF": "IF_SAFER"}
    with _explained(str(path)), rasterio.open(path, "w", driver="GTiff", **size, **options, **layout) as file:
        file.write(ids, 1)
        if ids.dtype == np.uint8:
            file.write_colormap(1, {number: (*color, 255) for number, color in colors.items()})


@contextmanager
def _explained(path: str) -> Iterator[None]:
    """Errors of rasterio in one sentence, and no warning of a missing georeference."""
    rasterio = import_rasterio(path)
    from rasterio.errors import RasterioError

    try:
        with warnings.catch_warnings(), rasterio.Env(GDAL_CACHEMAX=CACHE_MIB):
            warnings.simplefilter("ignore")
            yield
    except RasterioError as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].replace(path, "the file")
        raise InputError(f"Raster {path} cannot be used ({reason}). Copy it again or leave it out.") from error


__all__ = ["Georeference", "Raster", "is_georeferenced", "save_geotiff"]
