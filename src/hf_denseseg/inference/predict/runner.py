"""The one loop of prediction, evaluation and submission, which goes on where an interrupted run stopped.

An image is entered in a journal after its files are written. A run that is started again, with any number of
processes, makes only what has no valid entry.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from hf_denseseg.inference.predict.journal import Entry, Journal, Key


class Work(NamedTuple):
    """Images that are run together.

    Args:
        keys: number in the dataset, or name, of each.
        states: JSON value that identifies the content of each; None is never entered in a journal.
        images: what the function is given.
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
    """Give each work to a function, unless the journal has all its images, and enter what it returns.

    Args:
        work: of this process.
        function: takes `Work.images`, returns one JSON value per image; fewer leave out the last ones.
        journal: where finished images are entered; None enters nothing.
        known: entries of earlier runs by key.
        is_intact: whether a record of an earlier run is still worth keeping, for example whether its files exist.

    Yields:
        The entry of each image, and whether it was made now.
    """
    known = known or {}
    for keys, states, images in work:
        before = [known.get(key) for key in keys]
        kept = [
            entry
            for entry, state in zip(before, states, strict=True)
            if entry is not None and state is not None and entry.state == state and is_intact(entry.record)
        ]
        if len(kept) == len(keys):
            yield from ((entry, False) for entry in kept)
            continue
        for key, state, record in zip(keys, states, function(images), strict=False):
            entry = Entry(key, state, record)
            if journal is not None and state is not None:
                journal.add(entry)
            yield entry, True
