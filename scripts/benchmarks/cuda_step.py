"""A published variant on a GPU in bfloat16: forward and training step, eager and compiled, beside its reference.

The reference computes the same function with the same weights, written as in the paper or the released code
(`models/<family>/reference_<family>.py`). Parameters are float32 under bfloat16 autocast. Median of the rounds, timed
by events; memory is the peak of the allocator above the loaded model. A training step has loss and gradients and no
optimizer. Compiling is not part of the time of a step and is reported as `compile_seconds`.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from _timing import cuda_peak, in_turn
from torch import nn

import hf_denseseg
from hf_denseseg.models.auto.registration import reference_implementation

EXAMPLE = "example: python scripts/benchmark.py cuda_step dsct-base-sac --image_size 512 512 --batch_size 8"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLE
    parser.add_argument("variant", help="published name, see `denseseg models`")
    parser.add_argument("--image_size", nargs=2, type=int, default=(512, 512), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--num_labels", type=int, default=150)
    parser.add_argument("--repeats", type=int, default=7, help="rounds (default 7)")
    parser.add_argument("--compile", choices=["none", "forward", "both"], default="both", help="what to compile too")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu tries the script without a GPU")


def result_name(args: argparse.Namespace) -> str:
    return f"cuda_{args.variant}"


def build(args: argparse.Namespace) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    config = hf_denseseg.create_config(args.variant)
    sizes = {"image_size": list(args.image_size)} if hasattr(config, "image_size") else {}
    model = hf_denseseg.create_model(args.variant, num_labels=args.num_labels, **sizes).to(args.device)
    batch = {"pixel_values": torch.randn(args.batch_size, 3, *args.image_size, device=args.device)}
    if config.architectures[0].endswith("ForImageClassification"):
        batch["labels"] = torch.randint(0, args.num_labels, (args.batch_size,), device=args.device)
    else:
        regions = torch.randint(0, args.num_labels, (args.batch_size, 1, 6, 6), device=args.device).float()
        batch["labels"] = F.interpolate(regions, size=tuple(args.image_size))[:, 0].long()
    return model, batch


def run(args: argparse.Namespace) -> dict[str, Any]:
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("cuda_step needs a CUDA device; --device cpu tries the script without one.")
    model, batch = build(args)
    figures: dict[str, Any] = {
        "variant": args.variant,
        "image_size": list(args.image_size),
        "batch_size": args.batch_size,
        "repeats": args.repeats,
    }
    for name, training in (("forward", False), ("training_step", True)):
        model.train(training)
        sides: dict[str, nn.Module] = {"ours": model, "reference": reference_implementation(model)}
        if args.compile == "both" or (args.compile == "forward" and not training):
            sides["ours_compiled"] = torch.compile(model)

        def step(side: nn.Module, training: bool = training) -> None:
            given = batch if training else {"pixel_values": batch["pixel_values"]}
            with torch.autocast(args.device, torch.bfloat16), torch.inference_mode(not training):
                out = side(**given)
            if training:
                out.loss.backward()
                side.zero_grad()

        row: dict[str, Any] = {}
        steps: dict[str, Callable[[], object]] = {}
        for side, module in sides.items():
            call = steps[side] = lambda module=module: step(module)
            start = time.perf_counter()
            try:
                call()
            except torch.OutOfMemoryError:
                row[f"{side}_failed"] = "out of memory"
                steps.pop(side)
                torch.cuda.empty_cache()
                continue
            if side == "ours_compiled":
                row["compile_seconds"] = time.perf_counter() - start
            row[f"{side}_peak_mib"] = cuda_peak(call) if args.device == "cuda" else None
        for side, values in in_turn(steps, args.repeats, args.device).items():
            row[f"{side}_ms"] = 1e3 * statistics.median(values)
            row[f"{side}_images_per_second"] = args.batch_size / statistics.median(values)
        if "reference_ms" in row:
            row["time_ratio"] = row["reference_ms"] / row["ours_ms"]
            if row["ours_peak_mib"]:
                row["memory_ratio"] = row["reference_peak_mib"] / row["ours_peak_mib"]
        figures[name] = row
        del sides, steps
    return figures


def readme_rows(result: dict) -> list[tuple[str, str, str]]:
    """(what, ours, peer) for the table of measured figures."""
    figures, size = result["figures"], "x".join(map(str, result["figures"]["image_size"]))
    parts = []
    for step in ("forward", "training_step"):
        row = figures[step]
        if "time_ratio" in row:
            text = f"{step.replace('_', ' ')} {row['time_ratio']:.2f}x the speed, "
            parts.append(text + f"{row['memory_ratio']:.2f}x less peak memory")
    what = f"`{figures['variant']}`, {size}, batch {figures['batch_size']}, bfloat16, {result['accelerator']}"
    return [(what, "; ".join(parts), "reference implementation")]
