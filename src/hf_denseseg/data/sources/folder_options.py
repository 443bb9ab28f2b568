"""Keys that say how the files of a folder become label maps."""

from collections.abc import Sequence
from dataclasses import dataclass

from hf_denseseg.errors import InputError

_CHOICES = {"overlap": ("last", "smaller"), "empty_images": ("background", "ignored")}


@dataclass(frozen=True)
class FolderOptions:
    """How the files of a folder become label maps.

    Args:
        overlap: which of two objects is seen where both are: the `"last"` in the file (default), or the `"smaller"`.
        empty_images: pixels of an image without objects are `"background"` (default) or `"ignored"`.
        mask_suffix: what the name of a label map has more than that of its image, such as `"_mask"`.

    Raises:
        InputError: another value.
    """

    overlap: str | None = None
    empty_images: str | None = None
    mask_suffix: str | None = None

    def __post_init__(self) -> None:
        for key, choices in _CHOICES.items():
            if (given := getattr(self, key)) not in (None, *choices):
                raise InputError(f"{key} is {given!r}: give {' or '.join(choices)}.")
        if self.mask_suffix is not None and not self.mask_suffix.strip("/."):
            raise InputError(f"mask_suffix is {self.mask_suffix!r}: give the end of the names of masks, as _mask.")

    def refuse_others(self, known: Sequence[str], what: str) -> None:
        """Refuse options that have no meaning for a kind of dataset.

        Raises:
            InputError: one of them was given.
        """
        if unread := [key for key, value in vars(self).items() if value is not None and key not in known]:
            raise InputError(f"{unread[0]} has no meaning for {what}. Leave it out.")


NO_OPTIONS = FolderOptions()
"""Folders are read by their defaults."""
