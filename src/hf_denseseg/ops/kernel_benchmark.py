"""Time and memory of deformable attention, from raw offsets and logits to the output, compared with transformers.

The peer is what transformers' Deformable DETR runs without a compiled kernel: softmax, sampling locations, one
`grid_sample` per level, all samples stacked. Both sides run alternately in one process; memory is measured in
separate processes.
"""

import ctypes
import math
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from hf_denseseg.ops.ms_deform_attn import ms_deform_attn
from hf_denseseg.ops.reference import ms_deform_attn_reference

HEADS, CHANNELS = 8, 32


@dataclass(frozen=True)
class Case:
    """Sizes of one call.

    Args:
        shapes: (height, width) of every level.
        queries: number of queries; None for one per value token (an encoder).
        points: points per head and level.
    """

    shapes: tuple[tuple[int, int], ...]
    queries: int | None
    points: int


CASES = {
    "unept-encoder": Case(((60, 60),) * 3, None, 16),  # ResNet-50 at 480 x 480
    "unept-encoder-deit": Case(((30, 30),) * 3, None, 16),
    "unept-decoder": Case(((60, 60),) * 3, 3600, 16),
    "detr-encoder": Case(((100, 134), (50, 67), (25, 34), (13, 17)), None, 4),  # 800 x 1066
    "detr-decoder": Case(((100, 134), (50, 67), (25, 34), (13, 17)), 900, 4),
    "mask2former": Case(((64, 64), (32, 32), (16, 16)), None, 4),  # 512 x 512
}


def inputs(name: str, pattern: str = "initial", batch: int = 1, device: str = "cpu") -> list[Tensor]:
    """Return value, offsets, logits and reference points of a case.

    Args:
        name: key of `CASES`.
        pattern: "initial" (points as Deformable DETR initializes them, give or take a pixel) or "uniform" (anywhere).
        batch: number of images.
        device: device of the tensors.
    """
    case = CASES[name]
    random = torch.Generator().manual_seed(0)
    tokens, levels = sum(height * width for height, width in case.shapes), len(case.shapes)
    centers = torch.cat([_centers(shape) for shape in case.shapes])
    if case.queries is not None:
        side = math.isqrt(case.queries)
        centers = _centers((side, side)) if side**2 == case.queries else torch.rand(case.queries, 2, generator=random)
    references = centers[None, :, None].repeat(1, 1, levels, 1)
    sizes = (batch, len(centers), HEADS, levels, case.points)
    size = torch.tensor([shape[::-1] for shape in case.shapes], dtype=torch.float32)
    if pattern == "uniform":
        pixels = torch.rand(*sizes, 2, generator=random) * size[:, None]
        offsets = pixels - references[:, :, None, :, None] * size[:, None]
    else:
        angle = 2 * math.pi * torch.arange(HEADS) / HEADS
        direction = torch.stack([angle.cos(), angle.sin()], -1)
        direction = direction / direction.abs().amax(-1, keepdim=True)
        steps = direction[:, None, None] * torch.arange(1, case.points + 1)[:, None]
        offsets = steps + 2 * torch.rand(*sizes, 2, generator=random) - 1
    pixels = references[:, :, None, :, None] * size[:, None] - 0.5 + offsets
    # At pixel centers the derivative jumps; rounding would decide which of its sides is compared.
    offsets = offsets + 0.02 * ((pixels - pixels.round()).abs() < 0.01)
    value = torch.randn(batch, tokens, HEADS, CHANNELS, generator=random)
    logits = torch.randn(*sizes, generator=random)
    return [tensor.to(device) for tensor in (value, offsets, logits, references)]


def _centers(shape: tuple[int, int]) -> Tensor:
    """Centers of the pixels of a map, `(H*W, 2)` as (x, y) in 0..1."""
    y, x = ((torch.arange(size) + 0.5) / size for size in shape)
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).view(-1, 2)


def peer(
    value: Tensor, offsets: Tensor, logits: Tensor, reference_points: Tensor, shapes: tuple[tuple[int, int], ...]
) -> Tensor:
    """The plain PyTorch form in transformers, with the arithmetic that its attention module does before it."""
    from transformers.models.deformable_detr.modeling_deformable_detr import MultiScaleDeformableAttention

    size = torch.tensor(shapes, device=value.device)
    weights = logits.flatten(-2).softmax(-1).view(logits.shape)
    locations = reference_points[:, :, None, :, None] + offsets / size.flip(-1)[:, None]
    starts = torch.cat([size.new_zeros(1), size.prod(1).cumsum(0)[:-1]])
    return MultiScaleDeformableAttention().forward(value, size, list(shapes), starts, locations, weights, 64)


def sides(name: str, training: bool, tensors: list[Tensor]) -> dict[str, Callable[[], object]]:
    """One step of each side: the forward pass, or with `training` the backward pass of an output computed before."""
    shapes = CASES[name].shapes
    functions: dict[str, Callable[..., Tensor]] = {"ours": ms_deform_attn, "peer": peer}
    if not training:
        return {side: partial(run, *tensors, shapes) for side, run in functions.items()}
    steps: dict[str, Callable[[], object]] = {}
    for side, run in functions.items():
        leaves = [tensor.detach().requires_grad_() for tensor in tensors[:3]]
        out = run(*leaves, tensors[3], shapes)
        steps[side] = partial(torch.autograd.grad, out, leaves, torch.ones_like(out), retain_graph=True)
    return steps


def measure(name: str, repeats: int, pattern: str = "initial", memory: bool = True) -> dict[str, dict[str, float]]:
    """Milliseconds (fastest of `repeats`), their ratio (peer / ours) and peak MiB above the inputs, per pass.

    Process time on one thread, wall time on several.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    result = {}
    for step in ("forward", "backward"):
        runs = sides(name, step == "backward", inputs(name, pattern))
        taken: dict[str, list[float]] = {side: [] for side in runs}
        for _ in range(repeats):
            for side, run in runs.items():
                start = clock()
                run()
                taken[side].append(clock() - start)
        row = {f"{side}_ms": 1e3 * min(values) for side, values in taken.items()}
        row["time_ratio"] = row["peer_ms"] / row["ours_ms"]
        if memory:
            row |= {f"{side}_mib": _peak_memory(name, side, step) for side in runs}
            row["memory_ratio"] = row["peer_mib"] / row["ours_mib"]
        result[step] = row
    return result


def errors(name: str, pattern: str = "initial") -> dict[str, dict[str, float]]:
    """Error of output and gradients against float64, as the norm of the difference over the norm, per side."""
    shapes = CASES[name].shapes
    tensors = inputs(name, pattern)
    grad = torch.randn(*tensors[1].shape[:2], HEADS * CHANNELS, generator=torch.Generator().manual_seed(1))

    def results(run: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        leaves = [tensor.to(dtype).requires_grad_() for tensor in tensors[:3]]
        out = run(*leaves, tensors[3].to(dtype), shapes)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))]

    exact = results(ms_deform_attn_reference, torch.float64)
    found = {"ours": results(ms_deform_attn, torch.float32), "peer": results(peer, torch.float32)}
    names = ("output", "grad_value", "grad_offsets", "grad_logits")
    return {
        side: {n: ((x - e).norm() / e.norm()).item() for n, x, e in zip(names, tensors, exact, strict=True)}
        for side, tensors in found.items()
    }


def _peak_memory(name: str, side: str, step: str) -> float:
    """Peak MiB above the inputs of one step (forward, or forward and backward) in a fresh process; NaN off Linux."""
    if not sys.platform.startswith("linux"):
        return math.nan
    words = [sys.executable, "-m", "hf_denseseg.ops.kernel_benchmark", name, side, step]
    return float(subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()[-1])


def _peak_in_this_process(name: str, side: str, step: str) -> float:
    tensors = inputs(name)
    tiny = [torch.zeros(sizes) for sizes in ((1, 4, 1, 16), (1, 4, 1, 1, 1, 2), (1, 4, 1, 1, 1), (1, 4, 1, 2))]
    ms_deform_attn(tiny[0], tiny[1], tiny[2], tiny[3], [(2, 2)])  # loads the libraries before the measurement
    ctypes.CDLL(None).malloc_trim(0)  # freed memory that the allocator keeps would hide what the step takes
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the memory that is resident now
    before = resident_peak()
    run = ms_deform_attn if side == "ours" else peer
    value, offsets, logits = leaves = [tensor.requires_grad_(step == "backward") for tensor in tensors[:3]]
    out = run(value, offsets, logits, tensors[3], CASES[name].shapes)
    if step == "backward":
        torch.autograd.grad(out, leaves, torch.ones_like(out))
    return resident_peak() - before


def resident_peak() -> float:
    """Peak resident memory of this process in MiB (Linux)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    print(_peak_in_this_process(*sys.argv[1:]))
