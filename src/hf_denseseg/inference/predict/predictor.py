"""What the runner asks of a predictor, and what a predictor gives."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from PIL import Image


class Prediction(NamedTuple):
    """What a model predicts for one image.

    Args:
        facts: go into the record.
        files: kind of file -> function that writes it to the path it is given.
    """

    facts: dict[str, Any]
    files: dict[str, Callable[[Path], object]]


class Predictor(Protocol):
    """A model that predicts one image at a time."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of the files that each image gets."""

    def predict(self, image: Image.Image, name: str) -> Prediction:
        """Run on an RGB image, which messages call `name`; the image may be painted on."""

    def description(self) -> dict[str, Any]:
        """What `results.json` says of the model and its settings."""

    def fingerprint(self) -> dict[str, Any]:
        """What the results depend on besides the image; while it is unchanged they need not be made again."""

    def finish(self, records: list[dict[str, Any]], output: Path) -> dict[str, Any]:
        """Write what belongs to all images together; returns what `results.json` says of it."""


def checkpoint_state(checkpoint: str) -> dict[str, Any]:
    """Name of a checkpoint and when its folder was last written, for the fingerprint."""
    folder = Path(checkpoint)
    written = [path.stat().st_mtime_ns for path in folder.iterdir()] if folder.is_dir() else []
    return {"checkpoint": checkpoint, "checkpoint_modified": max(written, default=0)}
