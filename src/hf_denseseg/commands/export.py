"""`denseseg export`: a checkpoint as a file of another runtime, written only if it agrees with the model."""

import argparse
from pathlib import Path
from typing import Any

from hf_denseseg.errors import InputError, RunError

FORMATS = ("torch", "onnx", "openvino", "aoti", "executorch", "web")
MOST_LOST = 0.0005  # of the main score, a fraction
EPILOG = """examples:
  denseseg export runs/demo/model --format onnx --output exported
  denseseg export runs/demo/model --format onnx --with_argmax --output exported
  denseseg export runs/camvid/model --format openvino --output exported --dataset path/to/camvid --eval_split val
  denseseg export runs/dpt/model --output exported --size 384 384
  denseseg evaluate exported --dataset path/to/camvid --eval_split test
  denseseg export runs/camvid/model --format web --output page && python -m http.server --directory page

OUTPUT gets the model (torch, aoti: model.pt2, onnx: model.onnx, openvino: openvino_model.xml and .bin), the files of
the checkpoint that running it needs, and export.json: inputs, outputs, versions, agreement with the checkpoint,
scores, milliseconds and peak memory of both, checksums. Its README.md has the table.
Without --with_argmax the model takes normalized pixel_values (batch, 3, height, width) float32 and returns logits.
With it, it takes image (batch, 3, height, width) uint8, RGB, and returns class_map (batch, height, width) uint8
(int32 above 256 classes): normalization, resize and argmax are part of it. --format web: the same, and a page.
With --dataset checkpoint and export are scored with every data and test key of `denseseg evaluate`; if the main score
differs by more than 0.05 points, nothing is written (exit code 1).

torch 2.11 exports pooling for even or for odd sizes only; the command then says so and writes nothing."""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `export` to the command line."""
    parser = subparsers.add_parser(
        "export",
        help="write a checkpoint for another runtime",
        description="Export with dynamic batch, height and width, and compare with the model at four sizes.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", help="model folder or hub id")
    parser.add_argument("--format", choices=FORMATS, default="torch", help="format (default: %(default)s)")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--with_argmax", action="store_true", help="bytes in, class map out (segmentation)")
    text = "of the only images that the program takes, for models of one size (default: any size)"
    parser.add_argument("--size", nargs=2, type=int, metavar=("H", "W"), help=text)
    text = "npm package for --format web: folder or tarball (default: a cache folder, where npm puts it)"
    parser.add_argument("--onnxruntime_web", metavar="PATH", help=text)
    parser.set_defaults(takes_overrides=True)


def main(args: argparse.Namespace) -> int:
    """Export, verify, score, save."""
    from hf_denseseg.files import atomic_folder
    from hf_denseseg.inference.export import exporting
    from hf_denseseg.inference.export.cost import measure_cost
    from hf_denseseg.inference.export.formats import FORMATS as formats
    from hf_denseseg.inference.export.record import write_record
    from hf_denseseg.models.auto.pretrained import task_of_checkpoint
    from hf_denseseg.models.auto.tasks import SEMANTIC_SEGMENTATION
    from hf_denseseg.reports.export_card import write_export_card
    from hf_denseseg.reports.web_page import add_page, prepare_page
    from hf_denseseg.training.run import score_export

    output = _output_folder(args.output)
    if args.size and min(args.size) < 1:
        raise InputError(f"--size {args.size[0]} {args.size[1]}: give height and width in pixels.")
    formats[args.format].check_installed()
    task = task_of_checkpoint(args.checkpoint) or SEMANTIC_SEGMENTATION
    runtime = prepare_page(args.format, args.checkpoint, task, args.onnxruntime_web)
    args.with_argmax |= runtime is not None
    recipe = _scoring_recipe(args, task) if args.overrides else None
    size = (args.size[0], args.size[1]) if args.size else None
    request = exporting.Request(args.checkpoint, task, formats[args.format], args.with_argmax, size)
    program = exporting.load_program(request)
    with atomic_folder(output) as folder:
        record = exporting.export(request, program, folder)
        _print_agreement(record["verified"])
        write_record(folder, record)  # which opening the export for its scores reads
        if recipe:
            record["score"] = score_export(recipe, folder)
            _check_score(record["score"], MOST_LOST)
        record["cost"] = measure_cost(request, program, folder)
        if runtime:
            add_page(folder, program.model.config, record, runtime)
        write_export_card(folder, args.checkpoint, record)
        write_record(folder, record)
    print(f"Written: {output}")
    return 0


def _output_folder(path: str) -> Path:
    """The folder to write.

    Raises:
        InputError: it is a file, or holds anything but an earlier export.
    """
    from hf_denseseg.inference.export.record import is_export

    output = Path(path)
    if output.is_file() or output.suffix in (".pt2", ".onnx", ".xml", ".pte"):
        raise InputError(f"--output {output}: give a folder; the model gets its usual name in it.")
    if output.exists() and not is_export(output) and any(output.iterdir()):
        raise InputError(f"--output {output} holds other files. Give a new folder, or that of an earlier export.")
    return output


def _scoring_recipe(args: argparse.Namespace, task: str) -> Any:
    """The recipe that checkpoint and export are scored with; class maps are scored with whole images and one view.

    Raises:
        InputError: a key is unknown or is not read in an evaluation, or there is no dataset.
    """
    from hf_denseseg.training.key_checks import is_read_in_evaluation
    from hf_denseseg.training.recipe import load_recipe, parse_overrides

    given = parse_overrides(args.overrides)
    for key in given:
        if not is_read_in_evaluation(key, task) or key == "task":
            raise InputError(f"--{key} changes nothing in an export. Leave it out.")
    if "dataset" not in given:
        raise InputError(f"--{next(iter(given))} is for scoring on a dataset. Give --dataset, or leave it out.")
    whole = ["--test_mode", "whole"] if args.with_argmax else []
    return load_recipe(None, [*whole, *args.overrides, "--model", args.checkpoint, "--task", task])


def _print_agreement(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        error = f", largest error {row['error']:.1e} of the spread" if "error" in row else ""
        where = f"batch {row['batch']}, {row['height']}x{row['width']}"
        print(f"{where}: agreement {100 * row['agreement']:.3f} %{error}")


def _check_score(score: dict[str, Any], most_lost: float) -> None:
    """Print both scores.

    Raises:
        RunError: they differ too much.
    """
    both = f"{score['metric']} on {score['images']} images: model {100 * score['model']:.2f}, "
    both += f"exported {100 * score['exported']:.2f}"
    if not abs(score["model"] - score["exported"]) <= most_lost:
        raise RunError(f"{both}: they differ by more than {100 * most_lost:g} points; nothing was written.")
    print(both)
