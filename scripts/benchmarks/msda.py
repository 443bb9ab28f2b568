"""Deformable attention on the CPU against the plain PyTorch form of transformers: time, memory, error, threads.

Both compute from raw offsets and logits to the result (softmax and locations included), in turn in one process; the
fastest of the repeats counts. A ratio is the peer's figure divided by ours. Two patterns of points: the initial ones
of Deformable DETR, plus or minus a pixel, and anywhere on the map. Time is process time on one thread and wall time on
several; memory is the peak above the inputs in fresh processes; errors are compared with float64.
"""

import argparse
import time
from typing import Any

import torch

from hf_denseseg.ops.kernel_benchmark import CASES, errors, measure, sides
from hf_denseseg.ops.kernel_benchmark import inputs as case_inputs
from hf_denseseg.ops.kernel_loading import find_kernel

EXAMPLE = "example: python scripts/benchmark.py --threads 2 msda --cases unept-encoder detr-encoder"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLE
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--repeats", type=int, default=5, help="runs per side; the fastest counts (default 5)")


def result_name(args: argparse.Namespace) -> str:
    return f"msda_{args.threads}_threads"


def scaling(name: str, threads: int, repeats: int) -> dict[str, float]:
    """Wall time on one thread divided by that on several, both ours, in turn; the fastest of the repeats."""
    ratios = {}
    for step in ("forward", "backward"):
        run = sides(name, step == "backward", case_inputs(name))["ours"]
        fastest = {1: float("inf"), threads: float("inf")}
        for _ in range(2 * repeats):
            for count in fastest:
                torch.set_num_threads(count)
                start = time.perf_counter()
                run()
                fastest[count] = min(fastest[count], time.perf_counter() - start)
        ratios[step] = fastest[1] / fastest[threads]
    return ratios


def run(args: argparse.Namespace) -> dict[str, Any]:
    kernel = find_kernel("cpu").kernel
    if kernel is None:
        raise SystemExit(f"there is nothing to measure: {find_kernel('cpu').reasons()}")
    figures: dict[str, Any] = {
        "peer": "transformers MultiScaleDeformableAttention (grid_sample), softmax and locations before it",
        "instruction_set": kernel.instruction_set(),
        "repeats": args.repeats,
    }
    for name in args.cases:
        figures[name] = {
            "initial": measure(name, args.repeats),
            "uniform": measure(name, args.repeats, "uniform", memory=False),
            "errors": errors(name),
        }
        if args.threads > 1:
            figures[name]["scaling"] = scaling(name, args.threads, args.repeats)
    return figures


def readme_rows(result: dict) -> list[tuple[str, str, str]]:
    """(what, ours, peer) for the table of the README; figures of one thread stay in their file, to keep it short."""
    threads, cases = result["threads"], sorted(CASES.keys() & result["figures"].keys())
    if threads == 1 or not cases:
        return []
    steps = [list(result["figures"][name]["initial"].values()) for name in cases]
    speed, memory = (
        " / ".join(f"{min(ratios):.{places}f}x to {max(ratios):.{places}f}x" for ratios in zip(*table, strict=True))
        for places, table in (
            (1, [[row["time_ratio"] for row in pair] for pair in steps]),
            (0, [[row["memory_ratio"] for row in pair] for pair in steps]),
        )
    )
    what = f"deformable attention, {len(cases)} shapes, forward / backward, CPU, {threads} threads"
    return [(what, f"{speed} the speed, {memory} less peak memory", "transformers' PyTorch form")]
