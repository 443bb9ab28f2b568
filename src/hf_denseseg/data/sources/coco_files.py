"""Find the annotation file and images of a split in COCO's layout: in folders, in the official zips, or in both."""

import re
from pathlib import Path
from typing import NamedTuple

from hf_denseseg.data.reading.archives import Tree, is_archive, open_tree
from hf_denseseg.data.reading.suffixes import image_suffixes
from hf_denseseg.data.sources.official import fetch_text, format_description, official_trees
from hf_denseseg.data.splits import resolve_split
from hf_denseseg.errors import InputError

COCO_NAME = "coco"
_FOLDERS = ("coco", "COCO", "coco2017")
_URL, _LICENSE = "https://cocodataset.org/#download", "annotations CC BY 4.0, images under Flickr's terms"
_FILES = "train2017.zip, val2017.zip and annotations_trainval2017.zip"
_ARCHIVES = ("train20*.zip", "val20*.zip", "annotations_trainval20*.zip", "coco*.zip")


class CocoSource(NamedTuple):
    """An annotation file and its images.

    Args:
        annotations: path, or reference into an archive.
        images: folder of the images, for messages and for the paths of missing images.
        files: `file_name` in the annotations -> path or reference.
    """

    annotations: str
    images: Path
    files: dict[str, str]

    def image(self, file_name: str) -> str:
        """Path of or reference to an image; for a missing image, the path where it should be."""
        return self.files.get(file_name, str(self.images / file_name))


def find_coco(name: str, split: str, root: str | Path | None = None) -> CocoSource:
    """Find the annotation file and the images of a split.

    Args:
        name: `"coco"`, a folder (or archive) in COCO's layout, or an annotation file.
        split: part of the file name, such as `"train2017"`; `"train"` is enough if there is only one year.
        root: where the files of `"coco"` are, see `official_trees`.

    Raises:
        InputError: they do not exist.
    """
    path = Path(name).expanduser()
    if name == COCO_NAME and (root or not path.exists()):
        for tree in official_trees(name, root, _FOLDERS, _ARCHIVES):
            if _annotation_files(tree):
                return _in_tree(tree, split)
        raise InputError(fetch_text("COCO", root, _URL, _LICENSE, _FILES))
    if root:
        raise InputError(f"data_root only applies to the dataset {COCO_NAME!r}, not to {name!r}. Leave it out.")
    if path.is_dir() or (path.is_file() and is_archive(path)):
        tree = open_tree(path, _ARCHIVES)
        if _annotation_files(tree):
            return _in_tree(tree, split)
    elif path.is_file():
        folders = (path.parent, path.parent / "images", path.parent.parent / split, path.parent.parent / "images")
        found = (folder for folder in folders if folder.is_dir() and _has_images(folder))
        return CocoSource(str(path), next(found, path.parent), {})
    raise InputError(
        f"Dataset {name!r} is neither a folder with annotations/instances_<split>.json (unpacked or in the official "
        "zips), nor an annotation file in COCO's format. Without data of your own, use 'synthetic'."
    )


def describe_coco() -> str:
    """Description of COCO for `denseseg data list`: source, license, expected files."""
    lines = [
        f"source: {_URL}; license: {_LICENSE}",
        "cite: Lin et al.: Microsoft COCO: Common Objects in Context. ECCV 2014",
        f"archives: {_FILES}; or unpacked, in a folder such as {_FOLDERS[0]}",
    ]
    counts = "80 classes of objects with boxes and masks; train2017 118,287, val2017 5,000"
    return format_description(f"{COCO_NAME}: {counts}", lines)


def _annotation_files(tree: Tree) -> dict[str, str]:
    """Split -> name of its annotation file in the tree."""
    found = (re.fullmatch(r"(.*/)?annotations/instances_([^/]+)\.json", name) for name in tree.names())
    return {match[2]: match[0] for match in found if match}


def _in_tree(tree: Tree, split: str) -> CocoSource:
    files = _annotation_files(tree)
    years: dict[str, list[str]] = {}
    for each in files:
        years.setdefault(re.sub(r"\d{4}$", "", each), []).append(each)
    short = {key: names[0] for key, names in years.items() if len(names) == 1}
    asked = resolve_split(split, sorted({**files, **short}), str(tree.root))
    found = asked if asked in files else short[asked]
    above = files[found].rpartition("annotations/")[0]
    for folder in (f"{above}{found}/", f"{above}images/{found}/", f"{above}images/"):
        images = {name.removeprefix(folder): tree.reference(name) for name in tree.names() if name.startswith(folder)}
        if images:
            return CocoSource(tree.reference(files[found]), tree.root / folder, images)
    return CocoSource(tree.reference(files[found]), tree.root / above / found, {})


def _has_images(folder: Path) -> bool:
    return any(child.suffix.lower() in image_suffixes() for child in folder.iterdir())
