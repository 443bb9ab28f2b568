"""Where the sources of the kernel lie, and where it is built."""

import os
from pathlib import Path

_CHECKOUT = Path(__file__).resolve().parents[3] / "kernels" / "ms-deform-attn"
_INSTALLED = Path(__file__).resolve().parent / "ms-deform-attn"


def build_folder() -> Path:
    """Folder of the built variants: beside the sources in a checkout and in a platform wheel, else in the cache."""
    beside = SOURCE / "build"
    if SOURCE == _CHECKOUT or beside.is_dir():
        return beside
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "hf_denseseg" / "ms-deform-attn"


SOURCE = _CHECKOUT if (_CHECKOUT / "build.toml").is_file() else _INSTALLED
"""The kernel repository: of the checkout, or the copy that an installed package brings."""
BUILD = build_folder()
