"""Detection data: COCO's layout, an annotation file, packed shards or embedded scenes, as a `datasets` table.

Rows are `image` (RGB image), `image_id`, `id` (text), `height`, `width` and `objects`, a list of dicts with `id`,
`category` (0..K-1), `bbox` (x, y, width, height in pixels), `area`, `iscrowd` and `segmentation` (JSON text).
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from hf_denseseg.data.class_names import NAME_FILES, ClassNames, read_names
from hf_denseseg.data.reading.archives import open_tree
from hf_denseseg.data.reading.images import read_image
from hf_denseseg.data.reading.pixels import RGB_BYTES, PixelFormat, height_width
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
    """Rows (a `datasets` dataset), the names of the classes, and notes on the annotation file."""

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
    pixel_format: PixelFormat = RGB_BYTES,
) -> DetectionData:
    """Load the images of one split with their objects.

    Args:
        name_or_path: `"coco"`; `"synthetic"` (also `"synthetic:100"`, `"synthetic@128x192"`); a folder with
            `annotations/instances_<split>.json` and `<split>/*.jpg`, unpacked or in the official zips; a folder of
            packed shards; or an annotation file in COCO's format.
        split: part of the file name, such as `"train2017"`; it has no effect for an annotation file.
        root: location of the files of `"coco"`: their folder or its parent folder; None uses the environment variable
            DENSESEG_DATA_ROOT.
        masks: whether every object needs a mask.
        filter_empty: exclude images without a trainable object.
        limit: use only the first `limit` images; None uses all.
        pixel_format: channels and range of the images; in all but 8-bit RGB they are `(H, W, C)` arrays.

    Returns:
        The dataset, whose images are decoded on access, the names of the classes, and notes.

    Raises:
        InputError: an argument cannot be used, or entries of the annotation file are faulty; the message names the
            first fault and the fix.
    """
    name = str(name_or_path)
    decode = partial(_decode, pixel_format=pixel_format)
    if name.split(":")[0].split("@")[0] == "synthetic":
        requested = parse_name(name)
        split = resolve_split(split, sorted(requested.counts), "The embedded dataset")
        count = min(requested.counts[split], limit or requested.counts[split])
        rows = [render_detection_row(split, index, requested.size) for index in range(count)]
        return DetectionData(_table(rows, filter_empty, decode), DETECTION_NAMES, [])
    folder = Path(name).expanduser()
    if folder.is_dir() and (manifest := read_manifest(folder, split)):
        return _packed(folder, manifest, filter_empty, limit, decode)
    source = find_coco(name, split, root)
    table = read_coco(source.annotations, masks)
    if table.faults:
        more = f" {len(table.faults) - 1} more faults; `denseseg data check` lists them." if table.faults[1:] else ""
        raise InputError(f"{table.faults[0]}{more}")
    rows = coco_rows(table, source)[:limit]
    return DetectionData(_table(rows, filter_empty, decode), table.spec, table.notes_as_text())


def _packed(folder: Path, manifest: Manifest, filter_empty: bool, limit: int | None, decode: Any) -> DetectionData:
    """Rows of packed shards.

    Raises:
        InputError: shards are missing or truncated, were packed for another task, or no image has a trainable object.
    """
    check_task(folder, manifest, "object-detection", "instance-segmentation")
    check_shards(folder, manifest)
    spec = read_names(folder / NAME_FILES[0], None)
    if manifest.form == "webdataset":
        rows = [row for shard in manifest.shards for row in _tar_rows(folder / shard.file)]
        return DetectionData(_table(rows[:limit], filter_empty, decode), spec, [])
    files = [str(folder / shard.file) for shard in manifest.shards]
    table = import_datasets().load_dataset("parquet", data_files=files, split="train")
    table = table.cast_column("image", import_datasets().Image(decode=False))
    table = table.select(range(min(limit or len(table), len(table))))
    if filter_empty:
        rows = table.select_columns(["objects", "height", "width"])
        table = table.select(_trainable_rows((_as_dicts(row["objects"]), row["height"], row["width"]) for row in rows))
    return DetectionData(table.with_transform(decode), spec, [])


def _tar_rows(shard: Path) -> Iterator[dict[str, Any]]:
    """Rows of a tar shard, with references to the images inside it."""
    tree = open_tree(shard)
    # Members are <id>.<image extension> and <id>.json.
    images = {name.partition(".")[0]: name for name in tree.names() if not name.endswith(".json")}
    for key, image in images.items():
        row = json.loads(tree.read(f"{key}.json"))
        yield row | {"image": tree.reference(image), "id": key, "objects": _as_dicts(row["objects"])}


def _trainable_rows(rows: Iterable[tuple[list[dict[str, Any]], int, int]]) -> list[int]:
    """Indices of the images with a trainable object, from rows of (objects, height, width).

    Raises:
        InputError: there is no such image.
    """
    indices = [index for index, row in enumerate(rows) if trainable(*row)[0]]
    if not indices:
        raise InputError("No image has a trainable object. Check the annotations, or set filter_empty: false.")
    return indices


def _as_dicts(objects: Mapping[str, list[Any]]) -> list[dict[str, Any]]:
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


def _table(rows: list[dict[str, Any]], filter_empty: bool, decode: Any) -> Any:
    """Rows as a dataset that decodes on access.

    Raises:
        InputError: `filter_empty` would exclude every image.
    """
    datasets = import_datasets()
    if filter_empty:
        rows = [
            rows[index] for index in _trainable_rows((row["objects"], row["height"], row["width"]) for row in rows)
        ]
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
    # `datasets` stores the objects of an image as a dict of lists; `_decode` turns them into a list of dicts again.
    columns: dict[str, list[Any]] = {key: [row[key] for row in rows] for key in features if key != "objects"}
    columns["objects"] = [
        {key: [found[key] for found in row["objects"]] for key in (*_COLUMNS, "bbox")} for row in rows
    ]
    return datasets.Dataset.from_dict(columns, features=features).with_transform(decode)


def _decode(batch: Mapping[str, list[Any]], pixel_format: PixelFormat) -> dict[str, list[Any]]:
    """Batched row transform: encoded images -> `image`, columns of objects -> a list of dicts."""
    rows = {key: list(values) for key, values in batch.items()}
    if "objects" in rows:
        rows["objects"] = [_as_dicts(found) for found in rows["objects"]]
    if "image" in rows:
        named = zip(rows["image"], rows["id"], strict=True)
        rows["image"] = [
            read_image(image, image.get("path") or f"{name} (image)", pixel_format) for image, name in named
        ]
        for image, height, width, name in zip(rows["image"], rows["height"], rows["width"], rows["id"], strict=True):
            if (found := height_width(image)) != (height, width):
                raise InputError(
                    f"Image {name} is {found[0]}x{found[1]} (height x width), but its entry has "
                    f"{height}x{width}. The boxes would be misplaced: fix the entry, or use the annotated image."
                )
    return rows
