"""`pipeline("image-segmentation")` with sliding windows."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import ImageSegmentationPipeline
from transformers.utils import ModelOutput

from hf_denseseg.inference.pipeline_images import declared_inputs, loaded_image
from hf_denseseg.inference.segmentation import choose_classes, predict_logits, resize_confidence
from hf_denseseg.inference.settings import DEFAULT_THRESHOLD, InferenceSettings, check_threshold
from hf_denseseg.inference.sliding_window import align_corners_of, upsample
from hf_denseseg.models.one_logit import class_names


class SlidingWindowSegmentationPipeline(ImageSegmentationPipeline):
    """`pipeline("image-segmentation")` with sliding windows, images of mixed sizes, and a score for each mask.

    Used as `pipeline("image-segmentation", model=..., pipeline_class=SlidingWindowSegmentationPipeline,
    crop_size=(512, 512), stride=(341, 341))`; without `crop_size` the model is run on the whole image. `score` is the
    mean probability of the class over its mask, at the temperature saved with the checkpoint. `batch_size` counts
    windows of one image, not images.

    Args:
        crop_size: (height, width) of the window in pixels.
        stride: (height, width) from one window to the next (default: 2/3 of the window).
        window_batch_size: windows per model call (default 4).
        threshold: of models with one logit, the probability above which a pixel is foreground.

    Returns:
        For each image a list of `{"score", "label", "mask"}`; masks are PIL images of the size of the image.

    Raises:
        InputError: settings that contradict each other, or an image of other channels or values than the checkpoint's.
    """

    _loaded_temperature: float | None = None

    def _sanitize_parameters(self, **kwargs: Any) -> tuple[dict, dict, dict]:
        preprocess, forward, postprocess = super()._sanitize_parameters(**kwargs)
        names = ("crop_size", "stride", "window_batch_size")
        window: dict[str, Any] = {name: kwargs[name] for name in names if name in kwargs}
        if window:
            forward["settings"] = InferenceSettings(mode="slide", **window)
        return preprocess, forward, postprocess

    def preprocess(self, image: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Read files and open images as training does; addresses and base64 text are left to transformers."""
        if (declared := declared_inputs(image, self.image_processor)) is not None:
            return {**declared[0].to(self.dtype), "target_size": [tuple(declared[1])]}
        return super().preprocess(loaded_image(image), *args, **kwargs)

    def get_iterator(self, inputs: Any, num_workers: int, batch_size: int, *args: Any) -> Any:
        """Feed the images one by one: they differ in size, and the windows are batched already."""
        return super().get_iterator(inputs, num_workers, 1, *args)

    def _forward(  # type: ignore[override]
        self, model_inputs: dict[str, Any], settings: InferenceSettings | None = None
    ) -> ModelOutput:
        logits = predict_logits(self.model, model_inputs["pixel_values"], settings or InferenceSettings())
        return ModelOutput(logits=logits, target_size=model_inputs["target_size"])

    def _temperature(self) -> float:
        """That of the test protocol saved with the checkpoint."""
        if self._loaded_temperature is None:
            config, self._loaded_temperature = self.model.config, 1.0
            checkpoint = str(config.name_or_path)
            # A model that was made in memory, or whose folder has moved, has no saved protocol.
            if (checkpoint and Path(checkpoint).is_dir()) or getattr(config, "_commit_hash", None):
                self._loaded_temperature = InferenceSettings.load(checkpoint).temperature
        return self._loaded_temperature

    def postprocess(  # type: ignore[override]
        self, model_outputs: ModelOutput, subtask: str | None = None, threshold: float | None = None, **unused: Any
    ) -> list[dict[str, Any]]:
        """One `{"score", "label", "mask"}` per class present, as the plain pipeline gives them.

        Of a model with one logit the foreground is what is more probable than `threshold`; None is the checkpoint's.
        """
        if subtask not in {"semantic", None}:
            raise ValueError(f"Subtask {subtask} is not supported for {type(self.model).__name__}. Use 'semantic'.")
        if threshold is None:
            threshold = getattr(self.image_processor, "threshold", DEFAULT_THRESHOLD)
        threshold = check_threshold(threshold, self.model.config.num_labels or 0)
        height, width = (int(length) for length in model_outputs["target_size"][0])
        logits, align_corners = model_outputs["logits"], align_corners_of(self.model)
        if threshold == DEFAULT_THRESHOLD:
            both = resize_confidence(logits, (height, width), align_corners, temperature=self._temperature())
            ids, confidence = (each[0] for each in both)
        else:
            probabilities = upsample(logits, (height, width), align_corners).softmax(1)
            ids, confidence = choose_classes(probabilities[0], threshold, self._temperature())
        names = class_names(self.model.config)
        annotation = []
        for label in ids.unique().tolist():
            mask = ids == label
            annotation.append(
                {
                    "score": float(confidence[mask].mean()),
                    "label": names[label],
                    "mask": Image.fromarray(mask.cpu().numpy().astype(np.uint8) * 255),
                }
            )
        return annotation
