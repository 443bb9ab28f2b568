"""Every published variant: parameters, multiply-adds, CPU milliseconds in eager mode and by ONNX Runtime.

Parameters and multiply-adds with the classes and at the size of the paper's own count. Milliseconds: CPU time of one
image on the given threads, the two in turn, random weights, deformable attention in plain torch in both. Each variant
runs in a process of its own; the smallest come first, and the file is written after each, so that the same command
goes on where another one ended.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from os import getloadavg
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from _results import earlier_figures
from _timing import in_turn

from hf_denseseg import create_config, create_model, list_models, model_info
from hf_denseseg.errors import RunError
from hf_denseseg.inference.export.cost import peak_memory
from hf_denseseg.inference.export.engines import OnnxEngine
from hf_denseseg.inference.export.exporting import trace
from hf_denseseg.inference.export.formats import FORMATS
from hf_denseseg.inference.export.programs import Detections, Logits, plain_operators
from hf_denseseg.models.auto.tasks import (
    IMAGE_CLASSIFICATION,
    INSTANCE_SEGMENTATION,
    OBJECT_DETECTION,
    SEMANTIC_SEGMENTATION,
    task_of_class,
)

Size = tuple[int, int]
# (height, width) and classes at which each paper counts its segmentation models; HLG's other tasks after them.
COUNTED = {"hfgd": ((513, 513), 59), "setr": ((512, 512), 19), "unept": ((480, 480), 150)}
OTHERS_COUNTED = ((512, 512), 150)
CLASSIFIERS_COUNTED, DETECTORS_COUNTED = ((224, 224), 1000), ((800, 1344), 80)
TIMED, CLASSIFIERS_TIMED = (512, 512), (224, 224)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--models", nargs="+", metavar="NAME", help="measure these, also again (default: what is left)"
    )
    parser.add_argument("--minutes", type=float, help="begin no other variant after this time (default: all)")
    parser.add_argument("--rounds", type=int, default=3, help="timed passes of each kind (default 3)")


def task_of(name: str) -> str:
    return task_of_class((create_config(name).architectures or [""])[0]) or SEMANTIC_SEGMENTATION


def counted_at(name: str) -> tuple[Size, int]:
    """(height, width) and number of classes of the paper's count."""
    task = task_of(name)
    if task == SEMANTIC_SEGMENTATION:
        return COUNTED.get(name.partition("-")[0], OTHERS_COUNTED)
    return CLASSIFIERS_COUNTED if task == IMAGE_CLASSIFICATION else DETECTORS_COUNTED


def counts(name: str) -> dict[str, Any]:
    size, num_labels = counted_at(name)
    info = model_info(name, image_size=size, num_labels=num_labels)
    return {
        "task": task_of(name),
        "parameters": info.parameters,
        "multiply_adds": info.multiply_adds,
        "counted_size": list(size),
        "counted_labels": num_labels,
    }


@torch.no_grad()
def measure(name: str, threads: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of one variant in this process; a model that cannot be exported gets the reason."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    task = task_of(name)
    size = CLASSIFIERS_TIMED if task == IMAGE_CLASSIFICATION else TIMED
    fields: dict[str, Any] = {"num_labels": counted_at(name)[1]}
    if name.startswith("setr"):  # a table of positions for one size
        fields["image_size"] = size[0]
    model = create_model(name, **fields).eval()
    program = Logits(model)
    if task == OBJECT_DETECTION:
        model.set_attn_implementation("eager")  # as `denseseg export` does
        program = Detections(model).eval()
    values = torch.randn(1, 3, *size)
    steps: dict[str, Any] = {"eager": lambda: model(pixel_values=values)}
    found: dict[str, Any] = {"timed_size": list(size), "load_average": getloadavg()[0]}
    with TemporaryDirectory() as folder, plain_operators():
        if task == INSTANCE_SEGMENTATION:
            found["onnx_reason"] = "the number of regions depends on the image"
        else:
            path = Path(folder) / FORMATS["onnx"].file
            try:
                FORMATS["onnx"].write(trace(program, 3, size, False), path, program.input_name, program.output_names)
                gc.collect()  # graphs hold themselves and the weights: the largest model needs this memory now
                engine = OnnxEngine(path)
                steps["onnx"] = lambda: engine(values)
            except RunError as error:
                found["onnx_reason"] = str(error)
        for kind, seconds in in_turn(steps, rounds).items():
            found[f"{kind}_milliseconds"] = 1000 * statistics.median(seconds)
    return found | {"peak_memory_mib": peak_memory() / 2**20}


def run(args: argparse.Namespace) -> dict[str, Any]:
    import benchmark  # the script that runs this

    started, threads = time.monotonic(), torch.get_num_threads()
    file = args.output or benchmark.result_file("zoo")
    known = earlier_figures(args).get("variants", {})
    variants = {name: {**known.get(name, {}), **counts(name)} for name in list_models()}
    figures = {"threads": threads, "rounds": args.rounds, "variants": variants}
    left = args.models or [name for name in variants if "eager_milliseconds" not in variants[name]]
    for name in sorted(left, key=lambda name: variants[name]["multiply_adds"]):
        if args.minutes is not None and time.monotonic() - started > 60 * args.minutes:
            break
        words = [sys.executable, __file__, name, str(threads), str(args.rounds)]
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode:  # the others can still be measured, and the same command tries it again
            print(f"{name} failed (exit code {done.returncode}): {done.stderr[-2000:]}", file=sys.stderr, flush=True)
            continue
        print(name, line := done.stdout.splitlines()[-1], flush=True)
        variants[name] |= json.loads(line)
        benchmark.write_result(args.name, figures, file)
    return figures


def readme_rows(result: dict) -> list[tuple[str, str, str]]:
    """Nothing for the table of speeds: docs/zoo.md has tables of its own."""
    return []


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
