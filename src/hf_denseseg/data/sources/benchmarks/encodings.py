"""Compare a copy of a benchmark that somebody else made with its specification, by the ids in its label maps.

What is compared: the set of ids that the first label maps hold with the ids that the specification has; and, where
another known encoding has all of them too, how many images show each class with the published numbers (ADE20K), or,
where none were published, how many of the classes occur.
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
_CLEARLY = 0.25  # by so much the share of its classes that occur must be larger in another encoding


def check_revision(name: str, revision: str | None) -> None:
    """Refuse a copy on the hub that may change under its user.

    Raises:
        InputError: `revision` is no commit hash; the message names the present one when the hub can be reached.
    """
    if revision is not None and re.fullmatch(r"[0-9a-f]{40}", revision):
        return
    from huggingface_hub import HfApi

    try:
        present = HfApi().dataset_info(name, revision=revision).sha
    except Exception:  # offline, private, gone: the message is the same but for the hash
        present = None
    given = f"revision {revision!r} may move" if revision else "no revision is given"
    now = f"; at present it is {present}" if present else ""
    raise InputError(
        f"Dataset {name!r} is a copy of a benchmark by somebody else, and {given}. Look at the copy, then give the "
        f"hash of its commit (40 digits) as dataset_revision{now}."
    )


def compare_encoding(table: Iterable[Any], benchmark: Benchmark, spec: LabelSpec, name: str) -> None:
    """Compare the ids of the first label maps with a specification of a benchmark.

    Args:
        table: rows whose `label` is still encoded.
        benchmark: the benchmark that it should be.
        spec: one of its encodings.
        name: how to call the table in messages.

    Raises:
        InputError: other ids, or ids that fit another encoding better.
    """
    images: list[set[int]] = []
    for row in islice(table, CHECKED_ROWS):
        raw = read_raw_label(row["label"], f"{row['id']} (label)")
        if raw.ndim == 3 and spec.color_to_raw is not None:
            return  # colors are compared one by one, when they are read
        if raw.ndim == 3:
            raise InputError(
                f"{name}: label map {row['id']} is a color image, as those of the full ADE20K release are; "
                f"{spec.name!r} has one id a pixel. Use the files of {benchmark.spec.source_url}."
            )
        images.append(set(np.unique(raw).tolist()))
    others = {f"{benchmark.name}:{key}": each for key, each in benchmark.encodings.items()}
    if related := _RELATED.get(benchmark.name):
        others |= {f"{related}:{key}": each for key, each in get_benchmark(related).encodings.items()}
    seen = set().union(*images)
    fitting = {key: each for key, each in others.items() if each != spec and seen <= _ids(each)}
    better = [key for key, each in fitting.items() if _is_better(each, spec, images, benchmark.shown)]
    outside = id_ranges(np.array(sorted(seen - _ids(spec))))
    if not outside and not better:
        return
    odd = "how often the classes show is not as published" if benchmark.shown else "too few of the classes occur"
    why = f"{outside} are not among them" if outside else odd
    known = better or list(fitting)
    hint = f" They fit {' and '.join(known)}. If that is what it holds, give it as label_spec." if known else ""
    ids, official = (id_ranges(np.array(sorted(each))) for each in (seen, _ids(spec)))
    raise InputError(
        f"{name}: the first {len(images)} label maps hold the ids {ids}; those of {spec.name!r} are {official}, and "
        f"{why}.{hint} Otherwise use the files of {benchmark.spec.source_url}."
    )


def _ids(spec: LabelSpec) -> set[int]:
    """Ids that official files have; unlike in a table for reading, 255 only where they use it."""
    return {*spec.raw_to_train, *spec.raw_void}


def _is_better(other: LabelSpec, spec: LabelSpec, images: list[set[int]], shown: tuple[float, ...]) -> bool:
    """Whether another encoding suits images better that hold no ids but those of both."""
    if not shown:
        seen = set().union(*images)
        found, expected = (len(seen & set(each.raw_to_train)) / len(each.raw_to_train) for each in (other, spec))
        return found > expected + _CLEARLY
    # Log-likelihood of what each image shows, over the ids that are classes in both.
    ids = sorted(set(other.raw_to_train) & set(spec.raw_to_train))
    there = np.array([[raw in image for raw in ids] for image in images])
    rates = [np.array(shown)[[each.raw_to_train[raw] for raw in ids]] for each in (other, spec)]
    found, expected = (np.where(there, np.log(rate), np.log1p(-rate)).sum() for rate in rates)
    return bool(found > expected)
