"""Write images of any number of channels and bits."""

import struct
import warnings
import zlib

import numpy as np
import pytest


def write_bands(path, values, **options):
    """A TIFF of `(H, W, C)` values; skips the test where rasterio is missing."""
    rasterio = pytest.importorskip("rasterio", reason="rasterio (extra `geo`) is not installed")
    height, width, count = values.shape
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # without a georeference
        with rasterio.open(
            path, "w", driver="GTiff", count=count, height=height, width=width, dtype=values.dtype, **options
        ) as raster:
            raster.write(np.moveaxis(values, 2, 0))


def write_deep_png(path, values):
    """A PNG of three channels of 16 bits, by the definition of the format: `(H, W, 3)` uint16."""
    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)  # filter 0 before each row
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        content += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    path.write_bytes(content)
