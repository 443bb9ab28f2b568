"""A forward pass of each family, batch 1: eager, compiled, ONNX Runtime and OpenVINO, float32 and int8.

Random weights and 19 classes, or a folder's weights; the ranges of int8 come from one random image, which leaves the
speed as it is. Milliseconds: median of rounds in which all runs of a model take turns. Peak memory: of a new process
that loads and runs one of them, above what the process had before. Finished models are kept in the work folder: an
interrupted command goes on, and models of earlier commands stay in the results.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _results import earlier_figures
from transformers import AutoModelForSemanticSegmentation

from hf_denseseg import create_model
from hf_denseseg.errors import InputError
from hf_denseseg.files import write_atomic
from hf_denseseg.inference.export.cost import paired_seconds, peak_memory
from hf_denseseg.inference.export.engines import OnnxEngine, OpenVinoEngine
from hf_denseseg.inference.export.exporting import trace
from hf_denseseg.inference.export.formats import FORMATS, convert_to_openvino
from hf_denseseg.inference.export.int8 import prepare, weight_layers, write_int8
from hf_denseseg.inference.export.programs import Logits, plain_operators
from hf_denseseg.inference.sliding_window import Size

MODELS = ("dsct-tiny-sac", "setr-naive-deit-base", "hlg-pup-small", "unept-resnet50", "hfgd-resnet50")
FILES = {
    "onnx": "model.onnx",
    "onnx_int8": "int8.onnx",
    "openvino": "openvino_model.xml",
    "openvino_int8": "openvino_int8.xml",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--models", nargs="+", default=list(MODELS), help="published variants, or folders (default: five)"
    )
    parser.add_argument("--size", nargs=2, type=int, default=[512, 512], help="height and width (default 512 512)")
    parser.add_argument("--all_threads", nargs="+", type=int, default=[1, 2], help="numbers of threads (default 1 2)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds over all runs of a model (default 7)")
    parser.add_argument("--work", type=Path, default=Path("runs/export_benchmark"), help="folder for exports and rows")


def program_of(name: str, size: Size) -> Logits:
    if Path(name).is_dir():
        return Logits(AutoModelForSemanticSegmentation.from_pretrained(name)).eval()
    torch.manual_seed(0)
    fields: dict[str, Any] = {"image_size": list(size)} if name.startswith("setr") else {}
    return Logits(create_model(name, num_labels=19, **fields)).eval()


@torch.no_grad()  # as `export`: with gradients attention lays its output out otherwise
def write_exports(name: str, size: Size, folder: Path) -> None:
    """Export once for all numbers of threads; what is there is kept."""
    folder.mkdir(parents=True, exist_ok=True)
    if all((folder / file).exists() for file in FILES.values()):
        return
    program = program_of(name, size)
    FORMATS["onnx"].write(trace(program, 3, size, False), folder / FILES["onnx"], "pixel_values", ("logits",))
    convert_to_openvino(folder / FILES["onnx"], folder / FILES["openvino"])
    np.save(folder / "input.npy", torch.randn(1, 3, *size).numpy())
    prepared = folder / "prepared.onnx"
    prepare(folder / FILES["onnx"], prepared)
    write_int8(prepared, folder / FILES["onnx_int8"], [folder / "input.npy"], weight_layers(prepared))
    convert_to_openvino(folder / FILES["onnx_int8"], folder / FILES["openvino_int8"])


def runner(name: str, size: Size, kind: str, folder: Path) -> Callable[[torch.Tensor], Any]:
    """The forward pass of a model by one of the runs."""
    if kind in FILES:
        return (OnnxEngine if kind.startswith("onnx") else OpenVinoEngine)(folder / FILES[kind])
    program = program_of(name, size)
    return torch.compile(program) if kind == "compiled" else program


@torch.no_grad()
def measure(name: str, size: Size, folder: Path, threads: int, rounds: int) -> dict[str, Any]:
    """Milliseconds and peak memory of every run of one model."""
    torch.set_num_threads(threads)
    values, kinds = torch.randn(1, 3, *size), ("eager", "compiled", *FILES)
    runs = [runner(name, size, kind, folder) for kind in kinds]
    with plain_operators():  # what the exports compute; the kernel of deformable attention has a benchmark of its own
        seconds = paired_seconds([lambda run=run: run(values) for run in runs], rounds)
    return {
        kind: {"milliseconds": 1000 * spent, "peak_memory_mib": own_memory(name, size, kind, folder, threads) / 2**20}
        for kind, spent in zip(kinds, seconds, strict=True)
    }


def own_memory(name: str, size: Size, kind: str, folder: Path, threads: int) -> int:
    words = [sys.executable, __file__, name, kind, str(folder), str(threads), *map(str, size)]
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def run(args: argparse.Namespace) -> dict[str, Any]:
    size = (args.size[0], args.size[1])
    figures = earlier_figures(args)
    if figures.get("size", list(size)) != list(size):
        raise InputError(f"The results were measured at {figures['size']}. Give the same --size, or another --output.")
    figures |= {"size": list(size), "batch": 1}
    for name in args.models:
        label = Path(name).parent.name if Path(name).name == "model" else Path(name).name
        folder = args.work / label
        write_exports(name, size, folder)
        for threads in args.all_threads:
            kept = folder / f"threads_{threads}.json"
            if not kept.exists():
                write_atomic(kept, json.dumps(measure(name, size, folder, threads, args.rounds)))
            figures.setdefault(f"{threads} thread{'s' * (threads > 1)}", {})[label] = json.loads(kept.read_text())
            print(label, threads, kept.read_text(), flush=True)
    return figures


def readme_rows(result: dict) -> list[tuple[str, str, str]]:
    """(what, ours, peer) for the table of the README: speed on one thread."""
    rows = []
    for name, runs in result["figures"].get("1 thread", {}).items():
        eager, size = runs["eager"]["milliseconds"], "x".join(map(str, result["figures"]["size"]))
        speeds = {kind: eager / run["milliseconds"] for kind, run in runs.items() if kind != "eager"}
        faster = ", ".join(f"{kind.replace('_', ' ')} {speed:.2f}x" for kind, speed in speeds.items())
        rows.append((f"Speed of `{name}`, {size}, one thread", faster, f"eager, {eager:.0f} ms"))
    return rows


@torch.no_grad()
def own_process(name: str, kind: str, folder: str, threads: str, height: str, width: str) -> None:
    """Print the growth of the peak memory in bytes that loading and running takes."""
    torch.set_num_threads(int(threads))
    size = (int(height), int(width))
    values = torch.randn(1, 3, *size)
    before = peak_memory()
    with plain_operators():
        runner(name, size, kind, Path(folder))(values)
    print(peak_memory() - before)


if __name__ == "__main__":
    own_process(*sys.argv[1:])
