"""Exports in every format: agreement, score of both, milliseconds, peak memory, file size, or the reason why not.

Without `--checkpoints` a small model of each family and task is trained for a few steps on drawn scenes; rows start
from these. Each pair of checkpoint and format is one run of `denseseg export`. What the work folder holds already is
read from there, so that an interrupted command goes on, and rows and cells of earlier commands stay in the results.
"""

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from _results import earlier_figures

import hf_denseseg
from experiments import DENSESEG, train

FORMATS = ("torch", "onnx", "openvino", "aoti", "executorch", "web", "transformers_js")
INT8 = ("onnx", "openvino")
SCRIPTS = Path(__file__).resolve().parents[1]
SIZE = (192, 288)
SCENES = f"synthetic:100@{SIZE[0]}x{SIZE[1]}"
# An exported detector takes images of one size: all of these become its recipe's 192x320.
DETECTOR_SCENES = "synthetic:2@96x160"
# Sizes of the models for segmentation: rows of the leaderboard.
SEGMENTATION = {
    "dsct": "DSCT",
    "setr-pup": "SETR-PUP",
    "hlg-pup": "HLG-PUP",
    "unept": "UN-EPT",
    "hfgd": "HFGD, half ResNet-18",
}
STEPS = 40
TRAINED = {
    "crop_size": [128, 192],
    "per_device_train_batch_size": 8,
    "learning_rate": 1.0e-3,
    "max_steps": STEPS,
    "warmup_steps": 5,
    "eval_strategy": "no",
    "save_steps": STEPS,
    "use_cpu": True,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoints", nargs="+", type=Path, help="folders; their names are the rows (default: own)")
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=FORMATS, help="columns (default: all)")
    parser.add_argument("--dataset", default=SCENES, help="to score checkpoint and export on (default %(default)s)")
    parser.add_argument("--eval_split", default="val", help="(default val)")
    parser.add_argument("--images", default="10", help="largest number of images for the score (default 10)")
    parser.add_argument("--size", nargs=2, default=[*map(str, SIZE)], metavar=("H", "W"), help="of its images")
    parser.add_argument("--work", type=Path, default=Path("runs/export_formats"), help="folder for models and exports")


def own_checkpoints(work: Path) -> list[Path]:
    """Train a small model of each family and task; Mask R-CNN, which no format holds, needs a configuration only."""
    rows = yaml.safe_load((SCRIPTS / "leaderboards" / "camvid.yaml").read_text())["rows"]
    commands, made = Path(hf_denseseg.__file__).parent / "commands", []
    for name, row in SEGMENTATION.items():
        own = {key: value for key, value in rows[row].items() if key in ("model", "config_overrides")}
        train(work / "trained" / name, {**TRAINED, **own, "dataset": SCENES, "max_eval_samples": 20})
        made.append(name)
    for name, task, own in (
        ("hlg-classifier", "image_classification", {}),
        ("hlg-retinanet", "object_detection", {"dataset": DETECTOR_SCENES}),
    ):
        recipe = yaml.safe_load((commands / f"demo_{task}.yaml").read_text())
        fewer = {"max_steps": STEPS, "eval_strategy": "no", "save_steps": STEPS, "use_cpu": True}
        train(work / "trained" / name, {**recipe, **fewer, **own})
        made.append(name)
    config = hf_denseseg.create_config("hlg-maskrcnn-tiny")
    config.architectures = ["HlgForInstanceSegmentation"]
    config.save_pretrained(work / "trained" / "hlg-maskrcnn" / "model")
    return [work / "trained" / name / "model" for name in (*made, "hlg-maskrcnn")]


def data_of(checkpoint: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Data for the score: those of its training, if the checkpoint lies in the folder of a run of another task."""
    recipe = checkpoint.parent.with_name(f"{checkpoint.parent.name}.yaml")
    keys = yaml.safe_load(recipe.read_text()) if recipe.exists() else {}
    if "task" not in keys:
        return {"dataset": args.dataset, "eval_split": args.eval_split, "max_eval_samples": args.images}
    names = ("dataset", "eval_split", "max_eval_samples", "test_base_size", "crop_size")
    return {key: keys[key] for key in names if key in keys}


def export(checkpoint: Path, folder: Path, name: str, int8: bool, args: argparse.Namespace) -> dict[str, Any]:
    """The cell of one checkpoint and format, from its `export.json`."""
    record = folder / "export.json"
    if not record.exists():
        data, size = data_of(checkpoint, args), args.size
        words = [*DENSESEG, "export", str(checkpoint), "--format", name, "--output", str(folder), "--use_cpu"]
        base, crop = data.pop("test_base_size", None), data.pop("crop_size", None)
        if prepared := base or crop:  # the size of a detector's or a classifier's images
            size = [str(side) for side in prepared]
        words += ["--size", *size] if name == "executorch" or base else []
        words += ["--int8", "--calibration", data["dataset"], "--calibration_images", "30"] if int8 else []
        words += [word for key, value in data.items() for word in (f"--{key}", str(value))]
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            return {"reason": last.removeprefix("error: ").removeprefix("failed: ")}
    found = json.loads(record.read_text())
    score, cost = found["score"], found["cost"]
    return {
        "agreement": found["int8"]["agreement"] if int8 else min(row["agreement"] for row in found["verified"]),
        "metric": score["metric"],
        "images": score["images"],
        "any_size": found["size"] is None,
        "size": cost["size"],
        "file_mib": found["model_bytes"] / 2**20,
        **{
            kind: {
                "score": score[kind],
                "milliseconds": cost[kind]["milliseconds"],
                "peak_mib": cost[kind]["peak_memory_bytes"] / 2**20,
            }
            for kind in ("model", "exported")
        },
    }


def run(args: argparse.Namespace) -> dict[str, Any]:
    table: dict[str, Any] = earlier_figures(args).get("checkpoints", {})
    for checkpoint in args.checkpoints or own_checkpoints(args.work):
        name = checkpoint.parent.name if checkpoint.name == "model" else checkpoint.name
        row = table.setdefault(name, {"commands": [], "cells": {}})
        command = "python scripts/benchmark.py " + shlex.join(sys.argv[1:])
        row["commands"] = [*dict.fromkeys([*row["commands"], command])]
        for format_name, int8 in [(name, int8) for name in args.formats for int8 in (False, True)]:
            if int8 and format_name not in INT8:
                continue
            cell = f"{format_name} int8" if int8 else format_name
            folder = args.work / name / cell.replace(" ", "_")
            row["cells"][cell] = export(checkpoint, folder, format_name, int8, args)
            print(name, cell, row["cells"][cell], flush=True)
    return {"checkpoints": table}


def readme_rows(result: dict) -> list[tuple[str, str, str]]:
    """Nothing for the table of speeds: docs/deploy.md has a table of its own."""
    return []
