"""The loop of prediction, evaluation and submission, which continues where an interrupted run stopped.

An image is entered in a journal after its files are written. A run that is started again, with any number of
processes, runs only the images without a valid entry.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from hf_denseseg.inference.predict.journal import Entry, Journal, Key


class Work(NamedTuple):
    """A batch of images that are run together.

    Args:
        keys: number in the dataset, or name, of each image.
        states: JSON value that identifies the content of each image; one with the state None is never entered in a
            journal.
        images: the argument of the function.
    """

    keys: Sequence[Key]
    states: Sequence[Any]
    images: Any


def run(
    work: Iterable[Work],
    function: Callable[[Any], Sequence[Any]],
    journal: Journal | None = None,
    known: Mapping[Key, Entry] | None = None,
    is_intact: Callable[[Any], bool] = lambda record: True,
) -> Iterator[tuple[Entry, bool]]:
    """Call a function for each batch, unless all its images are known, and enter the records in the journal.

    Args:
        work: the batches of this process.
        function: takes `Work.images`, returns one JSON value per image; if it returns fewer, the last images are left
            out.
        journal: where finished images are entered; with None, nowhere.
        known: entries of earlier runs by key.
        is_intact: whether a record of an earlier run is still valid, for example whether its files exist.

    Yields:
        The entry of each image, and whether it is new.
    """
    known = known or {}
    for keys, states, images in work:
        before = [known.get(key) for key in keys]
        kept = [
            entry
            for entry, state in zip(before, states, strict=True)
            if entry is not None and state is not None and entry.state == state and is_intact(entry.record)
        ]
        # A batch is run as one call of the model, so one missing image runs all of them again.
        if len(kept) == len(keys):
            yield from ((entry, False) for entry in kept)
            continue
        for key, state, record in zip(keys, states, function(images), strict=False):
            entry = Entry(key, state, record)
            if journal is not None and state is not None:
                journal.add(entry)
            yield entry, True
