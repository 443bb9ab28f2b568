"""`denseseg evaluate`: score a checkpoint with any test protocol, or predict a test split for its server."""

import argparse
from pathlib import Path

from hf_denseseg.errors import InputError
from hf_denseseg.models.auto.tasks import SEMANTIC_SEGMENTATION

EPILOG = """examples:
  denseseg evaluate runs/demo/model --dataset synthetic
  denseseg evaluate runs/camvid/model --dataset path/to/camvid --eval_split val --output_dir runs/camvid_ms \\
      --test_scales 0.75 1.0 1.25 --test_flip
  denseseg evaluate runs/camvid/model --dataset path/to/camvid --eval_split val --fit_temperature
  denseseg evaluate runs/camvid/model --dataset path/to/camvid --eval_split test --calibration
  denseseg evaluate runs/coco/model --dataset path/to/coco --eval_split val2017
  denseseg evaluate runs/city/model --dataset cityscapes --data_root FOLDER --eval_split test --submission city.zip
  torchrun --nproc_per_node 2 -m hf_denseseg.cli evaluate CHECKPOINT --dataset FOLDER --use_cpu

--output_dir (default: runs/ and the name of the recipe, or runs/default) gets results.json and, for segmentation,
index.html (open it in a browser), classes.csv, images.csv and confusion.csv.

Run an interrupted command again, with any number of processes, and it continues where it
stopped; with another checkpoint, protocol or label specification it starts from the beginning.

Without a --test_... key the protocol saved with the checkpoint is used. Every data and test key of a recipe can be
given (`denseseg train --keys` lists them)."""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `evaluate` to the command line."""
    parser = subparsers.add_parser(
        "evaluate",
        help="score a checkpoint on a dataset, with any test protocol",
        description="Score a checkpoint for its task: a table of the classes and results.json.",
        epilog=EPILOG,
    )
    parser.add_argument("checkpoint", help="model folder, exported model or hub id")
    parser.add_argument("--recipe", metavar="FILE", help="YAML file whose data and test keys are used (default: none)")
    parser.add_argument(
        "--submission",
        metavar="ZIP",
        help="instead of scoring, write and check a ZIP for the evaluation server of Cityscapes or ADE20K",
    )
    parser.add_argument(
        "--fit_temperature",
        action="store_true",
        help="fit the temperature of the probabilities to this split, and save it with the checkpoint's protocol",
    )
    parser.set_defaults(takes_overrides=True)


def main(args: argparse.Namespace) -> int:
    """Evaluate and print the table."""
    if any(word.startswith("--model") for word in args.overrides):
        raise InputError("The model is the first argument of `denseseg evaluate`; take --model out.")
    from hf_denseseg.models.auto.pretrained import task_of_checkpoint
    from hf_denseseg.training.recipe import load_recipe
    from hf_denseseg.training.run import evaluate, submit

    words = [*args.overrides, "--model", args.checkpoint]
    if not any(word.split("=")[0] == "--task" for word in words):
        words += ["--task", task_of_checkpoint(args.checkpoint) or SEMANTIC_SEGMENTATION]
    recipe = load_recipe(args.recipe, words)
    _check_keys(args.overrides, recipe.task.name)
    if args.submission and args.fit_temperature:
        raise InputError("--submission has no labels to fit a temperature to. Leave --fit_temperature out.")
    if args.submission:
        submit(recipe, Path(args.submission))
    else:
        evaluate(recipe, args.fit_temperature)
    return 0


def _check_keys(words: list[str], task: str) -> None:
    """Refuse keys on the command line that only training reads: they would be accepted and ignored.

    Raises:
        InputError: there is such a key; the test key of the same name is proposed.
    """
    from hf_denseseg.training.key_checks import is_read_in_evaluation
    from hf_denseseg.training.recipe import parse_overrides, recipe_fields

    for key in parse_overrides(words):
        if not is_read_in_evaluation(key, task):
            known = recipe_fields()
            near = f" Did you mean --test_{key}?" if f"test_{key}" in known else " Leave it out."
            raise InputError(f"--{key} changes nothing in an evaluation: only training reads it.{near}")
