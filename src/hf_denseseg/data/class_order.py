"""Do a checkpoint and a dataset mean the same classes by the same ids? Compared by name."""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from hf_denseseg.data.labels import SegmentationData
from hf_denseseg.errors import InputError

_UNNAMED = re.compile(r"LABEL_\d+")  # what transformers calls classes that nobody named


def class_order(model_classes: Sequence[str], data_classes: Sequence[str], model: str, data: str) -> list[int] | None:
    """Return, for each class of a model, its train id in a dataset; None if the ids are the same.

    Names are compared without regard to case, spaces, `_` and `-`. A checkpoint whose classes have no names is taken
    as it is.

    Args:
        model_classes: names in the order of the model's outputs.
        data_classes: names in the order of the train ids, as many.
        model: what the checkpoint is called in the message.
        data: what the dataset is called in the message.

    Raises:
        InputError: the names are not the same set; it lists the first that differ.
    """
    ours, theirs = ([_plain(name) for name in names] for names in (model_classes, data_classes))
    if ours == theirs or any(_UNNAMED.fullmatch(name) for name in model_classes):
        return None
    if sorted(ours) == sorted(theirs) and len(set(ours)) == len(ours):
        return [theirs.index(name) for name in ours]
    different = [
        f"{index}: {own!r} and {other!r}"
        for index, (own, other) in enumerate(zip(model_classes, data_classes, strict=True))
        if _plain(own) != _plain(other)
    ]
    more = f", and {len(different) - 3} more" if len(different) > 3 else ""
    raise InputError(
        f"{model} and {data} have {len(ours)} classes each, but of other names ({', '.join(different[:3])}{more}). "
        "Give the dataset or the label specification that the checkpoint was trained on; if only the spelling "
        "differs, use the names of the checkpoint in `classes` of the label specification."
    )


class _ReorderedRows:
    """Rows of a dataset whose label maps hold other train ids: `table[old]`."""

    def __init__(self, rows: Any, table: np.ndarray) -> None:
        self.rows, self.table = rows, table

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        return {**row, "label": self.table[np.asarray(row["label"])]}


def in_order_of(model_classes: Sequence[str], data: SegmentationData, model: str) -> SegmentationData:
    """The data with the train ids of a model.

    Args:
        model_classes: names in the order of the model's outputs.
        data: what `load_segmentation` returned.
        model: what the checkpoint is called in the message.

    Raises:
        InputError: another number of classes, or other names.
    """
    spec = data.spec
    if len(model_classes) != spec.num_labels:
        raise InputError(
            f"{model} knows {len(model_classes)} classes, {spec.name} has {spec.num_labels}. Give the dataset the "
            "checkpoint was trained on."
        )
    order = class_order(model_classes, spec.classes, model, spec.name)
    if order is None:
        return data
    table = np.arange(spec.ignore_index + 1, dtype=spec.dtype)
    table[order] = np.arange(len(order))
    reordered = replace(
        spec,
        classes=tuple(spec.classes[old] for old in order),
        palette=tuple(spec.palette[old] for old in order),
        raw_to_train={raw: int(table[old]) for raw, old in spec.raw_to_train.items()},
    )
    return SegmentationData(_ReorderedRows(data.dataset, table), reordered)


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", "", name).casefold()


__all__ = ["class_order", "in_order_of"]
