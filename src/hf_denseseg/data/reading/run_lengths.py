"""Label maps from run-length encodings: the JSON form of Pascal Context, one file for all images."""

import io
import json
from collections import defaultdict
from typing import Any

import numpy as np
from PIL import Image

from hf_denseseg.errors import InputError

SCHEME = "rle://"
_LARGEST = 2**26  # pixels of a label map; an image of Pascal Context has 0.25 million


def read_merged(content: bytes, file: str) -> dict[str, str]:
    """Read the label maps of `trainval_merged.json`, the annotation file of the Detail API.

    Args:
        content: the file.
        file: its name, for messages.

    Returns:
        Image id -> reference. It contains `[height, width, [[category, counts], ...]]` as JSON, with the areas in the
        order in which they are painted: a later one covers an earlier one.

    Raises:
        InputError: the file does not have this format.
    """
    try:
        values = json.loads(content)
        areas: dict[Any, list[Any]] = defaultdict(list)
        for area in values["annos_segmentation"]:
            areas[area["image_id"]].append([int(area["category_id"]), area["segmentation"]["counts"]])
        return {
            stem: f"{SCHEME}{stem}?" + json.dumps([int(each["height"]), int(each["width"]), areas[each["image_id"]]])
            for each in values["images"]
            for stem in [str(each["file_name"]).rpartition(".")[0]]
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{file} is not an annotation file of Pascal Context ({error!r}). It needs `images` and "
            "`annos_segmentation`, like trainval_merged.json."
        ) from error


def decode_run_lengths(reference: str) -> bytes:
    """Decode a label map to a 16-bit PNG of raw ids; 0 where there is no area.

    Raises:
        InputError: the encoding is invalid, or pycocotools is not installed.
    """
    name, _, text = reference.removeprefix(SCHEME).partition("?")
    try:
        from pycocotools import mask
    except ImportError as error:
        raise InputError(
            f"Label map {name} is run-length encoded and needs pycocotools. Run `pip install 'hf-denseseg[train]'`."
        ) from error
    try:
        height, width, areas = json.loads(text)
        if not 0 < height * width <= _LARGEST:
            raise ValueError(f"the size {height}x{width} is out of range")
        ids = np.zeros((height, width), np.uint16)
        for category, counts in areas:
            ids[mask.decode({"size": [height, width], "counts": counts}) > 0] = category
    except (ValueError, TypeError, OverflowError) as error:
        raise InputError(
            f"Label map {name} has an invalid run-length encoding ({error}). Download its file again."
        ) from error
    buffer = io.BytesIO()
    Image.fromarray(ids).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
