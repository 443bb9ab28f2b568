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

"""HLG as the backbone of RetinaNet (objects) and Mask R-CNN (objects and their masks); Tables 10 and 11 of the paper.

Built from torchvision's detection modules. Where their defaults differ from the released mmdetection configurations
(anchors that are not rounded, L1 losses, the rule for low-quality matches, aligned RoIAlign with adaptive sampling,
background as the last class, and more), the configurations are followed. Internally boxes are corners (left, top,
right, bottom) in pixels of the padded image; labels and outputs are normalized (center x, center y, width, height) of
the image without its padding.

Order of the file: outputs; padding and labels; anchors, box coding and matching; pyramid, proposals and RoI heads; the
two models. Shapes: A anchors of all levels, K classes, N objects or regions.

RetinaNet without labels can be exported and compiled (with dynamic sizes: for images of at least 129 pixels a side, so
that no level has a single row). Mask R-CNN cannot: the number of boxes that non-maximum suppression leaves depends on
the image.
"""

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler, BoxCoder, Matcher
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead, concat_box_prediction_layers
from torchvision.ops import box_iou, clip_boxes_to_image, roi_align
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, FeaturePyramidNetwork, LastLevelMaxPool
from transformers import initialization as init
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.generic import can_return_tuple

from hf_denseseg.errors import InputError
from hf_denseseg.models.hlg.configuration_hlg import HlgConfig
from hf_denseseg.models.hlg.detections_hlg import (
    ALIGNMENT,
    MAX_DETECTIONS,
    SCORE_THRESHOLD,
    SMALLEST_EXTENT,
    suppress,
    to_corners,
    to_normalized,
)
from hf_denseseg.models.hlg.modeling_hlg import SMALLEST_SIDE, HlgModel, HlgModelOutput, HlgPreTrainedModel
from hf_denseseg.models.inputs import check_images

RATIOS = (0.5, 1.0, 2.0)  # height over width of the anchors
RETINANET_STRIDES, RETINANET_SCALES = (8, 16, 32, 64, 128), (4.0, 4.0 * 2 ** (1 / 3), 4.0 * 2 ** (2 / 3))
PROPOSAL_STRIDES, PROPOSAL_SCALES = (4, 8, 16, 32, 64), (8.0,)
ROI_STRIDES = (4, 8, 16, 32)
FINEST_SCALE = 56  # pixels: regions below twice this side are read from the map at 1/4, each coarser map doubles it
BOX_WEIGHTS = (10.0, 10.0, 5.0, 5.0)  # 1 / std of the second stage's box offsets: 0.1, 0.1, 0.2, 0.2
BORDER = 1e-3  # how far rounding may place a box beyond the image, as a fraction of its side


@dataclass
class HlgObjectDetectionOutput(ModelOutput):
    """Output of RetinaNet.

    Args:
        loss: sum of the losses, with labels only.
        loss_dict: `classification` (focal) and `boxes` (L1), with labels only.
        logits: `(B, A, num_labels)`, one independent logit per anchor and class.
        pred_boxes: `(B, A, 4)` normalized (center x, center y, width, height), of the image without its padding;
            they may reach beyond it.
        anchors_per_level: `(B, 5)` number of anchors of each level, finest first; if they sum up to less than A, the
            rest is padding of the batch.
        hidden_states: of the backbone, on request.
        attentions: of the backbone, on request.
    """

    loss: torch.Tensor | None = None
    loss_dict: dict[str, torch.Tensor] | None = None
    logits: torch.Tensor | None = None
    pred_boxes: torch.Tensor | None = None
    anchors_per_level: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class HlgInstanceSegmentationOutput(ModelOutput):
    """Output of Mask R-CNN; predictions, best first, in eval mode only.

    Args:
        loss: sum of the losses, with labels only.
        loss_dict: `rpn_classification`, `rpn_boxes`, `classification`, `boxes`, `masks`, with labels only.
        pred_scores: `(B, 100)` probabilities, 0 where there are fewer detections.
        pred_labels: `(B, 100)` class ids, -1 where there are fewer detections.
        pred_boxes: `(B, 100, 4)` normalized (center x, center y, width, height), of the image without its padding.
        pred_masks: `(B, 100, 28, 28)` logits of the mask within the box.
        hidden_states: of the backbone, on request.
        attentions: of the backbone, on request.
    """

    loss: torch.Tensor | None = None
    loss_dict: dict[str, torch.Tensor] | None = None
    pred_scores: torch.Tensor | None = None
    pred_labels: torch.Tensor | None = None
    pred_boxes: torch.Tensor | None = None
    pred_masks: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


Targets = list[dict[str, torch.Tensor]]
"""For each image `boxes` `(N, 4)` in corners, `labels` `(N,)` and, for Mask R-CNN, `masks` `(N, h, w)`."""

Size = tuple[int, int]
"""(height, width) in pixels."""


# --- images and labels


def aligned(side: int) -> int:
    """Round the side of an image up to a multiple of 32, in pixels."""
    return -(-side // ALIGNMENT) * ALIGNMENT


def image_sizes(pixel_values: torch.Tensor, pixel_mask: torch.Tensor | None) -> list[Size] | None:
    """Return the (height, width) of each image of a batch without its padding, or None if there is no mask.

    Raises:
        InputError: the mask has another size, or does not mark a rectangle in the upper left corner.
    """
    check_images(pixel_values, SMALLEST_SIDE)
    batch, _, height, width = pixel_values.shape
    if pixel_mask is None:
        return None  # a list of sizes would fix the batch size of an exported program
    if pixel_mask.shape != (batch, height, width):
        raise InputError(
            f"`pixel_mask` is {tuple(pixel_mask.shape)}, but the images need {(batch, height, width)}. Give 1 for "
            "each pixel of an image and 0 for padding, as the image processor does."
        )
    mask = pixel_mask.bool()
    heights, widths, areas = mask.any(2).sum(1), mask.any(1).sum(1), mask.sum((1, 2))
    rectangle = (areas == heights * widths) & mask[:, 0, 0]
    # One transfer for the batch: on a GPU each one waits for all work before it.
    found = torch.stack((heights, widths, rectangle.long()), dim=1).tolist()
    for index, (_, _, is_rectangle) in enumerate(found):
        if not is_rectangle:
            raise InputError(
                f"`pixel_mask` of image {index} is no rectangle of ones in the upper left corner. Pad images at "
                "the right and at the bottom only."
            )
    return [(rows, columns) for rows, columns, _ in found]


def split_by_size(
    pixel_values: torch.Tensor, sizes: list[Size] | None, keep: bool
) -> list[tuple[torch.Tensor, list[Size] | None]]:
    """Split a batch into parts in which no image is padded beyond its own multiple of 32.

    HLG's dilated windows and global attention span the complete map, so that more padding would change the result.
    With `keep` (training, as in the released code), or where no image has more padding, the batch stays one part.
    """
    largest = [aligned(side) for side in pixel_values.shape[-2:]]
    if keep or sizes is None or all([aligned(height), aligned(width)] == largest for height, width in sizes):
        return [(pixel_values, sizes)]
    return [
        (image[None, :, : aligned(size[0]), : aligned(size[1])], [size])
        for image, size in zip(pixel_values, sizes, strict=True)
    ]


def sizes_of(pixel_values: torch.Tensor, sizes: list[Size] | None) -> list[Size]:
    """Return one (height, width) for each image, also where none is padded."""
    height, width = pixel_values.shape[-2:]
    return [(height, width)] * len(pixel_values) if sizes is None else sizes


def check_labels(labels: Sequence[Mapping[str, torch.Tensor]], batch: int, num_labels: int, masks: bool) -> None:
    """Refuse labels that the model cannot be trained on.

    Raises:
        InputError: with the index of the image, what was given and what to do.
    """
    if len(labels) != batch:
        raise InputError(f"{len(labels)} labels were given for {batch} images. Give one dictionary for each.")
    for index, label in enumerate(labels):
        missing = [name for name in ("class_labels", "boxes", *(("masks",) if masks else ())) if name not in label]
        if missing:
            raise InputError(f"Labels of image {index} lack {', '.join(map(repr, missing))}; found {sorted(label)}.")
        boxes, classes = label["boxes"], label["class_labels"]
        if boxes.shape != (len(classes), 4) or (masks and len(label["masks"]) != len(classes)):
            shapes = {name: tuple(value.shape) for name, value in label.items() if hasattr(value, "shape")}
            raise InputError(
                f"Labels of image {index} do not belong together: {shapes}. N objects need `class_labels` (N,), "
                "`boxes` (N, 4)" + (" and `masks` (N, H, W)." if masks else ".")
            )
    # All boxes of the batch are checked at once: on a GPU each check that Python reads is a synchronization.
    boxes = torch.cat([label["boxes"].detach().float() for label in labels])
    classes = torch.cat([label["class_labels"] for label in labels])
    corners = to_corners(boxes)
    visible = corners.clamp(0, 1)  # the part of the box inside the image must have an extent
    bad_box = ~(boxes.isfinite().all(1) & (visible[:, 2:] - visible[:, :2] > SMALLEST_EXTENT).all(1))
    bad_box |= ((corners < -BORDER) | (corners > 1 + BORDER)).any(1)
    bad_class = (classes < 0) | (classes >= num_labels)
    if not bool((bad_box | bad_class).any()):
        return
    first = int((bad_box | bad_class).nonzero()[0])
    counts = torch.tensor([len(label["boxes"]) for label in labels]).cumsum(0)
    index = int((counts <= first).sum())  # image of the first bad object
    if bad_class[first]:
        raise InputError(
            f"Image {index} has an object of class {int(classes[first])}; the model knows 0 to {num_labels - 1}. "
            "Number the classes without gaps, or set `num_labels`."
        )
    raise InputError(
        f"Image {index} has the box {boxes[first].tolist()}; (center x, center y, width, height) with a positive "
        "extent inside the image are needed, as fractions of its width and height. Clip boxes at the border and drop "
        "empty ones, as the image processor does."
    )


def to_targets(labels: Sequence[Mapping[str, torch.Tensor]], sizes: list[Size], device: torch.device) -> Targets:
    """Convert labels to corners in pixels, float32, on the device of the model."""
    return [
        {
            "boxes": clip_boxes_to_image(to_corners(label["boxes"].to(device).float(), size), size),
            "labels": label["class_labels"].to(device).long(),
            **({"masks": label["masks"].to(device)} if "masks" in label else {}),
        }
        for label, size in zip(labels, sizes, strict=True)
    ]


def pad_masks(targets: Targets, size: Sequence[int]) -> Targets:
    """Pad masks of objects with zeros at the right and bottom to (height, width) of the batch."""
    padded = []
    for target in targets:
        height, width = target["masks"].shape[-2:]
        masks = F.pad(target["masks"], (0, int(size[1]) - width, 0, int(size[0]) - height))
        padded.append({**target, "masks": masks})
    return padded


# --- boxes and matches


class HlgAnchors(nn.Module):
    """Anchors in float32, not rounded, at fixed strides; the first ones of a level are centered at pixel (0, 0).

    torchvision's generator rounds them, and takes image size over map size for the stride, which is not exactly 64 and
    128 on the two coarsest levels. Nothing is stored, so that it works on any device.

    Args:
        strides: pixels between neighboring anchors of each level.
        scales: square roots of the anchors' areas, in strides.
    """

    def __init__(self, strides: Sequence[int], scales: Sequence[float]) -> None:
        super().__init__()
        self.strides, self.scales = tuple(strides), tuple(scales)

    def num_anchors_per_location(self) -> list[int]:
        """Anchors per location of each level."""
        return [len(self.scales) * len(RATIOS)] * len(self.strides)

    def forward(self, images: ImageList, features: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return all anchors `(A, 4)` for each image, in the form that the region proposal network expects."""
        return [torch.cat(self.of_levels(features))] * len(images.image_sizes)

    def of_levels(self, features: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the anchors of each level, `(h * w * ratios * scales, 4)`: row by row; per location by ratio."""
        anchors = []
        for stride, level in zip(self.strides, features, strict=True):
            half = [  # half width and half height
                (stride * scale / ratio**0.5 / 2, stride * scale * ratio**0.5 / 2)
                for ratio in RATIOS
                for scale in self.scales
            ]
            cell = torch.tensor([(-width, -height, width, height) for width, height in half], device=level.device)
            y = torch.arange(level.shape[-2], device=level.device, dtype=torch.float32) * stride
            x = torch.arange(level.shape[-1], device=level.device, dtype=torch.float32) * stride
            y, x = torch.meshgrid(y, x, indexing="ij")
            center = torch.stack((x, y, x, y), dim=-1)  # (h, w, 4)
            anchors.append((center[:, :, None] + cell).reshape(-1, 4))  # (h, w, ratios * scales, 4), flattened
        return anchors

    def inside(self, features: Sequence[torch.Tensor], size: Size | None) -> torch.Tensor:
        """Tell which anchors `(A,)` are centered on an image of (height, width) and its own padding to 32.

        The others lie on the further padding of a batch. None stands for an image as large as the maps.
        """
        flags = []
        for stride, level in zip(self.strides, features, strict=True):
            height, width = level.shape[-2:] if size is None else (-(-aligned(side) // stride) for side in size)
            rows, columns = (torch.arange(side, device=level.device) for side in level.shape[-2:])
            on_image = (rows < height)[:, None] & (columns < width)
            flags.append(on_image[:, :, None].expand(-1, -1, len(self.scales) * len(RATIOS)).flatten())
        return torch.cat(flags)


class HlgBoxCoder(BoxCoder):
    """Boxes as offsets from anchors; sides grow or shrink by at most 62.5 (torchvision bounds growing only)."""

    def decode_single(self, rel_codes: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        centers, sides = rel_codes.unflatten(-1, (-1, 4)).split(2, dim=-1)  # (N, 4 * classes) -> (N, classes, 2) twice
        smallest = sides.new_tensor(self.weights[2:]) * -self.bbox_xform_clip
        return super().decode_single(torch.cat((centers, sides.clamp(min=smallest)), dim=-1).flatten(-2), boxes)


class HlgMatcher(Matcher):
    """Match boxes to objects by IoU, and every object to the boxes that overlap it best (mmdetection's rule).

    Such a low-quality match replaces a better match of the box with another object (torchvision keeps the better one),
    goes to the later object if the box is the best of two, and needs an IoU of at least `smallest`.
    """

    def __init__(self, high_threshold: float, low_threshold: float, smallest: float) -> None:
        super().__init__(high_threshold, low_threshold, allow_low_quality_matches=True)
        self.smallest = smallest

    def __call__(self, match_quality_matrix: torch.Tensor) -> torch.Tensor:
        """Match: `(objects, boxes)` IoU -> `(boxes,)` index of the object, -1 for background, -2 for neither."""
        if len(match_quality_matrix) == 0 or match_quality_matrix.shape[1] == 0:
            boxes = match_quality_matrix.shape[1]
            return torch.full((boxes,), self.BELOW_LOW_THRESHOLD, device=match_quality_matrix.device)
        overlap, found = match_quality_matrix.max(dim=0)
        found[overlap < self.high_threshold] = self.BETWEEN_THRESHOLDS
        found[overlap < self.low_threshold] = self.BELOW_LOW_THRESHOLD
        best = match_quality_matrix.max(dim=1, keepdim=True).values
        is_best = (match_quality_matrix == best) & (best >= self.smallest)
        # The largest index of an object that the box is the best one for, or -1.
        objects = torch.arange(len(match_quality_matrix), device=found.device)[:, None]
        last = torch.where(is_best, objects, -1).max(dim=0).values
        return torch.where(last >= 0, last, found)


def match_anchors(
    matcher: HlgMatcher, objects: torch.Tensor, anchors: torch.Tensor, inside: torch.Tensor
) -> torch.Tensor:
    """Match anchors `(A, 4)` to objects `(N, 4)`; anchors on the padding of a batch are ignored: -2."""
    overlap = box_iou(objects, anchors).masked_fill(~inside, -1)
    return matcher(overlap).masked_fill(~inside, matcher.BETWEEN_THRESHOLDS)


def focal_loss(
    logits: torch.Tensor, judged: torch.Tensor, positive: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Sum of the focal loss (gamma 2, alpha 0.25) over anchors and classes, float32.

    Nearly all targets are background: the loss treats every logit as background, then corrects those of the objects.
    Results are torchvision's at less than half the time and memory, since no target `(A, num_labels)` is built.

    Args:
        logits: `(A, num_labels)`.
        judged: `(A,)` bool, anchors that count: objects and background, not those between the IoU thresholds.
        positive: `(A,)` bool, those of them that are objects.
        labels: `(P,)` classes of the positive anchors.
    """
    logits = logits.float()
    # Background: -(1 - alpha) * p^2 * log(1 - p); object: -alpha * (1 - p)^2 * log(p), with p = sigmoid(logit).
    background = 0.75 * logits.sigmoid().square() * F.softplus(logits)
    found = logits[positive, labels]
    objects = 0.25 * (1 - found.sigmoid()).square() * F.softplus(-found)
    return background.sum(1)[judged].sum() + (objects - background[positive, labels]).sum()


def mean_over_processes(count: torch.Tensor) -> torch.Tensor:
    """Average a count over all processes, so that averaged gradients equal those of one batch of all images."""
    if dist.is_available() and dist.is_initialized():
        count = count.clone()
        dist.all_reduce(count)
        count = count / dist.get_world_size()
    return count


# --- networks


def initialize_as(part: nn.Module, rule: str | float, bias: float = 0.0) -> None:
    """Set how the layers of a part are initialized: `"xavier"`, `"kaiming"` or a standard deviation.

    The rule is stored in each layer, since `_init_weights` sees single modules only.
    """
    for layer in part.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            layer.__dict__.update(initial_weight=rule, initial_bias=bias)


class HlgLastLevels(ExtraFPNBlock):
    """Levels P6 and P7: 3x3 convolutions of stride 2 on the backbone's stage 4 and on P6, without a ReLU between."""

    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__()
        self.p6 = nn.Conv2d(in_channels, width, kernel_size=3, stride=2, padding=1)
        self.p7 = nn.Conv2d(width, width, kernel_size=3, stride=2, padding=1)

    def forward(
        self, results: list[torch.Tensor], x: list[torch.Tensor], names: list[str]
    ) -> tuple[list[torch.Tensor], list[str]]:
        p6 = self.p6(x[-1])
        return [*results, p6, self.p7(p6)], [*names, "p6", "p7"]


class HlgRegionProposals(RegionProposalNetwork):
    """Region proposal network with the released settings; it computes losses whenever there are targets."""

    def __init__(self, width: int) -> None:
        anchors = HlgAnchors(PROPOSAL_STRIDES, PROPOSAL_SCALES)
        super().__init__(
            anchors,
            RPNHead(width, anchors.num_anchors_per_location()[0]),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=256,
            positive_fraction=0.5,
            pre_nms_top_n={"training": 2000, "testing": 1000},
            post_nms_top_n={"training": 1000, "testing": 1000},
            nms_thresh=0.7,
        )
        self.box_coder = HlgBoxCoder(weights=(1.0, 1.0, 1.0, 1.0))
        self.proposal_matcher = HlgMatcher(0.7, 0.3, smallest=0.3)
        initialize_as(self.head, 0.01)
        self.min_size = torch.finfo(torch.float32).tiny  # drops only boxes without extent

    def forward(
        self, images: ImageList, features: dict[str, torch.Tensor], targets: Targets | None = None
    ) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
        """Propose regions `(<= 1000, 4)` for each image; with targets also return the two losses."""
        levels = list(features.values())
        objectness, offsets = self.head(levels)  # per level (B, 3, h, w) and (B, 12, h, w)
        per_level = [level[0].numel() for level in objectness]
        scores, codes = concat_box_prediction_layers(objectness, offsets)  # (B * A, 1) and (B * A, 4), by image
        scores, codes = scores.float(), codes.float()
        anchors = self.anchor_generator(images, levels)
        proposals = self.box_coder.decode(codes.detach(), anchors).view(len(anchors), -1, 4)
        if proposals.is_meta:  # FLOPs are counted without values: assume the largest number of proposals
            boxes = [proposals[index, : min(1000, proposals.shape[1])] for index in range(len(anchors))]
        else:
            boxes, _ = self.filter_proposals(proposals, scores, images.image_sizes, per_level)
        if targets is None:
            return boxes, {}
        inside = [self.anchor_generator.inside(levels, size) for size in images.image_sizes]
        return boxes, self._losses(scores.flatten(), codes, anchors, inside, targets)

    def _losses(
        self,
        scores: torch.Tensor,
        codes: torch.Tensor,
        anchors: list[torch.Tensor],
        inside: list[torch.Tensor],
        targets: Targets,
    ) -> dict[str, torch.Tensor]:
        kinds, wanted = [], []
        for boxes, on_image, target in zip(anchors, inside, targets, strict=True):
            matched = match_anchors(self.proposal_matcher, target["boxes"], boxes, on_image)
            # The sampler reads 1 as object, 0 as background, -1 as neither.
            kinds.append(torch.where(matched >= 0, 1, torch.where(matched == -1, 0, -1)))
            objects = target["boxes"] if len(target["boxes"]) else boxes[:1]  # any box: it is never read
            wanted.append(self.box_coder.encode_single(objects[matched.clamp(min=0)], boxes))
        positive, negative = (torch.cat(each).bool() for each in self.fg_bg_sampler(kinds))
        sampled = positive | negative
        count = sampled.sum().clamp(min=1)
        is_object = positive[sampled].float()
        classification = F.binary_cross_entropy_with_logits(scores[sampled], is_object, reduction="sum")
        return {
            "rpn_classification": classification / count,
            "rpn_boxes": F.l1_loss(codes[positive], torch.cat(wanted)[positive], reduction="sum") / count,
        }


class HlgRoiAlign(nn.Module):
    """Aligned RoIAlign with adaptive sampling, from the pyramid level that fits a region's size (Eq. 1 of FPN)."""

    def __init__(self, output_size: int) -> None:
        super().__init__()
        self.output_size = output_size

    def forward(self, maps: Sequence[torch.Tensor], boxes: list[torch.Tensor]) -> torch.Tensor:
        """Pool maps at 1/4 to 1/32 in the boxes `(N_i, 4)` of each image: `(sum of N_i, C, size, size)`."""
        owner = torch.cat([torch.full_like(each[:, :1], index) for index, each in enumerate(boxes)])
        regions = torch.cat((owner, torch.cat(boxes)), dim=1)  # (image, left, top, right, bottom)
        areas = (regions[:, 3] - regions[:, 1]) * (regions[:, 4] - regions[:, 2])
        levels = torch.floor(torch.log2(areas.sqrt() / FINEST_SCALE + 1e-6)).clamp(0, len(ROI_STRIDES) - 1)
        size = (len(regions), maps[0].shape[1], self.output_size, self.output_size)
        pooled = torch.zeros(size, device=maps[0].device)
        if pooled.is_meta:  # FLOPs are counted without values: levels do not matter
            return pooled.to(maps[0].dtype)
        for level, stride in enumerate(ROI_STRIDES):
            chosen = (levels == level).nonzero().squeeze(1)
            # Also where no region is chosen, so that every map gets a gradient. Float32: the CPU has no bfloat16.
            cut = roi_align(maps[level].float(), regions[chosen], self.output_size, 1 / stride, aligned=True)
            pooled = pooled.index_copy(0, chosen, cut.float())
        return pooled.to(maps[0].dtype)


class HlgBoxPredictor(nn.Module):
    """Class logits with background last, and one box per class other than background."""

    def __init__(self, in_channels: int, num_labels: int) -> None:
        super().__init__()
        self.cls_score = nn.Linear(in_channels, num_labels + 1)
        self.bbox_pred = nn.Linear(in_channels, num_labels * 4)

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.cls_score(features), self.bbox_pred(features)


class HlgRoiHeads(nn.Module):
    """Second stage of Mask R-CNN: class, box and mask of each proposal."""

    def __init__(self, config: HlgConfig) -> None:
        super().__init__()
        self.num_labels = num_labels = int(config.num_labels or 0)
        width, (box_width, mask_width) = config.pyramid_hidden_size, config.region_hidden_sizes
        self.box_pool, self.mask_pool = HlgRoiAlign(7), HlgRoiAlign(14)
        self.box_head = TwoMLPHead(width * 7 * 7, box_width)
        self.box_predictor = HlgBoxPredictor(box_width, num_labels)
        self.mask_head = MaskRCNNHeads(width, (mask_width,) * 4, dilation=1)
        self.mask_predictor = MaskRCNNPredictor(mask_width, mask_width, num_labels)
        initialize_as(self.box_head, "xavier")
        initialize_as(self.box_predictor.cls_score, 0.01)
        initialize_as(self.box_predictor.bbox_pred, 0.001)
        initialize_as(self.mask_head, "kaiming")
        initialize_as(self.mask_predictor, "kaiming")
        self.box_coder = HlgBoxCoder(weights=BOX_WEIGHTS)
        self.matcher = HlgMatcher(0.5, 0.5, smallest=0.5)
        self.sampler = BalancedPositiveNegativeSampler(512, 0.25)

    def classify(self, maps: Sequence[torch.Tensor], regions: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return class logits `(N, num_labels + 1)` and box offsets `(N, num_labels * 4)` of all regions, float32."""
        logits, codes = self.box_predictor(self.box_head(self.box_pool(maps, regions)))
        return logits.float(), codes.float()

    def masks(self, maps: Sequence[torch.Tensor], regions: list[torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
        """Return the mask logits `(N, 28, 28)` of all regions for their classes, float32."""
        logits = self.mask_predictor(self.mask_head(self.mask_pool(maps, regions)))
        return logits[torch.arange(len(labels), device=labels.device), labels].float()

    def losses(
        self, maps: Sequence[torch.Tensor], proposals: list[torch.Tensor], targets: Targets
    ) -> dict[str, torch.Tensor]:
        """Sample 512 regions of each image and return the losses of classes, boxes and masks."""
        samples = [self._sample(*each) for each in zip(proposals, targets, strict=True)]
        logits, codes = self.classify(maps, [regions for regions, _ in samples])
        regions, matched = (torch.cat(each) for each in zip(*samples, strict=True))
        labels, wanted = [], []
        for (_, found), target in zip(samples, targets, strict=True):
            background = target["labels"].new_tensor([self.num_labels])
            nothing = target["boxes"].new_zeros(1, 4)
            labels.append(torch.cat((target["labels"], background))[found])  # index -1 reads the background class
            wanted.append(torch.cat((target["boxes"], nothing))[found])
        classes, positive = torch.cat(labels), matched >= 0
        count = max(len(classes), 1)
        codes = codes.unflatten(1, (-1, 4))[positive, classes[positive]]  # (positives, 4), of the true class
        offsets = self.box_coder.encode_single(torch.cat(wanted)[positive], regions[positive])
        objects = [(regions[found >= 0], found[found >= 0]) for regions, found in samples]
        return {
            "classification": F.cross_entropy(logits, classes, reduction="sum") / count,
            "boxes": F.l1_loss(codes, offsets, reduction="sum") / count,
            "masks": self._mask_loss(maps, objects, classes[positive], targets),
        }

    def _sample(self, proposals: torch.Tensor, target: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Sample among proposals and true boxes; return regions and the index of their object (-1: background)."""
        matched = self.matcher(box_iou(target["boxes"], proposals))
        own = torch.arange(len(target["boxes"]), device=matched.device)
        matched, regions = torch.cat((own, matched)), torch.cat((target["boxes"], proposals.detach()))
        positive, negative = (each[0].bool() for each in self.sampler([(matched >= 0).long()]))
        chosen = positive | negative
        return regions[chosen], matched[chosen]

    def _mask_loss(
        self,
        maps: Sequence[torch.Tensor],
        objects: list[tuple[torch.Tensor, torch.Tensor]],
        labels: torch.Tensor,
        targets: Targets,
    ) -> torch.Tensor:
        logits = self.masks(maps, [regions for regions, _ in objects], labels)
        wanted = []
        for (regions, found), target in zip(objects, targets, strict=True):
            # RoIAlign on the objects' masks, one "image" per object; `found` names the one that a region reads.
            rois = torch.cat((found[:, None].to(regions), regions), dim=1)
            masks = target["masks"][:, None].float()
            if len(masks):
                cut = roi_align(masks, rois, logits.shape[-1], 1.0, aligned=True)
                wanted.append((cut[:, 0] >= 0.5).float())
        target_masks = torch.cat(wanted) if wanted else torch.zeros_like(logits)
        return F.binary_cross_entropy_with_logits(logits, target_masks, reduction="sum") / max(logits.numel(), 1)

    def detect(
        self, maps: Sequence[torch.Tensor], proposals: list[torch.Tensor], sizes: list[Size]
    ) -> tuple[torch.Tensor, ...]:
        """Return scores `(B, 100)`, labels, normalized boxes and mask logits, padded with 0, -1, 0 and 0."""
        logits, codes = self.classify(maps, proposals)
        boxes = self.box_coder.decode(codes, proposals)  # (N, num_labels, 4)
        counts = [len(each) for each in proposals]
        found = [
            self._choose(*each)
            for each in zip(logits.softmax(1)[:, :-1].split(counts), boxes.split(counts), sizes, strict=True)
        ]
        labels = torch.cat([each[1] for each in found])
        masks = self.masks(maps, [each[2] for each in found], labels).split([len(each[1]) for each in found])
        padded = []
        for (score, label, corners), mask, size in zip(found, masks, sizes, strict=True):
            rest = MAX_DETECTIONS - len(score)
            box = F.pad(to_normalized(corners, size), (0, 0, 0, rest))
            mask = F.pad(mask, (0, 0, 0, 0, 0, rest))
            padded.append((F.pad(score, (0, rest)), F.pad(label, (0, rest), value=-1), box, mask))
        return tuple(torch.stack(each) for each in zip(*padded, strict=True))

    def _choose(
        self, scores: torch.Tensor, boxes: torch.Tensor, size: Size
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if scores.is_meta:  # FLOPs are counted without values: assume the largest number of detections
            flat = scores.flatten()[:MAX_DETECTIONS]
            return flat, torch.zeros_like(flat, dtype=torch.long), boxes.flatten(0, 1)[:MAX_DETECTIONS]
        boxes = clip_boxes_to_image(boxes, size)
        region, label = (scores > SCORE_THRESHOLD).nonzero().unbind(1)
        score, corners = scores[region, label], boxes[region, label]
        kept = suppress(corners, score, label)
        return score[kept], label[kept], corners[kept]


# --- task classes


@dataclass
class HlgAnchorResults:
    """RetinaNet's results for images of one size: logits `(b, A, K)`, box offsets `codes` and boxes `(b, A, 4)`.

    `anchors` and `levels`, the maps they lie on, are lists over pyramid levels; `sizes` are the images' own sizes
    (None without padding).
    """

    logits: torch.Tensor
    codes: torch.Tensor
    boxes: torch.Tensor
    anchors: list[torch.Tensor]
    levels: list[torch.Tensor]
    sizes: list[Size] | None
    backbone: HlgModelOutput


@dataclass
class HlgRegionResults:
    """Mask R-CNN's results for images of one size: losses if there are targets, detections in eval mode."""

    losses: dict[str, torch.Tensor]
    detections: tuple[torch.Tensor, ...]
    backbone: HlgModelOutput


class HlgDetectorPreTrainedModel(HlgPreTrainedModel):
    """Common to both detectors: initialization as in mmdetection, and checked labels."""

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialize a layer by the rule that `initialize_as` set, or as the backbone's layers."""
        rule = getattr(module, "initial_weight", None)
        if not isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear) or rule is None:
            super()._init_weights(module)
            return
        if rule == "xavier":
            init.xavier_uniform_(module.weight)
        elif rule == "kaiming":
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        else:
            init.normal_(module.weight, std=rule)
        if module.bias is not None:
            init.constant_(module.bias, getattr(module, "initial_bias", 0.0))

    def _targets(
        self,
        labels: Sequence[Mapping[str, torch.Tensor]] | None,
        pixel_values: torch.Tensor,
        sizes: list[Size] | None,
        masks: bool,
    ) -> Targets | None:
        if labels is None:
            return None
        if not torch.compiler.is_compiling():
            check_labels(labels, len(pixel_values), int(self.config.num_labels or 0), masks)
        return to_targets(labels, sizes_of(pixel_values, sizes), pixel_values.device)


def join(parts: list[torch.Tensor], value: float) -> torch.Tensor:
    """Concatenate `(b, A, C)` tensors of different A along the batch, padding with `value`."""
    if len(parts) == 1:
        return parts[0]
    most = max(each.shape[1] for each in parts)
    return torch.cat([F.pad(each, (0, 0, 0, most - each.shape[1]), value=value) for each in parts])


class HlgForObjectDetection(HlgDetectorPreTrainedModel):
    """RetinaNet on HLG (Table 10)."""

    def __init__(self, config: HlgConfig) -> None:
        super().__init__(config)
        self.hlg = HlgModel(config)
        channels, width = list(config.hidden_sizes[1:]), config.pyramid_hidden_size
        self.feature_pyramid = FeaturePyramidNetwork(channels, width, HlgLastLevels(channels[-1], width))
        self.anchors = HlgAnchors(RETINANET_STRIDES, RETINANET_SCALES)
        per_location = self.anchors.num_anchors_per_location()[0]
        self.detection_head = RetinaNetHead(width, per_location, int(config.num_labels or 0))
        initialize_as(self.feature_pyramid, "xavier")  # Sec. 4.2
        initialize_as(self.detection_head, 0.01)
        # Every class starts with probability 0.01, else the loss of background would dominate the first steps.
        initialize_as(self.detection_head.classification_head.cls_logits, 0.01, bias=-math.log(99))
        self.box_coder = HlgBoxCoder(weights=(1.0, 1.0, 1.0, 1.0))
        self.matcher = HlgMatcher(0.5, 0.4, smallest=0.0)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        pixel_mask: torch.Tensor | None = None,
        labels: Sequence[Mapping[str, torch.Tensor]] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> HlgObjectDetectionOutput:
        """Score the classes and refine the boxes of all anchors.

        Args:
            pixel_values: `(B, 3, H, W)`, normalized; any size.
            pixel_mask: `(B, H, W)`, 1 for the image and 0 for padding at its right and bottom; None without padding.
                In eval mode images that were padded differently are processed one by one, so that padding does not
                change results.
            labels: for each image `class_labels` `(N,)` and `boxes` `(N, 4)`, normalized (center x, center y, width,
                height) of the image without its padding. N may be 0.

        Returns:
            Logits and boxes of all anchors, which the image processor turns into detections. With labels also `loss`.

        Raises:
            InputError: impossible boxes or classes, or a mask that is no rectangle.
        """
        sizes = image_sizes(pixel_values, pixel_mask)
        targets = self._targets(labels, pixel_values, sizes, masks=False)
        parts = split_by_size(pixel_values, sizes, keep=self.training)
        results = [self._run_part(part, own, **kwargs) for part, own in parts]
        losses = None if targets is None else self._losses(results, targets)
        counts = [  # tensors, since Python numbers would become constants of an exported program
            torch.stack([torch.full((), each.shape[0]) for each in part.anchors]).expand(part.logits.shape[0], -1)
            for part in results
        ]
        backbone = results[0].backbone if len(results) == 1 else HlgModelOutput()
        return HlgObjectDetectionOutput(
            loss=None if losses is None else torch.stack(list(losses.values())).sum(),
            loss_dict=losses,
            logits=join([part.logits for part in results], torch.finfo(results[0].logits.dtype).min),
            pred_boxes=join([part.boxes for part in results], 0),
            anchors_per_level=torch.cat(counts).to(pixel_values.device),
            hidden_states=backbone.hidden_states,
            attentions=backbone.attentions,
        )

    def _run_part(
        self, pixel_values: torch.Tensor, sizes: list[Size] | None, **kwargs: Unpack[TransformersKwargs]
    ) -> HlgAnchorResults:
        """Run the network on images of one size."""
        backbone = self.hlg(pixel_values, output_feature_maps=True, return_dict=True, **kwargs)
        pyramid = self.feature_pyramid(OrderedDict(enumerate(backbone.feature_maps[1:])))  # stages 2 to 4
        levels = list(pyramid.values())  # P3 to P7
        outputs = self.detection_head(levels)
        anchors, codes = self.anchors.of_levels(levels), outputs["bbox_regression"].float()
        corners = self.box_coder.decode_single(codes.flatten(0, 1), torch.cat(anchors).repeat(codes.shape[0], 1))
        corners = corners.view(codes.shape)
        if sizes is None:
            boxes = to_normalized(corners, pixel_values.shape[-2:])
        else:
            boxes = torch.stack([to_normalized(each, size) for each, size in zip(corners, sizes, strict=True)])
        return HlgAnchorResults(
            logits=outputs["cls_logits"],
            codes=codes,
            boxes=boxes,
            anchors=anchors,
            levels=levels,
            sizes=sizes,
            backbone=backbone,
        )

    def _losses(self, results: list[HlgAnchorResults], targets: Targets) -> dict[str, torch.Tensor]:
        """Focal loss and L1 loss over all images, divided by the positive anchors of all images of all processes.

        An image without objects counts as one positive, as in mmdetection.
        """
        classification, boxes, positives = [], [], []
        rest = iter(targets)
        for part in results:
            anchors = torch.cat(part.anchors)
            for index, (logits, codes, target) in enumerate(zip(part.logits, part.codes, rest, strict=False)):
                inside = self.anchors.inside(part.levels, None if part.sizes is None else part.sizes[index])
                matched = match_anchors(self.matcher, target["boxes"], anchors, inside)
                positive, judged = matched >= 0, matched != self.matcher.BETWEEN_THRESHOLDS
                objects = matched[positive]
                classification.append(focal_loss(logits, judged, positive, target["labels"][objects]))
                offsets = self.box_coder.encode_single(target["boxes"][objects], anchors[positive])
                boxes.append(F.l1_loss(codes[positive], offsets, reduction="sum"))
                positives.append(positive.sum().clamp(min=1))
        count = torch.stack(positives).sum()
        if self.training:  # not in evaluation, where processes may have different numbers of batches
            count = mean_over_processes(count)
        return {
            "classification": torch.stack(classification).sum() / count,
            "boxes": torch.stack(boxes).sum() / count,
        }


class HlgForInstanceSegmentation(HlgDetectorPreTrainedModel):
    """Mask R-CNN on HLG (Table 11)."""

    def __init__(self, config: HlgConfig) -> None:
        super().__init__(config)
        self.hlg = HlgModel(config)
        width = config.pyramid_hidden_size
        self.feature_pyramid = FeaturePyramidNetwork(list(config.hidden_sizes), width, LastLevelMaxPool())
        initialize_as(self.feature_pyramid, "xavier")  # Sec. 4.2
        self.rpn = HlgRegionProposals(width)
        self.roi_heads = HlgRoiHeads(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        pixel_mask: torch.Tensor | None = None,
        labels: Sequence[Mapping[str, torch.Tensor]] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> HlgInstanceSegmentationOutput:
        """Find objects and their masks.

        Args:
            pixel_values: `(B, 3, H, W)`, normalized; any size.
            pixel_mask: `(B, H, W)`, 1 for the image and 0 for padding at its right and bottom; None without padding.
                In eval mode images that were padded differently are processed one by one, so that padding does not
                change results.
            labels: for each image `class_labels` `(N,)`, `boxes` `(N, 4)`, normalized (center x, center y, width,
                height) of the image without its padding, and `masks` `(N, h, w)`, bool or 0 and 1, as large as the
                image with or without padding. N may be 0.

        Returns:
            In training mode, or with labels, `loss`; in eval mode at most 100 detections of each image.

        Raises:
            InputError: impossible boxes or classes, a mask that is no rectangle, or training without labels.
        """
        sizes = image_sizes(pixel_values, pixel_mask)
        if self.training and labels is None:
            raise InputError("Mask R-CNN was called in training mode without `labels`. Give them, or call `.eval()`.")
        targets = self._targets(labels, pixel_values, sizes, masks=True)
        parts = split_by_size(pixel_values, sizes, keep=self.training)
        results, start = [], 0
        for part, own in parts:
            part_targets = None if targets is None else pad_masks(targets[start : start + len(part)], part.shape[-2:])
            results.append(self._run_part(part, sizes_of(part, own), part_targets, **kwargs))
            start += len(part)
        losses = None
        if targets is not None:
            # Each part's losses are means over its samples; weighted by its fraction of the images.
            weights = [len(part) / len(pixel_values) for part, _ in parts]
            weighted = list(zip(results, weights, strict=True))
            losses = {
                name: torch.stack([part.losses[name] * weight for part, weight in weighted]).sum()
                for name in results[0].losses
            }
        names = ("pred_scores", "pred_labels", "pred_boxes", "pred_masks")
        found = zip(*(part.detections for part in results), strict=True)
        backbone = results[0].backbone if len(results) == 1 else HlgModelOutput()
        return HlgInstanceSegmentationOutput(
            loss=None if losses is None else torch.stack(list(losses.values())).sum(),
            loss_dict=losses,
            **({} if self.training else {name: torch.cat(each) for name, each in zip(names, found, strict=True)}),
            hidden_states=backbone.hidden_states,
            attentions=backbone.attentions,
        )

    def _run_part(
        self,
        pixel_values: torch.Tensor,
        sizes: list[Size],
        targets: Targets | None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> HlgRegionResults:
        """Run both stages on images of one size."""
        backbone = self.hlg(pixel_values, output_feature_maps=True, return_dict=True, **kwargs)
        pyramid = self.feature_pyramid(OrderedDict(enumerate(backbone.feature_maps)))  # P2 to P6
        maps = list(pyramid.values())[: len(ROI_STRIDES)]  # P6 serves the proposals only
        proposals, losses = self.rpn(ImageList(pixel_values, sizes), pyramid, targets)
        if targets is not None:
            losses |= self.roi_heads.losses(maps, proposals, targets)
        detections = () if self.training else self.roi_heads.detect(maps, proposals, sizes)
        return HlgRegionResults(losses=losses, detections=detections, backbone=backbone)


__all__ = ["HlgForInstanceSegmentation", "HlgForObjectDetection"]
