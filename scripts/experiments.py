"""What the experiments share: runs as processes of their own that are resumed or kept, and statistics over seeds."""

import json
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from hf_denseseg.files import write_atomic

ROOT = Path(__file__).resolve().parents[1]
DENSESEG = (sys.executable, "-m", "hf_denseseg.cli")


def train(folder: Path, settings: dict[str, Any], command: tuple[str, ...] = DENSESEG) -> dict[str, Any]:
    """Run a recipe in a process of its own, resume it, or return its results if it is finished.

    The commit of the run is among the results: a table may grow over several evenings.

    Args:
        folder: run folder; the recipe and the output of the process are written beside it.
        settings: keys of the recipe, without `output_dir`.
        command: program with the subcommands of `denseseg`.

    Returns:
        the content of `results.json`, and `commit`.

    Raises:
        RuntimeError: the process failed; the message is its last line.
    """
    finished, commit = folder / "results.json", folder.with_name(f"{folder.name}.commit")
    if not finished.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        recipe, log = folder.with_name(f"{folder.name}.yaml"), folder.with_name(f"{folder.name}.log")
        write_atomic(commit, current_commit())
        write_atomic(recipe, yaml.safe_dump({**settings, "output_dir": str(folder)}, sort_keys=False))
        with log.open("a") as file:
            code = subprocess.run([*command, "train", str(recipe)], stdout=file, stderr=file).returncode
        if code:
            raise RuntimeError(f"exit code {code}: {log.read_text().strip().splitlines()[-1]}")
    return json.loads(finished.read_text()) | {"commit": commit.read_text()}


def slug(name: str) -> str:
    """A name as a file or folder."""
    return "".join(letter if letter.isalnum() else "_" for letter in name.lower())


def score(results: dict[str, Any]) -> float:
    """mIoU in percent."""
    return 100 * results["scores"]["mean_iou"]


def outcome_of(run: Callable[[], dict[str, Any]], seed: int) -> dict[str, Any]:
    """What the results keep of one run: its seed, and what it gave or why it failed."""
    try:
        return {"seed": seed, "state": "done", **run()}
    except RuntimeError as error:
        return {"seed": seed, "state": f"failed: {error}", "commit": current_commit()}


def current_commit() -> str:
    """Hash of the commit that is checked out."""
    words = ["git", "rev-parse", "HEAD"]
    return subprocess.run(words, capture_output=True, text=True, cwd=ROOT).stdout.strip()


def environment(script: str, words: list[str]) -> dict[str, Any]:
    """What the figures depend on besides the code: versions, processor, the command."""
    import benchmark

    return benchmark.environment() | {"command": f"python scripts/{script} {shlex.join(words)}"}


def finished(row: dict[str, Any]) -> dict[int, float]:
    """mIoU of the runs that did not fail, by seed."""
    return {run["seed"]: run["mean_iou_percent"] for run in row["runs"] if run["state"] == "done"}


def gain(row: dict[str, Any], base: dict[str, Any] | None) -> str:
    """Gain over the base seed by seed, with its 95 % interval if there are several seeds."""
    own, other = finished(row), finished(base or {"runs": []})
    seeds = sorted(own.keys() & other.keys())
    pairs = [own[seed] for seed in seeds], [other[seed] for seed in seeds]
    if row is base or not seeds:
        return "–"
    if len(seeds) == 1:
        return f"{pairs[0][0] - pairs[1][0]:+.2f}"
    return "{:+.2f} [{:+.2f}, {:+.2f}]".format(*paired_interval(*pairs))


def mean_and_spread(scores: list[float]) -> str:
    """Mean, and the standard deviation of more than one score: "61.20 ± 0.85"."""
    spread = f" ± {statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
    return f"{statistics.mean(scores):.2f}{spread}"


def paired_interval(first: list[float], second: list[float]) -> tuple[float, float, float]:
    """Mean of `first - second` seed by seed, and its 95 % confidence interval by Student's t."""
    from scipy.stats import ttest_rel

    low, high = ttest_rel(first, second).confidence_interval()
    return statistics.mean(first) - statistics.mean(second), float(low), float(high)
