"""How far the CPU kernel of deformable attention is from the least that its memory accesses take.

Every output row is a weighted sum of rows of the value map: four corners of each point. torch's `embedding_bag`
computes such sums from indices and weights that are known beforehand, so it reads the same rows without finding them
(softmax, sampling locations, floor, edges). Its time is the bound of a forward pass. A backward pass reads each of
these rows and reads and writes the gradient of each, which is three times as much.

Both sides run in turn in one process on the same points; the fastest of the repeats counts. `attainable` is what the
ratio to transformers would be if our kernel took the bound and nothing else.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_denseseg.ops.kernel_benchmark import CASES, sides
from hf_denseseg.ops.kernel_benchmark import inputs as case_inputs
from hf_denseseg.ops.kernel_loading import find_kernel

EXAMPLE = "example: python scripts/benchmark.py --threads 2 msda_roofline --instruction_set AVX2"
DEFAULT = ("unept-encoder", "unept-encoder-deit", "detr-decoder")
BYTES_PER_ROW = 4 * 32  # channels of a head in float32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLE
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(DEFAULT))
    parser.add_argument("--repeats", type=int, default=5, help="runs per side; the fastest counts (default 5)")
    parser.add_argument("--instruction_set", default="", help="AVX2, AVX-512 or generic (default: the best)")


def result_name(args: argparse.Namespace) -> str:
    return f"msda_roofline_{args.threads}_threads"


def corner_rows(name: str, tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows of the value map that a case reads, and their weights, both `(B*Q*M, 4*L*P)`.

    Corners outside the map are row 0 with weight 0.
    """
    value, offsets, logits, references = tensors
    batch, tokens, heads, _ = value.shape
    weights = logits.flatten(3).softmax(-1).view_as(logits)
    rows, shares, start = [], [], 0
    head = torch.arange(heads)[:, None]
    image = torch.arange(batch)[:, None, None, None] * tokens
    for level, (height, width) in enumerate(CASES[name].shapes):
        size = torch.tensor([width, height], dtype=torch.float32)
        x, y = (references[:, :, None, level, None] * size - 0.5 + offsets[:, :, :, level]).unbind(-1)
        left, top = x.floor(), y.floor()
        for column, across in ((left, 1 - (x - left)), (left + 1, x - left)):
            for line, down in ((top, 1 - (y - top)), (top + 1, y - top)):
                inside = (column >= 0) & (column < width) & (line >= 0) & (line < height)
                token = image + start + (line * width + column).long()
                rows.append(torch.where(inside, token * heads + head, 0))
                shares.append(weights[:, :, :, level] * across * down * inside)
        start += height * width
    return torch.cat(rows, -1).flatten(0, 2), torch.cat(shares, -1).flatten(0, 2)


def bound(name: str, tensors: list[Tensor]) -> Callable[[], Tensor]:
    """The same sums by `embedding_bag`."""
    rows, shares = corner_rows(name, tensors)
    table = tensors[0].flatten(0, 2)
    return lambda: F.embedding_bag(rows, table, per_sample_weights=shares, mode="sum")


def measure(name: str, repeats: int) -> dict[str, float]:
    """Milliseconds of both sides and of transformers' form for points anywhere on the map, and their ratios."""
    tensors = case_inputs(name, "uniform")
    forward, backward = (sides(name, training, tensors) for training in (False, True))
    runs = {
        "bound": bound(name, tensors),
        "forward": forward["ours"],
        "backward": backward["ours"],
        "peer_forward": forward["peer"],
        "peer_backward": backward["peer"],
    }
    found = runs["bound"]().view(-1)
    error = (found - runs["forward"]().reshape(-1)).norm() / found.norm()
    assert error < 1e-4, f"the two sides differ by {error}"
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    taken: dict[str, list[float]] = {side: [] for side in runs}
    for _ in range(repeats):
        for side, run in runs.items():
            start = clock()
            run()
            taken[side].append(1e3 * (clock() - start))
    row = {f"{side}_ms": min(values) for side, values in taken.items()}
    count = corner_rows(name, tensors)[0].numel()
    row["gigabytes_per_second_of_the_bound"] = count * BYTES_PER_ROW / row["bound_ms"] / 1e6
    for step, passes in (("forward", 1), ("backward", 3)):
        least = passes * row["bound_ms"]
        row[f"{step}_ratio"] = row[f"peer_{step}_ms"] / row[f"{step}_ms"]
        row[f"{step}_attainable"] = row[f"peer_{step}_ms"] / least
        row[f"{step}_share_of_bound"] = least / row[f"{step}_ms"]
    both = [row[f"{side}forward_ms"] + row[f"{side}backward_ms"] for side in ("peer_", "")]
    row["forward_and_backward_ratio"] = both[0] / both[1]
    return row


def run(args: argparse.Namespace) -> dict[str, Any]:
    kernel = find_kernel("cpu").kernel
    if kernel is None:
        raise SystemExit(f"there is nothing to measure: {find_kernel('cpu').reasons()}")
    figures: dict[str, Any] = {
        "peer": "torch embedding_bag of the same rows; transformers MultiScaleDeformableAttention",
        "instruction_set": kernel.instruction_set(args.instruction_set),
        "repeats": args.repeats,
    }
    return figures | {name: measure(name, args.repeats) for name in args.cases}


def readme_rows(result: dict) -> list[tuple[str, str, str]]:
    """(what, ours, peer) for the table of measurements."""
    rows = []
    for name in sorted(CASES.keys() & result["figures"].keys()):
        row = result["figures"][name]
        what = f"deformable attention, {name}, points anywhere, {result['figures']['instruction_set']}"
        speed = f"{row['forward_ratio']:.1f}x / {row['forward_and_backward_ratio']:.1f}x the speed"
        share = f"torch reads the same rows in {100 * row['forward_share_of_bound']:.0f} % of the forward pass"
        steps = f"forward / forward and backward, {result['threads']} threads"
        rows.append((f"{what}, {steps}", f"{speed}; {share}", "transformers' PyTorch form"))
    return rows
