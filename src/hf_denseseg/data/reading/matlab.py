"""Label maps in MATLAB's .mat files, version 5: Pascal Context (`LabelMap`) and COCO-Stuff 10k (`S`)."""

import io
import math
import struct
import zlib

import numpy as np

from hf_denseseg.errors import InputError

MATLAB_MARK = b"MATLAB 5.0 MAT-file"
_KEYS = ("LabelMap", "S")
_COMPRESSED = 15  # type of an element that zlib has packed
_LIMIT = 2**28  # bytes of one variable; a label map of 8192x8192 as int16 has half of that


def read_matlab_ids(content: bytes, called: str) -> np.ndarray:
    """Ids `(H, W)` of a label map.

    Args:
        content: the file.
        called: its name, for messages.

    Raises:
        InputError: scipy is not installed, or the file is damaged, has no label map, or unpacks to too much.
    """
    try:
        from scipy import io as matlab
    except ImportError as error:
        raise InputError(
            f"Label map {called} is a .mat file, which needs scipy. Run `pip install 'hf-denseseg[train]'`."
        ) from error
    try:
        _check_size(content)
        shapes = {name: shape for name, shape, _ in matlab.whosmat(io.BytesIO(content))}
        key = next((key for key in _KEYS if key in shapes), None)
        if key is None:
            raise ValueError(f"it holds {', '.join(shapes) or 'nothing'}, not {' or '.join(_KEYS)}")
        if len(shapes[key]) != 2 or math.prod(shapes[key]) > _LIMIT:
            raise ValueError(f"{key} has the shape {shapes[key]}")
        ids = matlab.loadmat(io.BytesIO(content), variable_names=[key])[key]
        if not np.issubdtype(ids.dtype, np.integer):
            if not np.array_equal(ids, np.floor(ids)):
                raise ValueError(f"{key} holds fractions")
            ids = ids.astype(np.int32)
        return ids
    except Exception as error:  # scipy raises almost anything at a damaged file
        raise InputError(f"Label map {called} cannot be read as a .mat file ({error}). Copy it again.") from error


def _check_size(content: bytes) -> None:
    """Refuse a packed variable that is larger than any label map, before scipy unpacks it."""
    place, order = 128, "<" if content[126:128] == b"IM" else ">"
    while place + 8 <= len(content):
        kind, size = struct.unpack_from(f"{order}II", content, place)
        packed = content[place + 8 : place + 8 + size]
        # zlib packs 1 : 1032 at best, so that small elements need no look.
        large = kind == _COMPRESSED and len(packed) * 1032 > _LIMIT
        if large and len(zlib.decompressobj().decompress(packed, _LIMIT + 1)) > _LIMIT:
            raise ValueError(f"a variable of more than {_LIMIT:,} bytes")
        place += 8 + size
