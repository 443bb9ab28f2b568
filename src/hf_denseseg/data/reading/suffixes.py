"""Suffixes of the image files that can be read: one list for data folders and for `denseseg predict`."""

from functools import cache

from PIL import Image, ImageFile

# Pillow knows these by their header only, or needs Ghostscript for them.
_NOT_DECODED = {"MPEG", "EPS"}


@cache
def image_suffixes() -> frozenset[str]:
    """Lower-case suffixes, such as `.jpg`, of the formats that the installed Pillow decodes, and `.npy`."""
    known = Image.registered_extensions().items()  # loads all plugins
    return frozenset(suffix for suffix, name in known if _is_decoded(name)) | {".mpo", ".npy"}  # MPO is opened as JPEG


def _is_decoded(name: str) -> bool:
    if name in _NOT_DECODED or name not in Image.OPEN:
        return False
    factory = Image.OPEN[name][0]  # a function, or a class; stubs only say that a format needs a further library
    return not (isinstance(factory, type) and issubclass(factory, ImageFile.StubImageFile))


__all__ = ["image_suffixes"]
