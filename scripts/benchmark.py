"""Measure one part of hf_denseseg against a named peer, in one run, and write the figures to a file.

    python scripts/benchmark.py --threads 1 reference dsct-base-sac
    python scripts/benchmark.py --list

Each benchmark is a module of `scripts/benchmarks/` with `add_arguments(parser)` and `run(args) -> dict`, and with
`result_name(args)` if one module writes several files. The figures go to `scripts/benchmarks/results/<name>.json`
together with the command, the versions and the machine, and are quoted from there.
"""

import argparse
import ast
import importlib.util
import json
import os
import platform
import shlex
import sys
from pathlib import Path
from types import ModuleType

import torch
import transformers

from hf_denseseg.files import write_atomic
from hf_denseseg.training.environment import processor_name

FOLDER = Path(__file__).resolve().parent / "benchmarks"
sys.path.append(str(FOLDER))  # its modules share `_timing`


def names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.py") if not path.stem.startswith("_"))


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def environment() -> dict[str, object]:
    """Everything that figures depend on besides the code: versions, processor, threads, accelerator."""
    return {
        "command": "python scripts/benchmark.py " + shlex.join(sys.argv[1:]),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def result_file(name: str) -> Path:
    """Where the figures of a benchmark are kept."""
    return FOLDER / "results" / f"{name}.json"


def write_result(name: str, figures: dict, file: Path) -> dict:
    """Write figures with the environment; returns both."""
    result = {"benchmark": name, **environment(), "figures": figures}
    write_atomic(file, json.dumps(result, indent=1) + "\n")
    return result


def show(figures: dict, indent: int = 0) -> None:
    """Print nested figures as an indented table."""
    for key, value in figures.items():
        if isinstance(value, dict):
            print(" " * indent + f"{key}:")
            show(value, indent + 2)
        else:
            text = f"{value:.4g}" if isinstance(value, float) else value
            print(" " * indent + f"{key:<{44 - indent}} {text}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print the names of the benchmarks and exit")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default 1)")
    parser.add_argument("--output", type=Path, help="JSON file (default scripts/benchmarks/results/<name>.json)")
    commands = parser.add_subparsers(dest="name", metavar="NAME")
    for name in names():
        text = ast.get_docstring(ast.parse((FOLDER / f"{name}.py").read_text())) or name
        command = commands.add_parser(name, help=text.splitlines()[0].replace("%", "%%"), description=text)
        if name in sys.argv:  # only the one that runs is imported
            load(name).add_arguments(command)
    args = parser.parse_args()
    if args.list or not args.name:
        parser.print_help()
        return
    torch.set_num_threads(args.threads)
    module = load(args.name)
    figures = module.run(args)
    file = module.result_name(args) if hasattr(module, "result_name") else args.name
    show(write_result(args.name, figures, args.output or result_file(file)))


if __name__ == "__main__":
    main()
