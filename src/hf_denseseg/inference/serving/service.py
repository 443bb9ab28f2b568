"""One image after the other through a checkpoint, as files: what the page and the endpoint have in common."""

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from hf_denseseg.data.reading.georeferenced import Raster
from hf_denseseg.data.reading.pixels import as_shown
from hf_denseseg.errors import InputError
from hf_denseseg.inference.predict.inputs import read_input_image
from hf_denseseg.inference.predict.objects import ObjectPredictor
from hf_denseseg.inference.predict.outputs import OutputSettings
from hf_denseseg.inference.predict.prediction import PLACES
from hf_denseseg.inference.predict.predictor import Predictor
from hf_denseseg.inference.predict.segmentation import REDUCED_SIDE, SegmentationPredictor
from hf_denseseg.models.auto.pretrained import task_of_checkpoint
from hf_denseseg.models.auto.tasks import SEMANTIC_SEGMENTATION

MAX_PIXELS = 40_000_000  # of an upload, as a photograph of 7300x5400


class Served(NamedTuple):
    """The prediction for one image.

    Args:
        rows: one per class or object, see `PixelTally.rows` and `ObjectPredictor.find`.
        files: kind of file (`"mask"`, `"overlay"`, `"confidence"`, `"drawn"`) -> its path.
    """

    rows: list[dict[str, Any]]
    files: dict[str, Path]


class ImageService:
    """A checkpoint that predicts uploads; threads may share it, it runs on one image at a time.

    Args:
        checkpoint: folder or hub id.
        device: torch device; None uses CUDA if available.
        max_pixels: an image that declares more pixels is refused before it is decoded.

    Raises:
        InputError: not a checkpoint, or no such device.
        RunError: a hub id without a network.
    """

    def __init__(self, checkpoint: str, device: str | None = None, max_pixels: int = MAX_PIXELS) -> None:
        self.task = task_of_checkpoint(checkpoint) or SEMANTIC_SEGMENTATION
        self.predictor: Predictor
        if self.task == SEMANTIC_SEGMENTATION:
            outputs = OutputSettings(write=("masks", "overlays", "confidence"))
            self.predictor = SegmentationPredictor.load(checkpoint, {}, device, outputs)
        else:
            self.predictor = ObjectPredictor.load(checkpoint, self.task, device)
        self.max_pixels = max_pixels
        self._lock = threading.Lock()

    def predict(
        self,
        path: str,
        folder: Path,
        *,
        settings: dict[str, Any] | None = None,
        least_confidence: float = 0.0,
        threshold: float | None = None,
    ) -> Served:
        """Predict an image file and write the results.

        Args:
            path: of the image.
            folder: for the files.
            settings: of a segmentation checkpoint, inference settings instead of the saved ones.
            least_confidence: of a segmentation checkpoint, the overlay leaves pixels below this probability as they
                are in the image; mask and table hold all pixels.
            threshold: of a detector, minimum score of an object.

        Raises:
            InputError: no readable image, too large a one, or settings that do not fit each other.
            RunError: the device runs out of memory.
        """
        image = read_input_image(path, self.max_pixels, self.predictor.pixel_format)
        predictor = self.predictor
        if isinstance(predictor, SegmentationPredictor):
            given = {**predictor.settings.to_dict(), **(settings or {})}
            predictor = replace(predictor, settings=type(predictor.settings).from_dict(given))
        elif isinstance(predictor, ObjectPredictor) and threshold is not None:
            predictor = replace(predictor, threshold=threshold)
        with self._lock:
            prediction = predictor.predict(image, Path(path).name)
        files = {}
        for kind, write in prediction.files.items():
            ending = prediction.endings.get(kind, PLACES[kind][1])
            files[kind] = folder / f"{kind}{ending}"
            write(files[kind])
        if least_confidence > 0 and "overlay" in files:
            image = read_input_image(path, self.max_pixels, predictor.pixel_format)  # the first was drawn on
            plain = as_shown(image.reduced(REDUCED_SIDE) if isinstance(image, Raster) else image)
            _leave_uncertain_pixels(files["overlay"], plain, files["confidence"], least_confidence)
        return Served(prediction.facts.get("classes", prediction.facts.get("predictions", [])), files)


def _leave_uncertain_pixels(overlay: Path, plain: Image.Image, confidence: Path, least: float) -> None:
    """Copy the pixels of the image back where the confidence is below `least`, in the overlay's file."""
    with Image.open(overlay) as drawn, Image.open(confidence) as known:
        certain = np.asarray(known.resize(drawn.size, Image.Resampling.NEAREST)) >= 255 * least
        mask = Image.fromarray(certain.astype(np.uint8) * 255)
        result = Image.composite(drawn, plain, mask)
    result.save(overlay, quality=90)


def settings_of(window: int, scales: list[float], flip: bool) -> dict[str, Any]:
    """Inference settings of the page's switches; what is left at its start keeps the checkpoint's protocol.

    Raises:
        InputError: a window of a negative size.
    """
    if window < 0:
        raise InputError(f"The window is {window} pixels. Give its side, or 0 for the checkpoint's protocol.")
    settings: dict[str, Any] = {"mode": "slide", "crop_size": (window, window), "stride": None} if window else {}
    if scales:
        settings["scales"] = tuple(sorted(scales))
    return settings | ({"flip": True} if flip else {})


__all__ = ["MAX_PIXELS", "ImageService", "Served", "settings_of"]
