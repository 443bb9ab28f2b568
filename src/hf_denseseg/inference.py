"""From a picture to a label map: whole image or sliding window, several scales, flip, at bounded memory.

The evaluation, `denseseg predict` and the pipeline all call these functions. The protocol is the one of mmsegmentation
and SETR: logits of overlapping windows are averaged by visit count, probabilities are averaged over scales and flips.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision.transforms.v2.functional import resize
from transformers import ImageSegmentationPipeline
from transformers.utils import ModelOutput

from hf_denseseg.inference_settings import InferenceSettings
from hf_denseseg.sliding_windows import Size, align_corners_of, padded_size, size_of, slide_logits, upsample

Channels = Sequence[float] | torch.Tensor
SMALL_MAP = 2**22  # elements of full-size logits (16 MiB) that are not worth cutting


class Preprocessing(NamedTuple):
    """What a checkpoint's image processor does to a picture, in the terms of this module."""

    mean: tuple[float, ...]  # of channels scaled to 0..1
    std: tuple[float, ...]
    base_size: Size | None  # (short, long) limit of a resize that keeps the ratio; None = no resize

    @classmethod
    def from_image_processor(cls, image_processor: Any) -> "Preprocessing":
        """Read mean, deviation and size; of a fixed `height` and `width` the smaller becomes the short side."""
        # `pixel * factor` equals `pixel / 255 * gain`; the gain is folded into mean and deviation.
        gain = 255 * image_processor.rescale_factor if image_processor.do_rescale else 255.0
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        if image_processor.do_normalize:
            mean, std = tuple(image_processor.image_mean), tuple(image_processor.image_std)
        base_size = None
        if image_processor.do_resize:
            size = dict(image_processor.size)
            short = size.get("shortest_edge") or min(size["height"], size["width"])
            base_size = (short, size.get("longest_edge") or 4 * short)
        return cls(tuple(value / gain for value in mean), tuple(value / gain for value in std), base_size)


@torch.no_grad()
def predict_logits(model: nn.Module, pixel_values: torch.Tensor, settings: InferenceSettings) -> torch.Tensor:
    """Logits of a normalised batch: the model's own resolution for the whole image, `(H, W)` for sliding windows.

    A window that covers the image is the whole image, bit for bit, unless the image is padded to it.
    """
    if settings.mode == "slide":
        crop_size, _ = settings.window()
        height, width = size_of(pixel_values)
        canvas = padded_size((height, width), settings)
        if canvas != (height, width):
            padded = F.pad(pixel_values, (0, canvas[1] - width, 0, canvas[0] - height))
            return slide_logits(model, padded, settings)[..., :height, :width]
        if pixel_values.shape[-2] > crop_size[0] or pixel_values.shape[-1] > crop_size[1]:
            return slide_logits(model, pixel_values, settings)
    return model(pixel_values=pixel_values).logits


def segment(
    model: nn.Module,
    image: torch.Tensor,
    settings: InferenceSettings,
    mean: Channels,
    std: Channels,
    size: Size | None = None,
) -> torch.Tensor:
    """Label every pixel of one picture.

    Args:
        model: segmentation model in eval mode.
        image: `(3, H, W)` uint8, any device.
        settings: how to look at the picture.
        mean: channel means of pictures scaled to 0..1.
        std: channel deviations of the same.
        size: `(height, width)` of the result; None is the picture's own size.

    Returns:
        `(height, width)` int64 class ids.
    """
    if settings.views > 1:
        return class_probabilities(model, image, settings, mean, std, size).argmax(0)
    logits = _single_view(model, image, settings, mean, std)
    (height, width), canvas = _result_sizes(image, size, settings)
    return resize_argmax(logits, canvas, align_corners_of(model), settings.chunk_classes)[0, :height, :width]


def segment_with_confidence(
    model: nn.Module,
    image: torch.Tensor,
    settings: InferenceSettings,
    mean: Channels,
    std: Channels,
    size: Size | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Class ids as `segment` gives them, and the probability of each pixel's class, float32 of the same size."""
    if settings.views > 1:
        confidence, ids = class_probabilities(model, image, settings, mean, std, size).max(0)
        return ids, confidence
    logits = _single_view(model, image, settings, mean, std)
    (height, width), canvas = _result_sizes(image, size, settings)
    ids, confidence = resize_confidence(logits, canvas, align_corners_of(model), settings.chunk_classes)
    return ids[0, :height, :width], confidence[0, :height, :width]


@torch.no_grad()
def class_probabilities(
    model: nn.Module,
    image: torch.Tensor,
    settings: InferenceSettings,
    mean: Channels,
    std: Channels,
    size: Size | None = None,
) -> torch.Tensor:
    """Probabilities `(num_labels, height, width)` of one picture, averaged over all scales and flips.

    Each view's logits are resized to `size` first. With `average="logits"` these are averaged and the softmax comes
    last.
    """
    (height, width), canvas = _result_sizes(image, size, settings)
    total = None
    for pixel_values, flipped in _views(model, image, settings, mean, std):
        logits = predict_logits(model, pixel_values, settings)
        if flipped:
            logits = logits.flip(-1)
        if settings.accumulation_device:
            logits = logits.to(settings.accumulation_device)
        logits = upsample(logits, canvas, align_corners_of(model))[..., :height, :width]
        part = logits.softmax(1) if settings.average == "probabilities" else logits
        total = part if total is None else total.add_(part)
    assert total is not None  # the settings hold at least one scale
    total = total.div_(settings.views)[0]
    return total if settings.average == "probabilities" else total.softmax(0)


def resize_argmax(
    logits: torch.Tensor, size: Size, align_corners: bool = False, chunk_classes: int = 8
) -> torch.Tensor:
    """Resize logits bilinearly and take the argmax, a few classes at a time.

    Equal to `F.interpolate(logits, size, mode="bilinear").argmax(1)` for finite logits, ties included (first class
    wins), but holds `chunk_classes` instead of all classes at full resolution.

    Args:
        logits: `(B, num_labels, h, w)`, any floating dtype; compared in float32.
        size: `(height, width)` of the result.
        align_corners: see `torch.nn.functional.interpolate`.
        chunk_classes: classes held at once; at least 4 are.

    Returns:
        `(B, height, width)` int64.
    """
    ids, _, _ = _winners(logits, size, align_corners, chunk_classes)
    return ids


def resize_confidence(
    logits: torch.Tensor, size: Size, align_corners: bool = False, chunk_classes: int = 8
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `resize_argmax`, with the softmax probability `(B, height, width)` of the class that won."""
    ids, best, log_sum = _winners(logits, size, align_corners, chunk_classes, with_sum=True)
    return ids, (best - log_sum).exp_()


def view_size(size: Size, scale: float, settings: InferenceSettings) -> Size:
    """Size of one scale: the ratio is kept inside `scale * base_size` (its short and long limit, in any order).

    Without a base size the picture's own size is multiplied. With `raise_short_side` a short side below the window's
    is raised to it, the ratio still kept; if there are several scales, the long limit does not count (SETR). With
    `keep_odd` each side of what scale 1 gives is scaled by itself, its even part only, so that 513 becomes 257 (HFGD).
    """
    if settings.keep_odd and scale != 1:
        height, width = view_size(size, 1.0, settings)
        return _scale_even_part(height, scale), _scale_even_part(width, scale)
    factor = scale
    if settings.base_size:
        short, long = sorted(int(limit * scale) for limit in settings.base_size)
        factor = short / min(size)
        if not settings.raise_short_side or len(settings.scales) == 1:
            factor = min(factor, long / max(size))
    if settings.raise_short_side:
        factor = max(factor, min(settings.window()[0]) / min(size))
    height, width = (max(int(length * factor + 0.5), 1) for length in size)
    return height, width


def _scale_even_part(length: int, scale: float) -> int:
    odd = length % 2
    return max(int(scale * (length - odd)) + odd, 1)


def _views(
    model: nn.Module, image: torch.Tensor, settings: InferenceSettings, mean: Channels, std: Channels
) -> Iterator[tuple[torch.Tensor, bool]]:
    """Normalised `(1, 3, h, w)` on the model's device for each scale and flip, and whether it is flipped."""
    weight = next(model.parameters(), torch.empty(0))
    image = image.to(weight.device)
    if settings.mode == "whole":
        image = pad_with_mean(image, padded_size(size_of(image), settings), mean)
    shift, spread = (torch.as_tensor(each, device=weight.device).view(3, 1, 1) for each in (mean, std))
    for scale in settings.scales:
        size = view_size(size_of(image), scale, settings)
        # Antialiased like the image processors, and on bytes, so that a resized picture is the processor's.
        view = image if size == size_of(image) else resize(image, list(size), antialias=True)
        pixel_values = ((view / 255 - shift) / spread).to(weight.dtype)[None]
        yield pixel_values, False
        if settings.flip:
            yield pixel_values.flip(-1), True


def pad_with_mean(image: torch.Tensor, size: Size, mean: Channels) -> torch.Tensor:
    """Bytes `(3, H, W)`, padded to `size` with the mean colour in whole bytes, as training crops are."""
    height, width = size_of(image)
    if (height, width) == size:
        return image
    color = (torch.as_tensor(mean) * 255).round().clamp(0, 255).to(image)
    padded = color.view(3, 1, 1).repeat(1, *size)
    padded[:, :height, :width] = image
    return padded


def _result_sizes(image: torch.Tensor, size: Size | None, settings: InferenceSettings) -> tuple[Size, Size]:
    """Size of the result, and of the larger map it is cut from when the picture as a whole was padded."""
    own = size_of(image)
    wanted = size or own
    canvas = padded_size(own, settings) if settings.mode == "whole" else own
    height, width = (round(w * c / o) for w, c, o in zip(wanted, canvas, own, strict=True))
    return wanted, (height, width)


@torch.no_grad()
def _single_view(
    model: nn.Module, image: torch.Tensor, settings: InferenceSettings, mean: Channels, std: Channels
) -> torch.Tensor:
    pixel_values, _ = next(_views(model, image, settings, mean, std))
    return predict_logits(model, pixel_values, settings)


@torch.no_grad()
def _winners(
    logits: torch.Tensor, size: Size, align_corners: bool, chunk_classes: int, with_sum: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Best class, its logit and (if wanted) the log of the summed exponentials, each `(B, height, width)`."""
    best = torch.full((len(logits), *size), -torch.inf, device=logits.device)
    log_sum = best.clone() if with_sum else best
    ids = torch.zeros(best.shape, dtype=torch.int16, device=logits.device)
    for start, values in _resized_chunks(logits, size, align_corners, chunk_classes):
        if with_sum:
            torch.logaddexp(log_sum, values.logsumexp(1), out=log_sum)
        for number, value in enumerate(values.unbind(1), start):
            ids.masked_fill_(value > best, number)
            torch.maximum(best, value, out=best)
        del values, value  # before the next chunk is made
    return ids.long(), best, log_sum


def _resized_chunks(
    logits: torch.Tensor, size: Size, align_corners: bool, chunk_classes: int
) -> Iterator[tuple[int, torch.Tensor]]:
    """First class and full-size logits of each chunk.

    On the CPU the last bit of an interpolated value depends on the memory format and, for small maps, on the number
    of channels. So the logits are made contiguous, small maps are done at once, and all chunks have the same size:
    the last one begins earlier, and what it repeats is cut off.
    """
    logits = logits.contiguous()
    classes, (height, width) = logits.shape[1], size
    # Three channels are interpolated by another routine.
    chunk = min(max(chunk_classes, 4), classes)
    if len(logits) * classes * height * width <= SMALL_MAP or logits.shape[-2:].numel() == 1:
        chunk = classes
    for start in range(0, classes, chunk):
        first = min(start, classes - chunk)
        yield start, upsample(logits[:, first : first + chunk], size, align_corners)[:, start - first :]


class SlidingWindowSegmentationPipeline(ImageSegmentationPipeline):
    """`pipeline("image-segmentation")` with sliding windows, pictures of mixed sizes, and a score for each mask.

    Used as `pipeline("image-segmentation", model=..., pipeline_class=SlidingWindowSegmentationPipeline,
    crop_size=(512, 512), stride=(341, 341))`; without `crop_size` the whole image is seen at once. `score` is the mean
    probability of the class over its mask. `batch_size` counts windows of one picture, not pictures.
    """

    def _sanitize_parameters(self, **kwargs: Any) -> tuple[dict, dict, dict]:
        preprocess, forward, postprocess = super()._sanitize_parameters(**kwargs)
        names = ("crop_size", "stride", "window_batch_size")
        window: dict[str, Any] = {name: kwargs[name] for name in names if name in kwargs}
        if window:
            forward["settings"] = InferenceSettings(mode="slide", **window)
        return preprocess, forward, postprocess

    def get_iterator(self, inputs: Any, num_workers: int, batch_size: int, *args: Any) -> Any:
        """Feed the pictures one by one: they differ in size, and the windows are batched already."""
        return super().get_iterator(inputs, num_workers, 1, *args)

    def _forward(  # type: ignore[override]
        self, model_inputs: dict[str, Any], settings: InferenceSettings | None = None
    ) -> ModelOutput:
        logits = predict_logits(self.model, model_inputs["pixel_values"], settings or InferenceSettings())
        return ModelOutput(logits=logits, target_size=model_inputs["target_size"])

    def postprocess(  # type: ignore[override]
        self, model_outputs: ModelOutput, subtask: str | None = None, **unused: Any
    ) -> list[dict[str, Any]]:
        """One `{"score", "label", "mask"}` per class present, as the plain pipeline gives them."""
        if subtask not in {"semantic", None}:
            raise ValueError(f"Subtask {subtask} is not supported for {type(self.model).__name__}. Use 'semantic'.")
        height, width = (int(length) for length in model_outputs["target_size"][0])
        ids, confidence = resize_confidence(model_outputs["logits"], (height, width), align_corners_of(self.model))
        names = self.model.config.id2label or {}
        annotation = []
        for label in ids.unique().tolist():
            mask = ids[0] == label
            annotation.append(
                {
                    "score": float(confidence[0][mask].mean()),
                    "label": names[label],
                    "mask": Image.fromarray(mask.cpu().numpy().astype(np.uint8) * 255),
                }
            )
        return annotation
