"""What a segmenter classifies pixels by: its class tokens, and the features of pixels it compares with them.

The HFGD paper shows both (Figures 4 and 6, Appendix C.1). A class token is a class's weight in the last convolution,
the one that classifies pixels; a pixel's feature is the input of that convolution there. Nothing here knows a family:
the convolution is found by watching one forward pass.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torchvision.transforms.v2.functional import pil_to_tensor, resize
from transformers import PreTrainedModel

from hf_denseseg.errors import InputError
from hf_denseseg.evaluation.segmentation_metrics import confusion_matrix
from hf_denseseg.inference import Preprocessing, view_size
from hf_denseseg.inference_settings import InferenceSettings
from hf_denseseg.introspection import Size, picture_view
from hf_denseseg.sliding_windows import window_corners

SHOWN_CLASSES = 8  # as in Figure 4
SILHOUETTE_POINTS = 4000  # a silhouette takes the distances of all pairs


class _Classifications(TorchFunctionMode):
    """Keeps weight, input and output of convolutions that give one channel per class, wherever they are called.

    A hook on modules would miss what is called as a function, such as HFGD's classifier with stopped gradients.
    """

    def __init__(self, num_labels: int, weight: torch.Tensor | None = None) -> None:
        super().__init__()
        self.num_labels = num_labels
        self.wanted = None if weight is None else weight.data_ptr()
        self.calls: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is F.conv2d:
            given = dict(zip(("input", "weight"), args, strict=False)) | (kwargs or {})
            weight = given["weight"]
            if len(weight) == self.num_labels and self.wanted in (None, weight.data_ptr()):
                self.calls.append((weight, given["input"], result))
        return result


def find_class_tokens(model: PreTrainedModel) -> torch.Tensor:
    """Find the weight of the convolution that classifies pixels.

    It is the last one called, on a small blank picture, that has an output channel per class and that the logits
    depend on: auxiliary heads may run too.

    Args:
        model: segmentation model in eval mode.

    Returns:
        `(num_labels, C, k, k)`, not a copy; k is 1 but for SETR-MLA.

    Raises:
        InputError: the model classifies pixels in another way.
    """
    blank = picture_view(torch.zeros(3, 64, 96, dtype=torch.uint8), model, 96, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    with torch.enable_grad(), _Classifications(int(model.config.num_labels or 0)) as watched:
        logits = model(pixel_values=blank.requires_grad_()).logits
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


def token_confidence(tokens: torch.Tensor) -> torch.Tensor:
    """Dependencies between classes: softmax over the products of a class token with all tokens (Appendix C.1).

    Row i is what the classifier answers, its bias left out, to a pixel whose feature is the token of class i. The
    higher the diagonal, the less a class leans on others. The paper names no formula; it refers to CAR, whose code
    takes the softmax of such products too, of class centres, divided by sqrt(C). That division is left out here:
    without it the values are the classifier's own probabilities, which rise with the length of the tokens too. The
    weights of a kernel count as one long token.

    Args:
        tokens: `(K, C, k, k)` or `(K, C)`.

    Returns:
        `(K, K)` float64 on the CPU; rows sum to 1.
    """
    flat = tokens.detach().double().cpu().flatten(1)
    return (flat @ flat.T).softmax(-1)


@dataclass
class PixelFeatures:
    """Features of sampled pixels.

    Args:
        samples: for each class `(n, C)` float32, n from 0 to the number asked for.
        confusion: `(K, K)` int64, all labelled cells of the feature maps; rows = truth, columns = answer.
    """

    samples: list[torch.Tensor]
    confusion: torch.Tensor


class _Reservoir:
    """An even sample of the features of each class: every feature draws a number, the `points` smallest stay."""

    def __init__(self, num_labels: int, points: int, seed: int) -> None:
        self.points = points
        self.generator = torch.Generator().manual_seed(seed)
        self.numbers = [torch.empty(0, dtype=torch.float64) for _ in range(num_labels)]
        self.samples = [torch.empty(0, 0) for _ in range(num_labels)]

    def add(self, features: torch.Tensor, labels: torch.Tensor) -> None:
        """Offer features `(C, h, w)` with their labels `(h, w)`; void is no class."""
        features, labels = features.flatten(1), labels.flatten()
        drawn = torch.rand(len(labels), generator=self.generator, dtype=torch.float64)
        for k in labels.unique().tolist():
            if k >= len(self.samples):
                continue
            own = (labels == k).nonzero().squeeze(1)
            own = own[drawn[own].argsort()[: self.points]]
            numbers = torch.cat([self.numbers[k], drawn[own]])
            offered = features[:, own.to(features.device)].T.float().cpu()
            samples = torch.cat([self.samples[k].view(-1, offered.shape[1]), offered])
            kept = numbers.argsort()[: self.points]
            self.numbers[k], self.samples[k] = numbers[kept], samples[kept]


@torch.no_grad()
def collect_features(
    model: PreTrainedModel,
    tokens: torch.Tensor,
    pairs: Iterable[Any],
    preprocessing: Preprocessing,
    settings: InferenceSettings,
    points: int = 500,
    seed: int = 0,
) -> PixelFeatures:
    """Sample the features of pixels, equally many of each true class, at the resolution the model classifies at.

    Pictures are seen at scale 1 of the test protocol, in its windows if it has any. The label of a feature is that of
    the pixel at the middle of its cell; void is left out.

    Args:
        model: segmentation model in eval mode.
        tokens: what `find_class_tokens` found in it.
        pairs: rows with `image` (PIL) and `label` `(H, W)` of train ids and 255.
        preprocessing: of the checkpoint.
        settings: test protocol.
        points: most features of a class.
        seed: of the sample.
    """
    count = len(tokens)
    reservoir, confusion = _Reservoir(count, points, seed), torch.zeros(count, count, dtype=torch.int64)
    for row in pairs:
        label = torch.from_numpy(np.array(row["label"]))
        view = _view(row["image"], tokens, preprocessing, settings)
        for window, place in _windows(view, settings):
            with _Classifications(count, tokens) as watched:
                logits = model(pixel_values=window).logits
            _, features, answers = watched.calls[-1]
            # HLG pads a picture and cuts its logits; others resize theirs.
            height, width = (min(a, b) for a, b in zip(logits.shape[-2:], answers.shape[-2:], strict=True))
            labels = _cell_labels(label, place, view.shape[-2:], (height, width))
            reservoir.add(features[0, :, :height, :width], labels)
            confusion += confusion_matrix(answers[0, :, :height, :width].argmax(0).cpu(), labels, count)
    return PixelFeatures(reservoir.samples, confusion)


def _view(image: Any, tokens: torch.Tensor, preprocessing: Preprocessing, settings: InferenceSettings) -> torch.Tensor:
    """A picture as the protocol shows it to the model at scale 1: `(1, 3, h, w)`."""
    pixels = pil_to_tensor(image).to(tokens.device)
    size = view_size(pixels.shape[-2:], 1.0, settings)
    if size != pixels.shape[-2:]:
        pixels = resize(pixels, list(size), antialias=True)
    mean, std = (torch.tensor(each, device=tokens.device).view(3, 1, 1) for each in preprocessing[:2])
    return ((pixels / 255 - mean) / std).to(tokens.dtype)[None]


def _windows(view: torch.Tensor, settings: InferenceSettings) -> Iterator[tuple[torch.Tensor, tuple[int, ...]]]:
    """The windows of a view, each with its place (y, x, height, width); the view itself without windows."""
    height, width = view.shape[-2:]
    crop, stride = settings.window() if settings.mode == "slide" else ((height, width), (height, width))
    crop = (min(crop[0], height), min(crop[1], width))
    for y, x in window_corners((height, width), crop, stride):
        yield view[..., y : y + crop[0], x : x + crop[1]], (y, x, *crop)


def _cell_labels(label: torch.Tensor, place: tuple[int, ...], view: Sequence[int], grid: Size) -> torch.Tensor:
    """Labels `grid` of the pixels at the middle of the cells of a window that lies at `place` in the view."""
    indices = []
    for axis in (0, 1):
        middle = place[axis] + (torch.arange(grid[axis]) + 0.5) * place[2 + axis] / grid[axis]
        indices.append((middle * label.shape[axis] / view[axis]).long().clamp(max=label.shape[axis] - 1))
    return label[indices[0]][:, indices[1]]


def most_confused(confusion: torch.Tensor, count: int = SHOWN_CLASSES) -> list[int]:
    """Classes that are taken for each other most often: the worst pair, then the next, until there are `count`.

    A pair's score is the share of the first class that is called the second, plus the reverse; of equal pairs the one
    with more pixels comes first. Classes without a pixel are left out.

    Returns:
        Train ids in ascending order.
    """
    pixels = confusion.sum(1)
    present = pixels.nonzero().flatten().tolist()
    rates = confusion.double() / pixels.clamp(min=1)[:, None]
    pairs = [(i, j) for i in present for j in present if i < j]
    pairs.sort(key=lambda pair: (-float(rates[pair] + rates[pair[::-1]]), -int(pixels[list(pair)].sum())))
    ordered = list(dict.fromkeys([k for pair in pairs for k in pair])) or present
    return sorted(ordered[:count])


def separability(samples: Sequence[torch.Tensor]) -> dict[str, float | None]:
    """How well the classes lie apart in the feature space itself, before any projection.

    With m_k the mean of class k and m the mean of all m_k, every class weighing the same,
    `scatter_ratio` = mean_k |m_k - m|^2 / mean_k mean_(x in k) |x - m_k|^2 (None if no class has any spread);
    `silhouette` = mean over features x of (b - a) / max(a, b), where a is the mean distance to the others of its class
    and b the smallest mean distance to another class: 1 apart, 0 on the border, negative inside another class. Of each
    class it takes the same number of features, `SILHOUETTE_POINTS` in all at most. Neither depends on scale or
    rotation.

    Args:
        samples: for each of at least two classes `(n, C)`, n at least 1.
    """
    middle = torch.cat([each.mean(0, keepdim=True) for each in samples]).double().mean(0)
    centred = [each.double() - middle for each in samples]
    means = torch.stack([each.mean(0) for each in centred])
    within = torch.stack([(each - mean).square().sum(1).mean() for each, mean in zip(centred, means, strict=True)])
    between = float(means.square().sum(1).mean())
    ratio = between / float(within.mean()) if within.any() else None
    few = [each[: SILHOUETTE_POINTS // len(centred)] for each in centred]
    sizes = torch.tensor([len(each) for each in few])
    own = F.one_hot(torch.arange(len(few)).repeat_interleave(sizes)).bool()
    points = torch.cat(few)
    sums = torch.cdist(points, points) @ own.double()  # (n, K): summed distance to each class
    nearest = (sums / sizes).masked_fill(own, torch.inf).amin(1)
    others = sums[own] / (sizes.repeat_interleave(sizes) - 1).clamp(min=1)
    widths = (nearest - others) / torch.maximum(nearest, others).clamp(min=torch.finfo(torch.float64).tiny)
    alone = (sizes == 1).repeat_interleave(sizes)
    return {"scatter_ratio": ratio, "silhouette": float(widths.masked_fill(alone, 0).mean())}
