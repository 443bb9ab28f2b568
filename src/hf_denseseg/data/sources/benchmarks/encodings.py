"""Check a third-party copy of a benchmark against its label specification, by the ids in its label maps.

A copy may store train ids or shifted ids in place of the official ones; training would then silently use wrong
classes. So the ids in the first label maps must be among those of the specification. If another known encoding
contains them all too, the more plausible one is found by how many images contain each class, compared with the
published numbers (ADE20K), or, where none were published, by the fraction of the classes that occur.
"""

import re
from collections.abc import Iterable
from itertools import islice
from typing import Any

import numpy as np

from hf_denseseg.data.labels import CHECKED_ROWS, LabelSpec, id_ranges
from hf_denseseg.data.reading.images import read_raw_label
from hf_denseseg.data.sources.benchmarks.layouts import Benchmark, get_benchmark
from hf_denseseg.errors import InputError

_RELATED = {"coco_stuff_10k": "coco_stuff_164k", "coco_stuff_164k": "coco_stuff_10k"}
_CLEARLY = 0.25  # another encoding is preferred if the fraction of its classes that occur is larger by this much


def check_revision(name: str, revision: str | None) -> None:
    """Require a fixed commit for a copy on the hub, since its owner may change it at any time.

    Raises:
        InputError: `revision` is not a commit hash; the message gives the current one if the hub can be reached.
    """
    if revision is not None and re.fullmatch(r"[0-9a-f]{40}", revision):
        return
    from huggingface_hub import HfApi

    try:
        current = HfApi().dataset_info(name, revision=revision).sha
    except Exception:  # offline, private or deleted: the message is then the same without the hash
        current = None
    given = f"revision {revision!r} may change" if revision else "no revision is given"
    now = f"; the current one is {current}" if current else ""
    raise InputError(
        f"Dataset {name!r} is a third-party copy of a benchmark, and {given}. Inspect the copy, then give its "
        f"commit hash (40 digits) as dataset_revision{now}."
    )


def compare_encoding(table: Iterable[Any], benchmark: Benchmark, spec: LabelSpec, name: str) -> None:
    """Compare the ids in the first label maps with a label specification of a benchmark.

    Args:
        table: rows with `label` as stored, not yet mapped to train ids.
        benchmark: the benchmark that the table should be a copy of.
        spec: one of its encodings.
        name: name of the table in messages.

    Raises:
        InputError: the label maps contain other ids, or ids that fit another encoding better.
    """
    images: list[set[int]] = []  # raw ids in each label map
    for row in islice(table, CHECKED_ROWS):
        raw = read_raw_label(row["label"], f"{row['id']} (label)")
        if raw.ndim == 3 and spec.color_to_raw is not None:
            return  # colors are unambiguous, and checked when each label map is read
        if raw.ndim == 3:
            raise InputError(
                f"{name}: label map {row['id']} is a color image, like those of the full ADE20K release; "
                f"{spec.name!r} expects one id per pixel. Use the files from {benchmark.spec.source_url}."
            )
        images.append(set(np.unique(raw).tolist()))
    others = {f"{benchmark.name}:{key}": each for key, each in benchmark.encodings.items()}
    if related := _RELATED.get(benchmark.name):
        others |= {f"{related}:{key}": each for key, each in get_benchmark(related).encodings.items()}
    seen = set().union(*images)
    fitting = {key: each for key, each in others.items() if each != spec and seen <= _ids(each)}
    better = [key for key, each in fitting.items() if _is_better(each, spec, images, benchmark.class_frequencies)]
    outside = id_ranges(np.array(sorted(seen - _ids(spec))))
    if not outside and not better:
        return
    odd = (
        "the class frequencies differ from the published ones"
        if benchmark.class_frequencies
        else "too few of the classes occur"
    )
    why = f"{outside} are not among them" if outside else odd
    known = better or list(fitting)
    hint = f" They fit {' and '.join(known)}. If that is the encoding, give it as label_spec." if known else ""
    ids, official = (id_ranges(np.array(sorted(each))) for each in (seen, _ids(spec)))
    raise InputError(
        f"{name}: the first {len(images)} label maps contain the ids {ids}; those of {spec.name!r} are {official}, "
        f"and {why}.{hint} Otherwise use the files from {benchmark.spec.source_url}."
    )


def _ids(spec: LabelSpec) -> set[int]:
    """Raw ids that occur in the official files; unlike in `LabelSpec.table`, 255 only if they use it."""
    return {*spec.raw_to_train, *spec.raw_void}


def _is_better(
    other: LabelSpec, spec: LabelSpec, images: list[set[int]], class_frequencies: tuple[float, ...]
) -> bool:
    """Whether another encoding is more plausible than `spec` for label maps whose ids are in both."""
    if not class_frequencies:
        seen = set().union(*images)
        found, expected = (len(seen & set(each.raw_to_train)) / len(each.raw_to_train) for each in (other, spec))
        return found > expected + _CLEARLY
    # Log-likelihood of the classes that each image contains, over the raw ids that are classes in both encodings.
    ids = sorted(set(other.raw_to_train) & set(spec.raw_to_train))
    present = np.array([[raw in image for raw in ids] for image in images])  # (images, ids) bool
    rates = [np.array(class_frequencies)[[each.raw_to_train[raw] for raw in ids]] for each in (other, spec)]
    found, expected = (np.where(present, np.log(rate), np.log1p(-rate)).sum() for rate in rates)
    return bool(found > expected)
