"""Classify images, or detect objects in them: predictions as JSON, objects drawn over the images."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from hf_denseseg.data.labels import color_wheel
from hf_denseseg.data.reading.georeferenced import Raster
from hf_denseseg.data.reading.pixels import PixelFormat, Pixels, height_width, read_options
from hf_denseseg.data.sources.coco import encode_mask
from hf_denseseg.errors import InputError
from hf_denseseg.inference.export.exported_model import load_model
from hf_denseseg.inference.predict.predictor import Prediction, checkpoint_state
from hf_denseseg.models.auto.pretrained import load_image_processor
from hf_denseseg.models.auto.tasks import IMAGE_CLASSIFICATION, INSTANCE_SEGMENTATION
from hf_denseseg.models.channels import check_statistics
from hf_denseseg.visualization.detections import draw_objects

TOP_CLASSES = 5  # of a classifier


@dataclass
class ObjectPredictor:
    """A checkpoint for classification, detection or instance segmentation, ready to run on images.

    Args:
        checkpoint: folder or hub id.
        task: what it was trained for.
        model: in eval mode, on its device.
        processor: its image processor.
        threshold: objects with a lower score are left out.
    """

    checkpoint: str
    task: str
    model: Any
    processor: Any
    threshold: float

    @classmethod
    def load(cls, checkpoint: str, task: str, device: str | None = None, threshold: float = 0.5) -> "ObjectPredictor":
        """Load a checkpoint.

        Args:
            checkpoint: folder or hub id.
            task: a task of `TASKS` other than semantic segmentation.
            device: torch device; None uses CUDA if available.
            threshold: objects with a lower score are left out.

        Raises:
            InputError: not a checkpoint for the task, no image processor, no such device, or a threshold outside 0..1.
            RunError: a hub id without a network.
        """
        if not 0 <= threshold <= 1:
            raise InputError(f"--threshold is {threshold}. Give a score from 0 to 1.")
        model: Any = load_model(checkpoint, task)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            model = model.to(device)
        except (RuntimeError, AssertionError) as error:
            raise InputError(f"Device {device!r} cannot be used ({str(error).splitlines()[0]}). Try cpu.") from error
        processor = load_image_processor(checkpoint)
        check_statistics(processor, model.config, checkpoint)
        return cls(checkpoint, task, model, processor, threshold)

    def find(self, image: Pixels) -> tuple[list[dict[str, Any]], Image.Image | None]:
        """Run on one image as read.

        Returns:
            Predictions, best first: `label` and `score`, for a detector also `box` (left, top, right, bottom in
            pixels), for instance segmentation also `segmentation` (RLE); and the image with the objects drawn, None
            for a classifier.
        """
        inputs = self.processor(images=[image], return_tensors="pt", **read_options(image))
        used = {key: inputs[key].to(self.model.device) for key in ("pixel_values", "pixel_mask") if key in inputs}
        names = self.model.config.id2label
        if self.task == IMAGE_CLASSIFICATION:
            with torch.no_grad():
                scores = self.model(pixel_values=used["pixel_values"]).logits[0].float().softmax(-1)
            best = scores.topk(min(TOP_CLASSES, len(scores)))
            pairs = zip(best.values.tolist(), best.indices.tolist(), strict=True)
            return [{"label": names[index], "score": score} for score, index in pairs], None
        with torch.no_grad():
            outputs = self.model(**used)
        with_masks = self.task == INSTANCE_SEGMENTATION
        post_process = self.processor.post_process_object_detection
        if with_masks:
            post_process = self.processor.post_process_detections_with_masks
        found = post_process(outputs, threshold=self.threshold, target_sizes=[height_width(image)])[0]
        classes, scores, boxes = (found[key].tolist() for key in ("labels", "scores", "boxes"))
        masks = [mask.cpu().numpy() for mask in found["masks"]] if with_masks else None
        predictions: list[dict[str, Any]] = [
            {"label": names[k], "score": score, "box": box}
            for k, score, box in zip(classes, scores, boxes, strict=True)
        ]
        for prediction, mask in zip(predictions, masks or (), strict=False):
            prediction["segmentation"] = encode_mask(mask)  # mask: (height, width) bool, of the image's size
        texts = [f"{each['label']} {100 * each['score']:.0f} %" for each in predictions]
        palette = color_wheel(len(names))
        return predictions, draw_objects(image, boxes, texts, [palette[k] for k in classes], masks)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of the files that are written for each image."""
        return () if self.task == IMAGE_CLASSIFICATION else ("drawn",)

    @property
    def pixel_format(self) -> PixelFormat:
        """Channels and range of the images."""
        return PixelFormat.of_processor(self.processor)

    def predict(self, image: Pixels | Raster, name: str) -> Prediction:
        """Run on one image, of which a raster is read at once; `name` is not needed."""
        image = image.load() if isinstance(image, Raster) else image
        predictions, drawn = self.find(image)
        return Prediction(
            {"predictions": predictions}, {} if drawn is None else {"drawn": partial(drawn.save, quality=90)}
        )

    def description(self) -> dict[str, Any]:
        """Entries of `results.json` on the model."""
        return {"checkpoint": self.checkpoint, "task": self.task}

    def fingerprint(self) -> dict[str, Any]:
        """Everything that the predictions depend on besides the image."""
        return {**checkpoint_state(self.checkpoint), "threshold": self.threshold}

    def finish(self, records: list[dict[str, Any]], output: Path) -> dict[str, Any]:
        """Write nothing: no file belongs to all images together."""
        return {}
