"""The options of `denseseg data` that say what a dataset is, as keywords of the task's loader."""

import argparse
from typing import Any

from hf_denseseg.data.reading.pixels import PixelFormat
from hf_denseseg.errors import InputError
from hf_denseseg.training.tasks.task import Task


def source_of(args: argparse.Namespace, task: Task) -> dict[str, Any]:
    """Keywords of the loader, see `Task.source_options`.

    Raises:
        InputError: an option that has no meaning for the task, or a value that is none.
    """
    given = {"spec": args.label_spec, "root": args.data_root, "columns": args.columns, "revision": args.revision}
    source = {key: value for key, value in given.items() if value is not None}
    if args.num_channels is not None or args.pixel_range is not None:
        source["pixel_format"] = PixelFormat(args.num_channels or 3, _range_of(args.pixel_range))
    if unread := [key for key in source if key not in task.source_options]:
        names = {"spec": "label_spec", "root": "data_root"}
        raise InputError(f"--{names.get(unread[0], unread[0])} has no meaning for {args.task} data. Leave it out.")
    return source


def _range_of(words: list[str] | None) -> Any:
    """The range as a recipe writes it."""
    if words is None:
        return "uint8"
    try:
        return words[0] if len(words) == 1 else tuple(float(word) for word in words)
    except ValueError:
        return " ".join(words)  # refused by `PixelFormat`
