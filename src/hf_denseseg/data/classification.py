"""Classification data: class folders in the layout of ImageNet, Parquet shards, hub datasets, embedded drawings.

Rows are always `image` (RGB image), `label` (class id) and `id` (text).
"""

from collections.abc import Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from hf_denseseg.data.class_names import NAME_FILES, ClassNames, read_names
from hf_denseseg.data.reading.images import read_image
from hf_denseseg.data.reading.pixels import RGB_BYTES, PixelFormat
from hf_denseseg.data.reading.suffixes import image_suffixes
from hf_denseseg.data.shards.manifest import check_task, is_packed, read_manifest
from hf_denseseg.data.shards.packed_rows import PackedRows
from hf_denseseg.data.shards.tables import find_shards, find_table, import_datasets, open_table
from hf_denseseg.data.sources.imagenet import find_imagenet, imagenet_names, imagenet_rows
from hf_denseseg.data.sources.imagenet_v2 import find_imagenet_v2, imagenet_v2_names, imagenet_v2_rows
from hf_denseseg.data.splits import resolve_split
from hf_denseseg.data.synthetic.objects import OBJECT_NAMES, render_object
from hf_denseseg.data.synthetic.scenes import parse_name
from hf_denseseg.errors import InputError


class ClassificationData(NamedTuple):
    """Rows (a `datasets` dataset) and the names of their classes."""

    dataset: Any
    spec: ClassNames


def load_classification(
    name_or_path: str | Path,
    split: str,
    *,
    root: str | Path | None = None,
    names: str | Path | None = None,
    columns: Mapping[str, str] | None = None,
    revision: str | None = None,
    streaming: bool = False,
    limit: int | None = None,
    pixel_format: PixelFormat = RGB_BYTES,
) -> ClassificationData:
    """Load the images of one split and their classes.

    Args:
        name_or_path: `"imagenet"`; `"imagenet-v2"`; `"synthetic"` (also `"synthetic:500"`, `"synthetic@64x64"`); a
            folder with `<split>/<class>/*.jpg`, or with the official archives of ImageNet, or such an archive; a
            folder of Parquet or tar shards; or the id of a hub dataset.
        split: `"train"`, `"val"` (`"validation"` is the same), `"test"`, or the name of a folder.
        root: location of the files of a dataset given by name: their folder, its parent folder, or an archive; None
            uses the environment variable DENSESEG_DATA_ROOT.
        names: file with the names of the classes; None searches next to the data (`classes.json`, `classes.txt`) and
            falls back to the folder names or the names of the label column.
        columns: `{"image": ..., "label": ..., "id": ...}`, names of the columns of shards and hub datasets.
        revision: commit, tag or branch of a hub dataset.
        streaming: read packed shards in place, as a stream for training.
        limit: use a random subset of this size (folders are sorted by class), the same one every time.
        pixel_format: channels and range of the images; in all but 8-bit RGB they are `(H, W, C)` arrays.

    Returns:
        The dataset, whose images are decoded on access, and the names of the classes.

    Raises:
        InputError: an argument cannot be used; the message names it and the fix.
        RunError: the hub cannot be reached.
    """
    name, folder = str(name_or_path), Path(name_or_path).expanduser()
    decode = partial(_decode, pixel_format=pixel_format)
    if streaming:
        return _stream(folder, split, limit, decode)
    if name.split(":")[0].split("@")[0] == "synthetic":
        counts = parse_name(name).counts
        split = resolve_split(split, sorted(counts), "The embedded dataset")
        # Only ids are stored; the images are rendered from them on access.
        rows = {"id": [f"{split}-{index:05d}" for index in range(counts[split])]}
        return ClassificationData(_table(rows, _RenderObjects(name, pixel_format), limit), OBJECT_NAMES)
    if not is_packed(folder, split) and (tree := find_imagenet_v2(name, root)):
        return ClassificationData(_table(imagenet_v2_rows(tree, split), decode, limit), imagenet_v2_names())
    if not is_packed(folder, split) and (tree := find_imagenet(name, root)):
        spec = imagenet_names()[1]
        return ClassificationData(_table(imagenet_rows(tree, split), decode, limit), spec)
    splits = find_class_folders(folder) if folder.is_dir() and not find_shards(folder) else {}
    if splits:
        rows, keys = _folder_rows(folder, splits, split)
        return ClassificationData(_table(rows, decode, limit), _names_of(folder, keys, names))
    # Shards or a hub dataset: ids are used as they are, so they must fit the names.
    table = open_table(
        find_table(name, "<split>/<class>/*.jpg"), split, columns=columns, revision=revision, images=("image",)
    )
    spec = _names_of_table(name, table, names)
    wrong = sorted({label for label in table["label"] if not (label is not None and 0 <= label < spec.num_labels)})
    if wrong:
        raise InputError(
            f"{name} has the labels {wrong[:5]}, but names for {spec.num_labels} classes only. Fix the labels."
        )
    if limit is not None:
        table = table.select(_random_subset(len(table), limit))
    return ClassificationData(table.with_transform(decode), spec)


def _stream(folder: Path, split: str, limit: int | None, decode: Any) -> ClassificationData:
    """Rows of packed shards, for sequential reading.

    Raises:
        InputError: there are no shards, or they were packed for another task.
    """
    manifest = read_manifest(folder, split) if folder.is_dir() else None
    if manifest is None:
        raise InputError(
            f"streaming reads shards, and {folder} holds none of split {split!r}. Pack the data: `denseseg data pack "
            f"DATASET --task image-classification --split {split} --output_dir SHARDS`."
        )
    check_task(folder, manifest, "image-classification")
    rows = PackedRows(folder, manifest, decode, limit)
    return ClassificationData(rows, read_names(folder / NAME_FILES[0], None))


def find_class_folders(folder: Path) -> dict[str, Path]:
    """Split -> its folder, for every subfolder that contains class folders with images."""
    children = [child for child in sorted(folder.iterdir()) if child.is_dir()]
    return {
        child.name: child
        for child in children
        if any(_has_image(grandchild) for grandchild in child.iterdir() if grandchild.is_dir())
    }


def class_keys(splits: Mapping[str, Path]) -> list[str]:
    """Sorted names of the class folders of all splits together, so that ids agree even if a split lacks a class.

    Names that are all numbers are sorted as numbers: folder `2` comes before folder `10`.
    """
    keys = {child.name for folder in splits.values() for child in folder.iterdir() if child.is_dir()}
    return sorted(keys, key=lambda key: (int(key), key)) if all(key.isdecimal() for key in keys) else sorted(keys)


def _has_image(folder: Path) -> bool:
    return any(path.suffix.lower() in image_suffixes() for path in folder.iterdir())


def _folder_rows(folder: Path, splits: Mapping[str, Path], split: str) -> tuple[dict[str, list[Any]], list[str]]:
    """Columns of one split (image path, class id, image id), and the keys of the classes."""
    found = resolve_split(split, sorted(splits), str(folder))
    keys = class_keys(splits)
    rows: dict[str, list[Any]] = {"image": [], "label": [], "id": []}
    for label, key in enumerate(keys):
        class_folder = splits[found] / key
        if not class_folder.is_dir():
            continue
        for path in sorted(path for path in class_folder.iterdir() if path.suffix.lower() in image_suffixes()):
            rows["image"].append(str(path))
            rows["label"].append(label)
            rows["id"].append(f"{key}/{path.stem}")
    return rows, keys


def _names_of(folder: Path, keys: list[str], names: str | Path | None) -> ClassNames:
    files = [Path(names)] if names else [folder / file for file in NAME_FILES if (folder / file).is_file()]
    return read_names(files[0], keys) if files else ClassNames(folder.name, tuple(keys))


def _names_of_table(name: str, table: Any, names: str | Path | None) -> ClassNames:
    """Class names of a table: from a file, else from its label column.

    Raises:
        InputError: neither names the classes.
    """
    known = getattr(table.features["label"], "names", None)
    folder = Path(name).expanduser()
    files = [Path(names)] if names else [folder / file for file in NAME_FILES if (folder / file).is_file()]
    if files:
        return read_names(files[0], known)
    if not known:
        raise InputError(
            f"The label column of {name} has no names. Give a file with the name of each class as `label_spec`, "
            'such as {"0": "cat", "1": "dog"}.'
        )
    return ClassNames(name.rpartition("/")[2], tuple(known))


def _decode(batch: Mapping[str, list[Any]], pixel_format: PixelFormat) -> dict[str, list[Any]]:
    """Batched row transform: encoded images -> `image`."""
    images = [
        read_image(image, (image.get("path") if isinstance(image, dict) else image) or f"{name} (image)", pixel_format)
        for image, name in zip(batch["image"], batch["id"], strict=True)
    ]
    return {"image": images, "label": list(batch["label"]), "id": list(batch["id"])}


class _RenderObjects:
    """Batched row transform: numbers of embedded drawings -> `image`, `label`, `id`."""

    def __init__(self, name: str, pixel_format: PixelFormat) -> None:
        self.size = parse_name(name).size
        self.pixel_format = pixel_format

    def __call__(self, batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        drawn = [_cached_object(name.split("-")[0], int(name.split("-")[1]), self.size) for name in batch["id"]]
        return {
            "image": [read_image(image, "of the embedded dataset", self.pixel_format) for image, _ in drawn],
            "label": [label for _, label in drawn],
            "id": list(batch["id"]),
        }


@lru_cache(maxsize=2048)
def _cached_object(split: str, index: int, size: tuple[int, int] | None) -> tuple[Image.Image, int]:
    return render_object(split, index, size)


def _table(rows: dict[str, list[Any]], decode: Any, limit: int | None) -> Any:
    datasets = import_datasets()
    if limit is not None:
        chosen = _random_subset(len(rows["id"]), limit)
        rows = {key: [values[index] for index in chosen] for key, values in rows.items()}
    kinds = {"image": datasets.Image(decode=False), "label": datasets.Value("int64"), "id": datasets.Value("string")}
    features = datasets.Features({key: kinds[key] for key in rows})
    return datasets.Dataset.from_dict(rows, features=features).with_transform(decode)


def _random_subset(count: int, limit: int) -> list[int]:
    """`limit` of `count` indices, always the same. Random, since equal steps could miss classes that alternate."""
    return sorted(np.random.default_rng(0).permutation(count)[:limit].tolist())
