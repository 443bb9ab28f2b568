"""What the runner asks of a predictor, and what it gives."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from PIL import Image


class Labelled(NamedTuple):
    """What a model says of one picture.

    `facts` go into the record; `files` are written by kind, each by a function that is given the path.
    """

    facts: dict[str, Any]
    files: dict[str, Callable[[Path], object]]


class Labeller(Protocol):
    """A model that looks at one picture at a time."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of the files that each picture gets."""

    def label(self, image: Image.Image, name: str) -> Labelled:
        """Look at an RGB picture, which messages call `name`; the picture may be painted on."""

    def description(self) -> dict[str, Any]:
        """What `results.json` says of the model and its settings."""

    def fingerprint(self) -> dict[str, Any]:
        """What the results depend on besides the picture; while it is unchanged they need not be made again."""

    def finish(self, records: list[dict[str, Any]], output: Path) -> dict[str, Any]:
        """Write what belongs to all pictures together; returns what `results.json` says of it."""


def checkpoint_state(checkpoint: str) -> dict[str, Any]:
    """Name of a checkpoint and when its folder was written last, for the fingerprint."""
    folder = Path(checkpoint)
    written = [path.stat().st_mtime_ns for path in folder.iterdir()] if folder.is_dir() else []
    return {"checkpoint": checkpoint, "checkpoint_modified": max(written, default=0)}
