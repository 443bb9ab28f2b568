"""Label maps in MATLAB 5 .mat files, as Pascal Context (variable `LabelMap`) and COCO-Stuff 10k (`S`) have them."""

import io
import math
import struct
import zlib

import numpy as np

from hf_denseseg.errors import InputError

MATLAB_MARK = b"MATLAB 5.0 MAT-file"
_KEYS = ("LabelMap", "S")
_COMPRESSED = 15  # miCOMPRESSED, the type of an element that is compressed by zlib
_LIMIT = 2**28  # bytes of one variable; a label map of 8192x8192 pixels in int16 has half as many


def read_matlab_ids(content: bytes, shown_name: str) -> np.ndarray:
    """Read the raw ids `(H, W)` of a label map.

    Args:
        content: bytes of the file.
        shown_name: its name, for messages.

    Raises:
        InputError: scipy is not installed, or the file is damaged, contains no label map, or is too large.
    """
    try:
        from scipy import io as matlab
    except ImportError as error:
        raise InputError(
            f"Label map {shown_name} is a .mat file, which needs scipy. Run `pip install 'hf-denseseg[train]'`."
        ) from error
    try:
        _check_size(content)
        shapes = {name: shape for name, shape, _ in matlab.whosmat(io.BytesIO(content))}
        key = next((key for key in _KEYS if key in shapes), None)
        if key is None:
            raise ValueError(f"it contains {', '.join(shapes) or 'nothing'}, not {' or '.join(_KEYS)}")
        if len(shapes[key]) != 2 or math.prod(shapes[key]) > _LIMIT:
            raise ValueError(f"{key} has the shape {shapes[key]}")
        ids = matlab.loadmat(io.BytesIO(content), variable_names=[key])[key]
        if not np.issubdtype(ids.dtype, np.integer):
            if not np.array_equal(ids, np.floor(ids)):
                raise ValueError(f"{key} contains values that are not integers")
            ids = ids.astype(np.int32)
        return ids
    except Exception as error:  # for a damaged file, scipy raises errors of almost any type
        raise InputError(f"Label map {shown_name} cannot be read as a .mat file ({error}). Copy it again.") from error


def _check_size(content: bytes) -> None:
    """Reject a compressed variable that is larger than any label map, before scipy unpacks it.

    A file is a header of 128 bytes, the last two of which give the byte order, then elements: type and size as uint32,
    then `size` bytes.
    """
    place, order = 128, "<" if content[126:128] == b"IM" else ">"
    while place + 8 <= len(content):
        kind, size = struct.unpack_from(f"{order}II", content, place)
        packed = content[place + 8 : place + 8 + size]
        # zlib compresses by 1032 : 1 at most, so a small element is known to be within the limit.
        large = kind == _COMPRESSED and len(packed) * 1032 > _LIMIT
        if large and len(zlib.decompressobj().decompress(packed, _LIMIT + 1)) > _LIMIT:
            raise ValueError(f"a variable of more than {_LIMIT:,} bytes")
        place += 8 + size
