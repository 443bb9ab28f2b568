"""Names of splits: `val` and `validation` are the same split, `train+val` joins two."""

import difflib
import hashlib

from hf_denseseg.errors import InputError

SPLIT_ALIASES = (("train", "training"), ("val", "validation", "valid", "dev"), ("test", "testing"))


class NoSplitError(InputError):
    """A dataset has no split of the name."""


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
        NoSplitError: there is no such split.
    """
    same = next((group for group in SPLIT_ALIASES if split in group), (split,))
    for name in (split, *same):
        if name in available:
            return name
    near = difflib.get_close_matches(split, available, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    if split in SPLIT_ALIASES[1]:
        hint += " Data without a validation split: eval_fraction 0.1 holds back a part of the training split."
    raise NoSplitError(f"{where} has no split {split!r}; available: {', '.join(available) or 'none'}.{hint}")


def held_back(name: str, fraction: float) -> bool:
    """Whether an image is held back for evaluation, decided by its id alone.

    So the choice does not depend on order, number or seed, and stays when images are added.

    Args:
        name: id of the image.
        fraction: of all images that are held back, between 0 and 1.
    """
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64
