"""`denseseg export`: a checkpoint as a file of another runtime, written only if it agrees with the model."""

import argparse

from hf_denseseg.errors import InputError

FORMATS = ("torch", "onnx", "openvino", "aoti", "executorch", "web", "transformers_js")
MOST_LOST, MOST_LOST_INT8 = 0.0005, 0.01  # of the main score, fractions
EPILOG = """examples:
  denseseg export runs/demo/model --format onnx --output exported
  denseseg export runs/demo/model --format onnx --with_argmax --output exported
  denseseg export runs/camvid/model --format openvino --output exported --dataset path/to/camvid --eval_split val
  denseseg export runs/camvid/model --format onnx --output exported --int8 --calibration path/to/camvid
  denseseg export runs/dpt/model --output exported --size 384 384
  denseseg evaluate exported --dataset path/to/camvid --eval_split test
  denseseg export runs/camvid/model --format web --output page

--output gets the model (torch, aoti: model.pt2, onnx: model.onnx, openvino: openvino_model.xml and .bin), the files of
the checkpoint that running it needs, and export.json: inputs, outputs, versions, agreement with the checkpoint,
scores, milliseconds and peak memory of both, checksums. Its README.md has the table.

Without --with_argmax the model takes normalized pixel_values (batch, 3, height, width) float32 and returns logits.
With it, it takes image (batch, 3, height, width) uint8, RGB, and returns class_map (batch, height, width) uint8
(uint16 above 256 classes): normalization, resize and argmax are part of it.

--format web is onnx with --with_argmax, and index.html, which runs it in the browser. --format transformers_js writes
onnx/model.onnx, and describes it as a Segformer, which transformers.js opens. See docs/deploy.md for both.

With --dataset, checkpoint and export are scored with every data and test key of `denseseg evaluate`; if the main score
differs by more than 0.05 points (--int8: 1 point), nothing is written (exit code 1).

torch 2.11 exports pooling for even or for odd sizes only; the command then says so and writes nothing."""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `export` to the command line."""
    parser = subparsers.add_parser(
        "export",
        help="write a checkpoint for another runtime",
        description="Write a checkpoint as a model for another runtime, for images of any size, and compare both at "
        "four sizes. Nothing is written if they differ.",
        epilog=EPILOG,
    )
    parser.add_argument("checkpoint", help="model folder or hub id")
    parser.add_argument(
        "--format", choices=FORMATS, metavar="FORMAT", default="torch", help="%(choices)s (default: %(default)s)"
    )
    parser.add_argument(
        "--output", required=True, metavar="FOLDER", help="folder to write: new, empty, or of an earlier export"
    )
    parser.add_argument(
        "--with_argmax", action="store_true", help="takes bytes, returns class ids (segmentation); see below"
    )
    text = "height and width in pixels of the only images that the program takes (default: any size)"
    parser.add_argument("--size", nargs=2, type=int, metavar=("H", "W"), help=text)
    parser.add_argument("--int8", action="store_true", help="8-bit weights and activations (formats on ONNX)")
    parser.add_argument("--calibration", metavar="DATASET", help="training images that the ranges of --int8 come from")
    text = "images for the ranges, spread over the training split (default: 100)"
    parser.add_argument("--calibration_images", type=int, metavar="N", help=text)
    text = "npm package for --format web: folder or tarball (default: a cache folder, where npm puts it)"
    parser.add_argument("--onnxruntime_web", metavar="PATH", help=text)
    parser.set_defaults(takes_overrides=True)


def main(args: argparse.Namespace) -> int:
    """Export, verify, score, measure, save."""
    from hf_denseseg.commands import export_options as options
    from hf_denseseg.evaluation.score_names import SCORE_NAMES
    from hf_denseseg.files import atomic_folder
    from hf_denseseg.inference.export import exporting
    from hf_denseseg.inference.export.cost import measure_cost
    from hf_denseseg.inference.export.exported_model import open_export
    from hf_denseseg.inference.export.formats import FORMATS as formats
    from hf_denseseg.inference.export.record import write_record
    from hf_denseseg.models.auto.pretrained import task_of_checkpoint
    from hf_denseseg.models.auto.tasks import SEMANTIC_SEGMENTATION
    from hf_denseseg.reports.export_card import write_export_card
    from hf_denseseg.reports.web_page import add_page, prepare_page
    from hf_denseseg.training.run import export_scorer

    output = options.output_folder(args.output)
    if args.size and min(args.size) < 1:
        raise InputError(f"--size {args.size[0]} {args.size[1]}: give height and width in pixels.")
    formats[args.format].check_installed()
    task = task_of_checkpoint(args.checkpoint) or SEMANTIC_SEGMENTATION
    runtime = prepare_page(args.format, args.checkpoint, task, args.onnxruntime_web)
    args.with_argmax |= runtime is not None
    size = (args.size[0], args.size[1]) if args.size else None
    request = exporting.Request(args.checkpoint, task, formats[args.format], args.with_argmax, size, args.int8)
    with atomic_folder(output) as folder:
        recipe = options.scoring_recipe(args, task, folder.parent / "scores")
        calibration = options.calibration_recipe(args, task, folder.parent / "scores")
        program = exporting.load_program(request)
        if calibration:
            run, metric = export_scorer(calibration, args.calibration_images or 100), SCORE_NAMES[task].main_metric[0]
            record = exporting.export_int8(request, program, folder, lambda model: run(model)["scores"][metric])
        else:
            record = exporting.export(request, program, folder)
        options.print_agreement(record["verified"])
        write_record(folder, record)  # which opening the export for its scores reads
        if recipe:
            score = export_scorer(recipe)
            found = score(None), score(open_export(folder, task, trusted=True))
            record["score"] = options.compared_scores(task, *found)
            options.check_scores(record["score"], MOST_LOST_INT8 if args.int8 else MOST_LOST)
        record["cost"] = measure_cost(request, program, folder)
        if runtime:
            add_page(folder, program.model.config, record, runtime)
        write_export_card(folder, args.checkpoint, record)
        write_record(folder, record)
    print(f"Written: {output}")
    return 0
