"""The interface between `run_prediction` and a predictor."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

from hf_denseseg.data.reading.georeferenced import Raster
from hf_denseseg.data.reading.pixels import PixelFormat, Pixels


class Prediction(NamedTuple):
    """The prediction for one image.

    Args:
        facts: values for its record.
        files: kind of file -> function that writes it to a given path.
        endings: kind of file -> ending of its name, where it is not the usual one.
    """

    facts: dict[str, Any]
    files: dict[str, Callable[[Path], object]]
    endings: Mapping[str, str] = MappingProxyType({})


class Predictor(Protocol):
    """A model that predicts one image at a time."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of the files that are written for each image."""

    @property
    def pixel_format(self) -> PixelFormat:
        """Channels and range of the images that it takes."""

    def predict(self, image: Pixels | Raster, name: str) -> Prediction:
        """Run on an image as read, or on a raster, called `name` in messages; the image may be drawn on."""

    def description(self) -> dict[str, Any]:
        """Entries of `results.json` on the model and its settings."""

    def fingerprint(self) -> dict[str, Any]:
        """Everything that results depend on besides the image; as long as it is equal they stay valid."""

    def finish(self, records: list[dict[str, Any]], output: Path) -> dict[str, Any]:
        """Write the files that belong to all images together; returns entries of `results.json` on them."""


def checkpoint_state(checkpoint: str) -> dict[str, Any]:
    """Name of a checkpoint and modification time of its folder, for the fingerprint."""
    folder = Path(checkpoint)
    written = [path.stat().st_mtime_ns for path in folder.iterdir()] if folder.is_dir() else []
    return {"checkpoint": checkpoint, "checkpoint_modified": max(written, default=0)}
