"""Do a checkpoint and a dataset mean the same classes by the same ids? Compared by name."""

import re
from collections.abc import Sequence

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


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", "", name).casefold()


__all__ = ["class_order"]
