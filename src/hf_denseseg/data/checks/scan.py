"""What every pass over a dataset does: read rows spread over the whole, and turn what cannot be read into faults."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np
from tqdm.auto import tqdm

from hf_denseseg.data.class_names import ClassNames
from hf_denseseg.data.labels import LabelSpec
from hf_denseseg.data.reading.images import Fault
from hf_denseseg.errors import InputError

Spec = TypeVar("Spec", LabelSpec, ClassNames)


@dataclass
class Scan(Generic[Spec]):
    """What a pass over the images found.

    Args:
        spec: names of the classes.
        faults: entries and images (or the whole dataset) that cannot be used.
        notes: what is unusual, but has a rule or may be meant.
        images: number of readable images.
        sizes: (height, width) -> number of images.
    """

    spec: Spec
    faults: list[Fault] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    images: int = 0
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)

    def rows(self, dataset: Any, limit: int | None, progress: bool, unit: str = "images") -> Iterator[dict[str, Any]]:
        """Read `limit` rows, spread over the whole (None: all of them); one that cannot be read becomes a fault."""
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
        """Note the classes that a pass over all rows counted no `what` of."""
        absent = [name for name, count in zip(self.spec.classes, counts, strict=True) if not count]
        if self.images and absent:
            self.notes.append(f"No {what} of {', '.join(absent[:8])} ({len(absent)} of {len(counts)} classes).")
