"""`denseseg predict`: run a checkpoint on images, folders, videos or streams."""

import argparse
from typing import Any

from hf_denseseg.models.auto.tasks import SEMANTIC_SEGMENTATION

KINDS, NEEDS = ("masks", "overlays", "confidence", "probabilities"), ("parquet", "video")
SHOWABLE = ("attention", "features", "positions", "refinement")
EPILOG = """examples:
  denseseg predict runs/demo/model street.jpg --output_dir masks
  denseseg predict runs/camvid/model photos/ 'more/*.png' @list.txt --output_dir masks --test_crop_size 512 512
  denseseg predict CHECKPOINT photos/ --output_dir masks --test_scales 0.75 1.0 1.25 --write masks parquet
  denseseg predict CHECKPOINT drive.mp4 --output_dir drive --frame_stride 5
  ffmpeg -i rtsp://HOST/PATH -t 60 -c copy -f matroska - | denseseg predict CHECKPOINT - --output_dir live
  denseseg predict CHECKPOINT map.tif --output_dir map --test_crop_size 512 512 --max_pixels 400000000
  accelerate launch --num_processes 4 -m hf_denseseg.cli predict CHECKPOINT photos/ --output_dir masks
  denseseg predict CHECKPOINT street.jpg --output_dir masks --show attention features positions --point 320 200

In the output folder, results.json names the files of each image, and for each class its fraction of the pixels and
mean probability. --write selects:
  masks          masks/NAME.png, class ids (a palette image: viewers show colors, readers get ids)
  overlays       overlays/NAME.jpg, the colors over the image
  confidence     confidence/NAME.png, the probability of each pixel's class (255 is 1)
  probabilities  probabilities/NAME.npz, all classes (num_labels, height, width) float16
  parquet        results.parquet, one row per image with its mask: datasets.Dataset.from_parquet reads it
  video          overlays/NAME.mp4, the overlays of a video at its frame rate

Frames of a video are numbered NAME/000000; Ctrl-C ends a stream. Videos and streams need the extra `video`.

Images above --tile_above_pixels are segmented in strips of rows: with windows, memory grows with their width only.
The ids are the same; scores that are resized, or averaged over scales, may differ by rounding.

--show writes into the folder shown/:
  attention   what the picked points attend to in each layer
  features    the features of the layers and of the decoder
  positions   the similarity of the position embeddings
  refinement  UN-EPT: the label map before and after the boundary refinement

The five best classes of a classifier, or the boxes of a detector (and masks as RLE), go to results.json, and the
objects over the images to drawn/NAME.jpg; of the options --threshold, --device, --frame_stride and --max_pixels
apply to them.

A run that was interrupted continues when the same command is given again, also with another number of processes.
Processes of accelerate launch or torchrun share the images and the frames of each video, need the same
--output_dir, and write the same files as one process with the same number of threads.

Files that cannot be read are left out and
reported (exit code 1); files of a folder that are neither images nor videos by their suffix are counted. Of a GIF,
WebP or TIFF with several frames the first is read."""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `predict` to the command line."""
    parser = subparsers.add_parser(
        "predict",
        help="run a checkpoint on images and videos",
        description="Segment images at their own size, classify them, or detect objects in them, as the checkpoint "
        "was trained to.",
        epilog=EPILOG,
    )
    add = parser.add_argument
    number: dict[str, Any] = {"type": int, "metavar": "N"}
    kinds: dict[str, Any] = {"nargs": "+", "metavar": "KIND"}
    add("checkpoint", help="model folder, exported model or hub id")
    add(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="image, video, folder (searched recursively), glob, @FILE with one path per line, address of a stream "
        "(rtsp://...), or - for a stream on standard input",
    )
    add("--output_dir", metavar="FOLDER", required=True, help="folder to write")
    text = "%(choices)s; see below (default: masks overlays, and for videos video)"
    add("--write", **kinds, choices=(*KINDS, *NEEDS), help=text)
    add("--raw_ids", action="store_true", default=None, help="masks hold the dataset's ids, as in its label maps")
    add("--label_spec", metavar="FILE", help="colors and raw ids (default: the checkpoint's labels.json)")
    add("--frame_stride", **number, help="predict every N-th frame of videos (default: 1)")
    add("--max_pixels", **number, help="leave images of more pixels out, undecoded (default: 178956970)")
    add("--tile_above_pixels", **number, help="segment images of more pixels in strips of rows (default: 4194304)")
    add("--threshold", type=float, metavar="SCORE", help="lowest score of an object (default: 0.5)")
    add("--device", help="cpu, cuda, cuda:1 ... (default: cuda if available, one GPU per process)")
    test = parser.add_argument_group("test protocol (default: as saved with the checkpoint)").add_argument
    size: dict[str, Any] = {"nargs": 2, "type": int, "metavar": ("H", "W")}
    switch: dict[str, Any] = {"action": "store_true", "default": None}
    test("--test_mode", choices=("whole", "slide"), help="whole image, or a sliding window")
    test("--test_crop_size", **size, help="height and width of the sliding window in pixels")
    test("--test_stride", **size, help="step of the window in pixels (default: 2/3 of its size)")
    test("--test_base_size", **size, help="box in pixels to resize into, aspect ratio kept")
    test("--test_scales", nargs="+", type=float, metavar="RATIO", help="scales to average over: 0.75 1.0 1.25")
    test("--test_flip", **switch, help="average with the horizontally flipped image")
    test("--test_raise_short_side", **switch, help="SETR: enlarge images whose shortest edge is below the window's")
    test("--test_keep_odd", **switch, help="HFGD: scale each side separately, odd sides stay odd")
    test("--test_pad_to_window", **switch, help="pad images that are smaller than the window")
    test("--test_average", choices=("probabilities", "logits"), help="what is averaged over scales and flips")
    test("--test_threshold", type=float, metavar="P", help="one logit: probability above which a pixel is foreground")
    test("--test_temperature", type=float, metavar="T", help="divide the logits by it; the classes stay")
    test("--window_batch_size", **number, help="windows per model call (default: 4)")
    test("--accumulation_device", metavar="DEVICE", help="device that sums full-size scores, for example cpu")
    internals = parser.add_argument_group("the model's internals, as the papers show them").add_argument
    internals("--show", **kinds, choices=SHOWABLE, help="%(choices)s; see below")
    point: dict[str, Any] = {"nargs": "+", "action": "extend", "type": float, "metavar": "X Y"}
    internals("--point", **point, help="picked points of the attention, in pixels (default: center)")
    internals("--layers", nargs="+", **number, help="layers to show, counted from 1 (default: all; attention: four)")
    internals("--show_size", **number, help="longest edge of the inspected image in pixels (default: 512)")


def main(args: argparse.Namespace) -> int:
    """Predict all inputs; return 1 if something could not be read."""
    from hf_denseseg.commands import prediction_options as options
    from hf_denseseg.files import check_output_folder
    from hf_denseseg.inference.predict.inputs import find_sources
    from hf_denseseg.inference.predict.prediction import run_prediction
    from hf_denseseg.inference.predict.processes import Processes
    from hf_denseseg.models.auto.pretrained import task_of_checkpoint

    output = check_output_folder(args.output_dir)
    found = find_sources(args.inputs, output)
    task = task_of_checkpoint(args.checkpoint) or SEMANTIC_SEGMENTATION
    options.check_options(args, task, found.sources)
    processes = Processes.launched()
    predictor = options.load_predictor(args, task, found.sources, processes.device(args.device))
    outcome = run_prediction(predictor, found, output, args.frame_stride or 1, options.max_pixels(args), processes)
    if processes.rank > 0:
        return 0  # a launcher stops all processes as soon as one fails, and rank 0 still has to write
    kept = f", {outcome.kept} finished before" if outcome.kept else ""
    left_out = f"{len(outcome.failed)} left out{found.describe_passed_over()}"
    where = f"see {output / 'results.json'} ({outcome.seconds:.1f} s)"
    images = "1 image" if outcome.predicted == 1 else f"{outcome.predicted} images"
    print(f"{images} predicted{kept}, {left_out}; {where}")
    return 1 if outcome.failed else 0
