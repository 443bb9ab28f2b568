"""HFGD at stride 4 and 2 against dilated self-attention at stride 8, forward: the comparison of the paper's Table 9.

The baseline is SA (CAR) on a ResNet-50 dilated to stride 8, of the same parts (same convolutions, norms folded, fused
attention, channels-last memory); both have timm's ResNet-50 and random weights. Both run in turn; a ratio is the
median of the pairs, ours divided by the baseline's, so below 1 means that ours needs less. Time is process time on the
CPU, and measured by events on a GPU; memory is the peak above the loaded model, on the CPU of a fresh process each.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from _timing import in_turn, median_ratio
from torch import nn

import hf_denseseg
from hf_denseseg.ops.kernel_benchmark import resident_peak

EXAMPLE = "example: python scripts/benchmark.py --threads 1 dilated --repeats 7"
BASELINE = {
    "extra_encoding": "sa_car",
    "upsampler": "none",
    "guidance": False,
    "axial_attention": False,
    "decoder_width": 512,
}
PAPER = {"stride 4": 71.63 / 158.96, "stride 2": 153.62 / 158.96}  # GFLOPs of Table 9


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLE
    parser.add_argument("--image_size", nargs=2, type=int, default=(513, 513), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--num_labels", type=int, default=59)
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7, help="rounds (default 7)")
    parser.add_argument("--device", default="cpu")


def build(args: argparse.Namespace, name: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    stride = 8 if name == "baseline" else 32
    backbone = {"model_type": "timm_backbone", "backbone": "resnet50", "out_indices": [1, 2, 3, 4]}
    fields = BASELINE if name == "baseline" else {"output_stride": int(name[-1])}
    model = hf_denseseg.create_model(
        "hfgd-resnet50", num_labels=args.num_labels, backbone_config=backbone | {"output_stride": stride}, **fields
    )
    return model.eval().to(args.device), torch.randn(args.batch_size, 3, *args.image_size, device=args.device)


def peak_memory(args: argparse.Namespace, name: str) -> float:
    """MiB above the loaded model during one pass."""
    if args.device == "cpu":
        words = json.dumps({**vars(args), "build": name, "output": None}, default=str)
        child = [sys.executable, str(Path(__file__).resolve()), words]
        return float(subprocess.run(child, check=True, capture_output=True, text=True).stdout.split()[-1])
    model, pixel_values = build(args, name)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.inference_mode():
        model(pixel_values)
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def measure_memory(words: str) -> None:
    settings = argparse.Namespace(**json.loads(words))
    torch.set_num_threads(int(settings.threads))
    model, pixel_values = build(settings, settings.build)
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak to the memory that is resident now
    before = resident_peak()
    with torch.inference_mode():
        model(pixel_values)
    print(resident_peak() - before)


def run(args: argparse.Namespace) -> dict[str, object]:
    names = ("baseline", "stride 4", "stride 2")
    models = {name: build(args, name) for name in names}
    steps = {name: lambda pair=pair: pair[0](pair[1]) for name, pair in models.items()}
    with torch.inference_mode():
        taken = in_turn(steps, args.repeats, args.device)
    del models, steps
    figures: dict[str, object] = {
        "peer": "SA (CAR), ResNet-50 at stride 8, same parts",
        "image_size": list(args.image_size),
        "batch_size": args.batch_size,
        "repeats": args.repeats,
        "device": args.device,
        "baseline_seconds": statistics.median(taken["baseline"]),
        "baseline_peak_mib": (peak := peak_memory(args, "baseline")),
    }
    for name in names[1:]:
        own = peak_memory(args, name)
        figures[name] = {
            "time_ratio": median_ratio(taken[name], taken["baseline"]),
            "seconds": statistics.median(taken[name]),
            "peak_mib": own,
            "memory_ratio": own / peak,
            "paper_gflops_ratio": PAPER[name],
        }
    return figures


def readme_rows(result: dict) -> list[tuple[str, str, str]]:
    """(what, ours, peer) for the table of the README."""
    figures = result["figures"]
    where = "CPU" if figures["device"] == "cpu" else result["accelerator"]
    size = "x".join(map(str, figures["image_size"]))
    return [
        (
            f"`hfgd-resnet50`, {name}, forward, {size}, {where}",
            f"{figures[name]['time_ratio']:.2f}x the time, {figures[name]['memory_ratio']:.2f}x the peak memory",
            "dilated self-attention (stride 8), same parts",
        )
        for name in PAPER
    ]


if __name__ == "__main__":
    measure_memory(sys.argv[1])
