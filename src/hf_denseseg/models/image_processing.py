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
from transformers.image_utils import ChannelDimension, ImageInput, SizeDict, is_scaled_image, to_numpy_array
from transformers.models.segformer.image_processing_pil_segformer import SegformerImageProcessorPil
from transformers.models.segformer.image_processing_segformer import SegformerImageProcessor
from transformers.processing_utils import ImagesKwargs, Unpack

from hf_denseseg.data.ignore_index import IGNORE_INDEX
from hf_denseseg.data.reading.pixels import RGB_BYTES, PixelFormat, read_open_image, resize_pixels
from hf_denseseg.errors import InputError

logger = logging.getLogger(__name__)

MOST_CHANNELS = 4  # of a label map that was saved as a color image


class SegmentationImageProcessorKwargs(ImagesKwargs, total=False):
    """Options in addition to those of every image processor.

    Args:
        do_reduce_labels: whether raw label 0 is ignored: 0 -> `ignore_index`, k -> k - 1, ignored ones stay.
        align_corners: how `post_process_semantic_segmentation` resizes logits; use the model's setting.
        pixel_range: stored values of black and white: `"uint8"`, `"uint16"` or `[low, high]`, see `PixelFormat`.
            `image_mean` has one number per channel.
    """

    do_reduce_labels: bool
    align_corners: bool
    pixel_range: str | list[int | float] | tuple[int | float, int | float]


class _SegmentationMixin:
    """Differences of both backends from Segformer's.

    Attributes:
        threshold: probability above which a pixel is foreground, of a model with one logit; saved.
        ignore_index: id of ignored pixels, 65535 for models of more than 254 classes; saved.
    """

    valid_kwargs = SegmentationImageProcessorKwargs
    size = {"shortest_edge": 512, "longest_edge": 2048}
    default_to_square = False
    do_convert_rgb = True
    align_corners = False
    pixel_range: str | list[float] = "uint8"
    threshold = 0.5
    ignore_index = IGNORE_INDEX

    def preprocess(
        self,
        images: ImageInput,
        segmentation_maps: ImageInput | None = None,
        **kwargs: Unpack[SegmentationImageProcessorKwargs],
    ) -> BatchFeature:
        """Prepare images, and label maps of the same sizes, for the model.

        Args:
            images: one image or a list; PIL of any mode, arrays or tensors with one channel per number of
                `image_mean`. Unless `pixel_range` is `"uint8"`, they hold the values that files store.
            segmentation_maps: one `(H, W)` map of class ids or a list; three equal channels count as one.

        Returns:
            `pixel_values` `(B, C, h, w)` and, with maps, `labels` `(B, h, w)` int64.

        Raises:
            InputError: tensors are requested, but the resized images have different sizes; images that contradict
                `pixel_range` or the number of channels; or a colored label map.
        """
        given: dict[str, Any] = dict(kwargs)
        pixel_format = PixelFormat.of_processor(self, **given)
        if segmentation_maps is not None:
            segmentation_maps = _class_ids(segmentation_maps, single=_is_one(images))
        if pixel_format == RGB_BYTES:
            if self.do_rescale if given.get("do_rescale") is None else given["do_rescale"]:  # type: ignore[attr-defined]
                _check_bytes(images)
            images = _upright(images)
        else:
            images = _declared_pixels(images, pixel_format, given.get("input_data_format"))
            given |= {"input_data_format": ChannelDimension.FIRST, "do_convert_rgb": False}
        return super().preprocess(images, segmentation_maps, **given)  # type: ignore[misc]

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
        threshold: float | None = None,
    ) -> list:
        """Turn logits into one map of class ids per image: of several logits the highest wins.

        Args:
            outputs: model output with `logits` `(B, num_labels, h, w)`.
            target_sizes: `(height, width)` of each map; None keeps the resolution of the logits.
            return_segmentation_scores: also return the resized logits `(num_labels, height, width)`.
            threshold: of a model with one logit: id 1 (foreground) is what has a higher probability, 0 the rest; None
                is the processor's own.

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
            if len(scores[0]) == 1:
                ids = (scores[0, 0].float().sigmoid() > (self.threshold if threshold is None else threshold)).long()
            else:
                ids = scores[0].argmax(dim=0)
            result = {"segmentation": ids, "segmentation_scores": scores[0]}
            results.append(SemanticSegmentationPostProcessorOutput(data=result))
        return results if return_segmentation_scores else [result["segmentation"] for result in results]


class SegmentationImageProcessor(_SegmentationMixin, SegformerImageProcessor):  # type: ignore[misc]
    """Resize (shorter side 512, ratio kept), rescale and normalize with torchvision.

    Options are those of transformers' Segformer processor (`size`, `image_mean`, `do_resize`, ...) and
    `SegmentationImageProcessorKwargs`.
    """

    def reduce_label(self, labels: list[torch.Tensor]) -> list[torch.Tensor]:
        """Ignore raw label 0: 0 -> `ignore_index`, k -> k - 1, ignored ones stay; int64, whatever the type of maps."""
        ignored, maps = self.ignore_index, [each.long() for each in labels]
        for each in maps:
            _check_reducible(int(each.max()), ignored)
        return [torch.where((each == 0) | (each == ignored), ignored, each - 1) for each in maps]


class SegmentationImageProcessorPil(_SegmentationMixin, SegformerImageProcessorPil):  # type: ignore[misc]
    """The same with PIL and numpy."""

    def resize(
        self, image: np.ndarray, size: SizeDict, resample: Any = None, reducing_gap: int | None = None, **options: Any
    ) -> np.ndarray:
        """As transformers' method, which takes nothing but 8 bits and one or three channels."""
        if image.dtype == np.uint8 and len(image) in (1, 3):
            return super().resize(image, size, resample, reducing_gap, **options)
        blank = np.zeros((1, *image.shape[1:]), np.uint8)  # resized for its new size alone
        height, width = super().resize(blank, size, Image.Resampling.NEAREST).shape[1:]
        return resize_pixels(image.transpose(1, 2, 0), (height, width), _pillow_filter(resample)).transpose(2, 0, 1)

    def reduce_label(self, image: np.ndarray) -> np.ndarray:
        """As in the other backend; Segformer's method would write into the caller's map."""
        raw, ignored = image.astype(np.int64), self.ignore_index
        _check_reducible(int(raw.max()), ignored)
        return np.where((raw == 0) | (raw == ignored), ignored, raw - 1)


def _pillow_filter(resample: Any) -> Image.Resampling:
    """A filter of Pillow, by its number or as torchvision calls it (`nearest-exact`); bilinear by default."""
    if resample is None or isinstance(resample, int):
        return Image.Resampling.BILINEAR if resample is None else Image.Resampling(resample)
    return Image.Resampling[resample.value.partition("-")[0].upper()]


def _check_reducible(largest: int, ignored: int) -> None:
    """Refuse raw ids that would become the ignored one, or larger."""
    if largest > ignored:
        raise InputError(
            f"A label map holds the id {largest}, but {ignored} marks ignored pixels. For more than 254 classes give "
            "the image processor ignore_index=65535."
        )


def _check_bytes(images: Any) -> None:
    """Warn of an image between 0 and 1, and refuse values beyond 8 bits; the first image stands for all.

    Raises:
        InputError: an array or a tensor with values above 255.
    """
    while isinstance(images, list | tuple) and images:
        images = images[0]
    if not isinstance(images, np.ndarray | torch.Tensor) or images.dtype in (np.uint8, torch.uint8):
        return
    values = to_numpy_array(images)
    if values.dtype.kind == "f" and is_scaled_image(values):
        logger.warning(
            "Floating-point images between 0 and 1 are divided by 255 once more. Give bytes, or do_rescale=False."
        )
    elif values.size and values.max() > 255:
        raise InputError(
            f"An image holds values up to {values.max()}, but pixel_range is uint8 (0 to 255). Give the processor the "
            "range of the images, such as pixel_range='uint16' or pixel_range=[0, 4095]."
        )


def _declared_pixels(
    images: Any, pixel_format: PixelFormat, layout: str | ChannelDimension | None
) -> list[np.ndarray]:
    """Images of any kind -> `(C, H, W)` with black 0 and white 255: uint8, or float32 for other ranges."""
    if isinstance(images, list | tuple):
        return [each for image in images for each in _declared_pixels(image, pixel_format, layout)]
    name = "given to the processor"
    if isinstance(images, Image.Image):
        pixels = np.asarray(read_open_image(images, name, pixel_format))
    else:
        values = to_numpy_array(images)
        if values.ndim == 4:
            return _declared_pixels(list(values), pixel_format, layout)
        if values.ndim == 2:
            values = values[..., None]
        elif layout == ChannelDimension.FIRST or (
            layout is None and values.shape[0] == pixel_format.num_channels != values.shape[-1]
        ):
            values = values.transpose(1, 2, 0)
        pixels = np.asarray(pixel_format.read(values, name))
    planes = pixels.transpose(2, 0, 1)  # (H, W, C) -> (C, H, W)
    return [planes if planes.dtype == np.uint8 else planes.astype(np.float32) / 257]


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
    """Read every PIL image of a (nested) list as training reads it, and leave everything else."""
    if isinstance(images, list | tuple):
        return [_upright(image) for image in images]
    return read_open_image(images, "given to the processor") if isinstance(images, Image.Image) else images


__all__ = ["SegmentationImageProcessor", "SegmentationImageProcessorKwargs", "SegmentationImageProcessorPil"]
