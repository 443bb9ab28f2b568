"""Time steps in turn, so that other load affects all of them; not a benchmark itself."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch


def seconds(step: Callable[[], object], device: str = "cpu") -> float:
    """Process time of one call on the CPU; on a GPU the time between events."""
    if device == "cpu":
        start = time.process_time()
        step()
        return time.process_time() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    step()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1000


def in_turn(steps: Mapping[str, Callable[[], object]], repeats: int, device: str = "cpu") -> dict[str, list[float]]:
    """Seconds of each step, in `repeats` rounds over all steps, after a warmup round."""
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(repeats + 1):
        for name, step in steps.items():
            each = seconds(step, device)
            if repeat:
                taken[name].append(each)
    return taken


def median_ratio(first: list[float], second: list[float]) -> float:
    """Median of the ratios of the pairs, first divided by second."""
    return statistics.median(a / b for a, b in zip(first, second, strict=True))


def cuda_peak(step: Callable[[], object]) -> float:
    """MiB of the CUDA allocator that a step takes above what is held before; call it once before."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20
