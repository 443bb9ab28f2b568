"""The options of `denseseg data` that say what a dataset is, as keywords of the task's loader."""

import argparse
import json
from typing import TYPE_CHECKING, Any

from hf_denseseg.data.sources.folder_options import FolderOptions
from hf_denseseg.errors import InputError

if TYPE_CHECKING:
    from hf_denseseg.training.tasks.task import Task

_FOLDER_OPTIONS = ("overlap", "empty_images", "mask_suffix")


def add_source_options(parser: argparse.ArgumentParser) -> None:
    """Add the options to a command."""
    add = parser.add_argument
    text = "folder of the benchmark that DATASET names (default: $DENSESEG_DATA_ROOT)"
    add("--data_root", metavar="FOLDER", help=text)
    text = (
        "label specification (YAML or JSON), a list of class names, or a benchmark's name (default: found by itself)"
    )
    add("--label_spec", metavar="FILE", help=text)
    text = 'names of columns in the data, where they differ from ours: \'{"label": "mask"}\''
    add("--columns", type=json.loads, metavar="JSON", help=text)
    text = "commit, tag or branch of a hub dataset (default: the newest; copies of benchmarks need a commit)"
    add("--revision", metavar="NAME", help=text)
    add("--num_channels", type=int, metavar="N", help="channels of each image (default: 3)")
    text = "stored values: uint8 (default), uint16, or those of black and white: 0 4095"
    add("--pixel_range", nargs="+", metavar="X", help=text)
    text = "exports: which of overlapping objects is on top: last (default) or smaller"
    add("--overlap", metavar="WHICH", help=text)
    text = "exports: what an image without objects is: background (default) or ignored"
    add("--empty_images", metavar="AS", help=text)
    text = "what the file name of a mask has after that of its image, for example _mask (default: found by itself)"
    add("--mask_suffix", metavar="END", help=text)


def source_of(args: argparse.Namespace, task: "Task") -> dict[str, Any]:
    """Keywords of the loader, see `Task.source_options`.

    Raises:
        InputError: an option that has no meaning for the task, or a value that is none.
    """
    from hf_denseseg.data.reading.pixels import PixelFormat  # waits for torch

    # Option -> keyword.
    keywords = {"label_spec": "spec", "data_root": "root", "columns": "columns", "revision": "revision"}
    keywords |= {"num_channels": "pixel_format", "pixel_range": "pixel_format"}
    keywords |= dict.fromkeys(_FOLDER_OPTIONS, "options")
    given = {key: value for key in keywords if (value := getattr(args, key)) is not None}
    if unread := [key for key in given if keywords[key] not in task.source_options]:
        raise InputError(f"--{unread[0]} has no meaning for {args.task} data. Leave it out.")
    source = {keywords[key]: value for key, value in given.items()}
    if "pixel_format" in source:
        source["pixel_format"] = PixelFormat(args.num_channels or 3, _range_of(args.pixel_range))
    if "options" in source:
        source["options"] = FolderOptions(**{key: getattr(args, key) for key in _FOLDER_OPTIONS})
    return source


def _range_of(words: list[str] | None) -> Any:
    """The range as a recipe writes it."""
    if words is None:
        return "uint8"
    try:
        return words[0] if len(words) == 1 else tuple(float(word) for word in words)
    except ValueError:
        return " ".join(words)  # refused by `PixelFormat`
