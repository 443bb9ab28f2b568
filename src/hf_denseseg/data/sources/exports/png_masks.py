"""Exports that hold label maps as PNG: CVAT's "Segmentation mask 1.1" (Pascal VOC's) and Roboflow's semantic masks."""

import csv
from collections.abc import Mapping
from pathlib import Path

from hf_denseseg.data.labels import Color, LabelSpec, color_wheel
from hf_denseseg.data.reading.images import Fault, palette_of
from hf_denseseg.data.reading.suffixes import image_suffixes
from hf_denseseg.data.sources.exports.scenes import BACKGROUND, ExportFormat, check_names, read_lines
from hf_denseseg.data.sources.folder_options import FolderOptions
from hf_denseseg.data.sources.folders import Listing, Pairs
from hf_denseseg.errors import InputError

LABEL_MAP, CLASS_TABLE = "labelmap.txt", "_classes.csv"
_VOC_CLASSES = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
_VOID_COLOR = (224, 224, 192)  # Pascal VOC's border


def find_cvat(folder: Path) -> dict[str, Path] | None:
    """Split -> list of its images."""
    if not (folder / "JPEGImages").is_dir() or not (folder / "SegmentationClass").is_dir():
        return None
    return {path.stem: path for path in sorted(folder.glob("ImageSets/Segmentation/*.txt"))} or None


def read_cvat(folder: Path, file: Path, files: Mapping[str, Path], options: FolderOptions) -> Listing:
    """List the images of a split and their masks."""
    colors = _label_map(folder / LABEL_MAP)
    names = read_lines(file)
    if not names:
        raise InputError(f"{file} lists no images. Export the task again.")
    images: dict[str, str] = {}
    labels: dict[str, str] = {}
    faults: list[Fault] = []
    places = {"image": folder / "JPEGImages", "mask": folder / "SegmentationClass"}
    for name in names:
        paths = {what: _with_suffix(place, name) for what, place in places.items()}
        for what, path in paths.items():
            if path is None:
                fix = "Export with `Save images`" if what == "image" else "Export again"
                faults.append(
                    Fault(name, f"{file}: {name} has no {what} in {places[what]}. {fix}, or remove the line.")
                )
        if all(paths.values()):
            images[name], labels[name] = str(paths["image"]), str(paths["mask"])
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        faults.append(Fault(twice[0], f"{file} lists {twice[0]} twice. Remove one of the lines."))
    spec = _cvat_spec(folder, colors, list(labels.values()), faults)
    pairs = Pairs(images, labels, str(places["image"]), str(places["mask"]))
    return Listing(pairs, spec, [], True, faults)


def _with_suffix(place: Path, name: str) -> Path | None:
    """The image of a name without suffix; names may contain dots and folders."""
    paths = (place / f"{name}{suffix}" for suffix in sorted(image_suffixes()))
    return next((path for path in paths if path.is_file()), None)


def _label_map(file: Path) -> dict[str, Color]:
    """Class -> color: lines `label:color_rgb:parts:actions`, # begins a comment; without a file, Pascal VOC's own."""
    if not file.exists():
        return dict(zip(_VOC_CLASSES, ((0, 0, 0), *color_wheel(len(_VOC_CLASSES) - 1)), strict=True))
    names, colors = [], []
    for number, line in enumerate(read_lines(file), 1):
        if line.startswith("#"):
            continue
        try:
            name, color = (
                line.rsplit(":", 3)[0] if line.count(":") >= 3 else line.split(":")[0],
                line.rsplit(":", 3)[1],
            )
            red, green, blue = (int(each) for each in color.split(","))
        except (ValueError, IndexError) as error:
            raise InputError(f"{file}, line {number}: {line!r} is not `name:red,green,blue::`. Fix it.") from error
        names.append(name.strip())
        colors.append((red, green, blue))
    if not any(name.lower() == BACKGROUND for name in names) and (0, 0, 0) not in colors:
        names, colors = [BACKGROUND, *names], [(0, 0, 0), *colors]
    check_names(names, file)
    if len(set(colors)) < len(colors):
        twice = [name for name, color in zip(names, colors, strict=True) if colors.count(color) > 1]
        raise InputError(f"{file}: {' and '.join(twice)} have the same color. Give each class its own, and export.")
    return dict(zip(names, colors, strict=True))


def _cvat_spec(folder: Path, colors: dict[str, Color], masks: list[str], faults: list[Fault]) -> LabelSpec:
    """The masks are color images; in palette images, the colors of the palette say which index is which class."""
    palettes = {}
    for mask in masks:
        try:
            palettes[mask] = palette_of(mask)
        except (OSError, SyntaxError, ValueError):
            continue  # reading the mask raises the error that explains it
    indices = {
        mask: [next(iter((palette == color).all(1).nonzero()[0].tolist()), -1) for color in colors.values()]
        for mask, palette in palettes.items()
        if palette is not None
    }
    raw = list(range(len(colors)))
    if indices:
        raw = next(iter(indices.values()))
        missing = [name for name, index in zip(colors, raw, strict=True) if index < 0]
        if missing:
            faults.append(
                Fault(
                    next(iter(indices)), f"its palette has no color of {missing[0]} in {LABEL_MAP}. Export it again."
                )
            )
            raw = list(range(len(colors)))
        for mask, other in indices.items():
            if other != raw:
                faults.append(Fault(mask, "its palette differs from those of other masks. Save the masks in color."))
    table: dict[Color, int] = dict(zip(colors.values(), raw, strict=True))
    void = 255 if 255 not in raw else max(raw) + 1
    if _VOID_COLOR not in table:
        table[_VOID_COLOR] = void
    return LabelSpec(
        folder.name,
        tuple(colors),
        palette=tuple(colors.values()),
        raw_to_train={each: train for train, each in enumerate(raw)},
        raw_void=(void,),
        color_to_raw=table,
    )


def find_roboflow(folder: Path) -> dict[str, Path] | None:
    """Split -> folder with _classes.csv."""
    places = [path.parent for path in sorted((*folder.glob(f"*/{CLASS_TABLE}"), *folder.glob(CLASS_TABLE)))]
    masks = (any(place.glob("*_mask.png")) for place in places)
    return {place.name if place != folder else "train": place for place in places} if any(masks) else None


def read_roboflow(folder: Path, place: Path, places: Mapping[str, Path], options: FolderOptions) -> Listing:
    """List the images of a split and their masks, `x.jpg` and `x_mask.png`."""
    spec = _class_table(place / CLASS_TABLE, folder.name)
    for other in places.values():
        if _class_table(other / CLASS_TABLE, folder.name) != spec:
            raise InputError(f"{other / CLASS_TABLE} and {place / CLASS_TABLE} differ. Export all splits together.")
    files = [path for path in sorted(place.iterdir()) if path.suffix.lower() in image_suffixes()]
    masks = {path.stem.removesuffix("_mask"): path for path in files if path.name.endswith("_mask.png")}
    faults: list[Fault] = []
    images: dict[str, str] = {}
    for path in files:
        if not path.name.endswith("_mask.png"):
            if path.stem in images:
                faults.append(Fault(str(path), f"{path} and {images[path.stem]} have one name. Rename one of them."))
            images[path.stem] = str(path)
    pairs = Pairs(images, {key: str(path) for key, path in masks.items()}, str(place), f"{place} (_mask.png)")
    return Listing(pairs, spec, [], True, faults)


def _class_table(file: Path, name: str) -> LabelSpec:
    """Lines `pixel value, class` below a heading."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as content:
            rows = [[cell.strip() for cell in row] for row in csv.reader(content) if row]
        values = {int(value): label for value, label in rows[1:]}
    except (OSError, ValueError, IndexError) as error:
        raise InputError(f"{file} does not hold lines `pixel value, class` ({error}). Export it again.") from error
    check_names([label for _, label in rows[1:]], file)
    if len(values) < len(rows) - 1:
        raise InputError(f"{file}: a pixel value is there twice. Give every class its own.")
    return LabelSpec(name, tuple(values.values()), raw_to_train={raw: train for train, raw in enumerate(values)})


CVAT = ExportFormat(
    "CVAT Segmentation mask 1.1, Pascal VOC",
    f"SegmentationClass/, JPEGImages/ and ImageSets/Segmentation/*.txt; {LABEL_MAP} unless the classes are VOC's",
    "the lists of images; `default` alone is train",
    "one class per pixel; overlaps and objects of one class are merged by the tool; order of labelmap.txt",
    find_cvat,
    read_cvat,
    (),
)
ROBOFLOW = ExportFormat(
    "Roboflow png-mask-semantic",
    f"<split>/{CLASS_TABLE}, <split>/x.jpg and <split>/x_mask.png",
    "the folders: train, valid, test",
    "one class per pixel; overlaps are merged by the tool; order of _classes.csv",
    find_roboflow,
    read_roboflow,
    (),
)

__all__ = ["CVAT", "ROBOFLOW"]
