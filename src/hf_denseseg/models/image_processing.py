"""Image processors that all families share: any image to `pixel_values`, any map to `labels`, logits to masks.

They extend transformers' Segformer processors: the aspect ratio is kept, every image mode is read as in training,
label maps may have any integer type, and masks are resized with the model's `align_corners`.
"""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers.image_processing_outputs import SemanticSegmentationPostProcessorOutput
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import ImageInput, is_scaled_image, to_numpy_array
from transformers.models.segformer.image_processing_pil_segformer import SegformerImageProcessorPil
from transformers.models.segformer.image_processing_segformer import SegformerImageProcessor
from transformers.processing_utils import ImagesKwargs, Unpack

from hf_denseseg.data.reading.images import to_rgb
from hf_denseseg.errors import InputError

logger = logging.getLogger(__name__)

MOST_CHANNELS = 4  # of a label map that was saved as a color image


class SegmentationImageProcessorKwargs(ImagesKwargs, total=False):
    """Options in addition to those of every image processor.

    Args:
        do_reduce_labels: whether raw label 0 is ignored: 0 -> 255, k -> k - 1, 255 stays.
        align_corners: how `post_process_semantic_segmentation` resizes logits; use the model's setting.
    """

    do_reduce_labels: bool
    align_corners: bool


class _SegmentationMixin:
    """Differences of both backends from Segformer's."""

    valid_kwargs = SegmentationImageProcessorKwargs
    size = {"shortest_edge": 512, "longest_edge": 2048}
    default_to_square = False
    do_convert_rgb = True
    align_corners = False

    def preprocess(
        self,
        images: ImageInput,
        segmentation_maps: ImageInput | None = None,
        **kwargs: Unpack[SegmentationImageProcessorKwargs],
    ) -> BatchFeature:
        """Prepare images, and label maps of the same sizes, for the model.

        Args:
            images: one image or a list; PIL of any mode, arrays or tensors.
            segmentation_maps: one `(H, W)` map of class ids or a list; three equal channels count as one.

        Returns:
            `pixel_values` `(B, 3, h, w)` and, with maps, `labels` `(B, h, w)` int64.

        Raises:
            InputError: tensors are requested, but the resized images have different sizes; or a colored label map.
        """
        rescales = kwargs.get("do_rescale")
        if (self.do_rescale if rescales is None else rescales) and _is_scaled(images):  # type: ignore[attr-defined]
            logger.warning(
                "Floating-point images between 0 and 1 are divided by 255 once more. Give bytes, or do_rescale=False."
            )
        if segmentation_maps is not None:
            segmentation_maps = _class_ids(segmentation_maps, single=_is_one(images))
        return super().preprocess(_upright(images), segmentation_maps, **kwargs)  # type: ignore[misc]

    def _preprocess_image_like_inputs(self, *args: Any, return_tensors: str | None, **kwargs: Any) -> BatchFeature:
        data = super()._preprocess_image_like_inputs(*args, return_tensors=None, **kwargs).data  # type: ignore[misc]
        sizes = sorted({tuple(each.shape[-2:]) for each in data["pixel_values"]})
        if return_tensors is not None and len(sizes) > 1:
            raise InputError(
                f"The resized images of this batch have different sizes {sizes} and cannot be stacked. Process them "
                "one by one, or give a fixed size such as size={'height': 512, 'width': 512}."
            )
        return BatchFeature(data=data, tensor_type=return_tensors)

    def post_process_semantic_segmentation(
        self,
        outputs: Any,
        target_sizes: Sequence[tuple[int, int]] | torch.Tensor | None = None,
        return_segmentation_scores: bool = False,
    ) -> list:
        """Turn logits into one map of class ids per image.

        Args:
            outputs: model output with `logits` `(B, num_labels, h, w)`.
            target_sizes: `(height, width)` of each map; None keeps the resolution of the logits.
            return_segmentation_scores: also return the resized logits `(num_labels, height, width)`.

        Returns:
            `(height, width)` LongTensors, or outputs with `segmentation` and `segmentation_scores`.

        Raises:
            ValueError: not one target size per image.
        """
        logits = outputs.logits
        if target_sizes is not None and len(target_sizes) != len(logits):
            raise ValueError(f"{len(target_sizes)} target sizes were given for {len(logits)} images. Give one each.")
        results = []
        for index in range(len(logits)):
            scores = logits[index : index + 1]
            if target_sizes is not None:
                size = tuple(int(side) for side in target_sizes[index])
                scores = F.interpolate(scores, size=size, mode="bilinear", align_corners=self.align_corners)
            result = {"segmentation": scores[0].argmax(dim=0), "segmentation_scores": scores[0]}
            results.append(SemanticSegmentationPostProcessorOutput(data=result))
        return results if return_segmentation_scores else [result["segmentation"] for result in results]


class SegmentationImageProcessor(_SegmentationMixin, SegformerImageProcessor):  # type: ignore[misc]
    """Resize (shorter side 512, ratio kept), rescale and normalize with torchvision."""

    def reduce_label(self, labels: list[torch.Tensor]) -> list[torch.Tensor]:
        """Ignore raw label 0: 0 -> 255, k -> k - 1, 255 stays, in int64, whatever the type of the maps."""
        maps = [each.long() for each in labels]
        return [torch.where((each == 0) | (each == 255), 255, each - 1) for each in maps]


class SegmentationImageProcessorPil(_SegmentationMixin, SegformerImageProcessorPil):  # type: ignore[misc]
    """The same with PIL and numpy."""

    def reduce_label(self, image: np.ndarray) -> np.ndarray:
        """As in the other backend; Segformer's method would write into the caller's map."""
        raw = image.astype(np.int64)
        return np.where((raw == 0) | (raw == 255), 255, raw - 1)


def _is_scaled(images: Any) -> bool:
    """Whether the first image is an array or a tensor of numbers between 0 and 1."""
    while isinstance(images, list | tuple) and images:
        images = images[0]
    floating = (isinstance(images, np.ndarray) and images.dtype.kind == "f") or (
        isinstance(images, torch.Tensor) and images.is_floating_point()
    )
    return floating and is_scaled_image(to_numpy_array(images))


def _is_one(images: Any) -> bool:
    return not isinstance(images, list | tuple) and getattr(images, "ndim", 3) <= 3


def _class_ids(maps: Any, single: bool) -> Any:
    """Take one of several equal channels of label maps.

    Args:
        maps: as `preprocess` takes them.
        single: whether they belong to one image, so that three dimensions are channels and no batch.

    Raises:
        InputError: the channels differ.
    """
    if type(maps) in (list, tuple):
        return [_class_ids(each, single=True) for each in maps]
    values = np.asarray(maps) if isinstance(maps, Image.Image) else maps
    if not single or getattr(values, "ndim", 0) != 3:
        return maps
    last = isinstance(maps, Image.Image) or values.shape[0] > MOST_CHANNELS
    channels = np.moveaxis(np.asarray(values), 2, 0) if last else values  # (C, H, W)
    if len(channels) > MOST_CHANNELS:
        return maps
    colors = channels[:3]  # without the opacity
    if any(bool((each != channels[0]).any()) for each in colors):
        raise InputError(
            f"A label map has {len(channels)} channels that differ, so its colors stand for classes; a map of class "
            "ids is needed. Convert colors to ids first: LabelSpec(colors=...) of hf_denseseg.data.labels does."
        )
    return channels[0]


def _upright(images: Any) -> Any:
    """Apply `to_rgb` to every PIL image of a (nested) list and leave everything else."""
    if isinstance(images, list | tuple):
        return [_upright(image) for image in images]
    return to_rgb(images) if isinstance(images, Image.Image) else images


__all__ = ["SegmentationImageProcessor", "SegmentationImageProcessorKwargs", "SegmentationImageProcessorPil"]
