"""`denseseg data doubt`: labels that a checkpoint contradicts, ranked."""

import argparse
from typing import Any

from hf_denseseg.errors import InputError
from hf_denseseg.models.auto.tasks import SEMANTIC_SEGMENTATION

EPILOG = """examples:
  denseseg data doubt runs/camvid/model --dataset path/to/camvid --split train --output_dir doubts
  torchrun --nproc_per_node 2 -m hf_denseseg.cli data doubt CHECKPOINT --dataset FOLDER --use_cpu

--output_dir gets doubts.csv (one row per region: image, box, classes, probabilities) and index.html with the first
ones outlined.

A model doubts labels best that it was not trained on: train on one part of the data, and rank another.

Run an interrupted command again, with any number of processes, and it continues where it stopped."""
HELP = "rank the labels that a checkpoint contradicts, as a table and a page"


def add_action(actions: argparse._SubParsersAction) -> None:
    """Add `doubt` to the actions of `denseseg data`."""
    action = actions.add_parser("doubt", help=HELP, description=f"{HELP[0].upper()}{HELP[1:]}.", epilog=EPILOG)
    add = action.add_argument
    add("checkpoint", help="folder or hub id of a segmentation model")
    add(
        "--dataset",
        metavar="DATASET",
        required=True,
        help="'synthetic', a benchmark, a folder or archive, or a hub id",
    )
    add("--split", default="train", help="train, val, test or the name of a folder (default: %(default)s)")
    add("--data_root", metavar="FOLDER", help="folder of the benchmark that --dataset names")
    add("--label_spec", metavar="FILE", help="label specification (default: found beside the data)")
    add("--limit", type=int, metavar="N", help="only the first N images (default: all)")
    add(
        "--min_pixels",
        type=int,
        default=64,
        metavar="N",
        help="leave regions of fewer pixels out (default: %(default)s)",
    )
    add("--output_dir", metavar="FOLDER", default="doubts", help="folder to write (default: %(default)s)")
    add("--use_cpu", action="store_true", help="do not use a GPU")


def recipe_of(args: argparse.Namespace) -> Any:
    """The recipe of an evaluation with these options.

    Raises:
        InputError: a number that is none, or what `load_recipe` refuses.
    """
    from hf_denseseg.models.auto.pretrained import task_of_checkpoint
    from hf_denseseg.training.recipe import load_recipe

    for option in ("limit", "min_pixels"):
        if (value := getattr(args, option)) is not None and value < 1:
            raise InputError(f"--{option} is {value}. Give 1 or more.")
    task = task_of_checkpoint(args.checkpoint) or SEMANTIC_SEGMENTATION
    given = {"model": args.checkpoint, "task": task, "dataset": args.dataset, "eval_split": args.split}
    given |= {"data_root": args.data_root, "label_spec": args.label_spec, "max_eval_samples": args.limit}
    words = [f"--{key}={value}" for key, value in given.items() if value is not None]
    words += [f"--output_dir={args.output_dir}", *(["--use_cpu"] if args.use_cpu else [])]
    return load_recipe(None, words)
