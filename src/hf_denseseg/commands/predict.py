"""`denseseg predict`: label pictures, folders or globs with a checkpoint."""

import argparse
import dataclasses
from typing import Any

from hf_denseseg.errors import InputError
from hf_denseseg.recipe_keys import DETECTION, TASKS

EPILOG = """examples:
  denseseg predict runs/demo/model street.jpg --output masks
  denseseg predict runs/camvid/model photos/ 'more/*.png' --output masks --crop_size 512 512 --flip
  denseseg predict CHECKPOINT photos/ --output masks --scales 0.75 1.0 1.25 --flip --probabilities
  denseseg predict runs/coco/model photos/ --output found --threshold 0.3
  denseseg predict CHECKPOINT street.jpg --output masks --show attention features positions --point 320 200

OUTPUT/masks/NAME.png holds class ids (a palette picture: viewers show colours, readers get ids),
OUTPUT/overlays/NAME.jpg the colours over the picture, OUTPUT/results.json share and mean probability of each class.
With --show, OUTPUT/shown/NAME_attention.png shows where the picked points look in each layer, NAME_features.png what
the layers and the parts of the decoder give, positions.png how alike the position embeddings are, and
NAME_refinement.png (UN-EPT) the label map before and after the boundary refinement.
A classifier's five best classes, or a detector's boxes (and masks as RLE), are written to OUTPUT/results.json, and the
objects over the pictures to OUTPUT/drawn/NAME.jpg; of the options only --threshold and --device concern them.
Pictures that are done already are skipped, so an interrupted run goes on when it is started again. Faulty files are
reported and left out; the exit code is then 1."""


def add_parser(subparsers: Any) -> None:
    """Add `predict` to the command line."""
    parser = subparsers.add_parser(
        "predict",
        help="label pictures with a checkpoint",
        description="Label every pixel of pictures at their own size, classify them, or find objects in them, as the "
        "checkpoint was trained to.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", help="folder or hub id of a model")
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="picture, folder (searched through) or glob")
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--mode", choices=("whole", "slide"), help="default: the checkpoint's, slide with --crop_size")
    parser.add_argument("--crop_size", nargs=2, type=int, metavar=("H", "W"), help="sliding window in pixels")
    parser.add_argument("--stride", nargs=2, type=int, metavar=("H", "W"), help="its step (default 2/3 of it)")
    parser.add_argument("--base_size", nargs=2, type=int, metavar=("H", "W"), help="box to resize into, ratio kept")
    parser.add_argument("--scales", nargs="+", type=float, metavar="RATIO", help="ratios averaged over")
    parser.add_argument("--flip", action="store_true", default=None, help="average with the mirrored picture")
    parser.add_argument("--average", choices=("probabilities", "logits"), help="what is averaged over these views")
    parser.add_argument("--window_batch_size", type=int, metavar="N", help="windows per model call (default 4)")
    parser.add_argument("--accumulation_device", metavar="DEVICE", help="where full-size scores are summed, e.g. cpu")
    parser.add_argument("--probabilities", action="store_true", help="also write OUTPUT/probabilities/NAME.npz")
    parser.add_argument("--label_spec", metavar="FILE", help="colours (default: the checkpoint's labels.json)")
    inside = parser.add_argument_group("the model's inside, as the papers show it")
    inside.add_argument(
        "--show", nargs="+", choices=("attention", "features", "positions", "refinement"), help="what to show"
    )
    inside.add_argument(
        "--point",
        nargs="+",
        action="extend",
        type=float,
        metavar="X Y",
        help="picked points in pixels (default: centre)",
    )
    inside.add_argument(
        "--layers", nargs="+", type=int, metavar="N", help="layers, from 1 (default: all; attention: 4)"
    )
    inside.add_argument("--show_size", type=int, metavar="N", help="longest side that is looked at (default 512)")
    parser.add_argument("--threshold", type=float, metavar="SCORE", help="of objects that count (default 0.5)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cuda if there is one)")


def main(args: argparse.Namespace) -> int:
    """Look at all pictures; 1 if some could not be read."""
    from hf_denseseg.answering import Answerer, answer_all
    from hf_denseseg.checkpoints import task_of_checkpoint
    from hf_denseseg.files import check_output_folder
    from hf_denseseg.prediction import Predictor, collect_pictures, predict_all

    output = check_output_folder(args.output)
    pictures = collect_pictures(args.inputs, output)
    task = task_of_checkpoint(args.checkpoint) or TASKS[0]
    _check_options(args, task)
    if task != TASKS[0]:
        threshold = {} if args.threshold is None else {"threshold": args.threshold}
        answerer = Answerer.load(args.checkpoint, task, args.device, **threshold)
        done, skipped, failed = answer_all(answerer, pictures, output)
    else:
        predictor = Predictor.load(
            args.checkpoint, _given_settings(args), args.device, args.probabilities, args.label_spec, _given_show(args)
        )
        done, skipped, failed = predict_all(predictor, pictures, output)
    kept = f", {skipped} were done before" if skipped else ""
    print(f"{done} pictures labelled{kept}, {len(failed)} left out; see {output / 'results.json'}")
    return 1 if failed else 0


def _check_options(args: argparse.Namespace, task: str) -> None:
    """Refuse options that mean nothing for the checkpoint's task."""
    everywhere = {"command", "checkpoint", "inputs", "output", "device", "overrides"}
    objects = task in DETECTION
    for name, value in vars(args).items():
        if name in everywhere or value in (None, False) or (name == "threshold" and objects):
            continue
        if task != TASKS[0] or name == "threshold":
            raise InputError(f"--{name} changes nothing for a checkpoint for {task}. Leave it out.")


def _given_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The inference settings named on the command line; they replace those saved with the checkpoint."""
    from hf_denseseg.inference import InferenceSettings

    names = [field.name for field in dataclasses.fields(InferenceSettings)]
    given = {name: getattr(args, name) for name in names if getattr(args, name, None) is not None}
    if "crop_size" in given:
        if given.get("mode") == "whole":
            raise InputError("--mode whole looks at the picture without a window. Leave out --crop_size or --mode.")
        # The saved stride belongs to the saved window.
        given = {"stride": None, **given, "mode": "slide"}
    return given


def _given_show(args: argparse.Namespace) -> Any:
    """What of the model's inside is wanted; None without `--show`."""
    from hf_denseseg.introspection import ShowSettings

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
