"""Read an annotation file in COCO's format and check every entry.

Invalid entries (an annotation of an unknown image, a box with NaN) are faults and rejected. Unusual but valid entries
that training or evaluation has a rule for (a box that exceeds the image, a crowd, a gap in the ids) are reported in
notes.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hf_denseseg.data.class_names import ClassNames
from hf_denseseg.data.reading.areas import checked_counts, checked_polygon
from hf_denseseg.data.reading.images import Fault
from hf_denseseg.data.reading.references import describe_reference, read_reference
from hf_denseseg.errors import InputError

SMALLEST_SIDE = 1.0  # pixels; narrower or lower objects are left out of training, as in mmdetection
_FORM = "It needs the lists `images`, `annotations` and `categories`, like instances_val2017.json."


@dataclass
class CocoTable:
    """Content of an annotation file, with categories renumbered to 0..K-1.

    Args:
        spec: names of the categories, in the order of their ids in the file.
        category_ids: id of each class in the file.
        images: entries of the images, each with `id`, `file_name`, `height`, `width`.
        objects: annotations of each image, each with `id`, `category`, `bbox` (x, y, width, height in pixels),
            `area`, `iscrowd` and `segmentation` (polygons or RLE as JSON text, empty if there is none).
        faults: entries that cannot be used.
        notes: description of an unusual property -> ids of the annotations (or images) that have it.
    """

    spec: ClassNames
    category_ids: list[int]
    images: list[dict[str, Any]]
    objects: list[list[dict[str, Any]]]
    faults: list[Fault] = field(default_factory=list)
    notes: dict[str, list[Any]] = field(default_factory=dict)

    def notes_as_text(self) -> list[str]:
        """One sentence per note, with count and first ids."""
        return [
            f"{len(ids)} {kind} (ids {', '.join(map(str, ids[:3]))}{', ...' if len(ids) > 3 else ''})."
            for kind, ids in self.notes.items()
        ]


def read_coco(source: str | Path, masks: bool = False) -> CocoTable:
    """Read and check an annotation file.

    Args:
        source: JSON file, or reference to one in an archive.
        masks: whether every object must have a mask.

    Raises:
        InputError: the file cannot be read or is not in COCO's format. Faults of single entries are returned instead.
    """
    path = describe_reference(str(source))
    try:
        content = json.loads(read_reference(str(source)))
        images, annotations, categories = (content[key] for key in ("images", "annotations", "categories"))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path} is not an annotation file in COCO's format ({error!r}). {_FORM}") from error
    if not categories or not images:
        raise InputError(f"{path} has {len(categories)} categories and {len(images)} images. {_FORM}")
    faults: list[Fault] = []
    ordered = sorted(categories, key=lambda each: each["id"])
    ids = [each["id"] for each in ordered]
    faults += _duplicates(ids, "category", path) + _duplicates([each["id"] for each in images], "image", path)
    faults += _duplicates([each["id"] for each in annotations], "annotation", path)
    licenses = {str(each.get("name")) for each in content.get("licenses", ()) if each.get("name")}
    name = str(content.get("info", {}).get("description") or Path(path.partition(" in ")[0]).stem)
    spec = ClassNames(name, tuple(str(each["name"]) for each in ordered), license=", ".join(sorted(licenses)[:3]))
    table = CocoTable(spec, ids, images, [[] for _ in images], faults)
    for image in images:
        if not image.get("file_name") or min(image.get("height") or 0, image.get("width") or 0) < 1:
            faults.append(
                Fault(f"image {image['id']}", f"{path}: `file_name`, `height` or `width` is missing. Add them.")
            )
    if ids != list(range(ids[0], ids[0] + len(ids))):
        gaps = sorted(set(range(ids[0], ids[-1])) - set(ids))
        table.notes["category ids are left out; the others become 0 to " + str(len(ids) - 1)] = gaps
    if not faults:
        _add_objects(table, annotations, path, masks)
    return table


def _duplicates(ids: Sequence[Any], what: str, path: str) -> list[Fault]:
    return [
        Fault(f"{what} {key}", f"{path}: {count} {what} entries have the id {key}. Give each a unique id.")
        for key, count in Counter(ids).items()
        if count > 1
    ]


def _add_objects(table: CocoTable, annotations: Sequence[dict[str, Any]], path: str, masks: bool) -> None:
    """Group the annotations by image, and collect faults and notes."""
    index_of = {image["id"]: index for index, image in enumerate(table.images)}
    class_of = {category: k for k, category in enumerate(table.category_ids)}
    for annotation in annotations:
        problem = _problem(annotation, index_of, class_of, masks)
        if problem:
            table.faults.append(Fault(f"annotation {annotation.get('id')}", f"{path}: {problem}"))
            continue
        place = index_of[annotation["image_id"]]
        image, box = table.images[place], [float(value) for value in annotation["bbox"]]
        segmentation = annotation.get("segmentation")
        found = {
            "id": annotation["id"],
            "category": class_of[annotation["category_id"]],
            "bbox": box,
            "area": float(annotation.get("area", box[2] * box[3])),
            "iscrowd": int(annotation.get("iscrowd", 0)),
            "segmentation": json.dumps(segmentation) if segmentation else "",
        }
        table.objects[place].append(found)
        kind = _note_on(found, image["height"], image["width"])
        if kind:
            table.notes.setdefault(kind, []).append(annotation["id"])
    empty = [image["id"] for image, found in zip(table.images, table.objects, strict=True) if not found]
    if empty:
        table.notes["images have no objects; evaluation keeps them, `filter_empty` is about training"] = empty


def _problem(annotation: dict[str, Any], images: Mapping[Any, int], categories: Mapping[Any, int], masks: bool) -> str:
    """Why an annotation cannot be used, and how to fix it; empty if it can."""
    if annotation.get("image_id") not in images:
        return f"its image {annotation.get('image_id')} is not in `images`. Add the image or remove the annotation."
    if annotation.get("category_id") not in categories:
        return f"its category {annotation.get('category_id')} is not in `categories`. Add it or fix the id."
    box = annotation.get("bbox")
    numbers = isinstance(box, list) and len(box) == 4 and all(isinstance(value, int | float) for value in box)
    if not numbers or not all(math.isfinite(value) for value in box or ()):
        return f"its bbox is {box}; it must be four finite numbers x, y, width, height in pixels. Fix it."
    segmentation = annotation.get("segmentation")
    if masks and not segmentation and not annotation.get("iscrowd"):
        return "it has no segmentation. Add polygons or RLE, or train with `task: object-detection`."
    if isinstance(segmentation, list) and any(len(polygon) % 2 or len(polygon) < 6 for polygon in segmentation):
        return "a polygon of its segmentation has fewer than three points or an odd number of coordinates. Fix it."
    try:
        if isinstance(segmentation, dict):
            checked_counts(segmentation["counts"], *segmentation["size"])
        for polygon in segmentation if isinstance(segmentation, list) else ():
            checked_polygon(polygon)
    except (ValueError, KeyError, TypeError) as error:
        return f"its segmentation cannot be drawn ({error}). Fix or remove it."
    return ""


def _note_on(found: dict[str, Any], height: int, width: int) -> str:
    """Note on an unusual but valid annotation, without its count; empty if there is nothing to note."""
    x, y, wide, high = found["bbox"]
    if found["iscrowd"]:
        return "crowds, left out of training, ignored regions in evaluation"
    if min(wide, high) < SMALLEST_SIDE or found["area"] <= 0:
        return "boxes less than a pixel wide or high, left out of training"
    if not len(trainable([found], height, width)[0]):
        return "boxes outside their image, left out of training"
    if x < 0 or y < 0 or x + wide > width or y + high > height:
        return "boxes stick out of their image, cut at its border in training"
    return ""


def trainable(objects: Sequence[dict[str, Any]], height: int, width: int) -> tuple[list[int], np.ndarray]:
    """Select the objects for training: no crowds, and at least one pixel wide and high inside the image.

    Returns:
        Indices into `objects`, and their boxes `(N, 4)` float32 as left, top, right, bottom, clipped to the image.
    """
    kept, boxes = [], []
    for place, found in enumerate(objects):
        x, y, wide, high = found["bbox"]
        left, top, right, bottom = max(x, 0.0), max(y, 0.0), min(x + wide, float(width)), min(y + high, float(height))
        inside = min(right - left, bottom - top) >= SMALLEST_SIDE
        if not found["iscrowd"] and found["area"] > 0 and inside:
            kept.append(place)
            boxes.append((left, top, right, bottom))
    return kept, np.array(boxes, dtype=np.float32).reshape(-1, 4)


def import_masks() -> Any:
    """Import the module of pycocotools that encodes and decodes masks.

    Raises:
        InputError: it is not installed.
    """
    try:
        from pycocotools import mask
    except ImportError as error:
        raise InputError(
            "Detection needs `pycocotools`, which is not installed. Run `pip install 'hf-denseseg[train]'`."
        ) from error
    return mask


def object_mask(segmentation: str, size: tuple[int, int], target: tuple[int, int] | None = None) -> np.ndarray:
    """Rasterize the mask of an object.

    Args:
        segmentation: polygons or RLE as JSON text, in pixels of the image.
        size: (height, width) of the image.
        target: (height, width) of the mask; the size of the image when None.

    Returns:
        `(height, width)` uint8, 1 inside the object.
    """
    coco_mask = import_masks()
    content = json.loads(segmentation) if segmentation else []
    height, width = target or size
    if not content:
        return np.zeros((height, width), dtype=np.uint8)
    if isinstance(content, list):
        # Scaling the polygons before rasterizing keeps their edges exact; an RLE can only be resampled.
        scale = np.array([width / size[1], height / size[0]])
        polygons = [(np.reshape(polygon, (-1, 2)) * scale).ravel().tolist() for polygon in content]
        return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, height, width)))
    mask = coco_mask.decode(_packed(content))
    if mask.shape == (height, width):
        return mask
    # Nearest neighbor: the source pixel under the center of each target pixel.
    rows = ((np.arange(height) + 0.5) * mask.shape[0] / height).astype(int)
    columns = ((np.arange(width) + 0.5) * mask.shape[1] / width).astype(int)
    return mask[rows[:, None], columns]


def _packed(rle: dict[str, Any]) -> Any:
    """RLE with counts as a list or as text -> compressed RLE, the form that pycocotools decodes."""
    if isinstance(rle["counts"], list):
        return import_masks().frPyObjects(rle, *rle["size"])
    return rle


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """`(height, width)` mask -> RLE `{"size", "counts"}` with text, as in COCO's result files."""
    # pycocotools runs down the columns, hence Fortran order.
    rle = import_masks().encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}
