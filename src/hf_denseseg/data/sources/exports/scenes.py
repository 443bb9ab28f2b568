"""What the exports of annotation tools have in common: images with objects, drawn as label maps when they are read."""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from hf_denseseg.data.ignore_index import ignore_index_of
from hf_denseseg.data.labels import LabelSpec
from hf_denseseg.data.reading.areas import areas_reference, checked_polygon
from hf_denseseg.data.reading.images import Fault
from hf_denseseg.data.reading.references import MEMBER_LIMIT
from hf_denseseg.data.sources.folder_options import FolderOptions
from hf_denseseg.data.sources.folders import Listing, Pairs
from hf_denseseg.errors import InputError

BACKGROUND = "background"
_BACKGROUNDS = ("background", "_background_", "__background__")


class ExportFormat(NamedTuple):
    """An export format.

    Args:
        name: of the tool and its format.
        recognized_by: the files that tell it from others.
        splits: where its splits come from.
        says: what it can say, and what it cannot.
        find: folder -> split and its files, None if the folder is no such export. It reads names and heads of files.
        read: folder, files of a split, all of them, options -> listing of the split.
        options: options of `FolderOptions` that have a meaning for it.
    """

    name: str
    recognized_by: str
    splits: str
    says: str
    find: Callable[[Path], dict[str, Any] | None]
    read: Callable[[Path, Any, Mapping[str, Any], FolderOptions], Listing]
    options: tuple[str, ...] = ("overlap", "empty_images")


class NoArea(ValueError):
    """An object of a kind without area, such as a point."""


class Object(NamedTuple):
    """An annotated object.

    Args:
        name: where it is in the file.
        label: name of its class.
        shape: as `areas` draws it.
        ignored: whether its pixels are ignored.
    """

    name: str
    label: str
    shape: dict[str, Any]
    ignored: bool = False


@dataclass
class Scene:
    """An image with its objects.

    Args:
        key: id of the image, without suffix.
        image: its path.
        size: (height, width) of the annotation.
        file: with the annotation, for messages.
        objects: in painting order.
    """

    key: str
    image: Path
    size: tuple[int, int]
    file: str
    objects: list[Object] = field(default_factory=list)


@dataclass
class Annotations:
    """Images of a split with their objects, and everything that could not be read.

    Args:
        place: file or folder, for messages.
        classes: names in the order of the file.
        scenes: images with objects.
        faults: entries that cannot be used.
        notes: what was left out, a line each.
    """

    place: Path
    classes: list[str]
    scenes: list[Scene] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def fault(self, file: str, problem: str) -> None:
        """Add an entry that cannot be used."""
        self.faults.append(Fault(file, f"{file}: {problem}"))

    def add(
        self, scene: Scene, name: str, label: str, shape: Callable[[], dict[str, Any]], ignored: bool = False
    ) -> None:
        """Add an object to an image, or a line that says why not.

        Args:
            scene: the image.
            name: of the object, in messages.
            label: name of its class.
            shape: makes its shape; a NoArea leaves the object out, another error is a fault.
            ignored: whether its pixels are ignored.
        """
        try:
            found = Object(f"{name} ({label})", label, shape(), ignored)
            if not ignored and label not in self.classes:
                raise ValueError(f"its class is not one of {', '.join(self.classes) or 'the file'}")
            scene.objects.append(found)
        except NoArea as error:
            self.notes.append(f"{scene.file}: {name} ({label}) is left out: {error}.")
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            self.fault(scene.file, f"{name} ({label}): {reason}. Fix or remove the object.")

    def listing(self, options: FolderOptions, name: str) -> Listing:
        """The label maps of the images, as references that are drawn when they are read.

        The background has the raw id 0, the other classes follow in their order.

        Args:
            options: keys of the dataset.
            name: of the dataset, the same for all of its splits.

        Raises:
            InputError: there are no images, or a class is named twice.
        """
        background = next((each for each in self.classes if each.lower() in _BACKGROUNDS), BACKGROUND)
        check_names(self.classes, self.place)
        names = [background, *(each for each in self.classes if each != background)]
        if not self.scenes and not self.faults:
            raise InputError(f"{self.place} has no images. Export them with the annotations.")
        spec = LabelSpec(name, tuple(names))
        ids, ignored = {each: raw for raw, each in enumerate(names)}, ignore_index_of(len(names))
        by_image: dict[Path, set[str]] = {}
        for scene in self.scenes:
            by_image.setdefault(scene.image, set()).add(scene.key)
        for key, count in Counter(scene.key for scene in self.scenes).items():
            if count > 1:
                self.fault(str(self.place), f"{count} images have the name {key}. Rename all but one of them.")
        for image, keys in by_image.items():
            if len(keys) > 1:
                self.fault(str(self.place), f"{' and '.join(sorted(keys))} are of one image, {image.name}. Keep one.")
        images, labels = {}, {}
        for scene in self.scenes:
            if not scene.image.is_file():
                self.fault(scene.file, f"the image {scene.image} is missing. Add it, or remove its entry.")
                continue
            # Ignored areas lie below: an object within a crowd stays an object.
            ordered = sorted(scene.objects, key=lambda each: not each.ignored)
            below = sum(each.ignored for each in ordered)
            areas = [(ignored if each.ignored else ids[each.label], each.shape, each.name) for each in ordered]
            fill = ignored if options.empty_images == "ignored" and not areas else 0
            map_name = f"of {scene.image.name} in {scene.file}"
            images[scene.key] = str(scene.image)
            smaller = below if options.overlap == "smaller" else None
            labels[scene.key] = areas_reference(map_name, scene.size, areas, fill, smaller)
        pairs = Pairs(images, labels, str(self.place), str(self.place))
        return Listing(pairs, spec, self.notes, True, self.faults)


def check_names(names: Sequence[str], place: Path) -> None:
    """Refuse a class that is named twice, or has no name.

    Raises:
        InputError: with the name and the file.
    """
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice or not all(names):
        problem = f"the class {twice[0]!r} is named twice" if twice else "a class has no name"
        raise InputError(f"{place}: {problem}. Give every class a name of its own.")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        InputError: it cannot be read, is empty, too large, no JSON, or nested too deeply.
    """
    try:
        size = path.stat().st_size
        content = path.read_bytes() if size <= MEMBER_LIMIT else b"?"
    except OSError as error:
        raise InputError(
            f"File {path} cannot be read: {error.strerror}. Check the file and its permissions."
        ) from error
    if size > MEMBER_LIMIT:
        raise InputError(f"{path} has {size:,} bytes; at most {MEMBER_LIMIT:,} are read. Export in several parts.")
    if not content.strip():
        raise InputError(f"File {path} is empty ({size} bytes). Export it again.")
    try:
        return json.loads(content.decode("utf-8-sig"))
    except RecursionError as error:
        raise InputError(f"{path} is nested too deeply for an annotation file. Export it again.") from error
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON ({error}): truncated or damaged. Export it again.") from error


def read_lines(path: Path) -> list[str]:
    """The lines of a text file that are not empty, without white space around them.

    Raises:
        InputError: it cannot be read, or is not in UTF-8.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise InputError(f"File {path} cannot be read as text ({error}). Export it again.") from error
    return [line.strip() for line in lines if line.strip()]


def head_of(path: Path, size: int = 4096) -> str:
    """The first characters of a text file; empty if it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(size).decode("utf-8", "replace").lstrip("\ufeff \r\n\t")
    except OSError:
        return ""


def polygons(parts: Iterable[Sequence[Any]], holes: Iterable[Sequence[Any]] = ()) -> dict[str, Any]:
    """Shape of the union of polygons without the holes.

    Args:
        parts: polygons, `x, y, x, y, ...` or `(x, y), ...` in pixels.
        holes: likewise.

    Raises:
        ValueError: fewer than three points, coordinates that are no numbers, or too far away.
    """
    shape: dict[str, Any] = {"polygons": [checked_polygon(part) for part in parts]}
    if not shape["polygons"]:
        raise ValueError("it has no polygon")
    if cut := [checked_polygon(hole) for hole in holes]:
        shape["holes"] = cut
    return shape


def rectangle(left: float, top: float, right: float, bottom: float) -> dict[str, Any]:
    """Shape of a rectangle between two corners; errors as for `polygons`."""
    return polygons([[left, top, right, top, right, bottom, left, bottom]])


def ellipse(x: float, y: float, radius_x: float, radius_y: float, degrees: float = 0) -> dict[str, Any]:
    """Shape of an ellipse that was turned clockwise, as a polygon of 72 points; errors as for `polygons`."""
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    turns = [2 * math.pi * step / 72 for step in range(72)]
    points = [(radius_x * math.cos(turn), radius_y * math.sin(turn)) for turn in turns]
    return polygons([[(x + u * cosine - v * sine, y + u * sine + v * cosine) for u, v in points]])


__all__ = [
    "BACKGROUND",
    "Annotations",
    "ExportFormat",
    "NoArea",
    "Object",
    "Scene",
    "check_names",
    "ellipse",
    "head_of",
    "polygons",
    "read_json",
    "read_lines",
    "rectangle",
]
