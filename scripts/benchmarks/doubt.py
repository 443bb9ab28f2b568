"""Recall of wrong segments in the first 5 % of the ranking of `denseseg data doubt`, against cleanlab's scores.

Of embedded scenes 5 % of the segments (64 pixels or more) of both splits get another class at random. A small model is
trained on the wrong labels of one split, and ranks those of the other, which it has not seen. A wrong segment is found
if one of the first entries (as many as segments were changed) overlaps it with an IoU of at least 0.5. cleanlab ranks
pixels and images of segmentation data; its scores are applied to the segments of the label maps: softmin of the pixel
scores as for an image, and the scores of classification for the mean probabilities of a segment. The best of them is
the peer. The rule was chosen with seed 0, which is not measured.
"""

import argparse
import importlib.metadata
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

from hf_denseseg.data.reading.pixels import as_tensor
from hf_denseseg.data.synthetic.scenes import SYNTHETIC_SPEC, render_scene
from hf_denseseg.evaluation.label_doubt import doubtful_regions
from hf_denseseg.inference.predict.segmentation import SegmentationPredictor
from hf_denseseg.inference.segmentation import class_probabilities

Ranking = list[tuple[float, str, np.ndarray]]  # score, the lowest first; image; mask (H, W)
SMALLEST = 64  # pixels of a segment that is changed or ranked
FRACTION = 0.05


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--train", type=int, default=160, help="images to train on (default 160)")
    parser.add_argument("--val", type=int, default=60, help="images to rank (default 60)")
    parser.add_argument("--max_steps", type=int, default=300, help="steps of the training (default 300)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2], help="of labels and training (default 1 2)")


def segments(label: np.ndarray) -> list[np.ndarray]:
    """Masks `(H, W)` of the connected segments of `SMALLEST` pixels or more."""
    masks = []
    for k in range(SYNTHETIC_SPEC.num_labels):
        numbers, count = ndimage.label(label == k)
        masks += [mask for number in range(1, count + 1) if (mask := numbers == number).sum() >= SMALLEST]
    return masks


def write_data(folder: Path, counts: dict[str, int], seed: int) -> None:
    """Pairs of both splits, and `changed.npz` with the masks of the changed segments of each image of val."""
    random = np.random.default_rng(seed)
    for split, count in counts.items():
        for part in ("images", "labels"):
            (folder / split / part).mkdir(parents=True)
        scenes = [render_scene({"val": "validation"}.get(split, split), number) for number in range(count)]
        found = [(number, mask) for number, (_, label) in enumerate(scenes) for mask in segments(np.array(label))]
        chosen = random.choice(len(found), round(FRACTION * len(found)), replace=False)
        labels = [np.array(label) for _, label in scenes]
        changed: dict[str, list[np.ndarray]] = {}
        for number, mask in (found[place] for place in sorted(chosen)):
            old = labels[number][mask][0]
            labels[number][mask] = (old + random.integers(1, SYNTHETIC_SPEC.num_labels)) % SYNTHETIC_SPEC.num_labels
            changed.setdefault(f"{number:05d}", []).append(mask)
        for number, ((image, _), label) in enumerate(zip(scenes, labels, strict=True)):
            image.save(folder / split / "images" / f"{number:05d}.png")
            Image.fromarray(label.astype(np.uint8)).save(folder / split / "labels" / f"{number:05d}.png")
        np.savez_compressed(
            folder / f"{split}_changed.npz", **{name: np.stack(each) for name, each in changed.items()}
        )
    (folder / "classes.json").write_text(json.dumps(list(SYNTHETIC_SPEC.classes)))


def train(folder: Path, steps: int, seed: int) -> None:
    """The model of the demo on the data with wrong labels."""
    from hf_denseseg.commands import demo

    recipe = demo.RECIPES / "demo_semantic_segmentation.yaml"
    words = ["--dataset", str(folder / "data"), "--eval_split", "val", "--max_steps", str(steps), "--eval_steps"]
    words += [str(steps), "--use_cpu", "--seed", str(seed), "--output_dir", str(folder / "run")]
    subprocess.run(
        [sys.executable, "-m", "hf_denseseg.cli", "train", str(recipe), *words],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def predictions(folder: Path) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Name, label map and probabilities `(C, H, W)` of each image of val."""
    predictor = SegmentationPredictor.load(str(folder / "run" / "model"), {}, "cpu")
    for path in sorted((folder / "data" / "val" / "images").glob("*.png")):
        label = np.array(Image.open(folder / "data" / "val" / "labels" / path.name))
        image = as_tensor(Image.open(path).convert("RGB"))
        scores = class_probabilities(predictor.model, image, predictor.settings, predictor.preprocessing)
        yield path.stem, label, scores.numpy()


def rank(folder: Path) -> dict[str, Ranking]:
    """Rankings of the same predictions, by name."""
    from cleanlab.internal.multilabel_scorer import softmin
    from cleanlab.rank import get_label_quality_scores

    rankings: dict[str, Ranking] = {"ours": [], "cleanlab softmin": []}
    given, means, places = [], [], []
    for name, label, scores in predictions(folder):
        known = np.where(label < len(scores), label, 0)
        own = np.log(np.take_along_axis(scores, known[None], 0)[0] + 1e-30)
        found, numbers = doubtful_regions(label, scores.argmax(0), own, np.log(scores.max(0)), len(scores), SMALLEST)
        rankings["ours"] += [(-each.doubt, name, numbers == each.number) for each in found]
        for mask in segments(label):
            pixels = np.exp(own[mask])
            rankings["cleanlab softmin"].append((float(softmin(pixels[None], temperature=0.1, axis=1)[0]), name, mask))
            given.append(label[mask][0])
            means.append(scores[:, mask].mean(1))
            places.append((name, mask))
    probabilities = np.stack(means).astype(np.float64)
    probabilities /= probabilities.sum(1, keepdims=True)
    for method in ("self_confidence", "normalized_margin", "confidence_weighted_entropy"):
        for adjusted in (False, True) if "entropy" not in method else (False,):
            qualities = get_label_quality_scores(
                np.array(given), probabilities, method=method, adjust_pred_probs=adjusted
            )
            kind = f"cleanlab {method}{', adjusted' if adjusted else ''}"
            rankings[kind] = [(float(q), *place) for q, place in zip(qualities, places, strict=True)]
    return rankings


def found_in(ranking: Ranking, changed: dict[str, np.ndarray], count: int) -> int:
    """Number of changed segments that the first `count` entries overlap with an IoU of 0.5 or more."""
    found = set()
    for _, name, mask in sorted(ranking, key=lambda entry: entry[0])[:count]:
        for number, wrong in enumerate(changed.get(name, ())):
            if (mask & wrong).sum() >= 0.5 * (mask | wrong).sum():
                found.add((name, number))
    return len(found)


def run(args: argparse.Namespace) -> dict:
    changed_segments, found = 0, {}
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_data(folder / "data", {"train": args.train, "val": args.val}, seed)
            train(folder, args.max_steps, seed)
            changed = dict(np.load(folder / "data" / "val_changed.npz"))
            count = sum(map(len, changed.values()))
            changed_segments += count
            for kind, ranking in rank(folder).items():
                found[kind] = found.get(kind, 0) + found_in(ranking, changed, count)
    recall = {kind: number / changed_segments for kind, number in found.items()}
    return {
        "changed_segments": changed_segments,
        "recall": recall,
        "best_peer": max((kind for kind in recall if kind != "ours"), key=lambda kind: recall[kind]),
        "cleanlab": importlib.metadata.version("cleanlab"),
    }


def readme_rows(result: dict) -> list[tuple[str, str, str]]:
    """(what, ours, peer) for the table of the README."""
    figures = result["figures"]
    ours, peer = (figures["recall"][kind] for kind in ("ours", figures["best_peer"]))
    score = figures["best_peer"].removeprefix("cleanlab ").replace("_", " ")
    return [
        (
            f"wrong segments ({figures['changed_segments']}, 5 % of all) in the first 5 % of `denseseg data doubt`",
            f"{100 * ours:.0f} % of them; peer {100 * peer:.0f} %",
            f"cleanlab {figures['cleanlab']}, its best score ({score})",
        )
    ]
