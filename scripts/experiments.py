"""What the experiments share: runs as processes of their own that are resumed or kept, and statistics over seeds."""

import itertools
import json
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from hf_denseseg.files import atomic_path, write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DENSESEG = (sys.executable, "-m", "hf_denseseg.cli")


def train(folder: Path, settings: dict[str, Any], command: tuple[str, ...] = DENSESEG) -> dict[str, Any]:
    """Run a recipe in a process of its own, resume it, or return its results if it is finished.

    The commit and the processor of the run are among the results: a table may grow over several evenings and machines.

    Args:
        folder: run folder; the recipe and the output of the process are written beside it.
        settings: keys of the recipe, without `output_dir`.
        command: program with the subcommands of `denseseg`.

    Returns:
        the content of `results.json`, with `commit` and `processor`.

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
    results = json.loads(finished.read_text())
    return results | {"commit": results["versions"].get("commit"), "processor": results["machine"]["processor"]}


def results_so_far(file: Path, head: dict[str, Any], script: str, words: list[str]) -> dict[str, Any]:
    """The results that were written before, or none yet.

    Args:
        file: JSON file of the results.
        head: what all runs of the file have in common.
        script: name of the script, for the command in new results.
        words: its arguments.

    Returns:
        `head`, `environment` (of the first run) and `rows`.

    Raises:
        SystemExit: the file holds results with another value in `head`.
    """
    if not file.exists():
        return head | {"environment": environment(script, words), "rows": {}}
    results = json.loads(file.read_text())
    for key, value in head.items():
        if (known := results.get(key)) != value:
            sys.exit(f"{file} holds results with {key} {known}, not {value}: run with the same, or give another "
                     "folder as --results.")  # fmt: skip
    return results


def train_seeds(
    rows: dict[str, dict[str, Any]],
    names: Iterable[str],
    seeds: Iterable[int],
    run: Callable[[str, int], dict[str, Any]],
    write: Callable[[], None],
) -> None:
    """Every row with the first seed, every row with the second, and so on; what failed before is tried again.

    Args:
        rows: states of the rows by name; `runs` of each takes what is new.
        names: rows to train.
        seeds: seeds to train.
        run: trains a row with a seed; may raise a RuntimeError, which is kept among the runs.
        write: is called after every run.
    """
    for seed, name in itertools.product(seeds, list(names)):
        if seed in finished(rows[name]):
            continue
        done = outcome_of(partial(run, name, seed), seed)
        others = [each for each in rows[name]["runs"] if each["seed"] != seed]
        rows[name]["runs"] = sorted([*others, done], key=lambda each: each["seed"])
        print(f"{name}, seed {seed}: {done.get('mean_iou_percent', done['state'])}", flush=True)
        write()


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


def current_commit() -> str | None:
    """Hash of the commit that is checked out, as runs name it."""
    from hf_denseseg.training.environment import PACKAGE, checked_out_commit  # loads torch, which --help need not

    return checked_out_commit(PACKAGE)


def environment(script: str, words: list[str]) -> dict[str, Any]:
    """What the figures depend on besides the code: versions, processor, the command."""
    import benchmark

    return benchmark.environment() | {"command": f"python scripts/{script} {shlex.join(words)}"}


def finished(row: dict[str, Any]) -> dict[int, float]:
    """mIoU of the runs that did not fail, by seed."""
    return {run["seed"]: run["mean_iou_percent"] for run in row["runs"] if run["state"] == "done"}


def costs(row: dict[str, Any], processor: str) -> list[dict[str, Any]]:
    """Finished runs of a row on one processor: seconds of another mean something else."""
    return [run for run in row["runs"] if run["state"] == "done" and run["processor"] == processor]


def differences(row: dict[str, Any], base: dict[str, Any] | None) -> list[float]:
    """Gain of a row over its base, seed by seed; empty for the base itself."""
    own, other = finished(row), finished(base or {"runs": []})
    return [] if row is base else [own[seed] - other[seed] for seed in sorted(own.keys() & other.keys())]


def gain(row: dict[str, Any], base: dict[str, Any] | None) -> str:
    """Mean gain over the base, with its 95 % interval by Student's t if there are several seeds."""
    gains = differences(row, base)
    if len(gains) < 2:
        return f"{gains[0]:+.2f}" if gains else "–"
    from scipy.stats import ttest_1samp

    low, high = ttest_1samp(gains, 0.0).confidence_interval()
    return f"{statistics.mean(gains):+.2f} [{low:+.2f}, {high:+.2f}]"


@contextmanager
def chart(path: Path, size: tuple[float, float]) -> Iterator["Axes"]:
    """Axes to draw on, with a grid; the image is written at the end.

    Args:
        path: PNG file.
        size: (width, height) in inches of 120 pixels.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.add_subplot()
    axis.grid(alpha=0.3)
    yield axis
    with atomic_path(path) as aside:
        figure.savefig(aside, dpi=120)


def mean_and_spread(values: list[float], form: str = ".2f") -> str:
    """Mean, and the standard deviation of more than one value: "61.20 ± 0.85"; `form` is that of the mean."""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{spread}"
