"""Label maps from run-length encodings: the JSON form of Pascal Context, one file for all images."""

import json
from collections import defaultdict
from typing import Any

from hf_denseseg.data.reading.areas import areas_reference
from hf_denseseg.errors import InputError


def read_merged(content: bytes, file: str) -> dict[str, str]:
    """Read the label maps of `trainval_merged.json`, the annotation file of the Detail API.

    Args:
        content: the file.
        file: its name, for messages.

    Returns:
        Image id -> reference to a map that is drawn, with the areas in the order in which they are painted: a later
        one covers an earlier one.

    Raises:
        InputError: the file does not have this format.
    """
    try:
        values = json.loads(content)
        areas: dict[Any, list[Any]] = defaultdict(list)
        for area in values["annos_segmentation"]:
            shape = {"counts": area["segmentation"]["counts"]}
            areas[area["image_id"]].append((int(area["category_id"]), shape, f"category {area['category_id']}"))
        return {
            stem: areas_reference(stem, (int(each["height"]), int(each["width"])), areas[each["image_id"]])
            for each in values["images"]
            for stem in [str(each["file_name"]).rpartition(".")[0]]
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{file} is not an annotation file of Pascal Context ({error!r}). It needs `images` and "
            "`annos_segmentation`, like trainval_merged.json."
        ) from error
