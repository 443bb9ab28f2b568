"""Look at every picture of a classification set before training: what is wrong with which file, how many per class."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from tqdm.auto import tqdm

from hf_denseseg.data.class_names import ClassNames
from hf_denseseg.data.classification import ClassificationData
from hf_denseseg.data.reading.images import Fault
from hf_denseseg.errors import InputError


@dataclass
class PictureScan:
    """What a pass over the pictures found.

    Args:
        spec: names of the classes.
        faults: pictures that cannot be used.
        notes: what is unusual, but may be meant.
        images: number of readable pictures.
        sizes: (height, width) -> number of pictures.
    """

    spec: ClassNames
    faults: list[Fault] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    images: int = 0
    sizes: Counter = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.pictures = np.zeros(self.spec.num_labels, dtype=np.int64)


def check_pictures(data: ClassificationData, limit: int | None = None) -> list[Fault]:
    """Read so many pictures, spread over the whole (None: all), and list what is wrong with them."""
    return scan_pictures(data, limit).faults


def scan_pictures(data: ClassificationData, limit: int | None = None, progress: bool = False) -> PictureScan:
    """Read pictures, count classes and sizes and list faults; arguments as for `check_pictures`."""
    scan = PictureScan(data.spec)
    count = len(data.dataset)
    if count == 0:
        scan.faults.append(Fault("the split", "it holds no pictures. Check the folder and the name of the split."))
    chosen = range(count) if limit is None or limit >= count else np.linspace(0, count - 1, limit).astype(int)
    for index in tqdm(chosen, desc="pictures", disable=None if progress else True):
        try:
            row = data.dataset[int(index)]
        except InputError as error:
            scan.faults.append(Fault(f"row {index}", str(error)))
            continue
        scan.images += 1
        scan.pictures[row["label"]] += 1
        scan.sizes[row["image"].height, row["image"].width] += 1
    absent = [name for name, pictures in zip(data.spec.classes, scan.pictures, strict=True) if not pictures]
    if limit is None and scan.images and absent:
        scan.notes.append(f"No picture of {', '.join(absent[:8])} ({len(absent)} of {data.spec.num_labels} classes).")
    return scan
