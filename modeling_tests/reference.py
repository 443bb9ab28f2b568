"""Where the recorded outputs of the official implementations lie."""

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
REFERENCE = Path(os.environ.get("DENSESEG_REFERENCE", REPOSITORY.parent / "shared" / "reference"))
FIXTURES = Path(__file__).resolve().parent / "fixtures"


def reference_folder(family: str) -> Path:
    """Return the folder of a family, or skip the test."""
    if not (REFERENCE / family).is_dir():
        pytest.skip(f"no recorded outputs in {REFERENCE / family}; set DENSESEG_REFERENCE to the folder that has them")
    return REFERENCE / family


def case_folders() -> list[Path]:
    """Return every `<family>/<case>` that holds a config and recorded tensors, outside and in the fixtures."""
    found = [path.parent for root in (FIXTURES, REFERENCE) if root.is_dir() for path in root.glob("*/*/config.json")]
    return sorted(found)
