"""Compare a copy of a benchmark that somebody else made with its specification, by the ids in its label maps.

What is compared: the set of ids that the first label maps hold with the ids that the specification has; and, where
another known encoding has all of them too, the shares of the classes with the published ones (ADE20K), or, where none
were published, how many of the classes occur.
"""

import re
from collections.abc import Iterable
from itertools import islice
from typing import Any

import numpy as np

from hf_denseseg.data.benchmarks.layouts import Benchmark, get_benchmark
from hf_denseseg.data.labels import LabelSpec, id_ranges
from hf_denseseg.data.reading import read_raw_label
from hf_denseseg.data.shards import CHECKED_ROWS
from hf_denseseg.errors import InputError

_RELATED = {"coco_stuff_10k": "coco_stuff_164k", "coco_stuff_164k": "coco_stuff_10k"}
_RARE = 1e-5  # share of a class that is published as 0.0000
_CLEARLY = 0.25  # by so much more of its classes must another encoding show


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
        f"Data set {name!r} is a copy of a benchmark by somebody else, and {given}. Look at the copy, then give the "
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
    counts: dict[int, int] = {}
    rows = 0
    for row in islice(table, CHECKED_ROWS):
        raw, rows = read_raw_label(row["label"], f"{row['id']} (label)"), rows + 1
        if raw.ndim == 3:
            if spec.color_to_raw is None:
                raise InputError(
                    f"{name}: label map {row['id']} is a colour picture, as those of the full ADE20K release are; "
                    f"{spec.name!r} has one id a pixel. Use the files of {benchmark.spec.source_url}."
                )
            continue
        for raw_id, count in zip(*np.unique(raw, return_counts=True), strict=True):
            counts[int(raw_id)] = counts.get(int(raw_id), 0) + int(count)
    if not counts:
        return
    others = {f"{benchmark.name}:{key}": each for key, each in benchmark.encodings.items()}
    if related := _RELATED.get(benchmark.name):
        others |= {f"{related}:{key}": each for key, each in get_benchmark(related).encodings.items()}
    fitting = {key: each for key, each in others.items() if each != spec and set(counts) <= _ids(each)}
    shares = benchmark.pixel_share
    worse = [key for key, each in fitting.items() if _fit(counts, each, shares) > _fit(counts, spec, shares)]
    if set(counts) <= _ids(spec) and not worse:
        return
    seen, known = (id_ranges(np.array(sorted(ids))) for ids in (counts, _ids(spec)))
    compared = "shares of the classes" if shares else "number of classes that occur"
    outside = id_ranges(np.array(sorted(set(counts) - _ids(spec))))
    why = f"{outside} are not among them" if outside else f"the {compared} does not fit"
    hint = f" They fit {' and '.join(worse or fitting)}." if worse or fitting else ""
    way = f" If that is what it holds, give it as label_spec: {(worse or list(fitting))[0]}." if hint else ""
    raise InputError(
        f"{name}: the first {rows} label maps hold the ids {seen}; those of {spec.name!r} are {known}, and {why}."
        f"{hint}{way} Otherwise use the files of {benchmark.spec.source_url}."
    )


def _ids(spec: LabelSpec) -> set[int]:
    """Ids that official files have; unlike in a table for reading, 255 only where they use it."""
    return {*spec.raw_to_train, *spec.raw_void}


def _fit(counts: dict[int, int], spec: LabelSpec, shares: tuple[float, ...]) -> float:
    """How well the counts suit an encoding, larger is better; equal encodings get the same."""
    classes = np.zeros(spec.num_labels)
    for raw, train in spec.raw_to_train.items():
        classes[train] += counts.get(raw, 0)
    if not shares:
        # In steps, so that a few rare classes do not decide.
        return float(np.floor((classes > 0).mean() / _CLEARLY))
    # Log-likelihood of a pixel under the published shares.
    return float(classes @ np.log(np.maximum(shares, _RARE)) / max(classes.sum(), 1))
