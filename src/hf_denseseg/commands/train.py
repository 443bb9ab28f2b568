"""`denseseg train`: train from a recipe, evaluate, and leave a folder that explains itself."""

import argparse
import os
import shutil
import sys
import textwrap
from pathlib import Path

DESCRIPTION = """Train from a recipe, evaluate, and write a run folder: checkpoints, model with its card, results.json,
learning curve, predictions and one HTML page of it all.

After an interruption run the same command again: it
resumes from the last complete checkpoint; on one machine it ends with the same weights, bit for bit."""

EPILOG = """examples:
  denseseg train path/to/dataset --output_dir runs/first
  denseseg train scripts/recipes/dsct/dsct_base_sac_cityscapes_80k.yaml --data_root path/to/archives
  denseseg train scripts/recipes/dsct/dsct_tiny_sac_camvid_cpu.yaml --dataset path/to/camvid --output_dir runs/camvid
  denseseg train --task image-classification --model hlg-tiny --dataset path/to/images --crop_size 224 224
  denseseg train RECIPE.yaml --print_config
  accelerate launch scripts/train.py RECIPE.yaml --bf16
  torchrun --nproc_per_node 2 scripts/train.py RECIPE.yaml --use_cpu

Given a dataset instead of a recipe, every key is derived from the data and the machine, and printed with its
reason; the run folder keeps them as recipe.yaml.

`denseseg train --keys` lists every key of a recipe. Each can also be given as `--key value`, after the recipe, and
then overrides it."""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `train` to the command line."""
    parser = subparsers.add_parser(
        "train",
        help="train a model from a recipe and evaluate it",
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    parser.add_argument(
        "recipe",
        nargs="?",
        help="recipe (YAML file), or a dataset (folder, archive or benchmark), for which one is derived (default: "
        "every key has its default value)",
    )
    parser.add_argument("--print_config", action="store_true", help="print the resulting recipe and exit")
    parser.add_argument(
        "--keys", action="store_true", help="list every key of a recipe with meaning and default, and exit"
    )
    parser.set_defaults(takes_overrides=True)


def main(args: argparse.Namespace) -> int:
    """Train, or print what would be trained."""
    if args.keys:
        print_keys()
        return 0
    from hf_denseseg.training.recipe import load_recipe, parse_overrides

    if args.recipe and is_dataset(args.recipe):
        from hf_denseseg.training.derived_recipe import derived_recipe

        recipe = derived_recipe(args.recipe, parse_overrides(args.overrides))
        reasons = recipe.comments if int(os.environ.get("RANK", 0)) == 0 else {}  # of several processes one prints
        for key, reason in reasons.items():
            print(f"{key}: {recipe.given[key]} ({reason})", file=sys.stderr)
    else:
        recipe = load_recipe(args.recipe, args.overrides)
    if args.print_config:
        print(recipe.to_yaml(), end="")
        return 0
    from hf_denseseg.training.run import train

    train(recipe)
    return 0


def is_dataset(argument: str) -> bool:
    """Whether the first argument is a dataset, for which a recipe is derived, and not a recipe file."""
    from hf_denseseg.data.reading.archives import is_archive
    from hf_denseseg.data.sources.benchmarks.layouts import NAMES

    path = Path(argument).expanduser()
    if path.is_dir() or (path.is_file() and is_archive(path)):
        return True
    return not path.exists() and (argument in NAMES or argument.split(":")[0].split("@")[0] == "synthetic")


def print_keys() -> None:
    """Print name, meaning and default of our keys, and the names of those that transformers defines.

    On a terminal lines are wrapped; elsewhere each key has one.
    """
    from hf_denseseg.training.key_checks import UNUSED_KEYS
    from hf_denseseg.training.recipe import ARGUMENT_CLASSES, recipe_fields

    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize
    inherited = []
    for name, (owner, _) in recipe_fields().items():
        field = owner.__dataclass_fields__[name]
        if name in ARGUMENT_CLASSES[-1].__annotations__ or owner is not ARGUMENT_CLASSES[-1]:
            default = field.default_factory() if callable(field.default_factory) else field.default
            tasks = ", ".join(field.metadata.get("tasks", ()))
            only = f" [only {tasks}]" if tasks else ""
            meaning = field.metadata.get("help", "")
            shown = "" if "(default: " in meaning else f" [default: {default}]"
            text = f"{name:<30} {meaning}{shown}{only}"
            print(textwrap.fill(text, width, subsequent_indent=" " * 31, break_on_hyphens=False))
        elif name not in UNUSED_KEYS:
            inherited.append(name)
    text = "and the arguments of transformers.TrainingArguments: " + ", ".join(sorted(inherited))
    print("\n" + textwrap.fill(text, width))
