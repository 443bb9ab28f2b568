"""Check a classification dataset before training: faults with their file, and images per class."""

from dataclasses import dataclass

import numpy as np

from hf_denseseg.data.checks.scan import Scan
from hf_denseseg.data.class_names import ClassNames
from hf_denseseg.data.classification import ClassificationData
from hf_denseseg.data.reading.images import Fault
from hf_denseseg.data.reading.pixels import height_width


@dataclass
class ClassificationScan(Scan[ClassNames]):
    """Result of a pass over the images; also holds `images_with_class`, `(num_labels,)`."""

    def __post_init__(self) -> None:
        self.images_with_class = np.zeros(self.spec.num_labels, dtype=np.int64)


def scan_classification(
    data: ClassificationData, limit: int | None = None, progress: bool = False
) -> ClassificationScan:
    """Read images, count classes and sizes and list faults.

    Args:
        data: what `load_classification` returned.
        limit: read only this many images, evenly spaced over the split; None reads all.
        progress: show a progress bar on a terminal.
    """
    scan = ClassificationScan(data.spec)
    if len(data.dataset) == 0:
        scan.faults.append(Fault("the split", "it contains no images. Check the folder and the name of the split."))
    for row in scan.rows(data.dataset, limit, progress):
        scan.images += 1
        scan.images_with_class[row["label"]] += 1
        scan.sizes[height_width(row["image"])] += 1
        scan.survey.add_read(row["image"])
    if limit is None:
        scan.note_absent(scan.images_with_class, "image")
    return scan
