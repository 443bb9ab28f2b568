"""What the options of `denseseg predict` mean together; what contradicts itself is refused with the remedy."""

import argparse
import dataclasses
from typing import Any

from hf_denseseg.errors import InputError
from hf_denseseg.inference.introspection.attention import ShowSettings
from hf_denseseg.inference.predict.inputs import MAX_PIXELS, Source
from hf_denseseg.inference.predict.outputs import BAND_PIXELS, OutputSettings
from hf_denseseg.inference.settings import InferenceSettings
from hf_denseseg.models.auto.tasks import DETECTION_TASKS, SEMANTIC_SEGMENTATION

EVERYWHERE = {"command", "checkpoint", "inputs", "output", "device", "overrides", "every", "max_pixels"}


def check_options(args: argparse.Namespace, task: str, sources: list[Source]) -> None:
    """Refuse options that mean nothing for the checkpoint's task or for what is to be labelled, and wrong numbers.

    Raises:
        InputError: there is such an option.
    """
    for name, value in vars(args).items():
        if name in EVERYWHERE or value is None or (name == "threshold" and task in DETECTION_TASKS):
            continue
        if task != SEMANTIC_SEGMENTATION or name == "threshold":
            raise InputError(f"--{name} changes nothing for a checkpoint for {task}. Leave it out.")
    for name, least in (("every", 1), ("max_pixels", 1), ("band_pixels", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise InputError(f"--{name} is {value}. Give a whole number from {least} on.")
    films = any(source.kind != "image" for source in sources)
    for name, given in (("every", args.every is not None), ("write video", "video" in (args.write or ()))):
        if given and not films:
            raise InputError(f"--{name} changes nothing: there is no video among the inputs. Leave it out.")


def given_outputs(args: argparse.Namespace, sources: list[Source]) -> OutputSettings:
    """What is to be written.

    Raises:
        InputError: it cannot be written like this.
    """
    films = any(source.kind != "image" for source in sources)
    default = ("masks", "overlays", "video") if films else ("masks", "overlays")
    write = tuple(dict.fromkeys(args.write or default))
    if args.band_pixels is not None and "probabilities" in write:
        raise InputError("--band_pixels and --write probabilities contradict each other: they need all rows at once.")
    band_pixels = BAND_PIXELS if args.band_pixels is None else args.band_pixels
    return OutputSettings(write, bool(args.raw_ids), band_pixels, args.every or 1)


def max_pixels(args: argparse.Namespace) -> int:
    """Pixels of the largest picture that is read."""
    return MAX_PIXELS if args.max_pixels is None else args.max_pixels


def given_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The inference settings named on the command line; they replace those saved with the checkpoint."""
    names = [field.name for field in dataclasses.fields(InferenceSettings)]
    given = {name: getattr(args, name) for name in names if getattr(args, name, None) is not None}
    if "crop_size" in given:
        if given.get("mode") == "whole":
            raise InputError("--mode whole looks at the picture without a window. Leave out --crop_size or --mode.")
        # The saved stride belongs to the saved window.
        given = {"stride": None, **given, "mode": "slide"}
    return given


def given_show(args: argparse.Namespace) -> ShowSettings | None:
    """What of the model's inside is wanted; None without `--show`."""
    kinds = tuple(dict.fromkeys(args.show or ()))
    for option, needs in (("point", {"attention"}), ("layers", {"attention", "features"}), ("show_size", set(kinds))):
        if getattr(args, option) is not None and not needs & set(kinds):
            wanted = " or ".join(sorted(needs)) or "attention"
            raise InputError(f"--{option} changes nothing here. Add --show {wanted}, or leave it out.")
    numbers = args.point or []
    if len(numbers) % 2:
        raise InputError(f"--point has {len(numbers)} numbers. Give pairs: X to the right and Y down, in pixels.")
    points = tuple(zip(numbers[::2], numbers[1::2], strict=True))
    size = {} if args.show_size is None else {"size": args.show_size}
    return ShowSettings(kinds, points, tuple(dict.fromkeys(args.layers or ())), **size) if kinds else None
