"""Label maps that are drawn when they are read: areas in painting order, as annotation tools store them.

A map is a reference `rle://NAME?JSON`. The JSON holds `size` (height, width), `areas` (`[raw id, shape, name]`, a
later one covers an earlier one), and where needed `fill` (raw id outside of all areas) and `smaller_from`.
A shape is one of

* `{"counts": ...}`: COCO's run lengths, compressed (text) or not (list);
* `{"polygons": [[x, y, x, y, ...], ...], "holes": [...]}`: the union of polygons without the holes, in pixels;
* `{"bitmap": ..., "origin": [x, y]}`: the pixels above 0 of a PNG, or its opaque ones, as Base64, compressed or not;
* `{"brush": [...]}`: the run lengths of Label Studio, one byte per entry;
* `{"file": ...}`: the pixels above 0 of an image file.

Polygons and run lengths are drawn by pycocotools: COCO's rasterization is the same for every source.
"""

import base64
import binascii
import io
import json
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from hf_denseseg.errors import InputError

SCHEME = "rle://"
_LARGEST = 2**28  # pixels of a label map
_LONGEST_OUTLINE = 2**22  # pixels; pycocotools keeps five points per pixel of an outline in memory
_BITMAP_LIMIT = 2**28  # bytes of a PNG within an annotation

Area = tuple[int, dict[str, Any], str]


class Drawing(NamedTuple):
    """A label map and what became of its areas.

    Args:
        ids: `(H, W)` uint16, raw ids.
        names: of the areas, in painting order.
        drawn: pixels of each area.
        visible: pixels of each area that no later one covers.
    """

    ids: np.ndarray
    names: list[str]
    drawn: list[int]
    visible: list[int]


def areas_reference(
    name: str, size: tuple[int, int], areas: Sequence[Area], fill: int = 0, smaller_from: int | None = None
) -> str:
    """Reference to a label map that is drawn when it is read.

    Args:
        name: of the map, in messages.
        size: (height, width).
        areas: raw id, shape and name of each area, in painting order.
        fill: raw id outside of all areas.
        smaller_from: number of the area from which on large ones are painted first; None keeps the order given.
    """
    content: dict[str, Any] = {"size": list(size), "areas": [list(area) for area in areas]}
    content |= {"fill": fill} if fill else {}
    content |= {} if smaller_from is None else {"smaller_from": smaller_from}
    return f"{SCHEME}{name.replace('%', '%25').replace('?', '%3F')}?{json.dumps(content, separators=(',', ':'))}"


def areas_name(reference: str) -> str:
    """Name of a label map that is drawn."""
    return reference.removeprefix(SCHEME).partition("?")[0].replace("%3F", "?").replace("%25", "%")


def decode_areas(reference: str) -> bytes:
    """Draw a label map, as a 16-bit PNG of raw ids; errors as for `draw_areas`."""
    buffer = io.BytesIO()
    Image.fromarray(draw_areas(reference).ids).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def draw_areas(reference: str) -> Drawing:
    """Draw a label map.

    Raises:
        InputError: a shape cannot be drawn, or pycocotools is not installed.
    """
    name, what = areas_name(reference), "the map"
    try:
        content = json.loads(reference.partition("?")[2])
        height, width = content["size"]
        if not 0 < height * width <= _LARGEST:
            raise ValueError(f"the size {height}x{width} is out of range")
        areas, drawn = content["areas"], []
        # Number of the visible area from 1, 0 outside; column by column, as pycocotools draws.
        owners = np.zeros((height, width), np.uint32, order="F")
        # Masks are not kept: hundreds of objects in a large image would fill the memory.
        for number, area in enumerate(areas):
            what = area[2]
            mask = _draw(area[1], height, width)
            np.copyto(owners, number + 1, where=mask)
            drawn.append(int(np.count_nonzero(mask)))
        if (first := content.get("smaller_from")) is not None:
            owners[:] = 0
            by_size = sorted(range(first, len(areas)), key=lambda each: -drawn[each])  # equal ones in the file's order
            for number in (*range(first), *by_size):
                np.copyto(owners, number + 1, where=_draw(areas[number][1], height, width))
        raw_ids = np.array([content.get("fill", 0), *(area[0] for area in areas)], np.uint16)
    except (ValueError, TypeError, KeyError, IndexError, OverflowError, OSError, zlib.error) as error:
        raise InputError(f"Label map {name} has an invalid encoding in {what} ({error}). Export it again.") from error
    visible = np.bincount(owners.ravel("K"), minlength=len(raw_ids))[1:]
    return Drawing(np.ascontiguousarray(raw_ids[owners]), [area[2] for area in areas], drawn, visible.tolist())


def _draw(shape: dict[str, Any], height: int, width: int) -> np.ndarray:
    """Mask `(height, width)` bool of a shape."""
    if "polygons" in shape:
        mask = _polygons(shape["polygons"], height, width)
        return mask & ~_polygons(shape["holes"], height, width) if shape.get("holes") else mask
    if "counts" in shape:
        return _counts(shape["counts"], height, width)
    if "bitmap" in shape:
        return _placed(_bitmap(shape["bitmap"]), shape["origin"], height, width)
    if "brush" in shape:
        return decode_brush(shape["brush"], height, width)
    mask = _inside(Image.open(shape["file"]))
    if mask.shape != (height, width):
        raise ValueError(f"{shape['file']} has {mask.shape[0]}x{mask.shape[1]} pixels, the image {height}x{width}")
    return mask


def _coco() -> Any:
    try:
        from pycocotools import mask
    except ImportError as error:
        raise InputError(
            "Polygons and run-length encodings need `pycocotools`, which is not installed. Run "
            "`pip install 'hf-denseseg[train]'`."
        ) from error
    return mask


def _polygons(polygons: list[list[float]], height: int, width: int) -> np.ndarray:
    coco = _coco()
    # One at a time: a list that begins with four numbers would be taken for boxes.
    return coco.decode(coco.merge([coco.frPyObjects([each], height, width)[0] for each in polygons])) > 0


def checked_polygon(points: Sequence[Any]) -> list[float]:
    """A polygon as `x, y, x, y, ...`, from such numbers or from pairs.

    Raises:
        ValueError: fewer than three points, coordinates that are no numbers, or too far away.
    """
    values = np.array(points)  # (n, 2) or (2n,)
    if values.size % 2 or values.size < 6 or values.shape[1:] not in ((), (2,)):
        raise ValueError(f"a polygon of {values.size // 2} points; at least three (x, y) are needed")
    if values.dtype.kind not in "iuf" or not np.isfinite(values).all():
        raise ValueError("a coordinate that is NaN, infinite or no number")
    values = values.reshape(-1, 2).astype(float)
    length = np.abs(values - np.roll(values, 1, axis=0)).sum()
    if max(length, np.abs(values).max()) > _LONGEST_OUTLINE:
        raise ValueError(f"an outline of {length:.3g} pixels: its coordinates are not pixels of an image")
    return values.ravel().tolist()


def _counts(counts: str | list[int], height: int, width: int) -> np.ndarray:
    lengths = checked_counts(counts, height, width)
    values = np.repeat(np.arange(len(lengths)) % 2 == 1, lengths)  # down the columns, beginning with a run outside
    return values.reshape(width, height).T


def checked_counts(counts: str | list[int], height: int, width: int) -> list[int]:
    """COCO's run lengths as numbers, from a list or the compressed text.

    pycocotools itself does not look whether they fill the image, and returns what was in the memory before.

    Raises:
        ValueError: they do not add up to the number of pixels.
    """
    lengths = _unpacked_counts(counts) if isinstance(counts, str) else list(counts)
    if min(lengths, default=-1) < 0 or sum(lengths) != height * width:
        raise ValueError(f"its run lengths add up to {sum(lengths)}, not to the {height * width} pixels")
    return lengths


def _unpacked_counts(text: str) -> list[int]:
    """COCO's text: 5 bits per character, a sixth if more follow; from the fourth on, differences to two before."""
    lengths: list[int] = []
    value = shift = 0
    for code in text.encode("ascii"):
        bits = code - 48
        if not 0 <= bits < 64 or shift > 60:
            raise ValueError(f"the character {chr(code)!r} in its run lengths")
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (1 << shift) if bits & 16 else 0
            lengths.append(value + (lengths[-2] if len(lengths) > 2 else 0))
            value = shift = 0
    if shift:
        raise ValueError("its run lengths are truncated")
    return lengths


def _bitmap(text: str) -> np.ndarray:
    try:
        content = base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError(f"not Base64: {error}") from error
    if not content.startswith(b"\x89PNG"):
        unpacker = zlib.decompressobj()
        content = unpacker.decompress(content, _BITMAP_LIMIT)
        if not unpacker.eof:
            raise ValueError(f"a bitmap that is truncated, or larger than {_BITMAP_LIMIT} bytes")
    return _inside(Image.open(io.BytesIO(content)))


def _inside(image: Image.Image) -> np.ndarray:
    """Pixels of a mask image that belong to the area: opaque ones where it has opacity, else those above 0."""
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    values = np.asarray(image)
    if values.ndim == 3:
        values = values[..., -1] if image.mode in ("RGBA", "LA") else values.max(axis=-1)
    return values > 0


def _placed(mask: np.ndarray, origin: Sequence[float], height: int, width: int) -> np.ndarray:
    """Put a mask into an image with its top left corner at `origin` (x, y), cut at the border."""
    left, top = (round(value) for value in origin)
    rows, columns = slice(max(top, 0), top + mask.shape[0]), slice(max(left, 0), left + mask.shape[1])
    placed = np.zeros((height, width), bool)
    target = placed[rows, columns] if rows.stop > 0 and columns.stop > 0 else placed[:0]
    target[:] = mask[max(-top, 0) :, max(-left, 0) :][: target.shape[0], : target.shape[1]]
    return placed


def decode_brush(values: Sequence[int], height: int, width: int) -> np.ndarray:
    """Mask `(height, width)` bool of Label Studio's run lengths: the pixels whose fourth channel is above 0.

    The bits of the bytes hold, in the format of thi.ng/rle-pack: 32 bits for the number of values, 5 for the bits of a
    value minus 1, 4 times 4 for the bits of a run length minus 1; then runs: 1 bit whether one value repeats, 2 for
    which of the four run lengths, the length minus 1, and the value or values.

    Raises:
        ValueError: the bytes end too early, or are of another size.
    """
    packed = bytes(values)
    place = 0

    def take(count: int) -> int:
        nonlocal place
        first, last = place // 8, (place + count + 7) // 8
        if last > len(packed):
            raise ValueError("its brush strokes are truncated")
        place += count
        return (int.from_bytes(packed[first:last]) >> (8 * last - place)) & ((1 << count) - 1)

    total, word = take(32), take(5) + 1
    if total != 4 * height * width:
        raise ValueError(f"its brush strokes have {total} values, not 4 for each of the {height}x{width} pixels")
    lengths = [take(4) + 1 for _ in range(4)]
    found, done = np.zeros(total, bool), 0
    while done < total:
        repeats, length = take(1), take(lengths[take(2)]) + 1
        if done + length > total:
            raise ValueError("its brush strokes are longer than the image")
        if repeats:
            found[done : done + length] = take(word) > 0
        elif word == 8:
            found[done : done + length] = np.frombuffer(take(8 * length).to_bytes(length), np.uint8) > 0
        else:
            found[done : done + length] = [take(word) > 0 for _ in range(length)]
        done += length
    return found.reshape(height, width, 4)[..., 3]


__all__ = [
    "Area",
    "Drawing",
    "areas_name",
    "areas_reference",
    "checked_counts",
    "decode_areas",
    "decode_brush",
    "draw_areas",
]
