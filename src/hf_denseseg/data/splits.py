"""Names of splits: `val` and `validation` are the same split, `train+val` joins two."""

import difflib

from hf_denseseg.errors import InputError

SPLIT_ALIASES = (("train", "training"), ("val", "validation", "valid", "dev"), ("test", "testing"))


def split_names(split: str) -> list[str]:
    """The splits that `"train+val"` joins.

    Raises:
        InputError: a name is empty or occurs twice.
    """
    names = [name.strip() for name in split.split("+")]
    if not all(names) or len(set(names)) < len(names):
        raise InputError(f"Split {split!r} must be one name, or different names joined by +, such as train+val.")
    return names


def resolve_split(split: str, available: list[str], where: str) -> str:
    """Find the split among the available ones, `val` and `validation` being the same.

    Raises:
        InputError: there is no such split.
    """
    same = next((group for group in SPLIT_ALIASES if split in group), (split,))
    for name in (split, *same):
        if name in available:
            return name
    near = difflib.get_close_matches(split, available, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise InputError(f"{where} has no split {split!r}; available: {', '.join(available) or 'none'}.{hint}")
