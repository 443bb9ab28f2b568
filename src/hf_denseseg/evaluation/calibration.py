"""How far probabilities can be trusted: calibration error, Brier score, log-likelihood, and the temperature.

Everything is counted per image in int64 (sums of fractions in units of 2**-20), so that the sums over images are the
same in any order and for any number of processes.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

BINS = 15  # of Guo et al. 2017, "On Calibration of Modern Neural Networks"
UNIT = 2.0**20
LEAST = -100.0  # log-probabilities below count as this
LENGTH = 3 * BINS + 2
# Temperatures at which the slope of the log-likelihood is summed; between them it is interpolated.
TEMPERATURES = np.geomspace(1 / 20, 20, 121)
SAMPLED = 2048  # pixels of an image that a temperature is fitted to, evenly spaced among the labeled ones


class Calibration:
    """Counts of one image, strip by strip.

    Args:
        num_labels: number of classes.
    """

    def __init__(self, num_labels: int) -> None:
        self.num_labels = num_labels
        self._sums = np.zeros(LENGTH)

    def add(self, ids: torch.Tensor, scores: torch.Tensor, label: torch.Tensor) -> None:
        """Add a strip.

        Args:
            ids: `(h, w)` predicted classes.
            scores: `(C, h, w)` log-probabilities.
            label: `(h, w)` class ids, others ignored.
        """
        known = (label < self.num_labels).to(ids.device)
        given = label.to(ids.device).long()[known]  # (N,) for N labeled pixels
        ids, scores = ids[known], scores[:, known]  # (N,), (C, N)
        probabilities = scores.exp()
        own = scores.gather(0, given[None])[0].double().clamp(min=LEAST)
        confidence = probabilities.gather(0, ids[None])[0].double().clamp(max=1).cpu()
        # Bin m of M holds the confidences in ((m - 1) / M, m / M].
        place = ((confidence * BINS).ceil().long() - 1).clamp(0, BINS - 1).numpy()
        right = (ids == given).cpu().numpy()
        brier = probabilities.square().sum(dtype=torch.float64) - 2 * own.exp().sum() + len(own)
        bins = [np.bincount(place, weights, BINS) for weights in (None, right, confidence.numpy())]
        self._sums += np.concatenate([*bins, [float(brier), -float(own.sum())]])

    def counts(self) -> list[int]:
        """`LENGTH` integers: pixels, right ones and summed confidence of each bin, Brier score, log-likelihood."""
        exact = 2 * BINS
        return [round(value * (1 if place < exact else UNIT)) for place, value in enumerate(self._sums)]


def calibration_scores(counts: Iterable[int]) -> dict[str, Any]:
    """Scores of summed counts.

    Returns:
        `calibration_error` (ECE: mean over the pixels of |accuracy - confidence| of their bin), `brier_score` (squared
        error of the probabilities, summed over the classes, mean over the pixels), `negative_log_likelihood` (mean
        over the pixels), each None without pixels; `reliability`, one row per bin: `pixels`, `accuracy`, `confidence`.
    """
    values = list(counts)
    pixels, right, confidence = (np.array(values[k * BINS : (k + 1) * BINS], dtype=np.float64) for k in range(3))
    confidence /= UNIT
    total = pixels.sum()
    brier, log_likelihood = (value / UNIT / total if total else None for value in values[3 * BINS :])
    rows = [
        {"pixels": int(n), "accuracy": r / n if n else None, "confidence": c / n if n else None}
        for n, r, c in zip(pixels.tolist(), right.tolist(), confidence.tolist(), strict=True)
    ]
    return {
        "calibration_error": float(np.abs(right - confidence).sum() / total) if total else None,
        "brier_score": brier,
        "negative_log_likelihood": log_likelihood,
        "reliability": rows,
    }


def sampled_places(label: torch.Tensor, num_labels: int) -> torch.Tensor:
    """Pixels `(N,)` that a temperature is fitted to, as indices into the flattened label map.

    Args:
        label: `(H, W)` class ids, others ignored.
        num_labels: number of classes.
    """
    known = (label.flatten() < num_labels).nonzero()[:, 0]
    if len(known) <= SAMPLED:
        return known
    return known[torch.arange(SAMPLED) * len(known) // SAMPLED]


def slopes(scores: torch.Tensor, given: torch.Tensor) -> list[int]:
    """Slope of the negative log-likelihood over 1 / T at each of `TEMPERATURES`, summed over pixels.

    With p = softmax(z / T) it is the mean of z under p minus z of the given class: it grows with 1 / T, and is 0 at
    the best temperature.

    Args:
        scores: `(C, N)` log-probabilities z.
        given: `(N,)` class ids.
    """
    scores = scores.double().clamp(min=LEAST)
    own = scores.gather(0, given[None])[0].sum()
    found = [((scores / t).softmax(0) * scores).sum() - own for t in TEMPERATURES.tolist()]
    return [round(float(slope) * UNIT) for slope in found]


def best_temperature(summed: Iterable[int]) -> float:
    """The temperature at which the summed `slopes` are 0, at most 20 and at least 0.05."""
    slope = np.array(list(summed), dtype=np.float64)[::-1]  # with 1 / T ascending, the slope ascends
    inverse = 1 / TEMPERATURES[::-1]
    if not slope.any():
        return 1.0  # no pixels, or one class
    return float(1 / np.interp(0.0, slope, inverse))
