"""Combine the options of `denseseg export`, and compare the scores of a checkpoint and its export."""

import argparse
from pathlib import Path
from typing import Any

from hf_denseseg.errors import InputError, RunError
from hf_denseseg.evaluation.score_names import SCORE_NAMES
from hf_denseseg.inference.export.record import is_export
from hf_denseseg.training.key_checks import is_read_in_evaluation
from hf_denseseg.training.recipe import Recipe, load_recipe, parse_overrides

ENDINGS = (".pt2", ".onnx", ".xml", ".pte")


def output_folder(path: str) -> Path:
    """The folder to write.

    Raises:
        InputError: it is a file, or holds anything but an earlier export.
    """
    output = Path(path)
    if output.is_file() or output.suffix in ENDINGS:
        raise InputError(f"--output {output}: give a folder; the model gets its usual name in it.")
    if output.exists() and not is_export(output) and any(output.iterdir()):
        raise InputError(f"--output {output} holds other files. Give a new folder, or that of an earlier export.")
    return output


def scoring_recipe(args: argparse.Namespace, task: str, folder: Path) -> Recipe | None:
    """The recipe that checkpoint and export are scored with; class maps are scored with whole images and one view.

    Args:
        args: the command line.
        task: of the checkpoint.
        folder: for what a Trainer creates.

    Raises:
        InputError: a key is unknown or is not read in an evaluation, or there is no dataset.
    """
    given = parse_overrides(args.overrides)
    for key in given:
        if not is_read_in_evaluation(key, task) or key in ("task", "output_dir"):
            raise InputError(f"--{key} changes nothing in an export. Leave it out.")
    if given and "dataset" not in given and not args.calibration:
        raise InputError(f"--{next(iter(given))} is for scoring on a dataset. Give --dataset, or leave it out.")
    return _recipe(args, task, folder, []) if "dataset" in given else None


def calibration_recipe(args: argparse.Namespace, task: str, folder: Path) -> Recipe | None:
    """The recipe that runs the calibration images: of the training split, with the other keys of the command line.

    Raises:
        InputError: `--int8` without `--calibration`, or the other way round.
    """
    if args.int8 != (args.calibration is not None):
        raise InputError("--int8 and --calibration DATASET need each other: ranges come from training images.")
    if args.calibration_images is not None and (not args.int8 or args.calibration_images < 1):
        raise InputError("--calibration_images is the number of images for --int8, at least 1.")
    if not args.int8:
        return None
    given = parse_overrides(args.overrides)
    split = str(given.get("train_split", "train"))
    return _recipe(args, task, folder, ["--dataset", args.calibration, "--eval_split", split])


def _recipe(args: argparse.Namespace, task: str, folder: Path, more: list[str]) -> Recipe:
    whole = ["--test_mode", "whole"] if args.with_argmax else []
    own = ["--model", args.checkpoint, "--task", task, "--output_dir", str(folder)]
    return load_recipe(None, [*whole, *args.overrides, *more, *own])


def compared_scores(task: str, model: dict[str, Any], exported: dict[str, Any]) -> dict[str, Any]:
    """For `export.json`: what was scored, the main score of both (fractions), and the score of each class by both."""
    names = SCORE_NAMES[task]
    metric, column = names.main_metric[0], next(iter(names.columns))
    rows = zip(model["scores"]["per_class"], exported["scores"]["per_class"], strict=True)
    return {
        **{key: model[key] for key in ("dataset", "split", "images", "protocol")},
        "metric": metric,
        "model": model["scores"][metric],
        "exported": exported["scores"][metric],
        "classes": [{"class": row["class"], "model": row[column], "exported": other[column]} for row, other in rows],
    }


def check_scores(score: dict[str, Any], most_lost: float) -> None:
    """Print both scores.

    Raises:
        RunError: they differ by more than `most_lost`.
    """
    both = f"{score['metric']} on {score['images']} images: model {100 * score['model']:.2f}, "
    both += f"exported {100 * score['exported']:.2f}"
    if not abs(score["model"] - score["exported"]) <= most_lost:
        raise RunError(f"{both}: they differ by more than {100 * most_lost:g} points; nothing was written.")
    print(both)


def print_agreement(rows: list[dict[str, Any]]) -> None:
    """Print a line for each size."""
    for row in rows:
        error = f", largest error {row['error']:.1e} of the spread" if "error" in row else ""
        where = f"batch {row['batch']}, {row['height']}x{row['width']}"
        print(f"{where}: agreement {100 * row['agreement']:.3f} %{error}")
