"""The part of a training split that is held back for evaluation."""

import logging
from typing import Any

from hf_denseseg.data.splits import held_back
from hf_denseseg.errors import InputError
from hf_denseseg.training.data_arguments import DataArguments

logger = logging.getLogger(__name__)


def part_of(data: Any, arguments: DataArguments, part: str) -> Any:
    """The images of a split that are held back for evaluation, or the others.

    Raises:
        InputError: a part without images, or a fraction that is none.
    """
    fraction = arguments.eval_fraction
    if fraction is None or not 0 < fraction < 1:
        raise InputError(f"eval_fraction is {fraction}: give a number between 0 and 1, such as 0.1.")
    if arguments.streaming:
        raise InputError("eval_fraction needs the ids of all images, which a stream does not have. Leave one out.")
    ids = data.dataset.with_format(None)["id"]
    chosen = [index for index, name in enumerate(ids) if held_back(str(name), fraction) == (part == "eval")]
    if not chosen:
        raise InputError(
            f"eval_fraction {fraction} of {len(ids)} images leaves none to {part}. Give another fraction."
        )
    logger.info("%d of the %d images of %s are used to %s.", len(chosen), len(ids), arguments.train_split, part)
    limit = arguments.max_train_samples if part == "train" else arguments.max_eval_samples
    return data._replace(dataset=data.dataset.select(chosen[:limit]))
