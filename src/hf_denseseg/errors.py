"""The two errors that commands report in one line, and messages for unknown names."""

import difflib
from collections.abc import Collection


class InputError(ValueError):
    """An input (file, recipe, name, checkpoint) cannot be used; the message says what, where, and how to fix it.

    Commands print it as one line and exit with code 2.
    """


class RunError(RuntimeError):
    """Something failed while running (disk full, no network); the message says what is kept and how to continue.

    Commands print it as one line and exit with code 1.
    """


def unknown_name(kind: str, given: str, known: Collection[str], otherwise: str | None = None) -> str:
    """Message that `given` is not a known `kind`; proposes up to three similar names of `known`.

    If none is similar, it ends with `otherwise`, or lists them all.
    """
    near = difflib.get_close_matches(given, known, n=3, cutoff=0.6)
    if near:
        return f"Unknown {kind} {given!r}. Did you mean {' or '.join(map(repr, near))}?"
    listed = f"Known: {', '.join(sorted(known))}."
    return f"Unknown {kind} {given!r}. {otherwise or listed}"
