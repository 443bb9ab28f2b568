"""`denseseg convert`: official checkpoint -> a folder that the Auto classes load."""

import argparse
from typing import Any

EPILOG = """examples:
  denseseg convert dsct Conformer_base_patch16.pth dsct-base-sac --num_labels 150 --output dsct-base-imagenet
  denseseg convert dsct weights.safetensors config.json --output converted

Weights are read as safetensors or with weights_only=True. Every official key is used or named as dropped."""


def add_parser(subparsers: Any) -> None:
    """Add `convert` to the command line."""
    parser = subparsers.add_parser(
        "convert",
        help="convert an official checkpoint",
        description="Convert an official checkpoint into a folder for from_pretrained.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("family", help="model family, such as dsct")
    parser.add_argument("weights", help=".safetensors, or .pth / .bin / .tar without pickled code")
    parser.add_argument("hyper_parameters", help="published name, or JSON file in the official words")
    parser.add_argument("--num_labels", type=int, help="classes of the segmentation head")
    parser.add_argument("--output", required=True, help="folder to write")


def main(args: argparse.Namespace) -> int:
    """Convert and save."""
    from hf_denseseg.files import check_output_folder
    from hf_denseseg.hub import write_shim
    from hf_denseseg.registration import create_image_processor, load_official

    output = check_output_folder(args.output)
    overrides = {} if args.num_labels is None else {"num_labels": args.num_labels}
    model = load_official(args.family, args.weights, args.hyper_parameters, **overrides)
    model.save_pretrained(output)
    create_image_processor(model.config).save_pretrained(output)
    write_shim(output)
    print(f"{type(model).__name__}, {model.num_parameters() / 1e6:.2f} M parameters -> {output}")
    return 0
