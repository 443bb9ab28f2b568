"""The part all dataset checks share: read evenly spaced rows, and turn rows that cannot be read into faults."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np
from tqdm.auto import tqdm

from hf_denseseg.data.checks.pixels import PixelSurvey
from hf_denseseg.data.class_names import ClassNames
from hf_denseseg.data.labels import LabelSpec
from hf_denseseg.data.reading.images import Fault
from hf_denseseg.errors import InputError

Spec = TypeVar("Spec", LabelSpec, ClassNames)


@dataclass
class Scan(Generic[Spec]):
    """Result of a pass over the images.

    Args:
        spec: names of the classes.
        faults: entries and images (or the dataset itself) that cannot be used.
        notes: unusual findings that are handled by a rule or may be intended.
        images: number of readable images.
        sizes: (height, width) -> number of images.
        survey: what the images store, and mean and deviation of their channels.
    """

    spec: Spec
    faults: list[Fault] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    images: int = 0
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    survey: PixelSurvey = field(default_factory=PixelSurvey)

    def rows(self, dataset: Any, limit: int | None, progress: bool, unit: str = "images") -> Iterator[dict[str, Any]]:
        """Read `limit` evenly spaced rows (None: all); a row that cannot be read becomes a fault."""
        count = len(dataset)
        chosen = range(count) if limit is None or limit >= count else np.linspace(0, count - 1, limit).astype(int)
        for index in tqdm(chosen, desc=unit, disable=None if progress else True):
            try:
                row = dataset[int(index)]
            except InputError as error:
                self.faults.append(Fault(f"row {index}", str(error)))
                continue
            yield row

    def note_absent(self, counts: Sequence[int] | np.ndarray, what: str) -> None:
        """Add a note on the classes of which a pass over all rows found no `what`."""
        absent = [name for name, count in zip(self.spec.classes, counts, strict=True) if not count]
        if self.images and absent:
            self.notes.append(f"No {what} of {', '.join(absent[:8])} ({len(absent)} of {len(counts)} classes).")
