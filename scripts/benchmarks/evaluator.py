"""Counting a 1024x2048 pair of int64 maps with the evaluator, against the arithmetic of `evaluate`'s mean IoU.

The peer is a `Metric` of the library `evaluate` with the features and the arithmetic of its `mean_iou`, restated here
since its script is on the hub; the arithmetic alone is a second peer. Ours is the confusion matrix, which is all that
mean IoU needs, and everything that the evaluator counts, boundary regions and segments by size included. 19 classes,
10 % of the pixels ignored; "smooth" maps have outlines as networks predict them, "speckled" ones are the worst case
for segments. CPU time of one process, all methods in turn. Peak memory in separate processes.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
from _timing import in_turn, median_ratio
from metrics import IGNORE_INDEX, NUM_LABELS, make_pair

from hf_denseseg.data.labels import LabelSpec
from hf_denseseg.evaluation.segmentation_metrics import confusion_matrix
from hf_denseseg.evaluation.segmentation_scores import Evaluation, count_image

Pair = tuple[np.ndarray, np.ndarray]
SIZE = (1024, 2048)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=int, default=7, help="rounds over all methods (default 7)")
    parser.add_argument("--few", type=int, default=50, help="images of the first memory run (default 50)")
    parser.add_argument("--many", type=int, default=500, help="images of the second memory run (default 500)")


def smooth_pair(seed: int) -> Pair:
    """Regions with curved outlines; the prediction is the label shifted by a few pixels."""
    noise = torch.rand(1, NUM_LABELS, 32, 64, generator=torch.Generator().manual_seed(seed))
    scores = torch.cat([F.interpolate(noise[:, k : k + 1], size=SIZE, mode="bicubic") for k in range(NUM_LABELS)], 1)
    label = scores.argmax(1)[0].to(torch.uint8)
    prediction = label.roll((5, 7), (0, 1))
    label[-SIZE[0] // 10 :] = IGNORE_INDEX
    return prediction.numpy(), label.numpy()


def mean_iou_areas(prediction: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Areas of intersection, prediction and label as `mean_iou` counts them."""
    kept = np.not_equal(label, IGNORE_INDEX)
    prediction, label = prediction[kept], label[kept]
    bins = {"bins": NUM_LABELS, "range": (0, NUM_LABELS - 1)}
    return np.stack([np.histogram(ids, **bins)[0] for ids in (prediction[prediction == label], prediction, label)])


def evaluate_metric(folder: str) -> Callable[[list[Pair]], float]:
    """A function that computes the mean IoU of pairs with a `Metric` of `evaluate`."""
    import datasets
    import evaluate

    class MeanIou(evaluate.Metric):
        def _info(self) -> evaluate.MetricInfo:
            features = datasets.Features({"predictions": datasets.Image(), "references": datasets.Image()})
            return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

        def _compute(self, predictions: list, references: list) -> dict:
            areas = sum(
                mean_iou_areas(np.array(one), np.array(other))
                for one, other in zip(predictions, references, strict=True)
            )
            intersect, predicted, labeled = areas
            return {"mean_iou": float(np.nanmean(intersect / (predicted + labeled - intersect)))}

    metric = MeanIou(cache_dir=folder)

    def compute(pairs: list[Pair]) -> float:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a warning for each map that Pillow has no int64
            return metric.compute(predictions=[p for p, _ in pairs], references=[t for _, t in pairs])["mean_iou"]

    return compute


def count_everything(pairs: list[Pair]) -> float:
    evaluation = Evaluation(LabelSpec("toy", tuple(f"class {k}" for k in range(NUM_LABELS))))
    for number, (prediction, label) in enumerate(pairs):
        evaluation.add(number, count_image(torch.from_numpy(prediction), torch.from_numpy(label), NUM_LABELS))
    return evaluation.scores()["mean_iou"]


def run(args: argparse.Namespace) -> dict:
    figures: dict = {}
    with tempfile.TemporaryDirectory() as folder:
        metric = evaluate_metric(folder)
        for kind, make in (("smooth", smooth_pair), ("speckled", make_pair)):
            pairs = [tuple(ids.astype(np.int64) for ids in make(seed)) for seed in range(2)]
            assert abs(count_everything(pairs) - metric(pairs)) < 1e-12, "the scores differ"
            taken = in_turn(
                {
                    "matrix": lambda: [confusion_matrix(*pair, NUM_LABELS) for pair in pairs],  # noqa: B023
                    "everything": lambda: count_everything(pairs),  # noqa: B023
                    "metric": lambda: metric(pairs),  # noqa: B023
                    "histograms": lambda: [mean_iou_areas(*pair) for pair in pairs],  # noqa: B023
                },
                args.repeats,
            )
            figures[kind] = {f"{name}_ms_per_image": 1000 * median(each) / 2 for name, each in taken.items()}
            for peer in ("metric", "histograms"):
                for own in ("matrix", "everything"):
                    figures[kind][f"{peer}_to_{own}"] = median_ratio(taken[peer], taken[own])
    figures["target_metric_to_matrix"] = 5.0
    figures["memory"] = memory(args)
    return figures


def memory(args: argparse.Namespace) -> dict:
    """Peak memory in MiB of ours for few and many images, and of the peer for 4 and 16."""
    peaks = {}
    for kind, count in (("ours", args.few), ("ours", args.many), ("metric", 4), ("metric", 16)):
        done = subprocess.run([sys.executable, __file__, kind, str(count)], capture_output=True, text=True, check=True)
        peaks[f"{kind}_{count}_images_mib"] = json.loads(done.stdout.strip().splitlines()[-1])
    few, many, four, sixteen = peaks.values()
    return {**peaks, "ours_growth_mib": many - few, "metric_growth_mib_per_image": (sixteen - four) / 12}


def peak(kind: str, count: int) -> float:
    """Peak resident memory in MiB of this process after `count` images, each made when it is counted."""
    torch.set_num_threads(1)
    prediction, label = (ids.astype(np.int64) for ids in smooth_pair(0))
    if kind == "ours":
        evaluation = Evaluation(LabelSpec("toy", tuple(f"class {k}" for k in range(NUM_LABELS))))
        for number in range(count):
            pair = (torch.from_numpy(np.roll(ids, number, 1)) for ids in (prediction, label))
            evaluation.add(number, count_image(*pair, NUM_LABELS))
        evaluation.scores()
    else:
        with tempfile.TemporaryDirectory() as folder:
            evaluate_metric(folder)([(np.roll(prediction, k, 1), np.roll(label, k, 1)) for k in range(count)])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def readme_rows(result: dict) -> list[tuple[str, str, str]]:
    """(what, ours, peer) for the table of the README."""
    smooth, memory = result["figures"]["smooth"], result["figures"]["memory"]
    few, many = sorted(int(key.split("_")[1]) for key in memory if key.startswith("ours_") and "images" in key)
    return [
        (
            "counting for mIoU / everything the evaluator counts, 1024x2048, int64 maps",
            f"{smooth['metric_to_matrix']:.1f}x / {smooth['metric_to_everything']:.1f}x the speed; "
            f"{many} images take {memory['ours_growth_mib']:.1f} MiB more than {few}",
            "mean IoU of `evaluate`",
        )
    ]


if __name__ == "__main__":
    print(json.dumps(peak(sys.argv[1], int(sys.argv[2]))))
