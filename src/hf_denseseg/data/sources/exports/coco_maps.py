"""COCO's JSON as label maps: the official layout, Roboflow's, and one file beside its images."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_denseseg.data.sources.exports.scenes import (
    Annotations,
    ExportFormat,
    NoArea,
    Scene,
    head_of,
    polygons,
    read_json,
)
from hf_denseseg.data.sources.folder_options import FolderOptions
from hf_denseseg.data.sources.folders import Listing
from hf_denseseg.errors import InputError

_HEAD = re.compile(r'\{\s*"(info|licenses|images|annotations|categories)"\s*:')
_ROBOFLOW = "_annotations.coco.json"


def find(folder: Path) -> dict[str, Path] | None:
    """Split -> annotation file."""
    official = {
        path.stem.removeprefix("instances_"): path for path in sorted(folder.glob("annotations/instances_*.json"))
    }
    nested = {path.parent.name: path for path in sorted(folder.glob(f"*/{_ROBOFLOW}"))}
    beside = {path.stem: path for path in sorted(folder.glob("*.json")) if _HEAD.match(head_of(path))}
    return official or nested or beside or None


def read(folder: Path, file: Path, files: Mapping[str, Path], options: FolderOptions) -> Listing:
    """List the images of an annotation file with their label maps."""
    content = read_json(file)
    try:
        images, entries, categories = (list(content[key]) for key in ("images", "annotations", "categories"))
        ordered = sorted(((each["id"], str(each["name"])) for each in categories), key=lambda each: each[0])
        names = dict(ordered)
        known = {each["id"] for each in images}
        used, orphans = (
            {each.get(key) for each in entries if isinstance(each, dict)} for key in ("category_id", "image_id")
        )
        orphans -= known
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{file} is not an annotation file in COCO's format ({error!r}). It needs the lists `images`, "
            "`annotations` and `categories`, each entry with an `id`."
        ) from error
    found = Annotations(file, [name for _, name in ordered])
    # Roboflow lists the name of the project first, as the category above all others.
    over = ordered[0] if ordered else (None, "")
    if len(ordered) > 1 and over[0] not in used and _is_above_all(categories, over):
        found.classes.remove(over[1])
        found.notes.append(f"{file}: category {over[1]!r} is above all others and has no objects; it is no class.")
    if len(known) < len(images):
        found.fault(str(file), "two images have one id. Give each its own.")
    places = _image_folders(folder, file)
    scenes = {each["id"]: scene for each in images if (scene := _scene(each, places, found)) is not None}
    found.scenes = list(scenes.values())
    for number, entry in enumerate(entries):
        name = f"annotation {entry.get('id', number)}" if isinstance(entry, dict) else f"annotation {number}"
        if not isinstance(entry, dict) or entry.get("image_id") in orphans:
            found.fault(str(file), f"{name} belongs to no entry of `images`. Fix its `image_id`, or remove it.")
        elif (scene := scenes.get(entry["image_id"])) is not None:
            label = names.get(entry.get("category_id"), f"category {entry.get('category_id')}")
            crowd = bool(entry.get("iscrowd"))
            found.add(scene, name, label, lambda entry=entry, scene=scene: _shape(entry, scene), ignored=crowd)  # type: ignore[misc]
    return found.listing(options, folder.name)


def _is_above_all(categories: list[dict[str, Any]], over: tuple[Any, str]) -> bool:
    return all(each.get("supercategory") == ("none" if each["id"] == over[0] else over[1]) for each in categories)


def _image_folders(folder: Path, file: Path) -> list[Path]:
    split = file.stem.removeprefix("instances_")
    if file.parent == folder:
        return [folder, folder / "images", folder / split, folder / "images" / split]
    if file.name == _ROBOFLOW:
        return [file.parent]
    return [folder / split, folder / "images" / split, folder / "images", folder]


def _scene(entry: dict[str, Any], places: list[Path], found: Annotations) -> Scene | None:
    """The image of an entry, without objects; None if the entry cannot be used."""
    try:
        path = Path(str(entry["file_name"]))
        size = int(entry["height"]), int(entry["width"])
        if min(size) < 1 or not path.name:
            raise ValueError(f"{path.name!r} of size {size[0]}x{size[1]}")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        found.fault(str(found.place), f"image {entry['id']} has no `file_name`, `height` or `width` ({error!r}).")
        return None
    # Some tools write where an image was on their server: then its name is looked up.
    inside = not path.is_absolute() and ".." not in path.parts
    relative = [*([path] if inside else []), Path(path.name)]
    tried = [place / each for each in relative for place in places]
    image = next((each for each in tried if each.is_file()), tried[0])
    return Scene(relative[0].with_suffix("").as_posix(), image, size, str(found.place))


def _shape(entry: dict[str, Any], scene: Scene) -> dict[str, Any]:
    segmentation = entry.get("segmentation")
    if not segmentation:
        raise NoArea("it is a box or a point, without a segmentation")
    if isinstance(segmentation, list):
        return polygons(segmentation)
    if not isinstance(segmentation, dict) or "counts" not in segmentation:
        raise ValueError("its `segmentation` is neither polygons nor run lengths with `counts`")
    if tuple(segmentation["size"]) != scene.size:
        raise ValueError(f"its run lengths are of size {segmentation['size']}, the image is of {list(scene.size)}")
    return {"counts": segmentation["counts"]}


FORMAT = ExportFormat(
    "COCO JSON, Roboflow COCO",
    "annotations/instances_<split>.json; <split>/_annotations.coco.json; or a COCO file beside images",
    "the name of the file, or of its folder",
    "polygons of several parts, run lengths, crowds (ignored); holes as run lengths only",
    find,
    read,
)
