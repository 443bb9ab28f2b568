"""Label maps drawn from run lengths: the second form of Pascal Context, one JSON file for all images."""

import io
import json
from collections import defaultdict
from typing import Any

import numpy as np
from PIL import Image

from hf_denseseg.errors import InputError

SCHEME = "rle://"
_LARGEST = 2**26  # pixels of a label map; those of Pascal Context have 0.25 million


def read_merged(content: bytes, file: str) -> dict[str, str]:
    """Label maps of `trainval_merged.json`, the annotation file of the Detail API.

    Args:
        content: the file.
        file: its name, for messages.

    Returns:
        Id of the image -> reference, which holds what is drawn: the areas in their order, a later one above.

    Raises:
        InputError: the file is not of this form.
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
            f"{file} is no annotation file of Pascal Context ({error!r}). It needs `images` and `annos_segmentation`, "
            "as trainval_merged.json has them."
        ) from error


def draw(reference: str) -> bytes:
    """A label map as a PNG of 16 bits; 0 where no area is.

    Raises:
        InputError: the areas cannot be drawn, or pycocotools is not installed.
    """
    name, _, text = reference.removeprefix(SCHEME).partition("?")
    try:
        from pycocotools import mask
    except ImportError as error:
        raise InputError(
            f"Label map {name} is kept as run lengths; they need pycocotools: `pip install 'hf-denseseg[train]'`."
        ) from error
    try:
        height, width, areas = json.loads(text)
        if not 0 < height * width <= _LARGEST:
            raise ValueError(f"a size of {height}x{width}")
        ids = np.zeros((height, width), np.uint16)
        for category, counts in areas:
            ids[mask.decode({"size": [height, width], "counts": counts}) > 0] = category
    except (ValueError, TypeError, OverflowError) as error:
        raise InputError(
            f"Label map {name} cannot be drawn from its run lengths ({error}). Fetch it again."
        ) from error
    buffer = io.BytesIO()
    Image.fromarray(ids).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
