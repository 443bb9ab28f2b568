"""What a folder that is no dataset is nearest to, and what to rename or add."""

import difflib
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from hf_denseseg.data.reading.suffixes import image_suffixes
from hf_denseseg.data.sources.folders import IMAGE_FOLDERS, LABEL_FOLDERS, SPEC_FILES

_LOOKED_AT = 2000  # files; a folder may hold millions
_IMAGE_WORDS = ("image", "img", "imgs", "photo", "photos", "rgb", "jpegimages", "input", "inputs", "x")
_LABEL_WORDS = (
    *("label", "mask", "gt", "groundtruth", "annotation", "ann", "annots", "segmentation", "target"),
    *("segmentationclass", "targets", "output", "y", "lbl", "seg"),
)


def nearest_layout(folder: Path) -> str:
    """Two sentences on a folder in which no dataset is recognized: what is there, and what makes it one."""
    files = list(islice((path for path in folder.rglob("*") if path.is_file()), _LOOKED_AT))
    if not files:
        return "It is empty."
    names = {path.name.lower() for path in files}
    images = [path for path in files if path.suffix.lower() in image_suffixes()]
    for marker, others in _INCOMPLETE.items():
        if marker in names:
            return f"It has {marker}, but not all of {others}."
    texts = [path for path in files if path.suffix.lower() == ".txt"]
    tables = [path for path in files if path.suffix.lower() == ".json" and path.name not in SPEC_FILES]
    if not images and any(path.suffix.lower() == ".xml" for path in files):
        return "It has XML files: export as masks, as COCO JSON or as labelme JSON instead."
    if not images:
        return f"It has {len(files)} files, none of them an image. Give the folder that holds the images."
    if texts and len(texts) * 2 >= len(images):
        return "It is nearest to YOLO: add data.yaml with `train: images/train` and `names`, as the tool exports it."
    if tables:
        return (
            f"It is nearest to COCO or labelme JSON, but {tables[0].relative_to(folder)} is neither: COCO has "
            "`images`, `annotations` and `categories`, labelme `shapes` and `imagePath`. Export again as one of them."
        )
    return _of_folders(folder, images)


_INCOMPLETE = {
    "labelmap.txt": "SegmentationClass/, JPEGImages/ and ImageSets/Segmentation/*.txt: it is nearest to CVAT's "
    "`Segmentation mask 1.1`; export with `Save images`",
    "_classes.csv": "x.jpg and x_mask.png beside it: it is nearest to Roboflow's png-mask-semantic; export it so",
    "meta.json": "<dataset>/img and <dataset>/ann: it is nearest to Supervisely; give the folder of the project",
    "data.yaml": "`names`, and `train` or `val`: it is nearest to YOLO",
}


def _of_folders(folder: Path, images: list[Path]) -> str:
    """Of images only: which of their folders seem to be images and which label maps."""
    places = {path.parent.relative_to(folder) for path in images}
    parts = sorted({part for place in places for part in place.parts})
    photos, masks = _like(parts, _IMAGE_WORDS), _like(parts, _LABEL_WORDS)
    if photos and masks:
        renames = [f"{name} to {new}" for name, new in ((photos, "images"), (masks, "masks")) if name != new]
        return f"It is nearest to images/ and masks/: rename {' and '.join(renames)}." if renames else _expected()
    if masks:
        return f"{masks} looks like label maps: move the images into images/ beside it, and call it masks/."
    ends = sorted({path.stem.rpartition(sep)[2] for path in images for sep in ("_", "-") if sep in path.stem})
    shown = ", ".join(str(place) for place in sorted(places)[:3])
    return (
        f"It has images in {shown}, but no label maps of the same names."
        f" {_expected()} Masks beside their images need an end that is common to all, given by mask_suffix"
        f"{': ' + ', '.join(ends[:4]) if 0 < len(ends) <= 4 else ''}."
    )


def _like(parts: Iterable[str], words: tuple[str, ...]) -> str:
    """The folder whose name is one of the words, or almost."""
    known = {*words, *(IMAGE_FOLDERS if words is _IMAGE_WORDS else LABEL_FOLDERS)}
    for part in parts:
        if part.lower() in known or difflib.get_close_matches(part.lower(), known, n=1, cutoff=0.8):
            return part
    return ""


def _expected() -> str:
    return "Expected is <split>/images and <split>/labels, or images/ and masks/ with files of the same names."
