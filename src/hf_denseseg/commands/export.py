"""`denseseg export`: a checkpoint as a file of another runtime, written only if it agrees with the model."""

import argparse
from pathlib import Path

from hf_denseseg.errors import InputError

FORMATS = ("torch", "onnx")
EPILOG = """examples:
  denseseg export runs/demo/model --format onnx --output exported
  denseseg export runs/demo/model --format onnx --with_argmax --output exported
  denseseg export runs/dpt/model --output exported --size 384 384

OUTPUT gets the model (torch: model.pt2, onnx: model.onnx), the files of the checkpoint that running it needs, and
export.json: inputs, outputs, versions, agreement with the checkpoint, checksums.
Without --with_argmax the model takes normalized pixel_values (batch, 3, height, width) float32 and returns logits.
With it, it takes image (batch, 3, height, width) uint8, RGB, and returns class_map (batch, height, width) uint8
(int32 above 256 classes): normalization, resize of the logits and argmax are part of it.

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


def main(args: argparse.Namespace) -> int:
    """Export, verify, save."""
    from hf_denseseg.files import atomic_folder
    from hf_denseseg.inference.export import exporting
    from hf_denseseg.inference.export.formats import FORMATS as formats
    from hf_denseseg.inference.export.record import is_export, write_record

    output = Path(args.output)
    if output.is_file() or output.suffix in (".pt2", ".onnx", ".xml", ".pte"):
        raise InputError(f"--output {output}: give a folder; the model gets its usual name in it.")
    if output.exists() and not is_export(output) and any(output.iterdir()):
        raise InputError(f"--output {output} holds other files. Give a new folder, or that of an earlier export.")
    if args.size and min(args.size) < 1:
        raise InputError(f"--size {args.size[0]} {args.size[1]}: give height and width in pixels.")
    formats[args.format].check_installed()
    size = (args.size[0], args.size[1]) if args.size else None
    request = exporting.Request(args.checkpoint, formats[args.format], args.with_argmax, size)
    program = exporting.load_program(request)
    with atomic_folder(output) as folder:
        record = exporting.export(request, program, folder)
        write_record(folder, record)
    for row in record["verified"]:
        error = f", largest error {row['error']:.1e} of the spread" if "error" in row else ""
        print(f"batch {row['batch']}, {row['height']}x{row['width']}: agreement {100 * row['agreement']:.3f} %{error}")
    print(f"Written: {output}")
    return 0
