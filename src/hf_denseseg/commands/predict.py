"""`denseseg predict`: label pictures, folders, videos or streams with a checkpoint."""

import argparse
from typing import Any

from hf_denseseg.models.auto.tasks import SEMANTIC_SEGMENTATION

EPILOG = """examples:
  denseseg predict runs/demo/model street.jpg --output masks
  denseseg predict runs/camvid/model photos/ 'more/*.png' @list.txt --output masks --crop_size 512 512 --flip
  denseseg predict CHECKPOINT photos/ --output masks --scales 0.75 1.0 1.25 --write masks probabilities parquet
  denseseg predict CHECKPOINT drive.mp4 --output drive --every 5
  ffmpeg -i rtsp://HOST/PATH -t 60 -c copy -f matroska - | denseseg predict CHECKPOINT - --output live
  denseseg predict CHECKPOINT map.tif --output map --crop_size 512 512 --max_pixels 400000000
  accelerate launch --num_processes 4 -m hf_denseseg.cli predict CHECKPOINT photos/ --output masks
  denseseg predict CHECKPOINT street.jpg --output masks --show attention features positions --point 320 200

OUTPUT/results.json names the files of each picture with share and mean probability of each class. --write chooses:
  masks          OUTPUT/masks/NAME.png, class ids (a palette picture: viewers show colours, readers get ids)
  overlays       OUTPUT/overlays/NAME.jpg, the colours over the picture
  confidence     OUTPUT/confidence/NAME.png, the probability of each pixel's class (255 is 1)
  probabilities  OUTPUT/probabilities/NAME.npz, all classes (num_labels, height, width) float16
  parquet        OUTPUT/results.parquet, one row a picture with its mask: datasets.Dataset.from_parquet reads it
  video          OUTPUT/overlays/NAME.mp4, the overlays of a video at its frame rate
Frames of a video are numbered NAME/000000; Ctrl-C ends a stream. Videos and streams need the extra `video`.
Pictures above --band_pixels are labelled a few rows at a time: with windows, memory grows with their width alone. The
ids are the same; where scores are resized, or averaged over scales, these may differ by rounding.
With --show, OUTPUT/shown/NAME_attention.png shows where the picked points look in each layer, NAME_features.png what
the layers and the parts of the decoder give, positions.png how alike the position embeddings are, and
NAME_refinement.png (UN-EPT) the label map before and after the boundary refinement.
A classifier's five best classes, or a detector's boxes (and masks as RLE), are written to OUTPUT/results.json, and the
objects over the pictures to OUTPUT/drawn/NAME.jpg; --threshold, --device, --every and --max_pixels concern them.
What is done already is skipped, so an interrupted run goes on when it is started again, also with another number of
processes. Those of accelerate launch or torchrun share the pictures and the frames of each video, need one OUTPUT, and
write the files that one process with as many threads writes. Faulty files are reported and left out; exit code 1."""


def add_parser(subparsers: Any) -> None:
    """Add `predict` to the command line."""
    parser = subparsers.add_parser(
        "predict",
        help="label pictures and videos with a checkpoint",
        description="Label every pixel of pictures at their own size, classify them, or find objects in them, as the "
        "checkpoint was trained to.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("checkpoint", help="folder or hub id of a model")
    add(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="picture, video, folder (searched through), glob, @FILE with one path a line, address of a stream "
        "(rtsp://...), or - for a stream on standard input",
    )
    add("--output", required=True, help="folder to write")
    add("--mode", choices=("whole", "slide"), help="default: the checkpoint's, slide with --crop_size")
    add("--crop_size", nargs=2, type=int, metavar=("H", "W"), help="sliding window in pixels")
    add("--stride", nargs=2, type=int, metavar=("H", "W"), help="its step (default 2/3 of it)")
    add("--base_size", nargs=2, type=int, metavar=("H", "W"), help="box to resize into, ratio kept")
    add("--scales", nargs="+", type=float, metavar="RATIO", help="ratios averaged over")
    add("--flip", action="store_true", default=None, help="average with the mirrored picture")
    add("--average", choices=("probabilities", "logits"), help="what is averaged over these views")
    add("--window_batch_size", type=int, metavar="N", help="windows per model call (default 4)")
    add("--accumulation_device", metavar="DEVICE", help="where full-size scores are summed, e.g. cpu")
    add(
        "--write",
        nargs="+",
        choices=("masks", "overlays", "confidence", "probabilities", "parquet", "video"),
        help="what to write, see below (default masks overlays, and video if there is one)",
    )
    add("--raw_ids", action="store_true", default=None, help="masks hold the data set's ids, as in its label maps")
    add("--label_spec", metavar="FILE", help="colours and raw ids (default: the checkpoint's labels.json)")
    add("--every", type=int, metavar="N", help="label every N-th frame of videos (default 1)")
    add("--max_pixels", type=int, metavar="N", help="larger pictures are left out unread (default 178956970)")
    add("--band_pixels", type=int, metavar="N", help="larger ones are labelled a few rows at a time (default 4194304)")
    inside = parser.add_argument_group("the model's inside, as the papers show it").add_argument
    inside("--show", nargs="+", choices=("attention", "features", "positions", "refinement"), help="what to show")
    point = {"nargs": "+", "action": "extend", "type": float, "metavar": "X Y"}
    inside("--point", **point, help="picked points in pixels (default: centre)")
    inside("--layers", nargs="+", type=int, metavar="N", help="layers, from 1 (default: all; attention: 4)")
    inside("--show_size", type=int, metavar="N", help="longest side that is looked at (default 512)")
    add("--threshold", type=float, metavar="SCORE", help="of objects that count (default 0.5)")
    add("--device", help="cpu, cuda, cuda:1 ... (default: cuda if there is one, each process its own)")


def main(args: argparse.Namespace) -> int:
    """Look at everything; 1 if something could not be read."""
    from hf_denseseg.commands import prediction_options as options
    from hf_denseseg.files import check_output_folder
    from hf_denseseg.inference.predict.inputs import find_sources
    from hf_denseseg.inference.predict.objects import Answerer
    from hf_denseseg.inference.predict.predictor import Labeller
    from hf_denseseg.inference.predict.processes import Processes
    from hf_denseseg.inference.predict.runner import label_all
    from hf_denseseg.inference.predict.segmentation import Predictor
    from hf_denseseg.models.auto.pretrained import task_of_checkpoint

    output = check_output_folder(args.output)
    found = find_sources(args.inputs, output)
    task = task_of_checkpoint(args.checkpoint) or SEMANTIC_SEGMENTATION
    options.check_options(args, task, found.sources)
    processes = Processes.launched()
    device = processes.device(args.device)
    labeller: Labeller
    if task != SEMANTIC_SEGMENTATION:
        threshold = {} if args.threshold is None else {"threshold": args.threshold}
        labeller = Answerer.load(args.checkpoint, task, device, **threshold)
    else:
        settings, outputs = options.given_settings(args), options.given_outputs(args, found.sources)
        shown = options.given_show(args)
        labeller = Predictor.load(args.checkpoint, settings, device, outputs, args.label_spec, shown)
    outcome = label_all(labeller, found, output, args.every or 1, options.max_pixels(args), processes)
    if processes.rank > 0:
        return 0  # a launcher ends all as soon as one ends badly, and the first has still to write
    kept = f", {outcome.kept} were done before" if outcome.kept else ""
    print(
        f"{outcome.made} pictures labelled{kept}, {len(outcome.failed)} left out; see {output / 'results.json'} "
        f"({outcome.seconds:.1f} s)"
    )
    return 1 if outcome.failed else 0
