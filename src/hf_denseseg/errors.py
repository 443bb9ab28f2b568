"""The two ways a command can end badly, and messages for names that are not known."""

import difflib
from collections.abc import Collection


class InputError(ValueError):
    """What the user gave cannot be used (file, recipe, name, checkpoint); the message says what, where and the remedy.

    Commands print it as one line and exit with code 2.
    """


class RunError(RuntimeError):
    """Something failed while running (disk full, no network); the message says what is kept and how to go on.

    Commands print it as one line and exit with code 1.
    """


def unknown_name(kind: str, given: str, known: Collection[str], otherwise: str | None = None) -> str:
    """Say that `given` is no known `kind`, and propose up to three of `known` that look alike.

    If none does, end with `otherwise`, or list them all.
    """
    near = difflib.get_close_matches(given, known, n=3, cutoff=0.6)
    if near:
        return f"Unknown {kind} {given!r}. Did you mean {' or '.join(map(repr, near))}?"
    listed = f"Known: {', '.join(sorted(known))}."
    return f"Unknown {kind} {given!r}. {otherwise or listed}"


def reject_misspelled_fields(config: object, extra: Collection[str]) -> None:
    """Refuse keyword arguments of a configuration that look like a declared field with a typing error.

    transformers stores what it does not know as plain attributes, so `hiden_size=64` would pass without a word.

    Raises:
        ValueError: one of `extra` is nearly, but not exactly, the name of a field of `config`.
    """
    fields = [name for name in type(config).__dataclass_fields__ if not name.startswith("_")]  # type: ignore[attr-defined]
    for name in extra:
        near = difflib.get_close_matches(name, fields, n=1, cutoff=0.85)
        if near and not hasattr(type(config), name):
            raise ValueError(f"{type(config).__name__} has no field {name!r}. Did you mean {near[0]!r}?")
