"""Image processors that all families share: any picture to `pixel_values`, any map to `labels`, logits to masks."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import InterpolationMode
from transformers.image_processing_backends import PilBackend, TorchvisionBackend
from transformers.image_processing_outputs import SemanticSegmentationPostProcessorOutput
from transformers.image_processing_utils import BatchFeature
from transformers.image_transforms import group_images_by_shape, reorder_images
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    ChannelDimension,
    ImageInput,
    PILImageResampling,
    SizeDict,
)
from transformers.processing_utils import ImagesKwargs, Unpack

from hf_denseseg.data.reading.images import to_rgb
from hf_denseseg.errors import InputError


class SegmentationImageProcessorKwargs(ImagesKwargs, total=False):
    """Options besides those of every image processor.

    Args:
        do_reduce_labels: whether raw label 0 is void: 0 -> 255, k -> k - 1, 255 stays.
        align_corners: how `post_process_semantic_segmentation` resizes logits; give what the model was trained with.
    """

    do_reduce_labels: bool
    align_corners: bool


def reduce_labels(labels: np.ndarray | torch.Tensor) -> Any:
    """Make raw label 0 void: 0 -> 255, k -> k - 1, 255 stays, in int64."""
    if isinstance(labels, torch.Tensor):
        labels = labels.long()
        return torch.where((labels == 0) | (labels == 255), 255, labels - 1)
    labels = labels.astype(np.int64)
    return np.where((labels == 0) | (labels == 255), 255, labels - 1)


class _SegmentationMixin:
    """What both backends do alike; subclasses give `_preprocess` and `nearest`."""

    valid_kwargs = SegmentationImageProcessorKwargs
    nearest: Any

    def preprocess(
        self,
        images: ImageInput,
        segmentation_maps: ImageInput | None = None,
        **kwargs: Unpack[SegmentationImageProcessorKwargs],
    ) -> BatchFeature:
        """Prepare pictures, and label maps of the same sizes, for the model.

        Args:
            images: one picture or a list; PIL of any mode, arrays or tensors.
            segmentation_maps: one `(H, W)` map of class ids or a list.

        Returns:
            `pixel_values` `(B, 3, h, w)` and, with maps, `labels` `(B, h, w)` int64.

        Raises:
            InputError: tensors are asked for but the pictures come out in different sizes.
        """
        return super().preprocess(_upright(images), segmentation_maps, **kwargs)  # type: ignore[misc]

    def _preprocess_image_like_inputs(
        self,
        images: ImageInput,
        segmentation_maps: ImageInput | None,
        do_convert_rgb: bool,
        input_data_format: ChannelDimension,
        return_tensors: str | None,
        device: Any = None,
        **kwargs: Any,
    ) -> BatchFeature:
        placed = {} if device is None else {"device": device}
        prepared = self._prepare_image_like_inputs(  # type: ignore[attr-defined]
            images=images, do_convert_rgb=do_convert_rgb, input_data_format=input_data_format, **placed
        )
        data = {"pixel_values": self._preprocess(prepared, **{**kwargs, "do_reduce_labels": False})}  # type: ignore[attr-defined]
        if segmentation_maps is not None:
            maps = self._prepare_image_like_inputs(  # type: ignore[attr-defined]
                images=segmentation_maps,
                expected_ndims=2,
                do_convert_rgb=False,
                input_data_format=ChannelDimension.FIRST,
            )
            as_labels = {"do_normalize": False, "do_rescale": False, "resample": self.nearest}
            maps = self._preprocess(maps, **{**kwargs, **as_labels})  # type: ignore[attr-defined]
            data["labels"] = [
                each[0].long() if isinstance(each, torch.Tensor) else each[0].astype(np.int64) for each in maps
            ]
        sizes = sorted({tuple(each.shape[-2:]) for each in data["pixel_values"]})
        if return_tensors is not None and len(sizes) > 1:
            raise InputError(
                f"The pictures of this batch come out in different sizes {sizes} and cannot be stacked. Process them "
                "one by one, or give a fixed size such as size={'height': 512, 'width': 512}."
            )
        return BatchFeature(data=data, tensor_type=return_tensors)

    def post_process_semantic_segmentation(
        self,
        outputs: Any,
        target_sizes: Sequence[tuple[int, int]] | torch.Tensor | None = None,
        return_segmentation_scores: bool = False,
    ) -> list:
        """Turn logits into one map of class ids per picture.

        Args:
            outputs: model output with `logits` `(B, num_labels, h, w)`.
            target_sizes: `(height, width)` of each map; None keeps the resolution of the logits.
            return_segmentation_scores: also give the resized logits `(num_labels, height, width)`.

        Returns:
            `(height, width)` LongTensors, or outputs with `segmentation` and `segmentation_scores`.

        Raises:
            ValueError: not one target size per picture.
        """
        logits = outputs.logits
        if target_sizes is not None and len(target_sizes) != len(logits):
            raise ValueError(f"{len(target_sizes)} target sizes were given for {len(logits)} pictures. Give one each.")
        results = []
        for index in range(len(logits)):
            scores = logits[index : index + 1]
            if target_sizes is not None:
                size = tuple(int(side) for side in target_sizes[index])
                scores = F.interpolate(
                    scores,
                    size=size,
                    mode="bilinear",
                    align_corners=self.align_corners,  # type: ignore[attr-defined]
                )
            result = {"segmentation": scores[0].argmax(dim=0), "segmentation_scores": scores[0]}
            results.append(SemanticSegmentationPostProcessorOutput(data=result))
        return results if return_segmentation_scores else [result["segmentation"] for result in results]


class SegmentationImageProcessor(_SegmentationMixin, TorchvisionBackend):  # type: ignore[misc]
    """Resize (shorter side 512, ratio kept), rescale and normalise with torchvision."""

    resample = PILImageResampling.BILINEAR
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    size = {"shortest_edge": 512, "longest_edge": 2048}
    default_to_square = False
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    do_reduce_labels = False
    align_corners = False
    rescale_factor = 1 / 255
    nearest = InterpolationMode.NEAREST_EXACT  # equals PIL's NEAREST in every pixel; plain NEAREST does not

    def __init__(self, **kwargs: Unpack[SegmentationImageProcessorKwargs]) -> None:
        super().__init__(**kwargs)  # type: ignore[misc]

    def _preprocess(  # type: ignore[override]
        self,
        images: list[torch.Tensor],
        do_reduce_labels: bool,
        resample: Any,
        do_resize: bool,
        do_rescale: bool,
        do_normalize: bool,
        size: SizeDict,
        rescale_factor: float,
        image_mean: float | list[float],
        image_std: float | list[float],
        disable_grouping: bool,
        **kwargs: Any,
    ) -> list[torch.Tensor]:
        if do_reduce_labels:
            images = [reduce_labels(image) for image in images]
        if do_resize:
            groups, order = group_images_by_shape(images, disable_grouping=disable_grouping)
            groups = {shape: self.resize(stack, size=size, resample=resample) for shape, stack in groups.items()}
            images = reorder_images(groups, order)
        groups, order = group_images_by_shape(images, disable_grouping=disable_grouping)
        finish = (do_rescale, rescale_factor, do_normalize, image_mean, image_std)
        groups = {shape: self.rescale_and_normalize(stack, *finish) for shape, stack in groups.items()}
        return list(reorder_images(groups, order))


class SegmentationImageProcessorPil(_SegmentationMixin, PilBackend):  # type: ignore[misc]
    """The same with PIL and numpy."""

    resample = PILImageResampling.BILINEAR
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    size = {"shortest_edge": 512, "longest_edge": 2048}
    default_to_square = False
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    do_reduce_labels = False
    align_corners = False
    rescale_factor = 1 / 255
    nearest = PILImageResampling.NEAREST

    def __init__(self, **kwargs: Unpack[SegmentationImageProcessorKwargs]) -> None:
        super().__init__(**kwargs)  # type: ignore[misc]

    def _preprocess(  # type: ignore[override]
        self,
        images: list[np.ndarray],
        do_reduce_labels: bool,
        resample: Any,
        do_resize: bool,
        do_rescale: bool,
        do_normalize: bool,
        size: SizeDict,
        rescale_factor: float,
        image_mean: float | list[float],
        image_std: float | list[float],
        **kwargs: Any,
    ) -> list[np.ndarray]:
        processed = []
        for image in images:
            if do_reduce_labels:
                image = reduce_labels(image)
            if do_resize:
                image = self.resize(image, size, resample)
            if do_rescale:
                image = self.rescale(image, rescale_factor)
            if do_normalize:
                image = self.normalize(image, image_mean, image_std)
            processed.append(image)
        return processed


def _upright(images: Any) -> Any:
    """Apply `to_rgb` to every PIL picture of a (nested) list and leave everything else."""
    if isinstance(images, list | tuple):
        return [_upright(image) for image in images]
    return to_rgb(images) if isinstance(images, Image.Image) else images


__all__ = ["SegmentationImageProcessor", "SegmentationImageProcessorKwargs", "SegmentationImageProcessorPil"]
