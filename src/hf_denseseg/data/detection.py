"""Images with objects: COCO's layout or annotation file, or embedded scenes; a `datasets` table, read once.

Rows are `image` (RGB image), `image_id`, `id` (text), `height`, `width` and `objects`, a list of dicts with `id`,
`category` (0..K-1), `bbox` (x, y, width, height in pixels), `area`, `iscrowd` and `segmentation` (JSON text).
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from hf_denseseg.data.class_names import NAME_FILES, ClassNames, read_names
from hf_denseseg.data.reading.archives import open_tree
from hf_denseseg.data.reading.images import read_image
from hf_denseseg.data.shards.manifest import Manifest, check_shards, check_task, read_manifest
from hf_denseseg.data.shards.tables import import_datasets
from hf_denseseg.data.sources.coco import CocoTable, read_coco, trainable
from hf_denseseg.data.sources.coco_files import CocoSource, find_coco
from hf_denseseg.data.splits import resolve_split
from hf_denseseg.data.synthetic.detection import DETECTION_NAMES, render_detection_row
from hf_denseseg.data.synthetic.scenes import parse_name
from hf_denseseg.errors import InputError

_COLUMNS = {"id": "int64", "category": "int64", "area": "float64", "iscrowd": "int64", "segmentation": "string"}


class DetectionData(NamedTuple):
    """Rows (a `datasets` dataset), the names of the classes, and what was noted when the file was read."""

    dataset: Any
    spec: ClassNames
    notes: list[str]


def load_detection(
    name_or_path: str | Path,
    split: str,
    *,
    root: str | Path | None = None,
    masks: bool = False,
    filter_empty: bool = False,
    limit: int | None = None,
) -> DetectionData:
    """Load the images of one split with their objects.

    Args:
        name_or_path: `"coco"`; `"synthetic"` (also `"synthetic:100"`, `"synthetic@128x192"`); a folder with
            `annotations/instances_<split>.json` and `<split>/*.jpg`, unpacked or in the official zips; a folder of
            packed shards; or an annotation file in COCO's format.
        split: part of the file name, such as `"train2017"`; of an annotation file it says nothing.
        root: where the files of `"coco"` lie: folder, or a folder in which their folder lies; the environment variable
            DENSESEG_DATA_ROOT when None.
        masks: whether every object needs a mask.
        filter_empty: leave out images without an object that training can learn.
        limit: use the first so many images.

    Returns:
        The dataset, whose images are decoded when they are asked for, the names of the classes, and notes.

    Raises:
        InputError: something given cannot be used, or entries of the annotation file are faulty; the message names
            the first and the way out.
    """
    name = str(name_or_path)
    if name.split(":")[0].split("@")[0] == "synthetic":
        asked = parse_name(name)
        split = resolve_split(split, sorted(asked.counts), "The embedded dataset")
        count = min(asked.counts[split], limit or asked.counts[split])
        rows = [render_detection_row(split, index, asked.size) for index in range(count)]
        return DetectionData(_table(rows, filter_empty), DETECTION_NAMES, [])
    folder = Path(name).expanduser()
    if folder.is_dir() and (manifest := read_manifest(folder, split)):
        return _packed(folder, manifest, filter_empty, limit)
    source = find_coco(name, split, root)
    table = read_coco(source.annotations, masks)
    if table.faults:
        more = f" {len(table.faults) - 1} more faults; `denseseg data check` lists them." if table.faults[1:] else ""
        raise InputError(f"{table.faults[0]}{more}")
    rows = coco_rows(table, source)[:limit]
    return DetectionData(_table(rows, filter_empty), table.spec, table.notes_as_text())


def _packed(folder: Path, manifest: Manifest, filter_empty: bool, limit: int | None) -> DetectionData:
    """Rows of packed shards.

    Raises:
        InputError: shards are missing or cut short, were packed for another task, or nothing is left.
    """
    check_task(folder, manifest, "object-detection", "instance-segmentation")
    check_shards(folder, manifest)
    spec = read_names(folder / NAME_FILES[0], None)
    if manifest.form == "webdataset":
        rows = [row for shard in manifest.shards for row in _tar_rows(folder / shard.file)]
        return DetectionData(_table(rows[:limit], filter_empty), spec, [])
    files = [str(folder / shard.file) for shard in manifest.shards]
    table = import_datasets().load_dataset("parquet", data_files=files, split="train")
    table = table.cast_column("image", import_datasets().Image(decode=False))
    table = table.select(range(min(limit or len(table), len(table))))
    if filter_empty:
        rows = table.select_columns(["objects", "height", "width"])
        table = table.select(_learnable((_listed(row["objects"]), row["height"], row["width"]) for row in rows))
    return DetectionData(table.with_transform(_decode), spec, [])


def _tar_rows(shard: Path) -> Iterator[dict[str, Any]]:
    """Rows of a tar shard; the images stay in it."""
    tree = open_tree(shard)
    images = {name.partition(".")[0]: name for name in tree.names() if not name.endswith(".json")}
    for key, image in images.items():
        row = json.loads(tree.read(f"{key}.json"))
        yield row | {"image": tree.reference(image), "id": key, "objects": _listed(row["objects"])}


def _learnable(rows: Iterable[tuple[list[dict[str, Any]], int, int]]) -> list[int]:
    """Places of the images with an object that training can learn, of (objects, height, width).

    Raises:
        InputError: there are none.
    """
    places = [place for place, row in enumerate(rows) if trainable(*row)[0]]
    if not places:
        raise InputError("No image has an object to learn. Check the annotations, or give filter_empty: false.")
    return places


def _listed(objects: Mapping[str, list[Any]]) -> list[dict[str, Any]]:
    """Columns of objects -> a list of dicts."""
    return [dict(zip(objects, values, strict=True)) for values in zip(*objects.values(), strict=True)]


def coco_rows(table: CocoTable, source: CocoSource) -> list[dict[str, Any]]:
    """Rows of an annotation file, in the order of its images."""
    return [
        {
            "image": source.image(image["file_name"]),
            "image_id": image["id"],
            "id": Path(image["file_name"]).stem,
            "height": image["height"],
            "width": image["width"],
            "objects": objects,
        }
        for image, objects in zip(table.images, table.objects, strict=True)
    ]


def _table(rows: list[dict[str, Any]], filter_empty: bool) -> Any:
    """Rows as a dataset that decodes when asked.

    Raises:
        InputError: nothing is left.
    """
    datasets = import_datasets()
    if filter_empty:
        rows = [rows[place] for place in _learnable((row["objects"], row["height"], row["width"]) for row in rows)]
    kinds = {key: datasets.List(datasets.Value(kind)) for key, kind in _COLUMNS.items()}
    features = datasets.Features(
        {
            "image": datasets.Image(decode=False),
            "image_id": datasets.Value("int64"),
            "id": datasets.Value("string"),
            "height": datasets.Value("int64"),
            "width": datasets.Value("int64"),
            "objects": {**kinds, "bbox": datasets.List(datasets.List(datasets.Value("float64")))},
        }
    )
    columns: dict[str, list[Any]] = {key: [row[key] for row in rows] for key in features if key != "objects"}
    columns["objects"] = [
        {key: [found[key] for found in row["objects"]] for key in (*_COLUMNS, "bbox")} for row in rows
    ]
    return datasets.Dataset.from_dict(columns, features=features).with_transform(_decode)


def _decode(batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    """Batched row transform: encoded images -> `image`, columns of objects -> a list of dicts."""
    rows = {key: list(values) for key, values in batch.items()}
    if "objects" in rows:
        rows["objects"] = [_listed(found) for found in rows["objects"]]
    if "image" in rows:
        named = zip(rows["image"], rows["id"], strict=True)
        rows["image"] = [read_image(image, image.get("path") or f"{name} (image)") for image, name in named]
        for image, height, width, name in zip(rows["image"], rows["height"], rows["width"], rows["id"], strict=True):
            if (image.height, image.width) != (height, width):
                raise InputError(
                    f"Image {name} is {image.height}x{image.width} (height x width), its entry {height}x{width}."
                    " The boxes would lie elsewhere: fix the entry, or take the image that was annotated."
                )
    return rows
