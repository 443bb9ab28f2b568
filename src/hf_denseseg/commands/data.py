"""`denseseg data list|check|stats|show|convert|pack|doubt`: known datasets, what one holds, its wrong labels."""

import argparse
import json
from pathlib import Path

from hf_denseseg.commands import data_doubt
from hf_denseseg.commands.data_source import add_source_options, source_of
from hf_denseseg.data.shards.manifest import damaged_shards
from hf_denseseg.errors import InputError
from hf_denseseg.files import atomic_path, write_atomic
from hf_denseseg.models.auto.tasks import SEMANTIC_SEGMENTATION, TASKS

_EXAMPLES = {
    "list": "denseseg data list",
    "check": "denseseg data check path/to/camvid --split train",
    "stats": "denseseg data stats path/to/camvid --split train --output stats.json",
    "show": "denseseg data show synthetic --limit 8 --output scenes.png",
    "convert": "denseseg data convert path/to/export --output data",
    "pack": "denseseg data pack path/to/camvid --split train --output_dir camvid-shards --rows_per_shard 100",
}
_EPILOG = """examples:
  denseseg data list
  denseseg data check cityscapes --split val --data_root path/to/archives
  denseseg data check path/to/coco --split train2017 --task object-detection
  denseseg data stats path/to/imagenet --split val --task image-classification"""
_HELP = {
    "list": "known benchmarks and formats of annotation tools: classes, splits, license, source and files",
    "check": "read every image with its labels; name each fault, its file and how to fix it; exit code 2 if any",
    "stats": "count classes and image sizes (for label maps also pixels, and class weights from them), as JSON",
    "show": "draw the first images with their labels into one PNG",
    "convert": "write the export of an annotation tool, or any other dataset, as images and label maps in folders",
    "pack": "write shards that hold images and labels, with checksums; run again, it continues where it stopped",
}


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `data` with its actions to the command line."""
    parser = subparsers.add_parser(
        "data",
        help="list benchmarks; check, count, show or pack a dataset",
        description="Check a dataset before training on it, convert it, or pack it into shards for many machines.",
        epilog=_EPILOG,
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    for name, text in _HELP.items():
        action = actions.add_parser(
            name, help=text, description=text[0].upper() + text[1:] + ".", epilog=f"example:\n  {_EXAMPLES[name]}"
        )
        if name == "list":
            continue
        add = action.add_argument
        add("dataset", help="'synthetic', a benchmark, a folder, export or archive, an annotation file, or a hub id")
        text = "what the labels are for: %(choices)s (default: %(default)s)"
        add("--task", choices=tuple(TASKS), metavar="TASK", default=SEMANTIC_SEGMENTATION, help=text)
        split = None if name == "convert" else "train"
        text = f"train, val, test or the name of a folder (default: {split or 'all'})"
        add("--split", default=split, help=text)
        add_source_options(action)
        default = 8 if name == "show" else None
        text = f"only the first N images (default: {default or 'all'})"
        add("--limit", type=int, metavar="N", default=default, help=text)
        if name == "pack":
            add("--output_dir", type=Path, metavar="FOLDER", required=True, help="folder to write the shards into")
            add("--format", choices=("parquet", "webdataset"), default="parquet", help="of shards (default: parquet)")
            add("--rows_per_shard", type=int, metavar="N", default=500, help="images per shard (default: %(default)s)")
        elif name == "convert":
            add("--output", type=Path, metavar="FOLDER", required=True, help="folder to write, new or empty")
        elif name == "check":
            add("--write_spec", type=Path, metavar="FILE", help="write the label specification that fits label maps")
        else:
            path = Path("data.png" if name == "show" else "stats.json")
            add("--output", type=Path, metavar="FILE", default=path, help=f"file to write (default: {path})")
    data_doubt.add_action(actions)


def main(args: argparse.Namespace) -> int:
    """Run one action; 2 when `check` finds faults."""
    if args.action == "list":
        from hf_denseseg.data.sources import coco_files, imagenet, imagenet_v2
        from hf_denseseg.data.sources.benchmarks import listing
        from hf_denseseg.data.sources.exports.formats import describe_exports

        known = [listing.describe_benchmarks(), coco_files.describe_coco(), imagenet.describe_imagenet()]
        print("\n\n".join([*known, imagenet_v2.describe_imagenet_v2(), listing.FETCH_NOTE, describe_exports()]))
        return 0
    if args.action == "doubt":
        from hf_denseseg.training.run import doubt

        doubt(data_doubt.recipe_of(args), args.min_pixels)
        return 0
    from hf_denseseg.commands.data_writing import convert_splits, pack_split
    from hf_denseseg.data.checks.proposal import offer
    from hf_denseseg.training.tasks import get_task

    task = get_task(args.task)
    source = source_of(args, task)
    if args.action == "pack":
        return pack_split(task.load_split(args.dataset, args.split, args.limit, **source), args)
    if args.action == "convert":
        return convert_splits(args, source)
    if args.action == "show":
        with atomic_path(args.output) as aside:
            task.show(args.dataset, args.split, args.limit, **source).save(aside)
        print(f"Written: {args.output}")
        return 0
    if args.action == "check" and (damaged := damaged_shards(args.dataset, args.split)):
        print("\n".join(damaged))
        return 2
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
        if found.proposal or args.write_spec:
            print(offer(found.proposal, args.write_spec))
        return 2 if found.faults and not args.write_spec else 0
    if not found.images:
        raise InputError(f"{args.dataset} holds no images of split {args.split} to count. Give another --split.")
    statistics = {"dataset": args.dataset, "split": args.split, "images": found.images, **found.statistics}
    statistics["faults"] = [str(fault) for fault in found.faults]
    write_atomic(args.output, json.dumps(statistics, indent=1) + "\n")
    use = " (recipe key: class_weights: {}:median_frequency)" if "class_weights" in statistics else ""
    print(f"Written: {args.output}{use.format(args.output)}")
    return 0
