"""Look at every pair before training: what is wrong with which file, and what the labels are made of."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from hf_denseseg.data.labels import VOID, LabelSpec, SegmentationData
from hf_denseseg.data.reading.images import Fault, check_same_size, is_palette, read_image, read_label
from hf_denseseg.data.reading.references import describe_reference
from hf_denseseg.data.segmentation import list_source, load_segmentation
from hf_denseseg.errors import InputError


@dataclass
class Scan:
    """What a pass over the pairs found.

    Args:
        spec: what the labels mean.
        faults: pairs (or the whole) that cannot be used.
        notes: what is unusual, but may be meant.
        images: number of readable pairs.
        pixels: pixels per class, `(num_labels,)`.
        image_pixels: per class, labelled pixels of all the pictures that show it, `(num_labels,)`.
        images_with: pictures that show a class, `(num_labels,)`.
        void: void pixels.
        sizes: (height, width) -> number of pictures.
    """

    spec: LabelSpec
    faults: list[Fault] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    images: int = 0
    void: int = 0
    sizes: Counter = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.pixels, self.image_pixels, self.images_with = np.zeros((3, self.spec.num_labels), dtype=np.int64)

    def add(self, name: str, label: np.ndarray) -> None:
        """Count one label map of train ids and 255."""
        counts = np.bincount(label.ravel(), minlength=256)
        pixels = counts[: self.spec.num_labels]
        self.images += 1
        self.void += int(counts[VOID])
        self.pixels += pixels
        self.image_pixels += (pixels > 0) * pixels.sum()
        self.images_with += pixels > 0
        self.sizes[label.shape] += 1
        if not pixels.any():
            remedy = "Take the pair out, or mend `raw_to_train` or `raw_void` of the label specification."
            self.faults.append(Fault(name, f"every pixel of the label map is void. {remedy}"))

    def finish(self, whole: bool) -> "Scan":
        """Judge the labels together; classes that never occur are only named after looking at all pairs."""
        zero = int(self.spec.table[0])
        only_zero = zero < self.spec.num_labels and 0 < self.pixels.sum() == self.pixels[zero]
        if self.spec.num_labels > 1 and only_zero and self.void and self.spec.table[255] == VOID:
            self.faults.append(
                Fault(
                    "all label maps",
                    "they hold only 0 and void: these look like black-and-white masks (0 and 255). Say what 255 means "
                    "in the label specification, such as raw_to_train: {0: 0, 255: 1}.",
                )
            )
        absent = [name for name, count in zip(self.spec.classes, self.images_with, strict=True) if not count]
        if whole and self.images and absent:
            self.notes.append(
                f"No pixel of {', '.join(absent)} in {self.images} pictures. If that is a surprise, compare the order "
                "of `classes` with the ids in the files."
            )
        return self

    @property
    def shares(self) -> np.ndarray:
        """Share of each class among the labelled pixels."""
        return self.pixels / max(self.pixels.sum(), 1)

    @property
    def void_share(self) -> float:
        """Share of void among all pixels."""
        return self.void / max(self.void + int(self.pixels.sum()), 1)

    def class_weights(self) -> dict[str, list[float]]:
        """Weights against imbalance; a class without pixels gets 0.

        `enet`: 1 / ln(1.02 + share) (ENet, Sec. 5). `median_frequency`: median of the frequencies / own frequency, a
        frequency being counted in the pictures that show the class (SegNet, Sec. 3).
        """
        seen = self.pixels > 0
        frequency = self.pixels / np.maximum(self.image_pixels, 1)
        middle = np.median(frequency[seen]) if seen.any() else 0.0
        weights = {
            "enet": 1 / np.log(1.02 + self.shares),
            "median_frequency": middle / np.where(seen, frequency, 1.0),
        }
        return {name: np.where(seen, values, 0.0).round(6).tolist() for name, values in weights.items()}


def scan_dataset(data: SegmentationData, limit: int | None = None, progress: bool = False) -> Scan:
    """Read pairs, count their pixels and list their faults.

    Args:
        data: what `load_segmentation` returned.
        limit: look at so many pairs, spread over the whole; None looks at all.
        progress: show a bar on a terminal.
    """
    scan = Scan(data.spec)
    rows = data.dataset
    if hasattr(rows, "__len__"):
        count = len(rows)
        chosen = range(count) if limit is None or limit >= count else np.linspace(0, count - 1, limit).astype(int)
        for index in tqdm(chosen, desc="pairs", disable=None if progress else True):
            try:
                row = rows[int(index)]
            except InputError as error:
                scan.faults.append(Fault(f"row {index}", str(error)))
                continue
            scan.add(row["id"], row["label"])
    else:
        for row in islice(_until_fault(rows, scan), limit):
            scan.add(row["id"], row["label"])
    return scan.finish(whole=limit is None)


def scan_source(
    name: str, split: str, *, spec: str | None = None, limit: int | None = None, progress: bool = False, **options: Any
) -> Scan:
    """Scan a data set by its name; in a folder of pairs, files without partner and damaged files are faults too.

    Args:
        name: as for `load_segmentation`.
        split: as for `load_segmentation`.
        spec: label specification file.
        limit: look at so many pairs.
        progress: show a bar on a terminal.
        options: further arguments of `load_segmentation`.
    """
    root = options.pop("root", None)
    found = list_source(name, split, spec=spec, root=root)
    if found is None:
        return scan_dataset(load_segmentation(name, split, spec=spec, **options), limit, progress)
    scan, pairs = Scan(found.spec, notes=list(found.notes)), found.pairs
    if not found.labelled:
        scan.notes.append("The authors keep the labels of this split to themselves; only the pictures are read.")
    scan.faults += [Fault(file, message) for file, message in pairs.lone_files()]
    chosen = [key for key in sorted(pairs.images) if key in pairs.labels or not found.labelled]
    palettes = 0
    for key in tqdm(chosen[:limit], desc="pairs", disable=None if progress else True):
        called = describe_reference(pairs.images[key])
        try:
            image = read_image(pairs.images[key])
        except InputError as error:
            scan.faults.append(Fault(called, str(error)))
            image = None
        if not found.labelled:
            scan.images += 1
            continue
        file = pairs.labels[key]
        try:
            label = read_label(file, scan.spec)
            if image is not None:
                check_same_size(image, label, called)
        except InputError as error:
            scan.faults.append(Fault(describe_reference(file), str(error)))
            continue
        scan.add(describe_reference(file), label)
        palettes += is_palette(file)
    if palettes:
        scan.notes.append(f"{palettes} label maps are palette pictures: the index of a pixel is taken as its id.")
    return scan.finish(whole=limit is None and found.labelled)


def _until_fault(rows: Iterable[Any], scan: Scan) -> Iterator[Any]:
    """Rows of a stream; a faulty one ends it."""
    try:
        yield from rows
    except InputError as error:
        scan.faults.append(Fault("stream", str(error)))
