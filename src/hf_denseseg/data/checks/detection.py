"""Look at a detection set before training: faulty entries and pictures, and what its objects are like."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from tqdm.auto import tqdm

from hf_denseseg.data.class_names import ClassNames
from hf_denseseg.data.detection import DetectionData, load_detection
from hf_denseseg.data.reading.images import Fault
from hf_denseseg.data.shards.manifest import is_packed
from hf_denseseg.data.sources.coco import read_coco, trainable
from hf_denseseg.data.sources.coco_files import find_coco
from hf_denseseg.errors import InputError


@dataclass
class ObjectScan:
    """What a pass over the pictures found.

    Args:
        spec: names of the classes.
        faults: entries and pictures that cannot be used.
        notes: what is unusual, but has a rule.
        images: number of readable pictures.
        empty: pictures without an object that training learns.
        sizes: (height, width) -> number of pictures.
    """

    spec: ClassNames
    faults: list[Fault] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    images: int = 0
    empty: int = 0
    sizes: Counter = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.objects, self.crowds, self.images_with = np.zeros((3, self.spec.num_labels), dtype=np.int64)


def check_rows(data: DetectionData, limit: int | None = None) -> list[Fault]:
    """Read so many pictures, spread over the whole (None: all), and list what is wrong with them."""
    return scan_rows(data, limit).faults


def scan_rows(data: DetectionData, limit: int | None = None, progress: bool = False) -> ObjectScan:
    """Read pictures, count objects and sizes and list faults; arguments as for `check_rows`."""
    scan = ObjectScan(data.spec, notes=list(data.notes))
    count = len(data.dataset)
    chosen = range(count) if limit is None or limit >= count else np.linspace(0, count - 1, limit).astype(int)
    for index in tqdm(chosen, desc="pictures", disable=None if progress else True):
        try:
            row = data.dataset[int(index)]
        except InputError as error:
            scan.faults.append(Fault(f"row {index}", str(error)))
            continue
        scan.images += 1
        scan.sizes[row["height"], row["width"]] += 1
        kept, _ = trainable(row["objects"], row["height"], row["width"])
        scan.empty += not kept
        learned = np.bincount([row["objects"][place]["category"] for place in kept], minlength=data.spec.num_labels)
        crowds = [each["category"] for each in row["objects"] if each["iscrowd"]]
        scan.objects += learned
        scan.images_with += learned > 0
        scan.crowds += np.bincount(crowds, minlength=data.spec.num_labels)
    absent = [name for name, objects in zip(data.spec.classes, scan.objects, strict=True) if not objects]
    if limit is None and scan.images and absent:
        scan.notes.append(f"No object of {', '.join(absent[:8])} ({len(absent)} of {data.spec.num_labels} classes).")
    return scan


def scan_detections(
    name: str,
    split: str,
    *,
    root: str | None = None,
    masks: bool = False,
    limit: int | None = None,
    progress: bool = False,
) -> ObjectScan:
    """Scan a data set by its name; all faulty entries of an annotation file are listed, not only the first.

    Args:
        name: as for `load_detection`.
        split: as for `load_detection`.
        root: as for `load_detection`.
        masks: whether every object needs a mask.
        limit: look at so many pictures.
        progress: show a bar on a terminal.
    """
    if not (name.startswith("synthetic") or is_packed(name, split)):
        table = read_coco(find_coco(name, split, root).annotations, masks)
        if table.faults:
            return ObjectScan(table.spec, faults=table.faults, notes=table.notes_as_text())
    return scan_rows(load_detection(name, split, root=root, masks=masks), limit, progress)
