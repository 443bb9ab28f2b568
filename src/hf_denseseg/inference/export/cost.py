"""Milliseconds and peak memory of a checkpoint and of its export, on one image, with the threads that torch has."""

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hf_denseseg.errors import RunError
from hf_denseseg.inference.export.engines import ENGINES
from hf_denseseg.inference.export.exporting import Request, load_program
from hf_denseseg.inference.export.formats import FORMATS
from hf_denseseg.inference.export.programs import Program, example_input
from hf_denseseg.inference.sliding_window import Size
from hf_denseseg.models.channels import image_channels

MEASURED = (512, 512)  # where images may have any size
ROUNDS = 5


def measure_cost(request: Request, program: Program, folder: Path) -> dict[str, Any]:
    """Run both in turn on one image for the time, and each in a process of its own for the memory.

    Args:
        request: what was exported.
        program: the checkpoint.
        folder: of the export.

    Returns:
        For `export.json`: `size`, `threads`, and for `model` and `exported` the median `milliseconds` and
        `peak_memory_bytes`, of loading and running, above that of the process before.
    """
    size = request.size or MEASURED
    engine = ENGINES[request.format.name](folder / request.format.file)
    values = example_input(program, image_channels(program.model.config), 1, size)
    seconds = paired_seconds([lambda: program(values), lambda: engine(values)])
    words = [request.checkpoint, request.task, request.format.name, str(request.with_argmax), *map(str, size)]
    return {
        "size": list(size),
        "threads": torch.get_num_threads(),
        **{
            kind: {"milliseconds": 1000 * spent, "peak_memory_bytes": _peak_memory(kind, [str(folder), *words])}
            for kind, spent in zip(("model", "exported"), seconds, strict=True)
        },
    }


@torch.no_grad()
def paired_seconds(runs: list[Callable[[], Any]], rounds: int = ROUNDS) -> list[float]:
    """Median seconds of each of several runs, which take turns, so that all see the same load of the machine."""
    spent: list[list[float]] = [[] for _ in runs]
    for number in range(rounds + 1):
        for run, times in zip(runs, spent, strict=True):
            started = time.perf_counter()
            run()
            if number:  # the first round warms up
                times.append(time.perf_counter() - started)
    return [statistics.median(times) for times in spent]


def _peak_memory(kind: str, words: list[str]) -> int:
    """Bytes that a new process needs to load and run the checkpoint or its export."""
    command = [sys.executable, "-m", __name__, kind, str(torch.get_num_threads()), *words]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RunError(f"The memory of the {kind} could not be measured: {done.stderr.strip()[-300:]}")
    return json.loads(done.stdout.splitlines()[-1])


@torch.no_grad()
def _main(kind: str, threads: str, folder: str, checkpoint: str, task: str, name: str, *rest: str) -> None:
    """Load and run once; print the growth of the peak memory in bytes."""
    with_argmax, size = rest[0] == "True", (int(rest[1]), int(rest[2]))
    torch.set_num_threads(int(threads))
    torch.randn(8, 3, 64, 64).sum()  # what torch itself sets up at its first operation
    values = _example(folder, with_argmax, size)
    before = peak_memory()
    if kind == "model":
        load_program(Request(checkpoint, task, FORMATS[name], with_argmax, size))(values)
    else:
        ENGINES[name](Path(folder) / FORMATS[name].file)(values)
    print(peak_memory() - before)


def _example(folder: str, with_argmax: bool, size: Size) -> torch.Tensor:
    channels = json.loads((Path(folder) / "export.json").read_text())["channels"]
    values = torch.zeros(1, channels, *size)
    return values.byte() if with_argmax else values


def peak_memory() -> int:
    """Peak memory of this process in bytes; `getrusage` on Linux knows that of the parent too."""
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


if __name__ == "__main__":
    _main(*sys.argv[1:])
