"""`denseseg data check|stats|show`: look at a data set before training on it."""

import argparse
import json
from pathlib import Path
from typing import Any

from hf_denseseg.errors import InputError
from hf_denseseg.files import atomic_path, write_atomic
from hf_denseseg.recipe_keys import TASKS

_EXAMPLES = {
    "check": "denseseg data check path/to/camvid --split train",
    "stats": "denseseg data stats path/to/camvid --split train --output stats.json",
    "show": "denseseg data show synthetic --limit 8 --output scenes.png",
}
_EPILOG = """examples:
  denseseg data check path/to/camvid --split train
  denseseg data check path/to/coco --split train2017 --task object-detection
  denseseg data stats path/to/imagenet --split val --task image-classification"""
_HELP = {
    "check": "read every picture with its labels and name each fault with its file and remedy; exit code 2 if any",
    "stats": "count classes and sizes (of label maps pixels and void, with class weights) as JSON",
    "show": "draw pictures with their labels",
}


def add_parser(subparsers: Any) -> None:
    """Add `data` with its three actions to the command line."""
    parser = subparsers.add_parser(
        "data",
        help="check, count or show a data set",
        description="Look at a data set before training on it.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(dest="action", metavar="check|stats|show", required=True)
    for name, text in _HELP.items():
        action = actions.add_parser(
            name, help=text, description=text[0].upper() + text[1:] + ".", epilog="example: " + _EXAMPLES[name]
        )
        action.add_argument("dataset", help="synthetic, a folder, an annotation file, or a hub id")
        action.add_argument("--task", choices=TASKS, default=TASKS[0], help="what is learned (default: %(default)s)")
        action.add_argument("--split", default="train", help="train (default), val, test or a folder name")
        action.add_argument("--label_spec", metavar="FILE", help="label specification, or names of the classes")
        action.add_argument(
            "--columns", type=json.loads, metavar="JSON", help='columns of shards: \'{"label": "mask"}\''
        )
        action.add_argument("--revision", help="revision of a hub data set")
        default = 8 if name == "show" else None
        action.add_argument(
            "--limit", type=int, default=default, help=f"so many pictures (default {default or 'all'})"
        )
        if name != "check":
            path = Path("data.png" if name == "show" else "stats.json")
            action.add_argument("--output", type=Path, default=path, help=f"file to write (default {path})")


def main(args: argparse.Namespace) -> int:
    """Run one action; 2 when `check` finds faults."""
    from hf_denseseg.tasks import get_task

    task = get_task(args.task)
    given = {"spec": args.label_spec, "columns": args.columns, "revision": args.revision}
    source = {key: value for key, value in given.items() if value is not None}
    if unread := [key for key in source if key not in task.source_options]:
        names = {"spec": "label_spec"}
        raise InputError(f"--{names.get(unread[0], unread[0])} says nothing about {args.task} data. Leave it out.")
    if args.action == "show":
        with atomic_path(args.output) as aside:
            task.show(args.dataset, args.split, args.limit, **source).save(aside)
        print(f"Written: {args.output}")
        return 0
    found = task.inspect(args.dataset, args.split, args.limit, **source)
    for fault in found.faults:
        print(f"fault: {fault}")
    for note in found.notes:
        print(f"note: {note}")
    print(found.table)
    if args.action == "check":
        what = task.examples
        faults = f"read, {len(found.faults)} faults." if found.faults else "no faults."
        print(f"{found.images} {what}{' ' if found.faults else ', '}{faults}")
        return 2 if found.faults else 0
    statistics = {"dataset": args.dataset, "split": args.split, "images": found.images, **found.statistics}
    statistics["faults"] = [str(fault) for fault in found.faults]
    write_atomic(args.output, json.dumps(statistics, indent=1) + "\n")
    use = " (recipe key: class_weights: {}:median_frequency)" if "class_weights" in statistics else ""
    print(f"Written: {args.output}{use.format(args.output)}")
    return 0
