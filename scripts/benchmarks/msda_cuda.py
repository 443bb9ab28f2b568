"""Deformable attention on a GPU: the Triton kernel against the plain form of transformers and other CUDA kernels.

All compute from raw offsets and logits to the result (softmax and locations included), in turn in one process; the
median of the rounds counts, timed by events. A ratio is the peer's figure divided by ours. Memory is the peak of the
allocator above the inputs. Errors of the forward pass are compared with float64, as norm of the difference over norm.
The backward pass is that of an output computed before. In bfloat16 the value is bfloat16 and coordinates are float32.
"""

import argparse
import math
import os
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _timing import cuda_peak, in_turn
from torch import Tensor

from hf_denseseg.ops import kernel_loading
from hf_denseseg.ops.kernel_benchmark import CASES, inputs, peer
from hf_denseseg.ops.ms_deform_attn import ms_deform_attn
from hf_denseseg.ops.reference import ms_deform_attn_reference

EXAMPLE = "example: python scripts/benchmark.py msda_cuda --batch_size 8 --peer path/to/a/kernel/folder"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Run = Callable[..., Tensor]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLE
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=20, help="rounds per figure; the median counts (default 20)")
    parser.add_argument("--peer", type=Path, help="folder of a build of kernels-community/deformable-detr")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu tries the script without a GPU")


def forced(path: str) -> Run:
    """The operator with `DENSESEG_MSDA` set."""

    def call(*arguments: Any) -> Tensor:
        os.environ["DENSESEG_MSDA"] = path
        return ms_deform_attn(*arguments)

    return call


def cast(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    value, *coordinates = tensors
    return [value.to(dtype), *coordinates]


def transformers_form(
    value: Tensor, offsets: Tensor, logits: Tensor, references: Tensor, shapes: tuple[tuple[int, int], ...]
) -> Tensor:
    """The plain form wants one dtype for value and coordinates, so it computes in that of the coordinates."""
    return peer(value.to(offsets.dtype), offsets, logits, references, shapes).to(value.dtype)


def measure(runs: dict[str, Run], tensors: list[Tensor], shapes: Any, repeats: int) -> dict[str, dict[str, Any]]:
    device = tensors[0].device.type
    rows: dict[str, dict[str, Any]] = {}
    for name in ("forward", "backward"):
        steps: dict[str, Callable[[], object]] = {}
        for side, run in runs.items():
            if name == "forward":
                steps[side] = partial(run, *tensors, shapes)
                continue
            leaves = [tensor.detach().requires_grad_() for tensor in tensors[:3]]
            out = run(*leaves, tensors[3], shapes)
            steps[side] = partial(torch.autograd.grad, out, leaves, torch.ones_like(out), retain_graph=True)
        with torch.inference_mode(name == "forward"):
            memory = {side: cuda_peak(step) if device == "cuda" else math.nan for side, step in steps.items()}
            taken = in_turn(steps, repeats, device)
        row: dict[str, Any] = {}
        for side, values in taken.items():
            row |= {f"{side}_ms": 1e3 * statistics.median(values), f"{side}_mib": memory[side]}
        for side in runs:
            if side != "ours":
                row[f"{side}_time_ratio"] = row[f"{side}_ms"] / row["ours_ms"]
                row[f"{side}_memory_ratio"] = row[f"{side}_mib"] / row["ours_mib"]
        rows[name] = row
    return rows


def run(args: argparse.Namespace) -> dict[str, Any]:
    on_gpu = args.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        raise SystemExit("msda_cuda needs a CUDA device; `msda` measures the CPU kernel.")
    if on_gpu and kernel_loading.find_kernel("cuda").kernel is None:
        raise SystemExit(f"there is nothing to measure: {kernel_loading.find_kernel('cuda').reasons()}")
    runs: dict[str, Run] = {"ours": forced("triton") if on_gpu else ms_deform_attn, "transformers": transformers_form}
    if args.peer:
        os.environ["LOCAL_KERNELS"] = f"{kernel_loading.HUB_KERNEL}={args.peer.resolve()}"
        if kernel_loading.find_hub_kernel().kernel is None:
            raise SystemExit(f"--peer {args.peer}: {kernel_loading.find_hub_kernel().reasons()}")
        runs["cuda_kernel"] = forced("hub")
    figures: dict[str, Any] = {"batch_size": args.batch_size, "repeats": args.repeats, "peer_folder": bool(args.peer)}
    for name in args.cases:
        shapes = CASES[name].shapes
        figures[name] = {}
        for pattern in ("initial", "uniform"):
            plain = inputs(name, pattern, args.batch_size, args.device)
            with torch.inference_mode():
                exact = ms_deform_attn_reference(*(tensor[:1].double() for tensor in plain), shapes)
            for dtype_name, dtype in DTYPES.items():
                tensors = cast(plain, dtype)
                rows = measure(runs, tensors, shapes, args.repeats)
                with torch.inference_mode():
                    for side, call in runs.items():
                        error = call(*tensors, shapes)[:1].double() - exact
                        rows["forward"][f"{side}_error"] = (error.norm() / exact.norm()).item()
                figures[name][f"{pattern}_{dtype_name}"] = rows
    return figures


def readme_rows(result: dict) -> list[tuple[str, str, str]]:
    """(what, ours, peer) for the table of measured figures, one row per peer."""
    figures = result["figures"]
    cases = sorted(CASES.keys() & figures.keys())
    rows = []
    for side, label in (("transformers", "transformers' PyTorch form"), ("cuda_kernel", "the CUDA kernel on the hub")):
        if side == "cuda_kernel" and not figures["peer_folder"]:
            continue
        parts = []
        for step in ("forward", "backward"):
            ratios = [row[step][f"{side}_time_ratio"] for name in cases for row in figures[name].values()]
            parts.append(f"{min(ratios):.1f}x to {max(ratios):.1f}x")
        what = f"deformable attention, {len(cases)} shapes, forward / backward, {result['accelerator']}"
        rows.append((what, " / ".join(parts) + " the speed", label))
    return rows
