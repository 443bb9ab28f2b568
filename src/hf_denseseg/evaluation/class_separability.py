"""How separable classes are: numbers from class tokens and pixel features (HFGD, Figure 4)."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from hf_denseseg.evaluation.segmentation_metrics import confusion_matrix

SHOWN_CLASSES = 8  # as in Figure 4
SILHOUETTE_POINTS = 4000  # a silhouette takes the distances of all pairs


def token_confidence(tokens: torch.Tensor) -> torch.Tensor:
    """Dependencies between classes: softmax over the products of a class token with all tokens (Appendix C.1).

    Row i is what the classifier predicts, without its bias, for a pixel whose feature is the token of class i. The
    higher the diagonal, the less a class depends on others. The paper gives no formula; it refers to CAR, whose code
    also takes the softmax of such products, of class centers, divided by sqrt(C). That division is left out here:
    without it the values are the classifier's own probabilities, which also rise with the length of the tokens. The
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
        confusion: `(K, K)` int64, all labeled cells of the feature maps; rows = ground truth, columns =
            prediction.
    """

    samples: list[torch.Tensor]
    confusion: torch.Tensor


class _Reservoir:
    """A uniform sample of the features of each class: every feature draws a number, the `points` smallest stay."""

    def __init__(self, num_labels: int, points: int, seed: int) -> None:
        self.points = points
        self.generator = torch.Generator().manual_seed(seed)
        self.numbers = [torch.empty(0, dtype=torch.float64) for _ in range(num_labels)]
        self.samples = [torch.empty(0, 0) for _ in range(num_labels)]

    def add(self, features: torch.Tensor, labels: torch.Tensor) -> None:
        """Offer features `(C, h, w)` with their labels `(h, w)`; ignored ones are left out."""
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


def sample_features(
    parts: Iterable[tuple[torch.Tensor, torch.Tensor, torch.Tensor]], num_labels: int, points: int, seed: int
) -> PixelFeatures:
    """Sample the features of each class uniformly, and count what they were predicted as.

    Args:
        parts: features `(C, h, w)`, labels `(h, w)` of train ids and 255, and predictions `(h, w)`.
        num_labels: number of classes.
        points: largest number of features kept per class.
        seed: of the random sample.
    """
    reservoir, confusion = _Reservoir(num_labels, points, seed), torch.zeros(num_labels, num_labels, dtype=torch.int64)
    for features, labels, predictions in parts:
        reservoir.add(features, labels)
        confusion += confusion_matrix(predictions, labels, num_labels)
    return PixelFeatures(reservoir.samples, confusion)


def most_confused(confusion: torch.Tensor, count: int = SHOWN_CLASSES) -> list[int]:
    """Classes that are confused with each other most often: the worst pair, then the next, until there are `count`.

    A pair's score is the fraction of the first class that is predicted as the second, plus the reverse; of equal pairs
    the one with more pixels comes first. Classes without a pixel are left out.

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
    """How well the classes are separated in the feature space itself, before any projection.

    With m_k the mean of class k and m the mean of all m_k, every class weighing the same,
    `scatter_ratio` = mean_k |m_k - m|^2 / mean_k mean_(x in k) |x - m_k|^2 (None if no class has any spread);
    `silhouette` = mean over features x of (b - a) / max(a, b), where a is the mean distance to the others of its class
    and b the smallest mean distance to another class: 1 far apart, 0 on the border, negative inside another class. It
    uses the same number of features of each class, at most `SILHOUETTE_POINTS` in all. Neither depends on scale or
    rotation.

    Args:
        samples: for each of at least two classes `(n, C)`, n at least 1.
    """
    middle = torch.cat([each.mean(0, keepdim=True) for each in samples]).double().mean(0)
    centered = [each.double() - middle for each in samples]
    means = torch.stack([each.mean(0) for each in centered])
    within = torch.stack([(each - mean).square().sum(1).mean() for each, mean in zip(centered, means, strict=True)])
    between = float(means.square().sum(1).mean())
    ratio = between / float(within.mean()) if within.any() else None
    few = [each[: SILHOUETTE_POINTS // len(centered)] for each in centered]
    sizes = torch.tensor([len(each) for each in few])
    own = F.one_hot(torch.arange(len(few)).repeat_interleave(sizes)).bool()  # (n, K): the class of each point
    points = torch.cat(few)
    sums = torch.cdist(points, points) @ own.double()  # (n, K): summed distance to each class
    nearest = (sums / sizes).masked_fill(own, torch.inf).amin(1)
    others = sums[own] / (sizes.repeat_interleave(sizes) - 1).clamp(min=1)  # (n,): its distance to itself is 0
    widths = (nearest - others) / torch.maximum(nearest, others).clamp(min=torch.finfo(torch.float64).tiny)
    alone = (sizes == 1).repeat_interleave(sizes)  # by definition a class of one point scores 0
    return {"scatter_ratio": ratio, "silhouette": float(widths.masked_fill(alone, 0).mean())}
