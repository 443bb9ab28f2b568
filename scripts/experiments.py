"""What the experiments share: runs as processes of their own that are resumed or kept, and statistics over seeds."""

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from hf_denseseg.files import write_atomic

DENSESEG = (sys.executable, "-m", "hf_denseseg.cli")


def train(folder: Path, settings: dict[str, Any], command: tuple[str, ...] = DENSESEG) -> dict[str, Any]:
    """Run a recipe in a process of its own, resume it, or return its results if it is finished.

    Args:
        folder: run folder; the recipe and the output of the process are written beside it.
        settings: keys of the recipe, without `output_dir`.
        command: program with the subcommands of `denseseg`.

    Raises:
        RuntimeError: the process failed; the message is its last line.
    """
    finished = folder / "results.json"
    if not finished.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        recipe, log = folder.with_name(f"{folder.name}.yaml"), folder.with_name(f"{folder.name}.log")
        write_atomic(recipe, yaml.safe_dump({**settings, "output_dir": str(folder)}, sort_keys=False))
        with log.open("a") as file:
            code = subprocess.run([*command, "train", str(recipe)], stdout=file, stderr=file).returncode
        if code:
            raise RuntimeError(f"exit code {code}: {log.read_text().strip().splitlines()[-1]}")
    return json.loads(finished.read_text())


def score(results: dict[str, Any]) -> float:
    """mIoU in percent."""
    return 100 * results["scores"]["mean_iou"]


def mean_and_spread(scores: list[float]) -> str:
    """Mean, and the standard deviation of more than one score: "61.20 ± 0.85"."""
    spread = f" ± {statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
    return f"{statistics.mean(scores):.2f}{spread}"


def paired_interval(first: list[float], second: list[float]) -> tuple[float, float, float]:
    """Mean of `first - second` seed by seed, and its 95 % confidence interval by Student's t."""
    from scipy.stats import ttest_rel

    low, high = ttest_rel(first, second).confidence_interval()
    return statistics.mean(first) - statistics.mean(second), float(low), float(high)
