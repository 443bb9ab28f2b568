"""labelme: one JSON file per image, with polygons, rectangles, circles and masks."""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hf_denseseg.data.reading.suffixes import image_suffixes
from hf_denseseg.data.sources.exports.scenes import (
    Annotations,
    ExportFormat,
    NoArea,
    Scene,
    ellipse,
    head_of,
    polygons,
    read_json,
    read_lines,
    rectangle,
)
from hf_denseseg.data.sources.folder_options import FolderOptions
from hf_denseseg.data.sources.folders import SPEC_FILES, Listing
from hf_denseseg.errors import InputError

CLASS_LIST, IGNORED = "labels.txt", "__ignore__"
_FOLDERS = ("", "annotations", "labels", "json", "jsons")
_HEAD = re.compile(r'"(shapes|imagePath)"\s*:')
_WITHOUT_AREA = ("point", "points", "line", "linestrip")


def find(folder: Path) -> dict[str, Path] | None:
    """Split -> folder of the JSON files."""
    if _is_labelme(folder):
        return {"train": folder}
    places = {
        child.name: child / inside
        for child in sorted(each for each in folder.iterdir() if each.is_dir())
        for inside in reversed(_FOLDERS)
        if _is_labelme(child / inside)
    }
    return places or None


def _is_labelme(folder: Path) -> bool:
    return any(_HEAD.search(head_of(path)) for path in _files(folder)[:3])


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.json") if path.name not in SPEC_FILES)


def read(folder: Path, place: Path, places: Mapping[str, Path], options: FolderOptions) -> Listing:
    """List the images of a folder of JSON files with their label maps."""
    found = Annotations(place, [])
    contents = {each: list(_contents(each, found if each == place else None)) for each in places.values()}
    found.classes = _classes(folder, [content for each in contents.values() for _, content in each])
    for file, content in contents[place]:
        scene = _scene(file, content, found)
        if scene is None:
            continue
        found.scenes.append(scene)
        for number, entry in enumerate(content["shapes"]):
            if not isinstance(entry, dict):
                found.fault(str(file), f"shape {number} is no object. Fix or remove it.")
                continue
            label = str(entry.get("label"))
            found.add(scene, f"shape {number}", label, lambda entry=entry: _shape(entry), label == IGNORED)  # type: ignore[misc]
    used = {scene.image for scene in found.scenes}
    for image in sorted(path for path in place.iterdir() if path.suffix.lower() in image_suffixes()):
        if image not in used and not image.with_suffix(".json").exists():
            found.notes.append(f"{image} is left out: it has no annotation file {image.stem}.json.")
    return found.listing(options, folder.name)


def _contents(place: Path, found: Annotations | None) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The files of a folder that can be read; the others are faults of the split that is listed."""
    for file in _files(place):
        try:
            content = read_json(file)
            if not isinstance(content, dict) or not isinstance(content.get("shapes"), list):
                raise InputError(f"{file} has no list `shapes`: it is no file of labelme. Remove it.")
            yield file, content
        except InputError as error:
            if found is not None:
                found.fault(str(file), str(error).removeprefix(f"{file} "))


def _classes(folder: Path, contents: list[dict[str, Any]]) -> list[str]:
    """Names of `labels.txt`, else all labels of all splits in alphabetical order."""
    if (folder / CLASS_LIST).is_file():
        return [line for line in read_lines(folder / CLASS_LIST) if line != IGNORED]
    shapes = (shape for content in contents for shape in content["shapes"] if isinstance(shape, dict))
    with_area = {str(shape.get("label")) for shape in shapes if shape.get("shape_type") not in _WITHOUT_AREA}
    return sorted(with_area - {IGNORED})


def _scene(file: Path, content: dict[str, Any], found: Annotations) -> Scene | None:
    try:
        size = int(content["imageHeight"]), int(content["imageWidth"])
        image = file.parent / str(content["imagePath"]).replace("\\", "/")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        found.fault(str(file), f"`imagePath`, `imageHeight` or `imageWidth` is missing or no number ({error!r}).")
        return None
    if not image.is_file():  # the JSON files were moved
        places = (file.parent, file.parent.parent / "images", file.parent.parent)
        image = next((place / image.name for place in places if (place / image.name).is_file()), image)
    return Scene(file.stem, image, size, str(file))


def _shape(entry: dict[str, Any]) -> dict[str, Any]:
    kind, points = entry.get("shape_type") or "polygon", entry["points"]
    if kind == "polygon":
        return polygons([points])
    if kind in _WITHOUT_AREA:
        raise NoArea(f"a {kind} has no area")
    if kind not in ("rectangle", "circle", "mask"):
        raise ValueError(f"unknown shape_type {kind!r}; known are polygon, rectangle, circle, mask")
    (x, y), (u, v) = points
    if kind == "rectangle":
        return rectangle(x, y, u, v)
    if kind == "circle":  # center, and a point of the edge
        radius = math.hypot(u - x, v - y)
        return ellipse(x, y, radius, radius)
    return {"bitmap": entry["mask"], "origin": [x, y]}


FORMAT = ExportFormat(
    "labelme",
    "JSON files with `shapes` and `imagePath`, beside their images or in a folder per split",
    "folders; a folder without splits is train",
    "polygons, rectangles, circles, masks; holes as masks only; `__ignore__` is ignored; order of labels.txt, else "
    "alphabetical",
    find,
    read,
)
