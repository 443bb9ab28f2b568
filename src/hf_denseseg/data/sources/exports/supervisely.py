"""Supervisely: meta.json, and folders img/ and ann/ per dataset."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_denseseg.data.sources.exports.scenes import (
    Annotations,
    ExportFormat,
    Scene,
    polygons,
    read_json,
    rectangle,
)
from hf_denseseg.data.sources.folder_options import FolderOptions
from hf_denseseg.data.sources.folders import Listing
from hf_denseseg.errors import InputError

_WITHOUT_AREA = ("point", "line", "graph", "graph_nodes", "polyline", "cuboid")


def find(folder: Path) -> dict[str, Path] | None:
    """Dataset of the project -> its folder."""
    if not (folder / "meta.json").is_file():
        return None
    return {path.parent.name: path.parent for path in sorted(folder.glob("*/ann")) if path.is_dir()} or None


def read(folder: Path, place: Path, places: Mapping[str, Path], options: FolderOptions) -> Listing:
    """List the images of a dataset with their label maps."""
    meta = folder / "meta.json"
    try:
        shapes = {str(each["title"]): str(each.get("shape")) for each in read_json(meta)["classes"]}
        classes = [str(each["title"]) for each in read_json(meta)["classes"]]
    except (KeyError, TypeError) as error:
        raise InputError(f"{meta} has no list `classes` with a `title` each ({error!r}). Export it again.") from error
    found = Annotations(place, [name for name in classes if shapes[name] not in _WITHOUT_AREA])
    for file in sorted((place / "ann").glob("*.json")):
        try:
            content = read_json(file)
            size = int(content["size"]["height"]), int(content["size"]["width"])
            objects = list(content["objects"])
        except InputError as error:
            found.fault(str(file), str(error).removeprefix(f"{file} "))
            continue
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            found.fault(str(file), f"it has no `size` or `objects` ({error!r}). Export it again.")
            continue
        name = Path(file.stem)  # of the image, with its suffix
        scene = Scene(name.with_suffix("").as_posix(), place / "img" / name, size, str(file))
        found.scenes.append(scene)
        for number, entry in enumerate(objects):
            if not isinstance(entry, dict):
                found.fault(str(file), f"object {number} is no object. Export it again.")
                continue
            label = str(entry.get("classTitle"))
            kind = str(entry.get("geometryType") or shapes.get(label))
            if kind in _WITHOUT_AREA:
                found.notes.append(f"{file}: object {number} ({label}) is left out: a {kind} has no area.")
                continue
            found.add(scene, f"object {entry.get('id', number)}", label, lambda e=entry, k=kind: _shape(e, k))  # type: ignore[misc]
    annotated = {scene.image for scene in found.scenes}
    for image in sorted((place / "img").glob("*")):
        if image.is_file() and image not in annotated:
            found.notes.append(f"{image} is left out: it has no annotation file {image.name}.json.")
    return found.listing(options, folder.name)


def _shape(entry: dict[str, Any], kind: str) -> dict[str, Any]:
    if kind == "bitmap":
        return {"bitmap": entry["bitmap"]["data"], "origin": entry["bitmap"]["origin"]}
    if kind not in ("polygon", "rectangle"):
        raise ValueError(f"unknown geometryType {kind!r}; known are polygon, bitmap, rectangle")
    points = entry["points"]
    if kind == "rectangle":
        (left, top), (right, bottom) = points["exterior"]
        return rectangle(left, top, right, bottom)
    return polygons([points["exterior"]], points.get("interior") or ())


FORMAT = ExportFormat(
    "Supervisely",
    "meta.json, <dataset>/img and <dataset>/ann/*.json",
    "the datasets of the project",
    "polygons with holes, bitmaps, rectangles; points and lines are left out, with a note",
    find,
    read,
)
