"""Class-chunked resize and argmax against the plain one: 150 classes from 256x512 to 1024x2048, time and memory.

Each run is a separate process; its memory is the growth of the peak resident set above the logits.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from statistics import median

import torch
import torch.nn.functional as F

from hf_denseseg.inference.segmentation import resize_argmax

SHAPE, SIZE = (1, 150, 256, 512), (1024, 2048)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=5, help="processes per method, in turn (default 5)")


def measure(method: str) -> dict:
    """One call in this process: CPU seconds, peak memory growth, and a checksum of the map."""
    torch.set_num_threads(1)
    logits = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    # The first call of an operator allocates memory of its own.
    resize_argmax(logits[:, :2, :8, :8], (16, 16))
    F.interpolate(logits[:, :2, :8, :8], (16, 16), mode="bilinear").argmax(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    if method == "chunked":
        ids = resize_argmax(logits, SIZE)
    else:
        ids = F.interpolate(logits, SIZE, mode="bilinear").argmax(1)
    seconds = time.process_time() - started
    growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    checksum = int((ids * torch.arange(1, ids.numel() + 1).view_as(ids) % 1_000_003).sum())
    return {"seconds": seconds, "peak_mib": growth / 1024, "checksum": checksum}


def run(args: argparse.Namespace) -> dict:
    results: dict[str, list[dict]] = {"plain": [], "chunked": []}
    for _ in range(args.rounds):
        for method, found in results.items():
            done = subprocess.run([sys.executable, __file__, method], capture_output=True, text=True, check=True)
            found.append(json.loads(done.stdout))
    checksums = {each["checksum"] for found in results.values() for each in found}
    assert len(checksums) == 1, "the maps differ"
    figures: dict = {"maps_identical": True}
    for method, found in results.items():
        figures[method] = {key: median(each[key] for each in found) for key in ("seconds", "peak_mib")}
    for key in ("seconds", "peak_mib"):
        pairs = zip(results["chunked"], results["plain"], strict=True)
        figures[f"chunked_to_plain_{key}"] = median(own[key] / peer[key] for own, peer in pairs)
    figures["target_chunked_to_plain_peak_mib"] = 0.1
    return figures


def readme_rows(result: dict) -> list[tuple[str, str, str]]:
    """(what, ours, peer) for the table of the README."""
    time, memory = (result["figures"][f"chunked_to_plain_{key}"] for key in ("seconds", "peak_mib"))
    what = "resize + argmax, 150 classes, 1024x2048"
    return [(what, f"{time:.2f}x the time, {memory:.2f}x the memory", "`interpolate` + `argmax`")]


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1])))
