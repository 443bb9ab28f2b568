"""Confusion matrix of a 1024x2048 pair, against the fastest masked numpy bincount and the arithmetic of `evaluate`.

19 classes in blocks, 15 % of the pixels predicted wrong, 10 % ignored; CPU time of one process. Neither peer detects
an id that is out of range; ours refuses it.
"""

import argparse
import importlib.util
import time
from collections.abc import Callable
from statistics import median

import numpy as np
import torch

from hf_denseseg.evaluation.segmentation_metrics import confusion_matrix

NUM_LABELS = 19
IGNORE_INDEX = 255


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", type=int, default=4, help="different pairs (default 4)")
    parser.add_argument("--rounds", type=int, default=10, help="passes over them, all methods in turn (default 10)")


def make_pair(seed: int, size: tuple[int, int] = (1024, 2048)) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    patches = rng.integers(0, NUM_LABELS, (size[0] // 16, size[1] // 16), dtype=np.uint8)
    label = patches.repeat(16, 0).repeat(16, 1)
    wrong = rng.random(size) < 0.15
    prediction = np.where(wrong, rng.integers(0, NUM_LABELS, size, dtype=np.uint8), label)
    label[rng.random(size) < 0.1] = IGNORE_INDEX
    return prediction, label


def masked_bincount(prediction: np.ndarray, label: np.ndarray) -> np.ndarray:
    """The fastest alternative known: numpy, ignored pixels masked out, int16 index."""
    kept = label != IGNORE_INDEX
    joint = label[kept].astype(np.int16) * NUM_LABELS + prediction[kept]
    return np.bincount(joint, minlength=NUM_LABELS**2).reshape(NUM_LABELS, NUM_LABELS)


def evaluate_histograms(prediction: np.ndarray, label: np.ndarray) -> np.ndarray:
    """As in `evaluate`'s mean IoU: three histograms (intersection, prediction, label), no matrix."""
    kept = label != IGNORE_INDEX
    prediction, label = prediction[kept], label[kept]
    edges = np.arange(NUM_LABELS + 1)
    return np.stack([np.histogram(ids, edges)[0] for ids in (prediction[prediction == label], prediction, label)])


def ours(prediction: np.ndarray, label: np.ndarray) -> np.ndarray:
    return confusion_matrix(prediction, label, NUM_LABELS).numpy()


def torchmetrics_jaccard() -> Callable:
    from torchmetrics.functional.classification import multiclass_confusion_matrix

    def count(prediction: np.ndarray, label: np.ndarray) -> np.ndarray:
        pair = torch.from_numpy(prediction), torch.from_numpy(label).long()
        return multiclass_confusion_matrix(*pair, NUM_LABELS, ignore_index=IGNORE_INDEX, validate_args=False).numpy()

    return count


def run(args: argparse.Namespace) -> dict:
    methods: dict[str, Callable] = {
        "masked_bincount": masked_bincount,
        "ours": ours,
        "evaluate_histograms": evaluate_histograms,
    }
    if importlib.util.find_spec("torchmetrics"):
        methods["torchmetrics"] = torchmetrics_jaccard()
    pairs = [make_pair(seed) for seed in range(args.images)]
    reference = sum(masked_bincount(*pair) for pair in pairs)
    assert (sum(ours(*pair) for pair in pairs) == reference).all(), "the matrices differ"
    intersection, predicted, _ = sum(evaluate_histograms(*pair) for pair in pairs)
    assert (reference.diagonal() == intersection).all() and (reference.sum(0) == predicted).all()
    figures: dict = {}
    for dtype in (np.uint8, np.int64):
        typed = [tuple(ids.astype(dtype) for ids in pair) for pair in pairs]
        seconds: dict[str, list[float]] = {name: [] for name in methods}
        for _ in range(args.rounds):
            for pair in typed:
                for name, method in methods.items():
                    started = time.process_time()
                    method(*pair)
                    seconds[name].append(time.process_time() - started)
        name = np.dtype(dtype).name
        figures[name] = {f"{method}_ms": 1000 * median(values) for method, values in seconds.items()}
        ratios = zip(seconds["ours"], seconds["masked_bincount"], strict=True)
        figures[name]["ours_to_masked_bincount"] = median(own / peer for own, peer in ratios)
    figures["target_ours_to_masked_bincount"] = 2.0
    return figures


def readme_rows(result: dict) -> list[tuple[str, str, str]]:
    """(what, ours, peer) for the table of the README."""
    ratio = result["figures"]["int64"]["ours_to_masked_bincount"]
    return [("confusion matrix, 1024x2048", f"{ratio:.2f}x the time", "numpy `bincount`")]
