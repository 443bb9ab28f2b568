"""Combine the options of `denseseg predict`; contradictions are refused with advice."""

import argparse
import dataclasses
from typing import Any

from hf_denseseg.errors import InputError
from hf_denseseg.inference.introspection.inspection import ShowSettings
from hf_denseseg.inference.predict.inputs import MAX_PIXELS, Source
from hf_denseseg.inference.predict.objects import ObjectPredictor
from hf_denseseg.inference.predict.outputs import TILE_ABOVE_PIXELS, OutputSettings
from hf_denseseg.inference.predict.predictor import Predictor
from hf_denseseg.inference.predict.segmentation import SegmentationPredictor
from hf_denseseg.inference.settings import InferenceSettings
from hf_denseseg.models.auto.tasks import DETECTION_TASKS, SEMANTIC_SEGMENTATION

EVERYWHERE = {"command", "checkpoint", "inputs", "output_dir", "device", "overrides", "frame_stride", "max_pixels"}


def check_options(args: argparse.Namespace, task: str, sources: list[Source]) -> None:
    """Refuse options that have no effect for the checkpoint's task or the inputs, and numbers out of range.

    Raises:
        InputError: there is such an option.
    """
    for name, value in vars(args).items():
        if name in EVERYWHERE or value is None or (name == "threshold" and task in DETECTION_TASKS):
            continue
        if task != SEMANTIC_SEGMENTATION or name == "threshold":
            raise InputError(f"--{name} changes nothing for a checkpoint for {task}. Leave it out.")
    for name, minimum in (("frame_stride", 1), ("max_pixels", 1), ("tile_above_pixels", 0)):
        value = getattr(args, name)
        if value is not None and value < minimum:
            raise InputError(f"--{name} is {value}. Give an integer of at least {minimum}.")
    has_videos = any(source.kind != "image" for source in sources)
    for name, given in (
        ("frame_stride", args.frame_stride is not None),
        ("write video", "video" in (args.write or ())),
    ):
        if given and not has_videos:
            raise InputError(f"--{name} changes nothing: there is no video among the inputs. Leave it out.")


def load_predictor(args: argparse.Namespace, task: str, sources: list[Source], device: str) -> Predictor:
    """Load the checkpoint with the options for its task.

    Raises:
        InputError: the checkpoint or an option cannot be used.
        RunError: a hub id without a network.
    """
    if task != SEMANTIC_SEGMENTATION:
        threshold = {} if args.threshold is None else {"threshold": args.threshold}
        return ObjectPredictor.load(args.checkpoint, task, device, **threshold)
    settings, outputs = given_settings(args), given_outputs(args, sources)
    return SegmentationPredictor.load(args.checkpoint, settings, device, outputs, args.label_spec, given_show(args))


def given_outputs(args: argparse.Namespace, sources: list[Source]) -> OutputSettings:
    """The outputs named on the command line, or the default ones.

    Raises:
        InputError: options that contradict each other.
    """
    has_videos = any(source.kind != "image" for source in sources)
    default = ("masks", "overlays", "video") if has_videos else ("masks", "overlays")
    write = tuple(dict.fromkeys(args.write or default))
    if args.tile_above_pixels is not None and "probabilities" in write:
        raise InputError(
            "--tile_above_pixels and --write probabilities contradict each other: probabilities need all rows at once."
        )
    limit = TILE_ABOVE_PIXELS if args.tile_above_pixels is None else args.tile_above_pixels
    return OutputSettings(write, bool(args.raw_ids), limit, args.frame_stride or 1)


def max_pixels(args: argparse.Namespace) -> int:
    """Pixels of the largest image that is read."""
    return MAX_PIXELS if args.max_pixels is None else args.max_pixels


def flag_of(setting: str) -> str:
    """The option of an inference setting: the recipe's key if there is one."""
    return setting if setting in ("window_batch_size", "accumulation_device", "chunk_classes") else f"test_{setting}"


def given_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The inference settings named on the command line; they replace those saved with the checkpoint."""
    flags = {field.name: flag_of(field.name) for field in dataclasses.fields(InferenceSettings)}
    given = {name: getattr(args, flag) for name, flag in flags.items() if getattr(args, flag, None) is not None}
    if "crop_size" in given:
        if given.get("mode") == "whole":
            raise InputError(
                "--test_mode whole runs on the whole image, not on windows. Leave out --test_crop_size or --test_mode."
            )
        # The saved stride belongs to the saved window size.
        given = {"stride": None, **given, "mode": "slide"}
    return given


def given_show(args: argparse.Namespace) -> ShowSettings | None:
    """Which internals of the model to show; None without `--show`.

    Raises:
        InputError: an option without the figure it is for, or half a point.
    """
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
