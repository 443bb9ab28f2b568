"""`denseseg data check|stats|show`: look at a data set before training on it."""

import argparse
import json
from itertools import islice
from pathlib import Path
from typing import Any

from hf_denseseg.data.checks import Scan, scan_source
from hf_denseseg.data.datasets import load_segmentation
from hf_denseseg.files import atomic_path, write_atomic
from hf_denseseg.visualization import picture_grid

_EXAMPLES = {
    "check": "denseseg data check path/to/camvid --split train",
    "stats": "denseseg data stats path/to/camvid --split train --output stats.json",
    "show": "denseseg data show synthetic --limit 8 --output scenes.png",
}
_HELP = {
    "check": "read every pair and name each fault with its file and remedy; exit code 2 if there are any",
    "stats": "count pixels, sizes and void; write them with class weights as JSON",
    "show": "draw pictures beside their labels",
}


def add_parser(subparsers: Any) -> None:
    """Add `data` with its three actions to the command line."""
    parser = subparsers.add_parser(
        "data",
        help="check, count or show a data set",
        description="Look at a data set before training on it.",
        epilog="example: " + _EXAMPLES["check"],
    )
    actions = parser.add_subparsers(dest="action", metavar="check|stats|show", required=True)
    for name, text in _HELP.items():
        action = actions.add_parser(
            name, help=text, description=text[0].upper() + text[1:] + ".", epilog="example: " + _EXAMPLES[name]
        )
        action.add_argument("dataset", help="synthetic, a folder of pairs or shards, or a hub id")
        action.add_argument("--split", default="train", help="train (default), val, test or a folder name")
        action.add_argument("--label_spec", metavar="FILE", help="label specification (YAML or JSON)")
        action.add_argument(
            "--columns", type=json.loads, metavar="JSON", help='columns of shards: \'{"label": "mask"}\''
        )
        action.add_argument("--revision", help="revision of a hub data set")
        default = 8 if name == "show" else None
        action.add_argument("--limit", type=int, default=default, help=f"so many pairs (default {default or 'all'})")
        if name != "check":
            path = Path("data.png" if name == "show" else "stats.json")
            action.add_argument("--output", type=Path, default=path, help=f"file to write (default {path})")


def main(args: argparse.Namespace) -> int:
    """Run one action; 2 when `check` finds faults."""
    source: dict[str, Any] = {"spec": args.label_spec, "columns": args.columns, "revision": args.revision}
    if args.action == "show":
        return _show(args, source)
    scan = scan_source(args.dataset, args.split, limit=args.limit, progress=True, **source)
    for fault in scan.faults:
        print(f"fault: {fault}")
    for note in scan.notes:
        print(f"note: {note}")
    print(_table(scan))
    if args.action == "check":
        print(
            f"{scan.images} pairs read, {len(scan.faults)} faults."
            if scan.faults
            else f"{scan.images} pairs, no faults."
        )
        return 2 if scan.faults else 0
    write_atomic(args.output, json.dumps(_statistics(args, scan), indent=1) + "\n")
    print(f"Written: {args.output} (recipe key: class_weights: {args.output}:median_frequency)")
    return 0


def _show(args: argparse.Namespace, source: dict[str, Any]) -> int:
    data = load_segmentation(args.dataset, args.split, limit=args.limit, **source)
    rows = [(row["image"], row["label"]) for row in islice(data.dataset, args.limit)]
    with atomic_path(args.output) as aside:
        picture_grid(rows, data.spec, ("picture", "label")).save(aside)
    print(f"Written: {args.output} ({len(rows)} pictures)")
    return 0


def _table(scan: Scan) -> str:
    """Share of each class, void, and the sizes, as lines of text."""
    weights = scan.class_weights()
    lines = [f"{'class':<20}{'share %':>10}{'pictures':>10}{'enet':>10}{'median':>10}"]
    for index, name in enumerate(scan.spec.classes):
        lines.append(
            f"{name:<20}{100 * scan.shares[index]:>10.3f}{scan.images_with[index]:>10}"
            f"{weights['enet'][index]:>10.3f}{weights['median_frequency'][index]:>10.3f}"
        )
    lines.append(f"{'(void, of all)':<20}{100 * scan.void_share:>10.3f}")
    sizes = ", ".join(f"{height}x{width}: {count}" for (height, width), count in scan.sizes.most_common(6))
    return "\n".join([*lines, f"sizes (height x width: pictures): {sizes or 'none'}"])


def _statistics(args: argparse.Namespace, scan: Scan) -> dict[str, Any]:
    return {
        "dataset": args.dataset,
        "split": args.split,
        "images": scan.images,
        "classes": list(scan.spec.classes),
        "pixels": scan.pixels.tolist(),
        "shares": scan.shares.tolist(),
        "pictures_with_class": scan.images_with.tolist(),
        "void_share": scan.void_share,
        "sizes": {f"{height}x{width}": count for (height, width), count in scan.sizes.most_common()},
        "faults": [str(fault) for fault in scan.faults],
        "class_weights": scan.class_weights(),
    }
