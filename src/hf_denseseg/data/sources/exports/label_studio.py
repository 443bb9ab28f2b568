"""Label Studio: its JSON export, and its export of brush strokes as one PNG per class."""

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from hf_denseseg.data.reading.images import upright_size
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
)
from hf_denseseg.data.sources.folder_options import FolderOptions
from hf_denseseg.data.sources.folders import Listing
from hf_denseseg.errors import InputError

_HEAD = re.compile(r'\[\s*\{.*?"(annotations|completions|data)"\s*:', re.DOTALL)
_PNG = re.compile(r"task-\d+-annotation-\d+-by-.*\.png")
_UPLOADED = re.compile(r"^[0-9a-f]{8}-")  # what Label Studio puts before the name of an uploaded file


def find(folder: Path) -> dict[str, tuple[list[Path], list[Path]]] | None:
    """The only split -> JSON files and PNG files."""
    tables = [path for path in sorted(folder.glob("*.json")) if _HEAD.match(head_of(path, 2**16))]
    masks = sorted(path for pattern in ("task-*.png", "*/task-*.png") for path in folder.glob(pattern))
    masks = [path for path in masks if _PNG.fullmatch(path.name)]
    return {"train": (tables, masks)} if tables or masks else None


def read(
    folder: Path, source: tuple[list[Path], list[Path]], splits: Mapping[str, Any], options: FolderOptions
) -> Listing:
    """List the images of the export with their label maps."""
    tables, masks = source
    found = Annotations(folder, [])
    images = _Images(folder)
    tasks = {}
    for file in tables:
        for number, task in enumerate(_tasks(file)):
            name = f"task {task.get('id', number)}"
            if (image := images.of_task(task)) is None:
                found.fault(str(file), f"the image of {name} ({_shown(task)}) is not in {folder}. Copy it there.")
            else:
                tasks[str(task.get("id", f"{file.stem}-{number}"))] = (file, name, task, image)
    results = {key: _results(found, file, name, task) for key, (file, name, task, _) in tasks.items()}
    if masks:
        annotated = {key: image for key, (_, _, _, image) in tasks.items() if results[key] is not None}
        _add_masks(found, masks, annotated, images, _controls(results))
        return found.listing(options, folder.name)
    found.classes = sorted({label for each in results.values() for one in each or () for label in _labels(one)})
    for key, (file, name, _, image) in tasks.items():
        if (regions := results[key]) is not None:
            _add_regions(found, regions, f"{file}, {name}", image)
    return found.listing(options, folder.name)


def _tasks(file: Path) -> list[dict[str, Any]]:
    tasks = read_json(file)
    if not isinstance(tasks, list) or not all(isinstance(each, dict) and "data" in each for each in tasks):
        raise InputError(f"{file} is not Label Studio's export JSON: a list of tasks with `data`. Export as JSON.")
    return tasks


class _Images:
    """Images of the folder, found by the names in the tasks."""

    def __init__(self, folder: Path) -> None:
        self.by_name: dict[str, list[Path]] = defaultdict(list)
        for path in sorted(folder.rglob("*")):
            if path.suffix.lower() in image_suffixes() and not _PNG.fullmatch(path.name):
                for name in {path.name, _UPLOADED.sub("", path.name)}:
                    self.by_name[name].append(path)

    def of_task(self, task: dict[str, Any]) -> Path | None:
        """The image that a task shows; None if there is none, or several."""
        for name in _names(task):
            for each in (name, _UPLOADED.sub("", name)):
                if len(paths := self.by_name.get(each, [])) == 1:
                    return paths[0]
        return None

    def of_number(self, task: str) -> Path | None:
        """An image that is called as the task, where there is no JSON export."""
        names = [f"{front}{task}{suffix}" for front in ("", "task-") for suffix in image_suffixes()]
        return next((paths[0] for name in names if (paths := self.by_name.get(name))), None)


def _names(task: dict[str, Any]) -> Iterator[str]:
    """File names in the data of a task, which hold paths and URLs."""
    for value in task["data"].values() if isinstance(task["data"], dict) else ():
        if isinstance(value, str):
            address = urlsplit(value)
            for path in (*parse_qs(address.query).get("d", []), unquote(address.path), value):
                name = path.replace("\\", "/").rpartition("/")[2]
                if Path(name).suffix.lower() in image_suffixes():
                    yield name


def _shown(task: dict[str, Any]) -> str:
    return next(_names(task), "no image file is named in its `data`")


def _results(found: Annotations, file: Path, name: str, task: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Regions of the first annotation that was not canceled; None if there is none."""
    given = task.get("annotations") or task.get("completions") or []
    given = [each for each in given if isinstance(each, dict)] if isinstance(given, list) else []
    kept = [each for each in given if not each.get("was_cancelled")]
    if not kept:
        found.notes.append(f"{file}: {name} is left out: it has no annotation.")
        return None
    for other in kept[1:]:
        found.notes.append(f"{file}: {name}: annotation {other.get('id')} is left out: the first one is used.")
    results = kept[0].get("result") or []
    if not isinstance(results, list):
        found.fault(str(file), f"{name}: `result` of annotation {kept[0].get('id')} is no list. Export it again.")
        return None
    return [each for each in results if isinstance(each, dict) and isinstance(each.get("value"), dict)]


def _labels(region: dict[str, Any]) -> list[str]:
    """Classes of a region; choices and texts about a whole image have none."""
    value = region["value"]
    keys = [key for key in value if key.endswith("labels")] if "original_width" in region else []
    return [str(label) for key in keys if isinstance(value[key], list) for label in value[key]]


def _add_regions(found: Annotations, regions: list[dict[str, Any]], file: str, image: Path) -> None:
    try:
        size = upright_size(image)
    except InputError as error:
        found.fault(file, str(error))
        return
    scene = Scene(image.stem, image, size, file)
    found.scenes.append(scene)
    for number, region in enumerate(regions):
        labels = _labels(region)
        if "original_width" not in region:
            continue  # a choice or a text
        if len(labels) != 1:
            found.fault(file, f"region {region.get('id', number)} has {len(labels)} classes; one is needed.")
            continue
        found.add(scene, f"region {region.get('id', number)}", labels[0], lambda r=region: _shape(r, size))  # type: ignore[misc]


def _shape(region: dict[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    value, (height, width) = region["value"], size
    if (int(region["original_height"]), int(region["original_width"])) != size or region.get("image_rotation"):
        raise ValueError(
            f"it was drawn on {region['original_height']}x{region['original_width']} pixels, turned by "
            f"{region.get('image_rotation') or 0} degrees; the image has {height}x{width}"
        )
    across, down = width / 100, height / 100  # coordinates are percents
    if "points" in value:
        return polygons([[(x * across, y * down) for x, y in value["points"]]])
    if "rle" in value:
        return {"brush": [int(each) for each in value["rle"]]}
    if "radiusX" in value:
        center, radii = (value["x"] * across, value["y"] * down), (value["radiusX"] * across, value["radiusY"] * down)
        return ellipse(*center, *radii, value.get("rotation") or 0)
    if "height" not in value:
        if "x" in value:
            raise NoArea("a point has no area")
        raise ValueError("a region of unknown kind; known are polygon, brush, rectangle, ellipse")
    return _turned(value, across, down)


def _turned(value: dict[str, Any], across: float, down: float) -> dict[str, Any]:
    """A rectangle, turned clockwise about its top left corner."""
    turn = math.radians(value.get("rotation") or 0)
    left, top = value["x"] * across, value["y"] * down
    corners = [(u * value["width"] * across, v * value["height"] * down) for u, v in ((0, 0), (1, 0), (1, 1), (0, 1))]
    cosine, sine = math.cos(turn), math.sin(turn)
    return polygons([[(left + u * cosine - v * sine, top + u * sine + v * cosine) for u, v in corners]])


def _controls(results: Mapping[str, list[dict[str, Any]] | None]) -> list[str]:
    """Names of the labeling controls, one of which stands before the class in the name of a PNG file."""
    return sorted({"tag", *(str(each.get("from_name")) for regions in results.values() for each in regions or ())})


def _add_masks(
    found: Annotations, masks: list[Path], tasks: dict[str, Path], images: _Images, controls: list[str]
) -> None:
    """One image per task, from the PNG files of its classes: a class later in the alphabet is on top."""
    control = "|".join(map(re.escape, controls))
    pattern = re.compile(
        rf"task-(?P<task>\d+)-annotation-(?P<annotation>\d+)-by-.*?-({control})-(?P<label>.+)-\d+\.png"
    )
    parts = [(match, path) for path in masks if (match := pattern.fullmatch(path.name))]
    for path in sorted(set(masks) - {path for _, path in parts}):
        found.fault(
            str(path), f"its name has no class after -{'- or -'.join(controls)}-. Add Label Studio's JSON export."
        )
    matches = [(match["task"], match["annotation"], match["label"], path) for match, path in parts]
    matches.sort(key=lambda each: (int(each[0]), int(each[1]), each[2], each[3].name))
    found.classes = sorted({label for _, _, label, _ in matches})
    annotations: dict[str, str] = {}
    scenes: dict[str, Scene | None] = {}
    for task, annotation, label, path in matches:
        if annotations.setdefault(task, annotation) != annotation:
            found.notes.append(f"{path} is left out: annotation {annotations[task]} of task {task} is used.")
            continue
        if task not in scenes:
            image = tasks.get(task) or images.of_number(task)
            scenes[task] = None
            if image is None:
                found.fault(
                    str(path),
                    f"the image of task {task} is unknown. Add Label Studio's JSON export, or call "
                    f"the image {task}.jpg.",
                )
                continue
            scenes[task] = Scene(image.stem, image, upright_size(image), f"task {task} in {path.parent}")
            found.scenes.append(scenes[task])  # type: ignore[arg-type]
        if (scene := scenes[task]) is not None:
            found.add(scene, path.name, label, lambda path=path: {"file": str(path)})  # type: ignore[misc]
    for task in sorted(set(tasks) - set(scenes)):
        found.scenes.append(Scene(tasks[task].stem, tasks[task], upright_size(tasks[task]), f"task {task}"))


FORMAT = ExportFormat(
    "Label Studio",
    "a JSON export, a list of tasks with `data`; or task-<id>-annotation-<id>-by-<user>-<control>-<class>-<n>.png",
    "none: all is train; the images are found anywhere in the folder by the names in the tasks",
    "polygons, brushes, rectangles, ellipses; holes as brushes only; classes in alphabetical order; the PNG export "
    "names no images, so the JSON export lies beside it or images are called <task>.jpg",
    find,
    read,
)
