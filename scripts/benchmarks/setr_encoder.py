"""The plain ViT of SETR against timm's `vit_base_patch16_384`, forward, at the same number of tokens.

Same weights, same tokens (checked). Both run in turn; the ratio is the median of the pairs, ours divided by timm's, so
below 1 means that ours is faster. Time is process time on the CPU, and measured by events on a GPU.
"""

import argparse
import statistics

import timm
import torch
from _timing import in_turn, median_ratio

import hf_denseseg

EXAMPLE = "example: python scripts/benchmark.py --threads 1 setr_encoder --repeats 11"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLE
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=11, help="pairs (default 11)")
    parser.add_argument("--device", default="cpu")


def run(args: argparse.Namespace) -> dict[str, object]:
    torch.manual_seed(0)
    theirs = timm.create_model("vit_base_patch16_384", pretrained=False).eval()
    weights = theirs.state_dict()
    model = hf_denseseg.load_official("setr", weights, "setr-naive-vit-base", image_size=384)
    ours, theirs = model.setr.to(args.device), theirs.to(args.device)
    theirs.norm = torch.nn.Identity()  # SETR has its norms in the heads
    pixel_values = torch.randn(args.batch_size, 3, 384, 384, device=args.device)
    steps = {
        "ours": lambda: ours(pixel_values).last_hidden_state,
        "timm": lambda: theirs.forward_features(pixel_values),
    }
    with torch.inference_mode():
        difference = (steps["ours"]() - steps["timm"]()).abs().max().item()
        taken = in_turn(steps, args.repeats, args.device)
    return {
        "peer": f"timm {timm.__version__} vit_base_patch16_384, same weights, fused attention",
        "batch_size": args.batch_size,
        "repeats": args.repeats,
        "device": args.device,
        "tokens": 577,
        "largest_difference_of_tokens": difference,
        "time_ratio": median_ratio(taken["ours"], taken["timm"]),
        "ours_seconds": statistics.median(taken["ours"]),
        "timm_seconds": statistics.median(taken["timm"]),
    }


def readme_rows(result: dict) -> list[tuple[str, str, str]]:
    """(what, ours, peer) for the table of the README."""
    figures = result["figures"]
    where = "CPU" if figures["device"] == "cpu" else result["accelerator"]
    what = f"SETR's plain ViT, forward, {figures['tokens']} tokens, {where}"
    return [(what, f"{figures['time_ratio']:.2f}x the time", "timm `vit_base_patch16_384`")]
