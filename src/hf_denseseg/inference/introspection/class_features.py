"""What a segmenter classifies pixels by: its class tokens, and the features of pixels it compares with them.

The HFGD paper shows both (Figures 4 and 6, Appendix C.1). A class token is a class's weight in the last convolution,
the one that classifies pixels; a pixel's feature is the input of that convolution there. Nothing here knows a family:
the convolution is found by recording one forward pass.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from hf_denseseg.data.reading.pixels import as_tensor
from hf_denseseg.errors import InputError
from hf_denseseg.inference.introspection.inspection import inspection_view
from hf_denseseg.inference.preprocessing import Preprocessing, View, resized, view_size
from hf_denseseg.inference.settings import InferenceSettings
from hf_denseseg.inference.sliding_window import Size, size_of, window_corners
from hf_denseseg.models.channels import image_channels


class _Classifications(TorchFunctionMode):
    """Records weight, input and output of convolutions that give one channel per class, wherever they are called.

    A hook on modules would miss convolutions called as functions, such as HFGD's classifier with stopped gradients.
    """

    def __init__(self, num_labels: int, weight: torch.Tensor | None = None) -> None:
        super().__init__()
        self.num_labels = num_labels
        self.wanted = None if weight is None else weight.data_ptr()
        self.calls: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def __torch_function__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is F.conv2d:
            given = dict(zip(("input", "weight"), args, strict=False)) | (kwargs or {})
            weight = given["weight"]
            if len(weight) == self.num_labels and self.wanted in (None, weight.data_ptr()):
                self.calls.append((weight, given["input"], result))
        return result


def find_class_tokens(model: PreTrainedModel, size: Size = (64, 96)) -> torch.Tensor:
    """Find the weight of the convolution that classifies pixels.

    It is the last one called, on a small blank image, that has an output channel per class and that the logits
    depend on: auxiliary heads may run too.

    Args:
        model: segmentation model in eval mode.
        size: `(height, width)` of the blank image, which some models have only one of.

    Returns:
        `(num_labels, C, k, k)`, not a copy; k is 1 but for SETR-MLA.

    Raises:
        InputError: the model classifies pixels in another way.
    """
    if model.config.num_labels == 1:
        raise InputError(
            f"{type(model).__name__} has one logit (num_labels 1), so one class token, and nothing to compare it "
            "with. Give a checkpoint that was trained with a logit for each class."
        )
    channels = image_channels(model.config)
    centered = Preprocessing((0.5,) * channels, (0.5,) * channels)
    blank = inspection_view(torch.zeros(channels, *size, dtype=torch.uint8), model, max(size), centered)
    with torch.enable_grad(), _Classifications(int(model.config.num_labels or 0)) as watched:
        logits = _logits(model, blank.requires_grad_())
    # A head whose output the logits do not depend on has no gradient.
    outputs = [output for _, _, output in watched.calls if output.requires_grad]
    gradients = torch.autograd.grad(logits.sum(), outputs, allow_unused=True) if outputs else ()
    used = [output for output, gradient in zip(outputs, gradients, strict=True) if gradient is not None]
    for weight, _, output in reversed(watched.calls):
        if any(output is each for each in used):
            return weight.detach()
    raise InputError(
        f"{type(model).__name__} has no convolution that gives its logits one channel per class, so it has no class "
        "tokens to show. Give a checkpoint that classifies pixels by a last convolution, as those of this package do."
    )


def _logits(model: PreTrainedModel, pixel_values: torch.Tensor) -> torch.Tensor:
    """Logits of a model, or an error that names the size it does not take."""
    try:
        return model(pixel_values=pixel_values).logits
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError) as error:
        height, width = size_of(pixel_values)
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"{type(model).__name__} does not take images of {height}x{width} pixels ({reason}). A model of a fixed "
            "size is shown in windows: give it an inference_settings.json with mode slide and its size as crop_size, "
            "as training with --test_mode slide --test_crop_size H W does."
        ) from error


class LabeledFeatures(NamedTuple):
    """The features a classifier was given for one image or window, on the grid of its feature map.

    Args:
        features: `(C, h, w)`.
        labels: `(h, w)` train ids and 255, of the pixel in the middle of each cell.
        predictions: `(h, w)` class ids.
    """

    features: torch.Tensor
    labels: torch.Tensor
    predictions: torch.Tensor


@torch.no_grad()
def labeled_features(
    model: PreTrainedModel,
    tokens: torch.Tensor,
    rows: Iterable[Mapping[str, Any]],
    preprocessing: Preprocessing,
    settings: InferenceSettings,
) -> Iterator[LabeledFeatures]:
    """What the classifier of a model is given and predicts, for each image (with windows: each window) at scale 1.

    Args:
        model: segmentation model in eval mode.
        tokens: what `find_class_tokens` found in it.
        rows: with `image` (PIL) and `label` `(H, W)` of train ids and 255.
        preprocessing: of the checkpoint.
        settings: test protocol.
    """
    for row in rows:
        label = torch.from_numpy(np.array(row["label"]).astype(np.int32))
        image = as_tensor(row["image"]).to(tokens.device)
        image = resized(image, view_size(size_of(image), 1.0, settings))
        view = View(image, False, preprocessing, tokens)
        for window, place in _windows(view, settings):
            with _Classifications(len(tokens), tokens) as watched:
                logits = _logits(model, window)
            _, features, scores = watched.calls[-1]
            # HLG pads an image and cuts its logits; others resize theirs.
            height, width = (min(a, b) for a, b in zip(logits.shape[-2:], scores.shape[-2:], strict=True))
            labels = _cell_labels(label, place, view.size, (height, width))
            predictions = scores[0, :, :height, :width].argmax(0).cpu()
            yield LabeledFeatures(features[0, :, :height, :width], labels, predictions)


def _windows(view: View, settings: InferenceSettings) -> Iterator[tuple[torch.Tensor, tuple[int, ...]]]:
    """The windows of a view, each with its place (y, x, height, width); the view itself without windows."""
    crop, stride = settings.window() if settings.mode == "slide" else (view.size, view.size)
    crop = (min(crop[0], view.size[0]), min(crop[1], view.size[1]))
    for y, x in window_corners(view.size, crop, stride):
        yield view.window(y, x, crop), (y, x, *crop)


def _cell_labels(label: torch.Tensor, place: tuple[int, ...], view: Sequence[int], grid: Size) -> torch.Tensor:
    """Labels `grid` of the pixels at the middle of the cells of a window that lies at `place` in the view."""
    indices = []
    for axis in (0, 1):
        # Cell of the window -> middle of it in the view -> pixel of the label map.
        middle = place[axis] + (torch.arange(grid[axis]) + 0.5) * place[2 + axis] / grid[axis]
        indices.append((middle * label.shape[axis] / view[axis]).long().clamp(max=label.shape[axis] - 1))
    return label[indices[0]][:, indices[1]]
