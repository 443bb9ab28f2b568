"""The derived recipe (`denseseg train FOLDER`) against the recipe made by hand for CamVid, at equal CPU seconds.

Both start from random weights with seed 0, one after the other, one run each. The first gets a fixed number of steps;
of the second, which is evaluated more often, the number of steps is chosen so that training and evaluations together
take as long. CPU seconds are those of the processes, so that other load on the machine hardly counts.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

RECIPE = Path(__file__).parents[1] / "recipes" / "dsct" / "dsct_tiny_sac_camvid_cpu.yaml"
EVALUATIONS = 6  # of the derived recipe: five, and one of the weights that are saved


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, required=True, help="folder of CamVid, 11 classes")
    parser.add_argument("--max_steps", type=int, default=1400, help="of the recipe made by hand (default 1400)")


def train(words: list[str], folder: Path) -> dict:
    """Run `denseseg train`; mIoU, steps and CPU seconds."""
    words = [*words, "--use_cpu", "--output_dir", str(folder)]
    subprocess.run(
        [sys.executable, "-m", "hf_denseseg.cli", "train", *words],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    results = json.loads((folder / "results.json").read_text())
    cost = results["training"]
    evaluated = sum("eval_mean_iou" in entry for entry in results["history"])
    return {
        "mean_iou": results["scores"]["mean_iou"],
        "steps": results["steps"],
        "train_cpu_seconds": cost["cpu_seconds"],
        "evaluation_cpu_seconds": cost["evaluation_cpu_seconds"],
        "cpu_seconds": cost["cpu_seconds"] + cost["evaluation_cpu_seconds"],
        "evaluations": evaluated,
    }


def run(args: argparse.Namespace) -> dict:
    steps = str(args.max_steps)
    with tempfile.TemporaryDirectory() as name:
        by_hand = train(
            [str(RECIPE), "--dataset", str(args.data), "--max_steps", steps, "--eval_steps", steps],
            Path(name) / "hand",
        )
        evaluation = by_hand["evaluation_cpu_seconds"] / by_hand["evaluations"]
        left = by_hand["cpu_seconds"] - EVALUATIONS * evaluation
        equal = round(left / (by_hand["train_cpu_seconds"] / by_hand["steps"]))
        derived = train([str(args.data), "--max_steps", str(equal)], Path(name) / "derived")
    difference = 100 * (derived["mean_iou"] - by_hand["mean_iou"])
    return {"by_hand": by_hand, "derived": derived, "difference_in_points": difference}


def readme_rows(result: dict) -> list[tuple[str, str, str]]:
    """(what, ours, peer) for the table of the README."""
    ours, peer = (result["figures"][kind] for kind in ("derived", "by_hand"))
    return [
        (
            f"`denseseg train FOLDER` on CamVid, {ours['cpu_seconds']:.0f} CPU s, {ours['steps']} steps, one run",
            f"{100 * ours['mean_iou']:.1f} % mIoU; peer {100 * peer['mean_iou']:.1f} %",
            f"the recipe made by hand, {peer['cpu_seconds']:.0f} CPU s, {peer['steps']} steps",
        )
    ]
