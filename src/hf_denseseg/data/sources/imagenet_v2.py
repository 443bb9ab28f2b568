"""ImageNet-V2, matched frequency: 10 new test images of each ImageNet class, as it is distributed.

Its 1000 folders are named by class id, in the order of ImageNet's sorted synsets: `10` is the eleventh class.
"""

import logging
import re
from pathlib import Path
from typing import Any

from hf_denseseg.data.class_names import ClassNames
from hf_denseseg.data.reading.archives import Tree, open_tree
from hf_denseseg.data.sources.imagenet import imagenet_names
from hf_denseseg.data.sources.official import fetch_text, format_description, official_trees
from hf_denseseg.data.splits import resolve_split
from hf_denseseg.errors import InputError

logger = logging.getLogger(__name__)

IMAGENET_V2_NAME = "imagenet-v2"
_COUNT = 10_000
_FOLDER = "imagenetv2-matched-frequency-format-val"
_ARCHIVES = ("imagenetv2-matched-frequency*.tar.gz", "imagenetv2-matched-frequency*.tar")
_IMAGE = re.compile(rf"(?:(?:.*/)?{_FOLDER}/)?(\d+)/([^/]+)\.jpe?g", re.IGNORECASE)
_URL, _LICENSE = "https://github.com/modestyachts/ImageNetV2", "MIT; the images remain their owners'"
_CITATION = "Recht et al., Do ImageNet Classifiers Generalize to ImageNet?, ICML 2019"


def find_imagenet_v2(name: str, root: str | Path | None = None) -> Tree | None:
    """Open the official files.

    Args:
        name: `"imagenet-v2"`, or the path of the official archive or folder, by its official name.
        root: where the files of `"imagenet-v2"` are, see `official_trees`.

    Returns:
        The files; None if `name` is some other dataset.

    Raises:
        InputError: `name` is `"imagenet-v2"` and the files are missing.
    """
    path = Path(name).expanduser()
    if name == IMAGENET_V2_NAME and (root or not path.exists()):
        for tree in official_trees(name, root, (_FOLDER,), _ARCHIVES):
            if any(_IMAGE.fullmatch(each) for each in tree.names()):
                return tree
        raise InputError(fetch_text("ImageNet-V2", root, _URL, _LICENSE, "imagenetv2-matched-frequency.tar.gz"))
    official = path.name == _FOLDER or any(path.match(pattern) for pattern in _ARCHIVES)
    return open_tree(path, _ARCHIVES) if official and path.exists() and not root else None


def describe_imagenet_v2() -> str:
    """Description of ImageNet-V2 for `denseseg data list`: source, license, expected files."""
    lines = [
        f"source: {_URL}; license: {_LICENSE}",
        f"cite: {_CITATION}",
        f"archives: imagenetv2-matched-frequency.tar.gz, or its folder {_FOLDER}",
    ]
    return format_description(f"{IMAGENET_V2_NAME}: ImageNet's 1000 classes, matched frequency; val {_COUNT:,}", lines)


def imagenet_v2_names() -> ClassNames:
    """ImageNet's 1000 classes, with license and citation of these images."""
    names = imagenet_names()[1]
    return ClassNames("ImageNet-V2", names.classes, license=_LICENSE, citation=_CITATION)


def imagenet_v2_rows(tree: Tree, split: str) -> dict[str, list[Any]]:
    """List the images as columns `image` (references), `label` (class ids) and `id`; their only split is `"val"`.

    Raises:
        InputError: another split, or a folder that is no class id.
    """
    resolve_split(split, ["val"], IMAGENET_V2_NAME)
    found = sorted((int(match[1]), match[2], name) for name in tree.names() if (match := _IMAGE.fullmatch(name)))
    if found and found[-1][0] > 999:
        raise InputError(f"{tree.root} has a folder {found[-1][0]}, but ImageNet-V2's are 0 to 999. Remove it.")
    if len(found) != _COUNT:
        logger.warning("%s is partial: %d of %d images.", tree.root, len(found), _COUNT)
    return {
        "image": [tree.reference(name) for _, _, name in found],
        "label": [label for label, _, _ in found],
        "id": [f"{label}/{stem}" for label, stem, _ in found],
    }
