"""Check a segmentation dataset before training: faults with their file, and pixels per class."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from hf_denseseg.data.checks.scan import Scan
from hf_denseseg.data.ignore_index import IGNORE_INDEX
from hf_denseseg.data.labels import LabelSpec, SegmentationData
from hf_denseseg.data.reading.areas import SCHEME, areas_name, draw_areas
from hf_denseseg.data.reading.images import Fault, orientation_of, palette_of, read_label, stored_image, upright_label
from hf_denseseg.data.reading.pixels import RGB_BYTES
from hf_denseseg.data.reading.references import describe_reference
from hf_denseseg.data.segmentation import list_source, load_segmentation
from hf_denseseg.data.sources.folder_options import NO_OPTIONS
from hf_denseseg.errors import InputError


@dataclass
class SegmentationScan(Scan[LabelSpec]):
    """Result of a pass over the pairs.

    Also holds, `(num_labels,)` each: `pixels` of a class; `image_pixels`, the valid pixels of all images that show it;
    `images_with_class`, the number of these images.

    Args:
        ignored: number of ignored pixels.
    """

    ignored: int = 0

    def __post_init__(self) -> None:
        self.pixels, self.image_pixels, self.images_with_class = np.zeros((3, self.spec.num_labels), dtype=np.int64)

    def add(self, name: str, label: np.ndarray) -> None:
        """Count the pixels of one label map `(H, W)` of train ids and `ignore_index`."""
        counts = np.bincount(label.ravel(), minlength=self.spec.ignore_index + 1)
        pixels = counts[: self.spec.num_labels]
        self.images += 1
        self.ignored += int(counts[self.spec.ignore_index])
        self.pixels += pixels
        self.image_pixels += (pixels > 0) * pixels.sum()
        self.images_with_class += pixels > 0
        self.sizes[label.shape] += 1
        if not pixels.any():
            fix = "Remove the pair, or fix `raw_to_train` or `raw_void` of the label specification."
            self.faults.append(Fault(name, f"every pixel of the label map is ignored. {fix}"))

    def finish(self, complete: bool) -> "SegmentationScan":
        """Check all label maps together; absent classes are noted only if the scan is complete."""
        # Only id 0 and ignored pixels, while 255 is the ignore value: most likely 255 was meant as the second class.
        zero = int(self.spec.table[0])
        only_zero = zero < self.spec.num_labels and 0 < self.pixels.sum() == self.pixels[zero]
        if self.spec.num_labels == 1:
            only = self.spec.classes[0]
            self.faults.append(
                Fault(
                    self.spec.name,
                    f"it has one class, {only!r}, so every prediction is right. Name the rest of the pixels too: "
                    f"classes: [background, {only}], for masks of 0 and 255 with raw_to_train: {{0: 0, 255: 1}}. A "
                    "model may still have one logit for both: config_overrides: {num_labels: 1}.",
                )
            )
        elif only_zero and self.ignored and self.spec.table[255] == IGNORE_INDEX:
            self.faults.append(
                Fault(
                    "all label maps",
                    "they contain only 0 and ignored pixels, so they are probably black-and-white masks (0 and 255). "
                    "Define 255 in the label specification, such as raw_to_train: {0: 0, 255: 1}.",
                )
            )
        absent = [name for name, count in zip(self.spec.classes, self.images_with_class, strict=True) if not count]
        if complete and self.images and absent:
            self.notes.append(
                f"No pixel of {', '.join(absent)} in {self.images} images. If that is unexpected, compare the order "
                "of `classes` with the ids in the files."
            )
        return self

    @property
    def fractions(self) -> np.ndarray:
        """Fraction of each class among the valid pixels."""
        return self.pixels / max(self.pixels.sum(), 1)

    @property
    def ignored_fraction(self) -> float:
        """Fraction of ignored pixels among all."""
        return self.ignored / max(self.ignored + int(self.pixels.sum()), 1)

    def class_weights(self) -> dict[str, list[float]]:
        """Class weights `(num_labels,)` against imbalance; a class without pixels gets 0.

        `enet`: 1 / ln(1.02 + fraction) (ENet, Sec. 5). `median_frequency`: median of the frequencies / own frequency,
        where the frequency of a class is its fraction of the images that show it (SegNet, Sec. 3).
        """
        seen = self.pixels > 0
        frequency = self.pixels / np.maximum(self.image_pixels, 1)
        median = np.median(frequency[seen]) if seen.any() else 0.0
        weights = {
            "enet": 1 / np.log(1.02 + self.fractions),
            "median_frequency": median / np.where(seen, frequency, 1.0),
        }
        return {name: np.where(seen, values, 0.0).round(6).tolist() for name, values in weights.items()}


def scan_segmentation(data: SegmentationData, limit: int | None = None, progress: bool = False) -> SegmentationScan:
    """Read pairs, count their pixels and list their faults.

    Args:
        data: what `load_segmentation` returned.
        limit: read only this many pairs, evenly spaced over the split (a stream: the first ones); None reads all.
        progress: show a progress bar on a terminal.
    """
    scan = SegmentationScan(data.spec)
    if hasattr(data.dataset, "__len__"):
        rows = scan.rows(data.dataset, limit, progress, "pairs")
    else:
        rows = islice(_until_fault(data.dataset, scan), limit)
    for row in rows:
        scan.add(row["id"], row["label"])
        scan.survey.add_read(row["image"])
    return scan.finish(complete=limit is None)


def scan_segmentation_source(
    name: str, split: str, *, spec: str | None = None, limit: int | None = None, progress: bool = False, **options: Any
) -> SegmentationScan:
    """Scan a dataset by its name; in a folder of pairs, unpaired and damaged files are faults too.

    Args:
        name: as for `load_segmentation`.
        split: as for `load_segmentation`.
        spec: label specification file.
        limit: read only the first `limit` pairs; None reads all.
        progress: show a progress bar on a terminal.
        options: further arguments of `load_segmentation`.
    """
    root, pixel_format = options.pop("root", None), options.get("pixel_format", RGB_BYTES)
    found = list_source(name, split, spec=spec, root=root, options=options.get("options", NO_OPTIONS))
    if found is None:
        return scan_segmentation(load_segmentation(name, split, spec=spec, **options), limit, progress)
    scan, pairs = SegmentationScan(found.spec, list(found.faults), list(found.notes)), found.pairs
    if not found.has_labels:
        scan.notes.append("The labels of this split are not published; only the images are read.")
    scan.faults += [Fault(file, message) for file, message in pairs.unpaired_files()]
    chosen = [key for key in sorted(pairs.images) if key in pairs.labels or not found.has_labels]
    palettes, objects, orientations = 0, ObjectCount(), Orientations()
    for key in tqdm(chosen[:limit], desc="pairs", disable=None if progress else True):
        image_name = describe_reference(pairs.images[key])
        try:
            stored = stored_image(pairs.images[key])
            scan.survey.add_stored(stored)
            image = pixel_format.read(stored, image_name)
            scan.survey.add_read(image)
        except InputError as error:
            scan.faults.append(Fault(image_name, str(error)))
            image = None
        if not found.has_labels:
            scan.images += 1
            continue
        file = pairs.labels[key]
        try:
            label = read_label(objects.draw(file), scan.spec, describe_reference(file))
            if image is not None:
                label = orientations.upright(label, image, pairs.images[key], image_name)
        except InputError as error:
            scan.faults.append(Fault(describe_reference(file), str(error)))
            continue
        scan.add(describe_reference(file), label)
        palettes += palette_of(file) is not None
    if (note := scan.survey.note(pixel_format)) is not None:
        scan.notes.append(note)
    scan.notes += [*objects.notes(), *orientations.notes()]
    if palettes:
        scan.notes.append(f"{palettes} label maps are palette images: the palette index of a pixel is used as its id.")
    return scan.finish(complete=limit is None and found.has_labels)


class Orientations:
    """Images that their EXIF tag turns, and what was done with their label maps."""

    def __init__(self) -> None:
        self.turned: list[str] = []
        self.unclear: list[str] = []

    def upright(self, label: np.ndarray, image: Any, source: str, name: str) -> np.ndarray:
        """The label map as `upright_label` gives it."""
        found = upright_label(label, image, source, name)
        if found is not label:
            self.turned.append(name)
        elif orientation_of(source) != 1 and (label.shape[0] == label.shape[1] or orientation_of(source) < 5):
            self.unclear.append(name)
        return found

    def notes(self) -> list[str]:
        """What was done, in words."""
        notes = []
        if self.turned:
            notes.append(
                f"{len(self.turned)} label maps have the size of images before their EXIF rotation, and are turned "
                f"with them, such as that of {self.turned[0]}."
            )
        if self.unclear:
            notes.append(
                f"{len(self.unclear)} images have an EXIF rotation that their label maps may have or not; they are "
                f"taken as upright, such as that of {self.unclear[0]}: `denseseg data show` draws it."
            )
        return notes


class ObjectCount:
    """Objects of an export that were drawn, and those of which nothing is seen."""

    def __init__(self) -> None:
        self.objects = self.pixels = 0
        self.unseen: list[str] = []

    def draw(self, reference: str) -> Any:
        """Count the objects of a label map that is drawn; it, or another reference as it is."""
        if not reference.startswith(SCHEME):
            return reference
        drawing = draw_areas(reference)
        self.objects += len(drawing.names)
        self.pixels += sum(drawing.visible)
        for name, drawn, visible in zip(drawing.names, drawing.drawn, drawing.visible, strict=True):
            if not visible:
                why = "later objects cover it" if drawn else "no pixel of the image is inside"
                self.unseen.append(f"Label map {areas_name(reference)}: nothing of {name} is seen: {why}.")
        return Image.fromarray(drawing.ids)

    def notes(self) -> list[str]:
        """Lines for objects of which nothing is seen, and how many objects became how many pixels."""
        if not self.objects:
            return []
        seen = self.objects - len(self.unseen)
        return [*self.unseen, f"{self.objects} objects in, {seen} of them seen, {self.pixels} pixels out."]


def _until_fault(rows: Iterable[Any], scan: SegmentationScan) -> Iterator[Any]:
    """Rows of a stream up to the first fault, which cannot be skipped."""
    try:
        yield from rows
    except InputError as error:
        scan.faults.append(Fault("stream", str(error)))
