"""Exports of checkpoints in several formats: agreement, score of both, milliseconds, peak memory, file size.

Each pair of checkpoint and format is one run of `denseseg export`; a pair that cannot be exported gets the reason.
What is exported already in the work folder is read from there, so that an interrupted command goes on.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

FORMATS = ("torch", "onnx", "openvino", "aoti", "executorch")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoints", nargs="+", type=Path, required=True, help="folders; their names are the rows")
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=FORMATS, help="columns (default: all)")
    parser.add_argument("--size", nargs=2, metavar=("H", "W"), help="of the images (default: any)")
    parser.add_argument("--dataset", help="to score checkpoint and export on")
    parser.add_argument("--eval_split", default="val", help="(default val)")
    parser.add_argument("--calibration", help="training images for int8, which then gets columns too")
    parser.add_argument("--work", type=Path, default=Path("runs/export_formats"), help="folder for the exports")


def export(checkpoint: Path, name: str, int8: bool, args: argparse.Namespace) -> dict[str, Any]:
    """The cell of one checkpoint and format, from its `export.json`."""
    folder = args.work / checkpoint.name / (f"{name}_int8" if int8 else name)
    record = folder / "export.json"
    if not record.exists():
        words = [sys.executable, "-m", "hf_denseseg.cli", "export", str(checkpoint), "--format", name]
        words += ["--output", str(folder), *(["--size", *args.size] if args.size else [])]
        words += ["--int8", "--calibration", args.calibration] if int8 else []
        words += ["--dataset", args.dataset, "--eval_split", args.eval_split] if args.dataset else []
        words += ["--use_cpu"] if args.dataset or int8 else []
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode:
            return {"reason": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]}
    found = json.loads(record.read_text())
    score = found.get("score", {})
    return {
        "agreement": min(row["agreement"] for row in found["verified"]),
        **{f"{key}_{score['metric']}": score[key] for key in ("model", "exported") if score},
        **{f"{key}_milliseconds": found["cost"][key]["milliseconds"] for key in ("model", "exported")},
        **{f"{key}_peak_mib": found["cost"][key]["peak_memory_bytes"] / 2**20 for key in ("model", "exported")},
        "file_mib": found["model_bytes"] / 2**20,
    }


def run(args: argparse.Namespace) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for checkpoint in args.checkpoints:
        cells = {name: export(checkpoint, name, False, args) for name in args.formats}
        if args.calibration:
            both = [name for name in args.formats if name in ("onnx", "openvino")]
            cells |= {f"{name}_int8": export(checkpoint, name, True, args) for name in both}
        table[checkpoint.name] = cells
    return {"size": args.size, "checkpoints": table}


def readme_rows(result: dict) -> list[tuple[str, str, str]]:
    """Nothing for the table of speeds: docs/deploy.md has a table of its own."""
    return []
