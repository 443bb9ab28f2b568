"""A forward pass of each family at 512x512, batch 1: eager, compiled, ONNX Runtime and OpenVINO, float32 and int8.

Random weights, 19 classes; the ranges of int8 come from one random image, which leaves the speed as it is.
Milliseconds: median of rounds in which all runs of a model take turns. Peak memory: of a new process that loads and
runs one of them, above what the process had before. Finished models are kept in the work folder, so that an
interrupted command goes on.
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

from hf_denseseg import create_model
from hf_denseseg.files import write_atomic
from hf_denseseg.inference.export.cost import paired_seconds, peak_memory
from hf_denseseg.inference.export.engines import OnnxEngine, OpenVinoEngine
from hf_denseseg.inference.export.exporting import trace
from hf_denseseg.inference.export.formats import FORMATS, convert_to_openvino
from hf_denseseg.inference.export.int8 import weight_layers, write_int8
from hf_denseseg.inference.export.programs import Logits, plain_operators

MODELS = ("dsct-tiny-sac", "setr-naive-deit-base", "hlg-pup-small", "unept-resnet50", "hfgd-resnet50")
SIZE = (512, 512)
FILES = {
    "onnx": "model.onnx",
    "onnx_int8": "int8.onnx",
    "openvino": "openvino_model.xml",
    "openvino_int8": "openvino_int8.xml",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="published variants (default: five)")
    parser.add_argument("--all_threads", nargs="+", type=int, default=[1, 2], help="numbers of threads (default 1 2)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds over all runs of a model (default 7)")
    parser.add_argument("--work", type=Path, default=Path("runs/export_benchmark"), help="folder for exports and rows")


def program_of(name: str) -> Logits:
    torch.manual_seed(0)
    fields: dict[str, Any] = {"image_size": SIZE[0]} if name.startswith("setr") else {}
    return Logits(create_model(name, num_labels=19, **fields)).eval()


def write_exports(name: str, folder: Path) -> None:
    """Export once for all numbers of threads; what is there is kept."""
    folder.mkdir(parents=True, exist_ok=True)
    if all((folder / file).exists() for file in FILES.values()):
        return
    program = program_of(name)
    FORMATS["onnx"].write(trace(program, 3, SIZE, False), folder / FILES["onnx"], "pixel_values", ("logits",))
    convert_to_openvino(folder / FILES["onnx"], folder / FILES["openvino"])
    np.save(folder / "input.npy", torch.randn(1, 3, *SIZE).numpy())
    layers = weight_layers(folder / FILES["onnx"])
    write_int8(folder / FILES["onnx"], folder / FILES["onnx_int8"], [folder / "input.npy"], layers)
    convert_to_openvino(folder / FILES["onnx_int8"], folder / FILES["openvino_int8"])


def runner(name: str, kind: str, folder: Path) -> Callable[[torch.Tensor], Any]:
    """The forward pass of a model by one of the runs."""
    if kind in FILES:
        return (OnnxEngine if kind.startswith("onnx") else OpenVinoEngine)(folder / FILES[kind])
    program = program_of(name)
    return torch.compile(program) if kind == "compiled" else program


@torch.no_grad()
def measure(name: str, folder: Path, threads: int, rounds: int) -> dict[str, Any]:
    """Milliseconds and peak memory of every run of one model."""
    torch.set_num_threads(threads)
    values, kinds = torch.randn(1, 3, *SIZE), ("eager", "compiled", *FILES)
    runs = [runner(name, kind, folder) for kind in kinds]
    with plain_operators():  # what the exports compute; the kernel of deformable attention has a benchmark of its own
        seconds = paired_seconds([lambda run=run: run(values) for run in runs], rounds)
    return {
        kind: {"milliseconds": 1000 * spent, "peak_memory_mib": own_memory(name, kind, folder, threads) / 2**20}
        for kind, spent in zip(kinds, seconds, strict=True)
    }


def own_memory(name: str, kind: str, folder: Path, threads: int) -> int:
    words = [sys.executable, __file__, name, kind, str(folder), str(threads)]
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def run(args: argparse.Namespace) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name in args.models:
        folder = args.work / name
        write_exports(name, folder)
        for threads in args.all_threads:
            kept = folder / f"threads_{threads}.json"
            if not kept.exists():
                write_atomic(kept, json.dumps(measure(name, folder, threads, args.rounds)))
            results.setdefault(f"{threads} threads" if threads > 1 else "1 thread", {})[name] = json.loads(
                kept.read_text()
            )
    return {"size": list(SIZE), "batch": 1, **results}


@torch.no_grad()
def own_process(name: str, kind: str, folder: str, threads: str) -> None:
    """Print the growth of the peak memory in bytes that loading and running takes."""
    torch.set_num_threads(int(threads))
    values = torch.randn(1, 3, *SIZE)
    before = peak_memory()
    with plain_operators():
        runner(name, kind, Path(folder))(values)
    print(peak_memory() - before)


if __name__ == "__main__":
    own_process(*sys.argv[1:])
