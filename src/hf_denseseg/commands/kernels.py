"""`denseseg kernels`: build the compiled operator, tell which implementation runs, measure it."""

import argparse
import json
import os
from pathlib import Path
from typing import Any

# Keys of `kernel_benchmark.CASES`; written out, since reading the command line must not import torch.
CASES = ("detr-decoder", "detr-encoder", "mask2former", "unept-decoder", "unept-encoder", "unept-encoder-deit")


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `kernels` to the command line."""
    parser = subparsers.add_parser(
        "kernels",
        help="build, inspect and measure the deformable-attention kernel",
        description="Deformable attention as compiled code: build it with the C++ compiler of this machine, see which "
        "implementation runs and why, and measure it against the PyTorch one of transformers.",
        epilog="examples:\n  denseseg kernels build\n  denseseg kernels info\n  denseseg kernels bench --threads 2",
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    build_parser = _add_action(
        actions, "build", "compile it, unless that is done already (takes seconds)", "--optional"
    )
    text = "kernel repository (default: the package's)"
    build_parser.add_argument("--source", type=Path, metavar="FOLDER", help=text)
    build_parser.add_argument(
        "--output_dir",
        type=Path,
        metavar="FOLDER",
        help="folder to build into (default: build/ in the checkout, or the user's cache folder)",
    )
    build_parser.add_argument("--optional", action="store_true", help="without a compiler, print a note and succeed")
    info = _add_action(actions, "info", "which implementation runs on the CPU and on the GPU, and why", "--json")
    info.add_argument("--json", action="store_true", help="print JSON instead of a table")
    text = "time and memory, compared with the PyTorch code of transformers"
    bench = _add_action(actions, "bench", text, "--cases unept-decoder detr-encoder --threads 2")
    text = "shapes as in these models: %(choices)s (default: unept-decoder)"
    bench.add_argument("--cases", nargs="+", choices=CASES, metavar="CASE", default=["unept-decoder"], help=text)
    bench.add_argument("--threads", type=int, metavar="N", help="torch threads (default: torch's)")
    text = "runs of each, of which the fastest counts (default: %(default)s)"
    bench.add_argument("--repeats", type=int, metavar="N", default=3, help=text)


def _add_action(actions: argparse._SubParsersAction, name: str, text: str, options: str) -> argparse.ArgumentParser:
    example = f"example:\n  denseseg kernels {name} {options}"
    return actions.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", epilog=example)


def main(args: argparse.Namespace) -> int:
    """Run one of the three actions."""
    return {"build": _build, "info": _info, "bench": _bench}[args.action](args)


def _build(args: argparse.Namespace) -> int:
    from hf_denseseg.ops.kernel_build import build, compiler
    from hf_denseseg.ops.kernel_loading import KERNEL
    from hf_denseseg.ops.kernel_paths import BUILD, SOURCE

    if args.optional and compiler() is None:
        print("no C++ compiler was found: deformable attention runs in plain PyTorch, many times slower.")
        return 0
    source = args.source or SOURCE
    output = args.output_dir or (BUILD if source == SOURCE else source / "build")
    for variant in build(source, output):
        print(f"ready: {variant}")
    if output != BUILD:
        print(f"use it with: export LOCAL_KERNELS={KERNEL}={output.resolve()}")
    return 0


def _info(args: argparse.Namespace) -> int:
    import torch

    from hf_denseseg.ops.kernel_build import compiler
    from hf_denseseg.ops.kernel_loading import find_hub_kernel, find_kernel

    report: dict[str, Any] = {"DENSESEG_MSDA": os.environ.get("DENSESEG_MSDA", "auto"), "compiler": compiler()}
    for device in ("cpu", "cuda"):
        search = find_kernel(device)
        kernel, failures = search.kernel, dict(search.failures)
        path = {"cpu": "compiled", "cuda": "triton"}[device] if kernel is not None else "reference"
        if device == "cuda" and torch.cuda.is_available():
            hub = find_hub_kernel()
            failures |= hub.failures
            path = "hub (eager)" if kernel is None and hub.kernel is not None else path
        report[device] = {"runs": path, "from": search.source, "not used": failures}
        if device == "cpu" and kernel is not None:
            report[device]["instruction set"] = kernel.instruction_set()
    if args.json:
        print(json.dumps(report, indent=1))
        return 0
    for name, value in report.items():
        rows = value if isinstance(value, dict) else {"": value}
        for key, entry in rows.items():
            text = "; ".join(f"{k}: {v}" for k, v in entry.items()) if isinstance(entry, dict) else entry
            print(f"{name:<14} {key:<16} {text or '-'}")
    return 0


def _bench(args: argparse.Namespace) -> int:
    import torch

    from hf_denseseg.ops import kernel_benchmark

    before = torch.get_num_threads()
    torch.set_num_threads(before if args.threads is None else args.threads)
    try:
        print(f"{'case':<20}{'pass':<10}{'ours ms':>10}{'torch ms':>10}{'ratio':>8}{'ours MiB':>10}{'torch MiB':>10}")
        for name in args.cases:
            for step, row in kernel_benchmark.measure(name, args.repeats).items():
                print(
                    f"{name:<20}{step:<10}{row['ours_ms']:>10.1f}{row['peer_ms']:>10.1f}{row['time_ratio']:>7.1f}x"
                    f"{row['ours_mib']:>10.1f}{row['peer_mib']:>10.1f}"
                )
    finally:
        torch.set_num_threads(before)
    return 0
