"""Deformable DETR of transformers with our kernel against itself without it: forward and training step on the CPU.

A small random configuration (with a narrow ResNet, so that the figures are those of the transformer; 256
channels, 8 heads, 3 + 3 layers, 300 queries). Both run in turn; a ratio is the median of the pairs, peer divided by
ours. Time is process time.
"""

import argparse
import copy
import statistics
from functools import partial

import torch
from _timing import in_turn, median_ratio
from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection, ResNetConfig

from hf_denseseg.ops import kernelize_deformable_attention

EXAMPLE = "example: python scripts/benchmark.py --threads 1 deformable_detr --repeats 5"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLE
    parser.add_argument("--image_size", nargs=2, type=int, default=(480, 640), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--repeats", type=int, default=5, help="pairs (default 5)")


def build() -> torch.nn.Module:
    torch.manual_seed(0)
    backbone = ResNetConfig(
        embedding_size=16,
        hidden_sizes=[16, 32, 64, 128],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    config = DeformableDetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=backbone,
        encoder_layers=3,
        decoder_layers=3,
    )
    return DeformableDetrForObjectDetection(config).eval()


def run(args: argparse.Namespace) -> dict[str, object]:
    peer = build()
    ours = kernelize_deformable_attention(copy.deepcopy(peer))
    pixel_values = torch.randn(1, 3, *args.image_size)

    def forward(model: torch.nn.Module) -> torch.Tensor:
        with torch.inference_mode():
            return model(pixel_values).logits

    def training(model: torch.nn.Module) -> None:
        model(pixel_values).logits.sum().backward()
        model.zero_grad()

    figures: dict[str, object] = {
        "peer": "the same model of transformers without the kernel",
        "image_size": list(args.image_size),
        "repeats": args.repeats,
        "largest_difference_of_logits": (forward(ours) - forward(peer)).abs().max().item(),
    }
    for name, step in (("forward", forward), ("training", training)):
        taken = in_turn({"peer": partial(step, peer), "ours": partial(step, ours)}, args.repeats)
        figures[name] = {
            "time_ratio": median_ratio(taken["peer"], taken["ours"]),
            **{f"{who}_seconds": statistics.median(values) for who, values in taken.items()},
        }
    return figures


def readme_rows(result: dict) -> list[tuple[str, str, str]]:
    """(what, ours, peer) for the table of the README."""
    figures = result["figures"]
    ratios = [f"{figures[step]['time_ratio']:.1f}x" for step in ("forward", "training")]
    what = f"Deformable DETR (3 + 3 layers, {figures['image_size']}), forward / training step, CPU"
    return [(what, f"{ratios[0]} / {ratios[1]} the speed", "itself without our kernel")]
