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


def reject_misspelled_fields(config: object, extra: Collection[str]) -> None:
    """Refuse keyword arguments of a configuration that look like a misspelled field.

    transformers stores unknown arguments as plain attributes, so `hiden_size=64` would pass silently.

    Raises:
        ValueError: one of `extra` is nearly, but not exactly, the name of a field of `config`.
    """
    fields = [name for name in type(config).__dataclass_fields__ if not name.startswith("_")]  # type: ignore[attr-defined]
    for name in extra:
        near = difflib.get_close_matches(name, fields, n=1, cutoff=0.85)
        if near and not hasattr(type(config), name):
            raise ValueError(f"{type(config).__name__} has no field {name!r}. Did you mean {near[0]!r}?")
