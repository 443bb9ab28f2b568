"""The handler of an inference endpoint of the hub: images in, what the task's pipeline returns out."""

import base64
import io
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hf_denseseg.errors import InputError, RunError
from hf_denseseg.inference.serving.service import ImageService
from hf_denseseg.models.auto.tasks import SEMANTIC_SEGMENTATION
from hf_denseseg.models.one_logit import class_names

PARAMETERS = {"threshold", "settings"}


class EndpointHandler:
    """Loaded once by the endpoint and called with each request.

    Args:
        path: folder of the model.
    """

    def __init__(self, path: str = "") -> None:
        self.service = ImageService(path)

    def __call__(self, data: dict[str, Any]) -> Any:
        """Predict one image.

        Args:
            data: `inputs`, an image (PIL, bytes of a file, or base64 text), and optionally `parameters`: for
                segmentation `settings` (see `InferenceSettings`), for a detector `threshold`.

        Returns:
            Segmentation: `{"label", "score", "mask"}` for each class in the image, the mask as base64 text of a PNG
            with 255 in the class. Detection and classification: the predictions, see `ObjectPredictor.find`. Input
            that cannot be used: `{"error": message}`.
        """
        try:
            return self._predict(data)
        except (InputError, RunError) as error:
            return {"error": str(error)}

    def _predict(self, data: dict[str, Any]) -> list[dict[str, Any]]:
        given = data.get("parameters") or {}
        if unknown := sorted(set(given) - PARAMETERS):
            raise InputError(f"parameters: {', '.join(unknown)} is unknown. Use {', '.join(sorted(PARAMETERS))}.")
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "image"
            source.write_bytes(_encoded(data.get("inputs")))
            served = self.service.predict(str(source), Path(folder), **given)
            if self.service.task != SEMANTIC_SEGMENTATION:
                return served.rows
            with Image.open(served.files["mask"]) as mask:
                ids = np.asarray(mask)  # (H, W)
        predictor: Any = self.service.predictor
        index = {name: number for number, name in enumerate(class_names(predictor.model.config))}
        return [
            {"label": row["class"], "score": row["score"], "mask": _png(ids == index[row["class"]])}
            for row in served.rows
        ]


def _encoded(image: Any) -> bytes:
    """Bytes of an image file.

    Raises:
        InputError: neither an image, bytes nor base64 text.
    """
    if isinstance(image, Image.Image):
        file = io.BytesIO()
        image.save(file, "PNG")
        return file.getvalue()
    if isinstance(image, str):
        try:
            return base64.b64decode(image.rpartition("base64,")[2], validate=True)
        except ValueError as error:
            raise InputError(
                "inputs is a text, but not base64 of an image file. Send the image encoded so, or as bytes."
            ) from error
    if isinstance(image, bytes | bytearray):
        return bytes(image)
    raise InputError(f"inputs is a {type(image).__name__}: send an image, or base64 text of an image file.")


def _png(mask: np.ndarray) -> str:
    """A boolean mask `(H, W)` as base64 text of a PNG."""
    file = io.BytesIO()
    Image.fromarray(mask.astype(np.uint8) * 255).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


__all__ = ["EndpointHandler"]
