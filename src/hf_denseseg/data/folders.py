"""A folder of pictures and label maps: its splits, which files belong together, its specification."""

import difflib
from pathlib import Path
from typing import NamedTuple

from hf_denseseg.data.labels import LabelSpec
from hf_denseseg.errors import InputError

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm"}
SPEC_FILES = ("classes.json", "labels.json", "labels.yaml", "labels.yml", "classes.yaml")
LABEL_FOLDERS = ("labels", "masks", "annotations")
SPLIT_ALIASES = (("train", "training"), ("val", "validation", "valid", "dev"), ("test", "testing"))


def find_spec(folder: Path) -> LabelSpec:
    """Read the label specification that lies beside the data.

    Raises:
        InputError: there is none, or it is not valid.
    """
    for name in SPEC_FILES:
        if (folder / name).is_file():
            return LabelSpec.from_file(folder / name)
    raise InputError(
        f"No label specification in {folder} (looked for {', '.join(SPEC_FILES)}). Write one, at least "
        '{"classes": ["road", ...]} in the order of the ids, or give `spec`.'
    )


class Pairs(NamedTuple):
    """Files of one split.

    Args:
        images: id -> picture; the id is the path below the folder without its ending.
        labels: id -> label map.
        images_folder: where the pictures lie.
        labels_folder: where the label maps lie.
    """

    images: dict[str, Path]
    labels: dict[str, Path]
    images_folder: Path
    labels_folder: Path

    def lone_files(self) -> list[tuple[Path, str]]:
        """Files without a partner, and a sentence on each."""
        lone = []
        for these, others, what, where in (
            (self.images, self.labels, "label map", self.labels_folder),
            (self.labels, self.images, "picture", self.images_folder),
        ):
            for key, path in these.items():
                if key not in others:
                    lone.append((path, f"{path} has no {what} of the same name in {where}. Add it, or take it out."))
        return lone


def list_pairs(folder: Path, split: str) -> Pairs | None:
    """List the pictures and label maps of a split; None when the folder has none of the two layouts.

    Raises:
        InputError: the split is missing or has no pictures.
    """
    layouts = _layouts(folder)
    if not layouts:
        return None
    name = resolve_split(split, sorted(layouts), str(folder))
    images_folder, labels_folder = layouts[name]
    images = _pictures(images_folder)
    if not images:
        raise InputError(f"Split {name!r} is empty: no pictures in {images_folder}.")
    return Pairs(images, _pictures(labels_folder), images_folder, labels_folder)


def find_pairs(folder: Path, split: str) -> dict[str, list[str]] | None:
    """Paths of pictures and label maps, and their ids, in the order of the ids; None without such a layout.

    Raises:
        InputError: the split is missing or empty, or a file has no partner.
    """
    pairs = list_pairs(folder, split)
    if pairs is None:
        return None
    if lone := pairs.lone_files():
        more = f" {len(lone) - 1} more files are alone; `denseseg data check` lists them." if len(lone) > 1 else ""
        raise InputError(lone[0][1] + more)
    ids = sorted(pairs.images)
    return {
        "image": [str(pairs.images[key]) for key in ids],
        "label": [str(pairs.labels[key]) for key in ids],
        "id": ids,
    }


def resolve_split(split: str, available: list[str], where: str) -> str:
    """Find the split among the available ones, `val` and `validation` being the same.

    Raises:
        InputError: there is no such split.
    """
    same = next((group for group in SPLIT_ALIASES if split in group), (split,))
    for name in (split, *same):
        if name in available:
            return name
    near = difflib.get_close_matches(split, available, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise InputError(f"{where} has no split {split!r}; available: {', '.join(available) or 'none'}.{hint}")


def _layouts(folder: Path) -> dict[str, tuple[Path, Path]]:
    """Split -> (folder of pictures, folder of label maps), for both layouts."""
    layouts = {}
    for child in sorted(path for path in folder.iterdir() if path.is_dir()):
        for name in LABEL_FOLDERS:
            if (child / "images").is_dir() and (child / name).is_dir():
                layouts[child.name] = (child / "images", child / name)
            if child.name == "images" and (folder / name).is_dir():
                for part in sorted(path for path in child.iterdir() if path.is_dir()):
                    layouts[part.name] = (part, folder / name / part.name)
    return layouts


def _pictures(folder: Path) -> dict[str, Path]:
    """Path below `folder` without ending -> file, for every picture."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in paths}
