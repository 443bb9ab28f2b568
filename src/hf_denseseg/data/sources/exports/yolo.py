"""YOLO segmentation: data.yaml, and a text file of polygons per image."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from hf_denseseg.data.reading.images import upright_size
from hf_denseseg.data.reading.suffixes import image_suffixes
from hf_denseseg.data.sources.exports.scenes import Annotations, ExportFormat, Scene, polygons, read_lines
from hf_denseseg.data.sources.folder_options import FolderOptions
from hf_denseseg.data.sources.folders import Listing
from hf_denseseg.errors import InputError

_FURTHEST = 4.0  # image sizes; coordinates beyond are pixels, not fractions


def find(folder: Path) -> dict[str, Any] | None:
    """Split -> (the YAML file, its entry of the split)."""
    for file in sorted((*folder.glob("*.yaml"), *folder.glob("*.yml"))):
        try:
            content = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            continue
        if isinstance(content, dict) and "names" in content:
            splits = {key: (file, content) for key in ("train", "val", "test") if content.get(key)}
            if splits and not any(_holds_images(folder / label) for label in ("labels", "train/labels")):
                return splits
    return None


def _holds_images(folder: Path) -> bool:
    """Whether label maps lie where YOLO has text files."""
    return any(path.suffix.lower() in image_suffixes() for path in folder.rglob("*"))


def read(folder: Path, source: Any, splits: Mapping[str, Any], options: FolderOptions) -> Listing:
    """List the images of a split with their label maps."""
    file, content = source
    split = next(key for key in ("train", "val", "test") if splits.get(key) is source)
    names = content["names"]
    if isinstance(names, dict) and all(isinstance(key, int) for key in names):
        if sorted(names) != list(range(len(names))):
            raise InputError(f"{file}: `names` has the ids {sorted(names)}; they must count from 0. Fix them.")
        names = [names[key] for key in sorted(names)]
    if not isinstance(names, list) or content.get("nc", len(names)) != len(names):
        raise InputError(f"{file}: `names` must list as many classes as `nc`. Fix one of them.")
    found = Annotations(file, [str(name) for name in names])
    images = _images(folder, file, content, split)
    for image, place in images:
        try:
            size = upright_size(image)
        except InputError as error:
            found.fault(str(image), str(error))
            continue
        text = _text_file(image)
        key = image.relative_to(place) if image.is_relative_to(place) else Path(image.name)
        scene = Scene(key.with_suffix("").as_posix(), image, size, str(text))
        found.scenes.append(scene)
        try:  # an image without a file has no objects, by YOLO's definition
            lines = read_lines(text) if text.exists() else []
        except InputError as error:
            found.fault(str(text), str(error))
            continue
        for number, line in enumerate(lines, 1):
            _add(found, scene, f"line {number}", line.split())
    known = {_text_file(image) for image, _ in images}
    for text in sorted({each for path in known for each in path.parent.glob("*.txt")} - known):
        if text.name not in ("classes.txt", "train.txt", "val.txt", "test.txt"):
            found.fault(str(text), "it belongs to no image. Add the image, or remove the file.")
    return found.listing(options, folder.name)


def _images(folder: Path, file: Path, content: dict[str, Any], split: str) -> list[tuple[Path, Path]]:
    """Images of a split, each with the folder that its id is relative to."""
    given = content[split]
    root, found = folder / str(content.get("path") or ""), []
    for entry in given if isinstance(given, list) else [given]:
        # The paths in the file are often those of another machine, or begin with ../ for no reason.
        inside = str(entry).removeprefix("../").removeprefix("./")
        tried = (root / str(entry), folder / str(entry), folder / inside, folder / split / "images")
        place = next((each for each in tried if each.exists()), None)
        if place is None:
            raise InputError(f"{file}: {split}: {entry} does not exist in {folder}. Fix `path` or `{split}`.")
        if place.is_file():
            found += [(place.parent / line.removeprefix("./"), place.parent) for line in read_lines(place)]
        else:
            paths = (path for path in place.rglob("*") if path.suffix.lower() in image_suffixes())
            found += [(path, place) for path in sorted(paths)]
    return found


def _text_file(image: Path) -> Path:
    """The last folder `images` of the path is `labels`; without it, the file lies beside the image."""
    parts = list(image.with_suffix(".txt").parts)
    if "images" in parts[:-1]:
        last = max(number for number, part in enumerate(parts[:-1]) if part == "images")
        parts[last] = "labels"
    return Path(*parts)


def _add(found: Annotations, scene: Scene, name: str, words: list[str]) -> None:
    number = int(words[0]) if words[0].isdigit() else -1
    label = found.classes[number] if 0 <= number < len(found.classes) else f"class {words[0]}"

    def shape() -> dict[str, Any]:
        if len(words) == 5:
            raise ValueError("it is a box, not a polygon: export segmentation labels")
        values = [float(word) for word in words[1:]]
        if len(values) % 2 == 0 and values and not max(map(abs, values)) <= _FURTHEST:
            raise ValueError(f"a coordinate of {max(map(abs, values))}: YOLO's are fractions of the image size")
        height, width = scene.size
        return polygons([[value * (height if place % 2 else width) for place, value in enumerate(values)]])

    found.add(scene, name, label, shape)


FORMAT = ExportFormat(
    "YOLO segmentation",
    "a YAML file with `names` and `train` or `val`, and labels/*.txt beside images/",
    "train, val and test of the YAML file",
    "polygons of one part, in fractions of the image size; no holes; an image without text file has no objects",
    find,
    read,
)
