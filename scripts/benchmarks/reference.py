"""A published variant against its reference implementation: forward and training step, time and memory.

The peer computes the same function with the same weights, written as in the paper or the released code, see
`models/<family>/reference_<family>.py` (for example softmax attention with all weights in memory). Both run in turn; a
ratio is the median of the pairs, peer divided by ours, so above 1 means that ours needs less. Time is process time.
Memory is the peak of resident memory during one step above that before it, each in a fresh process (Linux).
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from _timing import in_turn, median_ratio
from torch import nn

import hf_denseseg
from hf_denseseg.models.auto.registration import reference_implementation
from hf_denseseg.ops.kernel_benchmark import resident_peak

EXAMPLE = "example: python scripts/benchmark.py --threads 1 reference setr-pup-deit-base --image_size 512 512"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLE
    parser.add_argument("variant", help="published name, see `denseseg models`")
    parser.add_argument("--image_size", nargs=2, type=int, default=(512, 512), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--num_labels", type=int, default=19)
    parser.add_argument("--repeats", type=int, default=5, help="pairs per figure (default 5)")


def result_name(args: argparse.Namespace) -> str:
    return f"reference_{args.variant}"


def build(args: argparse.Namespace, peer: bool, training: bool) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    config = hf_denseseg.create_config(args.variant)
    sizes = {"image_size": list(args.image_size)} if hasattr(config, "image_size") else {}
    model = hf_denseseg.create_model(args.variant, num_labels=args.num_labels, **sizes).train(training)
    batch = {"pixel_values": torch.randn(args.batch_size, 3, *args.image_size)}
    if training and config.architectures[0].endswith("ForImageClassification"):
        batch["labels"] = torch.randint(0, args.num_labels, (args.batch_size,))
    elif training:
        regions = torch.randint(0, args.num_labels, (args.batch_size, 1, 6, 6)).float()  # about the size of objects
        batch["labels"] = F.interpolate(regions, size=tuple(args.image_size))[:, 0].long()
    return (reference_implementation(model) if peer else model), batch


def step(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """One forward pass, or with labels one training step without the optimizer."""
    if "labels" not in batch:
        with torch.inference_mode():
            return model(**batch).logits
    loss = model(**batch).loss
    loss.backward()
    model.zero_grad()
    return loss


def time_ratio(args: argparse.Namespace, training: bool) -> dict[str, float]:
    ours, batch = build(args, peer=False, training=training)
    peer, _ = build(args, peer=True, training=training)
    steps = {"peer": lambda: step(peer, batch), "ours": lambda: step(ours, batch)}
    seconds = in_turn(steps, args.repeats)
    return {
        "time_ratio": median_ratio(seconds["peer"], seconds["ours"]),
        "ours_seconds": statistics.median(seconds["ours"]),
        "reference_seconds": statistics.median(seconds["peer"]),
    }


def peak_memory(args: argparse.Namespace, peer: bool, training: bool) -> float:
    """MiB above the loaded model, measured in a child process that runs one step."""
    words = json.dumps({**vars(args), "peer": peer, "training": training, "output": None}, default=str)
    child = [sys.executable, str(Path(__file__).resolve()), words]
    return float(subprocess.run(child, check=True, capture_output=True, text=True).stdout.split()[-1])


def measure_memory(words: str) -> None:
    settings = argparse.Namespace(**json.loads(words))
    torch.set_num_threads(int(settings.threads))
    model, batch = build(settings, settings.peer, settings.training)
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak to the memory that is resident now
    before = resident_peak()
    step(model, batch)
    print(resident_peak() - before)


def run(args: argparse.Namespace) -> dict[str, object]:
    torch.manual_seed(0)
    ours, batch = build(args, peer=False, training=False)
    logits, peer_logits = step(ours, batch), step(reference_implementation(ours), batch)
    if logits.shape != peer_logits.shape:  # some released code resizes them to the image itself
        logits = F.interpolate(logits, size=peer_logits.shape[-2:], mode="bilinear", align_corners=False)
    family = ours.config.model_type
    figures: dict[str, object] = {
        "variant": args.variant,
        "image_size": list(args.image_size),
        "batch_size": args.batch_size,
        "repeats": args.repeats,
        "peer": f"reference implementation (models/{family}/reference_{family}.py), same weights",
        "largest_difference_of_logits_in_std": float((logits - peer_logits).abs().max() / peer_logits.std()),
    }
    del ours
    for name, training in (("forward", False), ("training_step", True)):
        memory = {who: peak_memory(args, who == "reference", training) for who in ("ours", "reference")}
        figures[name] = {
            **time_ratio(args, training),
            "memory_ratio": memory["reference"] / memory["ours"],
            "ours_peak_mib": memory["ours"],
            "reference_peak_mib": memory["reference"],
        }
    return figures


def readme_rows(result: dict) -> list[tuple[str, str, str]]:
    """(what, ours, peer) for the table of the README."""
    figures, size = result["figures"], "x".join(map(str, result["figures"]["image_size"]))
    threads = f"{result['threads']} thread" + ("s" if result["threads"] > 1 else "")
    ours = "; ".join(
        f"{step.replace('_', ' ')} {figures[step]['time_ratio']:.2f}x the speed, "
        f"{figures[step]['memory_ratio']:.2f}x less peak memory"
        for step in ("forward", "training_step")
    )
    return [(f"`{figures['variant']}`, {size}, {threads}", ours, "reference implementation")]


if __name__ == "__main__":
    measure_memory(sys.argv[1])
