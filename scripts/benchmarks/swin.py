"""HLG-Tiny as a classifier against timm's `swin_tiny_patch4_window7_224`, forward at 224 pixels.

Both have random weights; timm's fused attention is on. They run in turn; the ratio is the median of the pairs, ours
divided by timm's, so below 1 means that ours is faster. Time is process time on the CPU, and measured by events on a
GPU. The paper gives 734 images/s for HLG-Tiny and 755 for Swin-T, on a GPU it does not name.
"""

import argparse
import statistics

import timm
import torch
from _timing import in_turn, median_ratio

import hf_denseseg

EXAMPLE = "example: python scripts/benchmark.py --threads 1 swin --repeats 11"
PEER = "swin_tiny_patch4_window7_224"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLE
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=11, help="pairs (default 11)")
    parser.add_argument("--device", default="cpu")


def run(args: argparse.Namespace) -> dict[str, object]:
    torch.manual_seed(0)
    ours = hf_denseseg.create_model("hlg-tiny", num_labels=1000).eval().to(args.device)
    theirs = timm.create_model(PEER, pretrained=False).eval().to(args.device)
    pixel_values = torch.randn(args.batch_size, 3, 224, 224, device=args.device)
    steps = {"ours": lambda: ours(pixel_values).logits, "timm": lambda: theirs(pixel_values)}
    with torch.inference_mode():
        taken = in_turn(steps, args.repeats, args.device)
    return {
        "peer": f"timm {timm.__version__} {PEER}, fused attention",
        "batch_size": args.batch_size,
        "repeats": args.repeats,
        "device": args.device,
        "time_ratio": median_ratio(taken["ours"], taken["timm"]),
        "ours_seconds": statistics.median(taken["ours"]),
        "timm_seconds": statistics.median(taken["timm"]),
    }


def readme_rows(result: dict) -> list[tuple[str, str, str]]:
    """(what, ours, peer) for the table of the README."""
    figures = result["figures"]
    where = "CPU" if figures["device"] == "cpu" else result["accelerator"]
    what = f"HLG-Tiny, forward, 224x224, batch {figures['batch_size']}, {where}"
    return [(what, f"{figures['time_ratio']:.2f}x the time", f"timm `{PEER}`")]
