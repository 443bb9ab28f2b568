# Copyright 2026 The hf_denseseg authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Image processors of HLG for all of its tasks: one pair of classes (torchvision, PIL) with the saved option `task`.

The Auto classes resolve a processor by its class name, which is one for all tasks. The option `task` of a checkpoint
therefore decides how images are resized, cropped and padded, and which post-processing there is.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import ImageInput, PILImageResampling, SizeDict
from transformers.processing_utils import Unpack

from hf_denseseg.errors import InputError, unknown_name
from hf_denseseg.models.auto.tasks import (
    DETECTION_TASKS,
    IMAGE_CLASSIFICATION,
    INSTANCE_SEGMENTATION,
    OBJECT_DETECTION,
    SEMANTIC_SEGMENTATION,
    task_of_class,
)
from hf_denseseg.models.hlg.annotations_hlg import to_labels
from hf_denseseg.models.hlg.detections_hlg import ALIGNMENT, paste_masks, retinanet_detections, to_corners
from hf_denseseg.models.image_processing import (
    SegmentationImageProcessor,
    SegmentationImageProcessorKwargs,
    SegmentationImageProcessorPil,
)

_COCO = {"size": {"shortest_edge": 800, "longest_edge": 1333}, "do_pad": True}  # released test configuration
TASK_SETTINGS: dict[str, dict[str, Any]] = {
    SEMANTIC_SEGMENTATION: {},
    # The released settings are those of Swin (TEST.CROP = True), whose loader resizes to 256/224 of the crop.
    IMAGE_CLASSIFICATION: {
        "size": {"shortest_edge": 256},
        "do_center_crop": True,
        "crop_size": {"height": 224, "width": 224},
        "resample": PILImageResampling.BICUBIC,
    },
    OBJECT_DETECTION: _COCO,
    INSTANCE_SEGMENTATION: _COCO,
}
"""Task -> settings that differ from those of semantic segmentation."""


class HlgImageProcessorKwargs(SegmentationImageProcessorKwargs, total=False):
    """Options besides those of every segmentation processor.

    Args:
        task: `"semantic-segmentation"`, `"image-classification"`, `"object-detection"` or `"instance-segmentation"`.
    """

    task: str


class _Objects(NamedTuple):
    """Annotations of a batch, passed in place of segmentation maps through the steps that the backends share."""

    annotations: list[Mapping[str, Any]] | None
    masks: bool


class _HlgMixin:
    """Common to both backends."""

    valid_kwargs = HlgImageProcessorKwargs
    task = SEMANTIC_SEGMENTATION
    do_center_crop = False
    do_pad = False

    def __init__(self, **kwargs: Any) -> None:
        task = kwargs.get("task") or SEMANTIC_SEGMENTATION
        if task not in TASK_SETTINGS:
            raise InputError(unknown_name("task", task, TASK_SETTINGS))
        super().__init__(**{**TASK_SETTINGS[task], **kwargs})

    @staticmethod
    def task_of(config: PreTrainedConfig) -> str:
        """Task of the model class that a configuration names; semantic segmentation for a backbone."""
        return task_of_class((config.architectures or [""])[0]) or SEMANTIC_SEGMENTATION

    def preprocess(
        self,
        images: ImageInput,
        segmentation_maps: ImageInput | None = None,
        annotations: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        return_segmentation_masks: bool | None = None,
        **kwargs: Unpack[HlgImageProcessorKwargs],
    ) -> BatchFeature:
        """Prepare images and their labels for the model.

        Args:
            images: one image or a list; PIL of any mode, arrays or tensors.
            segmentation_maps: one `(H, W)` map of class ids or a list (semantic segmentation).
            annotations: one dictionary in COCO's form or a list (detection): `image_id` and `annotations`, each of
                them with `bbox` (x, y, width, height) in pixels of the upright image, `category_id` from 0 to
                `num_labels` - 1, and for masks `segmentation` (polygons, run lengths, or an array). Crowds are
                dropped.
            return_segmentation_masks: whether labels have masks; None: only for instance segmentation.

        Returns:
            `pixel_values` `(B, 3, h, w)`; with maps `labels` `(B, h, w)`; in detection also `pixel_mask` `(B, h, w)`,
            1 for the image and 0 for padding at its right and bottom, and with annotations `labels`, one dictionary of
            tensors for each image (see `annotations_hlg.to_labels`).

        Raises:
            InputError: annotations that do not fit the task or the images, or images that cannot be stacked.
        """
        task = kwargs.get("task") or self.task
        if task not in DETECTION_TASKS:
            if annotations is not None:
                raise InputError(
                    f"`annotations` are for detection, but the task of this processor is {task!r}. Leave them out."
                )
            return super().preprocess(images, segmentation_maps, **kwargs)  # type: ignore[misc]
        if segmentation_maps is not None:
            raise InputError(f"`segmentation_maps` are no labels of {task}. Give `annotations` in COCO's form.")
        listed = [annotations] if isinstance(annotations, Mapping) else annotations
        masks = task == INSTANCE_SEGMENTATION if return_segmentation_masks is None else return_segmentation_masks
        # The backends know no annotations: these travel in place of the maps, to `_preprocess_image_like_inputs`.
        objects = _Objects(None if listed is None else list(listed), masks)
        return super().preprocess(images, objects, **kwargs)  # type: ignore[misc]

    def _preprocess_image_like_inputs(
        self, images: ImageInput, segmentation_maps: Any, return_tensors: str | None, **kwargs: Any
    ) -> BatchFeature:
        if not isinstance(segmentation_maps, _Objects):
            return super()._preprocess_image_like_inputs(  # type: ignore[misc]
                images, segmentation_maps, return_tensors=return_tensors, **kwargs
            )
        names = ("do_convert_rgb", "input_data_format", "device")
        options = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
        prepared = self._prepare_image_like_inputs(images=images, **options)  # type: ignore[attr-defined]
        settings = {name: value for name, value in kwargs.items() if name not in names}
        processed = self._preprocess(prepared, **{**settings, "do_reduce_labels": False})
        original, resized = (
            [(int(each.shape[-2]), int(each.shape[-1])) for each in every] for every in (prepared, processed)
        )
        data: dict[str, Any] = {"pixel_values": processed}
        if kwargs["do_pad"]:
            data["pixel_values"], data["pixel_mask"] = self._pad_to_common_size(processed, resized, kwargs["pad_size"])
        if return_tensors is not None and len({tuple(each.shape) for each in data["pixel_values"]}) > 1:
            raise InputError(f"Images of sizes {sorted(set(resized))} cannot be stacked. Leave `do_pad` on.")
        batch = BatchFeature(data=data, tensor_type=return_tensors)
        if segmentation_maps.annotations is not None:
            batch["labels"] = self._labels(segmentation_maps, original, resized)
        return batch

    def _pad_to_common_size(self, images: list, sizes: list[tuple[int, int]], pad_size: SizeDict | None) -> tuple:
        if pad_size is None:
            height, width = (max(sides) for sides in zip(*sizes, strict=True))
            pad_size = SizeDict(height=-(-height // ALIGNMENT) * ALIGNMENT, width=-(-width // ALIGNMENT) * ALIGNMENT)
        return self.pad(images, pad_size=pad_size, return_mask=True)  # type: ignore[attr-defined]

    @staticmethod
    def _labels(objects: _Objects, original: list, resized: list) -> list[dict[str, torch.Tensor]]:
        annotations = objects.annotations or []
        if len(annotations) != len(original):
            raise InputError(f"{len(annotations)} annotations were given for {len(original)} images. Give one each.")
        return [to_labels(*each, objects.masks) for each in zip(annotations, original, resized, strict=True)]

    def _preprocess(self, images: list, do_center_crop: bool, crop_size: SizeDict | None, **kwargs: Any) -> list:
        images = super()._preprocess(images, **kwargs)  # type: ignore[misc]
        return [self.center_crop(each, crop_size) for each in images] if do_center_crop else images  # type: ignore[attr-defined]

    # --- post-processing

    @property
    def post_process_semantic_segmentation(self) -> Callable[..., list]:
        """See `SegmentationImageProcessor`; present with the task semantic segmentation only."""
        self._need(SEMANTIC_SEGMENTATION)
        return super().post_process_semantic_segmentation  # type: ignore[misc]

    @property
    def post_process_instance_segmentation(self) -> Callable[..., list[dict[str, Any]]]:
        """Turn the output into one map of objects per image; present with the task instance segmentation only.

        transformers' image-segmentation pipeline predicts instances wherever the processor has a method of this name.
        """
        self._need(INSTANCE_SEGMENTATION)
        return self._instance_maps

    def _need(self, task: str) -> None:
        # An AttributeError, so that `hasattr`, by which pipelines choose, says no.
        if self.task != task:
            raise AttributeError(f"This image processor is for {self.task}, not for {task}; see its option `task`.")

    def post_process_object_detection(
        self, outputs: Any, threshold: float = 0.5, target_sizes: Sequence[Any] | torch.Tensor | None = None
    ) -> list[dict[str, torch.Tensor]]:
        """Turn the output of either detector into detections.

        For RetinaNet the 1000 best pairs (anchor, class) of each level, with scores above 0.05, go through non-maximum
        suppression within their class (IoU 0.5), and the best 100 are kept. Mask R-CNN has done this in its `forward`.

        Args:
            outputs: output of `HlgForObjectDetection` or `HlgForInstanceSegmentation` in eval mode.
            threshold: detections with lower scores are dropped; 0 for evaluation.
            target_sizes: (height, width) of each image in pixels; None returns boxes as fractions of the image.

        Returns:
            For each image `scores` `(N,)`, `labels` `(N,)` and `boxes` `(N, 4)` (left, top, right, bottom), best
            first.

        Raises:
            InputError: not one target size for each image, or an output without predictions.
        """
        found = self._detections(outputs, threshold, target_sizes)
        return [{name: each[name] for name in ("scores", "labels", "boxes")} for each in found]

    def post_process_detections_with_masks(
        self,
        outputs: Any,
        threshold: float = 0.5,
        mask_threshold: float = 0.5,
        target_sizes: Sequence[Any] | torch.Tensor | None = None,
    ) -> list[dict[str, torch.Tensor]]:
        """Turn the output of Mask R-CNN into detections with a mask each, as COCO's evaluation needs them.

        Args:
            outputs: output of `HlgForInstanceSegmentation` in eval mode.
            threshold: detections with lower scores are dropped; 0 for evaluation.
            mask_threshold: probability from which on a pixel belongs to an object.
            target_sizes: (height, width) of each image in pixels.

        Returns:
            As `post_process_object_detection`, and `masks` `(N, height, width)` bool; they may overlap.

        Raises:
            InputError: no target sizes, not one for each image, or an output without masks.
        """
        if target_sizes is None:
            raise InputError("Masks are pasted into the image: give its (height, width) in `target_sizes`.")
        if getattr(outputs, "pred_masks", None) is None:
            raise InputError("The output has no masks. Give that of HlgForInstanceSegmentation in eval mode.")
        found = self._detections(outputs, threshold, target_sizes)
        for each, size in zip(found, _sizes(target_sizes), strict=True):
            each["masks"] = paste_masks(each.pop("mask_logits").sigmoid(), each["boxes"], size, mask_threshold)
        return found

    @staticmethod
    def _detections(
        outputs: Any, threshold: float, target_sizes: Sequence[Any] | torch.Tensor | None
    ) -> list[dict[str, torch.Tensor]]:
        scored = getattr(outputs, "pred_scores", None)
        batch = getattr(outputs, "pred_boxes", None)
        if batch is None:
            raise InputError("The output has no predictions: a model in training mode gives losses only.")
        sizes = [(1, 1)] * len(batch) if target_sizes is None else _sizes(target_sizes)
        if len(sizes) != len(batch):
            raise InputError(f"{len(sizes)} target sizes were given for {len(batch)} images. Give one each.")
        found = []
        for index, size in enumerate(sizes):
            scale = torch.tensor([size[1], size[0], size[1], size[0]], device=batch.device)  # fractions -> pixels
            if scored is None:  # RetinaNet: anchors, not detections
                counts = outputs.anchors_per_level[index].tolist()
                scores, labels, corners = retinanet_detections(outputs.logits[index], batch[index], counts, threshold)
                kept = scores > threshold
                found.append({"scores": scores[kept], "labels": labels[kept], "boxes": corners[kept] * scale})
                continue
            kept = (outputs.pred_labels[index] >= 0) & (scored[index] > threshold)
            found.append(
                {
                    "scores": scored[index][kept],
                    "labels": outputs.pred_labels[index][kept],
                    "boxes": to_corners(batch[index][kept]).clamp(0, 1) * scale,
                    "mask_logits": outputs.pred_masks[index][kept],
                }
            )
        return found

    def _instance_maps(
        self,
        outputs: Any,
        threshold: float = 0.5,
        mask_threshold: float = 0.5,
        overlap_mask_area_threshold: float = 0.8,
        target_sizes: Sequence[Any] | torch.Tensor | None = None,
    ) -> list[dict[str, Any]]:
        """Assign each pixel to the object with the best score that covers it.

        Args:
            outputs: output of `HlgForInstanceSegmentation` in eval mode.
            threshold: detections with lower scores are dropped.
            mask_threshold: probability from which on a pixel belongs to an object.
            overlap_mask_area_threshold: objects are dropped unless more than this fraction of their mask is visible.
            target_sizes: (height, width) of each image in pixels.

        Returns:
            For each image `segmentation`, `(height, width)` int32 with the ids of the objects and 0 for none, and
            `segments_info`, a list of `id`, `label_id`, `was_fused` (never) and `score`.
        """
        results = []
        for found in self.post_process_detections_with_masks(outputs, threshold, mask_threshold, target_sizes):
            masks, count = found["masks"], len(found["masks"])
            segmentation = torch.zeros(masks.shape[1:], dtype=torch.int32, device=masks.device)
            segments: list[dict[str, Any]] = []
            if count:
                covered = masks.any(0)
                # The first object that covers a pixel is the best one, since they are sorted; `count` where none does.
                owner = torch.where(covered, masks.to(torch.uint8).argmax(0), count)
                # Objects that others hide too much are dropped; the rest is numbered from 1, best first.
                visible = owner.flatten().bincount(minlength=count + 1)[:count]
                kept = visible > overlap_mask_area_threshold * masks.flatten(1).sum(1)
                ids = torch.where(kept, kept.cumsum(0), 0).to(torch.int32)
                segmentation = torch.cat((ids, ids.new_zeros(1)))[owner]
                for index in kept.nonzero().squeeze(1).tolist():
                    label, score = int(found["labels"][index]), round(float(found["scores"][index]), 6)
                    segments.append({"id": int(ids[index]), "label_id": label, "was_fused": False, "score": score})
            results.append({"segmentation": segmentation, "segments_info": segments})
        return results


def _sizes(target_sizes: Sequence[Any] | torch.Tensor) -> list[tuple[int, int]]:
    return [(int(height), int(width)) for height, width in target_sizes]


class HlgImageProcessor(_HlgMixin, SegmentationImageProcessor):  # type: ignore[misc]
    """Torchvision image processor of HLG, see `SegmentationImageProcessor`."""


class HlgImageProcessorPil(_HlgMixin, SegmentationImageProcessorPil):  # type: ignore[misc]
    """The same with PIL and numpy (HLG)."""


__all__ = ["HlgImageProcessor", "HlgImageProcessorKwargs", "HlgImageProcessorPil"]
