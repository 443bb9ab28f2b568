"""The actions of `denseseg data` that write a dataset in another form: `convert` and `pack`."""

import argparse
from typing import Any

from hf_denseseg.data.conversion import convert
from hf_denseseg.data.segmentation import splits_of
from hf_denseseg.data.shards.packing import pack
from hf_denseseg.errors import InputError
from hf_denseseg.models.auto.tasks import SEMANTIC_SEGMENTATION

_REPACK = (
    *("task", "split", "data_root", "label_spec", "revision", "limit", "output_dir", "format", "rows_per_shard"),
    *("overlap", "empty_images", "mask_suffix"),
)


def convert_splits(args: argparse.Namespace, source: dict[str, Any]) -> int:
    """Write the plain layout, of all splits or those given.

    Raises:
        InputError: the task has no label maps, or the output folder holds files.
    """
    if args.task != SEMANTIC_SEGMENTATION:
        raise InputError(f"data convert writes label maps, which {args.task} data does not have. Leave --task out.")
    known = {key: source[key] for key in ("root", "options") if key in source}
    splits = args.split.split("+") if args.split else splits_of(args.dataset, **known)
    counts = convert(args.dataset, args.output, splits, progress=True, limit=args.limit, **source)
    print(f"{', '.join(f'{split}: {count} pairs' for split, count in counts.items())}. Written: {args.output}")
    return 0


def pack_split(data: Any, args: argparse.Namespace) -> int:
    """Write shards; the manifest keeps the command line, so that a message can say how to repair them."""
    options = {"form": args.format, "rows_per_shard": args.rows_per_shard, "task": args.task}
    words = [word for key in _REPACK if (given := getattr(args, key)) is not None for word in (f"--{key}", str(given))]
    command = ["denseseg", "data", "pack", args.dataset, *words]
    shards = pack(data, args.output_dir, args.split, **options, command=command, progress=True)
    print(f"{len(data.dataset)} {args.task} rows in {len(shards)} shards. Written: {args.output_dir}")
    return 0
