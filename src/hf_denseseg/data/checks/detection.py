"""Check a detection dataset before training: faulty entries and images, and statistics of its objects."""

from dataclasses import dataclass

import numpy as np

from hf_denseseg.data.checks.scan import Scan
from hf_denseseg.data.class_names import ClassNames
from hf_denseseg.data.detection import DetectionData, load_detection
from hf_denseseg.data.reading.pixels import RGB_BYTES, PixelFormat
from hf_denseseg.data.shards.manifest import is_packed
from hf_denseseg.data.sources.coco import read_coco, trainable
from hf_denseseg.data.sources.coco_files import find_coco


@dataclass
class DetectionScan(Scan[ClassNames]):
    """Result of a pass over the images; also holds `objects`, `crowds`, `images_with_class`, `(num_labels,)` each.

    Args:
        images_without_objects: number of images without a trainable object.
    """

    images_without_objects: int = 0

    def __post_init__(self) -> None:
        self.objects, self.crowds, self.images_with_class = np.zeros((3, self.spec.num_labels), dtype=np.int64)


def scan_detection(data: DetectionData, limit: int | None = None, progress: bool = False) -> DetectionScan:
    """Read images, count objects and sizes and list faults.

    Args:
        data: what `load_detection` returned.
        limit: read only this many images, evenly spaced over the split; None reads all.
        progress: show a progress bar on a terminal.
    """
    scan = DetectionScan(data.spec, notes=list(data.notes))
    for row in scan.rows(data.dataset, limit, progress):
        scan.images += 1
        scan.sizes[row["height"], row["width"]] += 1
        scan.survey.add_read(row["image"])
        trainable_indices, _ = trainable(row["objects"], row["height"], row["width"])
        scan.images_without_objects += not trainable_indices
        trained = np.bincount(
            [row["objects"][index]["category"] for index in trainable_indices], minlength=data.spec.num_labels
        )
        crowds = [each["category"] for each in row["objects"] if each["iscrowd"]]
        scan.objects += trained
        scan.images_with_class += trained > 0
        scan.crowds += np.bincount(crowds, minlength=data.spec.num_labels)
    if limit is None:
        scan.note_absent(scan.objects, "object")
    return scan


def scan_detection_source(
    name: str,
    split: str,
    *,
    root: str | None = None,
    masks: bool = False,
    limit: int | None = None,
    progress: bool = False,
    pixel_format: PixelFormat = RGB_BYTES,
) -> DetectionScan:
    """Scan a dataset by its name; lists all faulty entries of an annotation file, not only the first.

    Args:
        name: as for `load_detection`.
        split: as for `load_detection`.
        root: as for `load_detection`.
        masks: whether every object needs a mask.
        limit: read only this many images, evenly spaced over the split; None reads all.
        progress: show a progress bar on a terminal.
        pixel_format: as for `load_detection`.
    """
    if not (name.startswith("synthetic") or is_packed(name, split)):
        table = read_coco(find_coco(name, split, root).annotations, masks)
        if table.faults:
            return DetectionScan(table.spec, faults=table.faults, notes=table.notes_as_text())
    data = load_detection(name, split, root=root, masks=masks, pixel_format=pixel_format)
    return scan_detection(data, limit, progress)
