"""transformers' image pipelines for our models, whose image processors keep the aspect ratio.

`pipeline(..., batch_size=4)` stacks images, which fails if their sizes differ. Here images of one size are run
together, so that the results are those of single calls; models of others are run as before.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    ImageClassificationPipeline,
    ImageFeatureExtractionPipeline,
    ImageSegmentationPipeline,
    ObjectDetectionPipeline,
)
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.pipelines.base import pad_collate_fn
from transformers.pipelines.pt_utils import PipelineIterator

from hf_denseseg.inference.pipeline_images import declared_inputs, loaded_image

ITEMS = "items"
"""Key under which images travel through a pipeline one by one: what is no tensor is listed, not stacked."""


class _MixedSizes:
    """Between the class of a pipeline and its subclass below."""

    target_size: Callable[[list[tuple[int, ...]]], Any] | None = None  # how the pipeline keeps the size of an image
    model: Any
    image_processor: Any
    tokenizer: Any

    def _is_ours(self) -> bool:
        """Whether model or image processor are of this package: other models may have a processor of ours."""
        parts = (self.model, self.image_processor)
        return any(type(each).__module__.startswith("hf_denseseg.") for each in parts)

    def preprocess(self, image: Any, *args: Any, **kwargs: Any) -> Any:
        """Prepare one image: read as training reads it, then as the pipeline does."""
        if not self._is_ours():
            return super().preprocess(image, *args, **kwargs)  # type: ignore[misc]
        if (declared := declared_inputs(image, self.image_processor)) is not None:
            inputs, size = declared[0].to(self.dtype), tuple(declared[1])  # type: ignore[attr-defined]
            if self.target_size is not None:
                inputs["target_size"] = self.target_size([size])
            return {ITEMS: [inputs]}
        return {ITEMS: [super().preprocess(loaded_image(image), *args, **kwargs)]}  # type: ignore[misc]

    def _forward(self, model_inputs: Any, **kwargs: Any) -> Any:
        if ITEMS not in model_inputs:
            return super()._forward(model_inputs, **kwargs)  # type: ignore[misc]
        # A single image, or from the collate function one list for each image of the batch.
        items = [each[0] if isinstance(each, list) else each for each in model_inputs[ITEMS]]
        groups: dict[torch.Size, list[int]] = {}
        for index, item in enumerate(items):
            groups.setdefault(item["pixel_values"].shape, []).append(index)
        results: list[Any] = [None] * len(items)
        collate = pad_collate_fn(self.tokenizer, self.image_processor)
        for group in groups.values():
            own = [items[index] for index in group]
            outputs = super()._forward(own[0] if len(own) == 1 else collate(own), **kwargs)  # type: ignore[misc]
            # Split as the pipeline itself splits a batch; one image is none.
            split = PipelineIterator([outputs], lambda batch: batch, {}, loader_batch_size=len(own))
            for index, result in zip(group, split, strict=True):
                results[index] = result
        return {ITEMS: results}

    def postprocess(self, model_outputs: Any, **kwargs: Any) -> Any:
        """Turn the outputs for one image into the pipeline's result."""
        if ITEMS in model_outputs:
            found = model_outputs[ITEMS]
            model_outputs = found[0] if isinstance(found, list) else found
        return super().postprocess(model_outputs, **kwargs)  # type: ignore[misc]


class MixedSizesSegmentationPipeline(_MixedSizes, ImageSegmentationPipeline):  # type: ignore[misc]
    """`pipeline("image-segmentation")` with batches of images of different sizes."""

    target_size = list


class MixedSizesDetectionPipeline(_MixedSizes, ObjectDetectionPipeline):  # type: ignore[misc]
    """`pipeline("object-detection")` with batches of images of different sizes."""

    target_size = torch.IntTensor


class MixedSizesClassificationPipeline(_MixedSizes, ImageClassificationPipeline):  # type: ignore[misc]
    """`pipeline("image-classification")` with batches of images of different sizes."""


class MixedSizesFeaturePipeline(_MixedSizes, ImageFeatureExtractionPipeline):  # type: ignore[misc]
    """`pipeline("image-feature-extraction")` with batches of images of different sizes."""


PIPELINES = {
    "image-segmentation": MixedSizesSegmentationPipeline,
    "object-detection": MixedSizesDetectionPipeline,
    "image-classification": MixedSizesClassificationPipeline,
    "image-feature-extraction": MixedSizesFeaturePipeline,
}


def register_pipelines() -> None:
    """Let `transformers.pipeline` build the classes above for their tasks."""
    for task, pipeline_class in PIPELINES.items():
        PIPELINE_REGISTRY.supported_tasks[task]["impl"] = pipeline_class


__all__ = ["PIPELINES", "register_pipelines"]
