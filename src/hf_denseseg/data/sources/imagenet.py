"""ImageNet-1K as it is distributed: the ILSVRC2012 tars, Kaggle's layout, or synset folders, unpacked or zipped.

Images are identified by their file names: `n01440764_10026.JPEG` is a training image of that synset (WordNet id), and
`ILSVRC2012_val_00000001.JPEG` is a validation image, whose synset is given by its folder, by Kaggle's
`LOC_val_solution.csv`, or by the devkit.
"""

import csv
import io
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_denseseg.data.class_names import ClassNames, make_unique
from hf_denseseg.data.reading.archives import Tree, is_archive, open_tree
from hf_denseseg.data.sources.official import fetch_text, format_description, official_trees
from hf_denseseg.data.splits import resolve_split
from hf_denseseg.errors import InputError

logger = logging.getLogger(__name__)

IMAGENET_NAME = "imagenet"
_COUNTS = {"train": 1_281_167, "val": 50_000}
_FOLDERS = ("imagenet", "ImageNet", "ILSVRC2012")
_ARCHIVES = (
    "ILSVRC2012_*.tar",
    "ILSVRC2012_devkit_t12.tar.gz",
    "imagenet*.zip",
    "ILSVRC*.zip",
    "train.zip",
    "val.zip",
)
_MARKS = (*_ARCHIVES, "LOC_synset_mapping.txt", "ILSVRC")  # files by which a folder is recognized as ImageNet
_TRAIN = re.compile(r"(?:.*/)?((n\d{8})_\d+)\.jpe?g", re.IGNORECASE)
_VAL = re.compile(r"(?:.*?(n\d{8})/|.*/)?(ILSVRC2012_val_\d{8})\.jpe?g", re.IGNORECASE)
_URL, _LICENSE = "https://image-net.org/download.php", "terms of access: non-commercial research and education"
_FILES = "ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz"
_CITATION = "Russakovsky et al., ImageNet Large Scale Visual Recognition Challenge, IJCV 2015"


def find_imagenet(name: str, root: str | Path | None = None) -> Tree | None:
    """Open the official files.

    Args:
        name: `"imagenet"`, or the path of a folder or archive that may contain them.
        root: where the files of `"imagenet"` are, see `official_trees`.

    Returns:
        The files; None if `name` is some other dataset.

    Raises:
        InputError: `name` is `"imagenet"` and the files are missing, or `root` is given for another dataset.
    """
    path = Path(name).expanduser()
    if name == IMAGENET_NAME and (root or not path.exists()):
        for tree in official_trees(name, root, _FOLDERS, _ARCHIVES):
            if _is_imagenet(tree):
                return tree
        raise InputError(fetch_text("ImageNet-1K", root, _URL, _LICENSE, _FILES))
    if root:
        raise InputError(f"data_root only applies to datasets given by name, not to {name!r}. Leave it out.")
    marked = path.is_dir() and any(found for mark in _MARKS for found in path.glob(mark))
    if marked or (path.is_file() and is_archive(path)):
        tree = open_tree(path, _ARCHIVES)
        return tree if _is_imagenet(tree) else None
    return None


def describe_imagenet() -> str:
    """Description of ImageNet-1K for `denseseg data list`: source, license, expected files."""
    splits = ", ".join(f"{split} {count:,}" for split, count in _COUNTS.items())
    lines = [
        f"source: {_URL}; license: {_LICENSE}",
        f"cite: {_CITATION}",
        f"archives: {_FILES}; or <split>/<synset>/ folders, in a folder such as {_FOLDERS[0]}; or Kaggle's ILSVRC",
    ]
    return format_description(f"{IMAGENET_NAME}: 1000 classes of images; {splits}", lines)


def _is_imagenet(tree: Tree) -> bool:
    return any(_TRAIN.fullmatch(name) or _VAL.fullmatch(name) for name in tree.names())


def imagenet_names() -> tuple[list[str], ClassNames]:
    """The 1000 synsets in the order of their class ids, and their names."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    synsets = info.label_names()
    names = make_unique([info.label_name_to_description(each) for each in synsets], synsets)
    return synsets, ClassNames("ImageNet-1K", tuple(names), license=_LICENSE, citation=_CITATION)


def imagenet_rows(tree: Tree, split: str) -> dict[str, list[Any]]:
    """List a split as columns `image` (references), `label` (class ids among all 1000) and `id`.

    Raises:
        InputError: the split has no images, a synset is not one of the 1000, or the validation images have no labels.
    """
    split = resolve_split(split, sorted(_COUNTS), IMAGENET_NAME)
    pattern = _TRAIN if split == "train" else _VAL
    matches = [match for name in tree.names() if (match := pattern.fullmatch(name))]
    if not matches:
        raise InputError(
            f"{tree.root} contains no images of ImageNet's split {split!r}. Add its archive, from {_URL}."
        )
    label_of = {synset: label for label, synset in enumerate(imagenet_names()[0])}
    ground_truth: Mapping[str, str] = {}
    rows: dict[str, dict[str, Any]] = {}
    for match in matches:
        name, synset = (match[1], match[2]) if split == "train" else (match[2], match[1])
        if synset is None:
            ground_truth = ground_truth or _validation_ground_truth(tree)
            synset = ground_truth.get(name)
        if synset not in label_of:
            raise InputError(
                f"{tree.root}: {match[0]} belongs to {synset or 'an unknown synset'}, which is not one of the 1000 of "
                "ImageNet-1K. Put images of other classes into folders: <split>/<class>/*.jpg."
            )
        key = f"{synset}/{name}"  # the same image may be listed twice, unpacked and in its archive
        rows.setdefault(key, {"image": tree.reference(match[0]), "label": label_of[synset], "id": key})
    if len(rows) != _COUNTS[split]:
        logger.warning("%s is partial: %d of %d images of split %r.", tree.root, len(rows), _COUNTS[split], split)
    ordered = [rows[key] for key in sorted(rows)]
    return {key: [row[key] for row in ordered] for key in ("image", "label", "id")}


def _validation_ground_truth(tree: Tree) -> dict[str, str]:
    """Validation image -> synset, from Kaggle's table or the devkit.

    Raises:
        InputError: there is neither.
    """
    if tables := [name for name in tree.names() if name.rpartition("/")[2] == "LOC_val_solution.csv"]:
        lines = csv.DictReader(io.StringIO(tree.read(tables[0]).decode()))
        return {line["ImageId"]: line["PredictionString"].split()[0] for line in lines}
    ground_truth = next(
        (name for name in tree.names() if name.endswith("ILSVRC2012_validation_ground_truth.txt")), None
    )
    if ground_truth is None or (meta := ground_truth.rpartition("/")[0] + "/meta.mat") not in tree:
        raise InputError(
            f"{tree.root}: the labels of the validation images are missing. Add ILSVRC2012_devkit_t12.tar.gz (or "
            "Kaggle's LOC_val_solution.csv), or sort the images into folders named after their synsets."
        )
    try:
        from scipy import io as matlab
    except ImportError as error:
        raise InputError(f"Reading {meta} needs scipy. Run `pip install 'hf-denseseg[train]'`.") from error
    synsets = matlab.loadmat(io.BytesIO(tree.read(meta)), squeeze_me=True)["synsets"]
    # The devkit numbers synsets from 1, in an order different from that of the class ids.
    synset_of = {int(each["ILSVRC2012_ID"]): str(each["WNID"]) for each in synsets}
    numbers = tree.read(ground_truth).decode().split()
    return {f"ILSVRC2012_val_{place:08d}": synset_of[int(number)] for place, number in enumerate(numbers, 1)}
