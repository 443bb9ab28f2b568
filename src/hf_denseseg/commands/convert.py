"""`denseseg convert`: from an official checkpoint to a folder that the Auto classes load."""

import argparse

EPILOG = """examples:
  denseseg convert dsct Conformer_base_patch16.pth dsct-base-sac --num_labels 150 --output_dir dsct-base-imagenet
  denseseg convert dsct weights.safetensors config.json --output_dir converted
  denseseg convert setr SETR_PUP_cityscapes.pth setr-pup-vit-large --output_dir setr-pup-cityscapes
  denseseg convert setr google/vit-large-patch16-384 setr-mla-vit-large --num_labels 150 \\
      --config_overrides '{image_size: 512}' --output_dir setr-mla-imagenet

Weights are read as safetensors or with weights_only=True, so no code in them is run.

Every key of the official
checkpoint is converted or known to be unused; keys that are left over or missing are an error that lists them."""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `convert` to the command line."""
    parser = subparsers.add_parser(
        "convert",
        help="convert the authors' checkpoint into a model folder",
        description="Convert the authors' weights into a model folder that from_pretrained loads.",
        epilog=EPILOG,
    )
    parser.add_argument("family", help="model family: dsct, setr, hlg, unept or hfgd")
    parser.add_argument(
        "weights",
        help="file of the weights: .safetensors, or .pth, .bin or .tar without pickled code; some families also "
        "take timm:NAME or a hub id, see their README",
    )
    parser.add_argument("hyper_parameters", help="published name, or a JSON file with the names of the official code")
    parser.add_argument(
        "--num_labels", type=int, metavar="N", help="classes of the head (default: those of the weights)"
    )
    parser.add_argument("--config_overrides", metavar="YAML", help="config fields to change: '{image_size: 512}'")
    parser.add_argument("--output_dir", metavar="FOLDER", required=True, help="folder to write")


def main(args: argparse.Namespace) -> int:
    """Convert and save."""
    import yaml
    from huggingface_hub.errors import StrictDataclassError

    from hf_denseseg.errors import InputError
    from hf_denseseg.files import check_output_folder
    from hf_denseseg.models.auto.registration import create_image_processor, load_official
    from hf_denseseg.models.auto.remote_code import write_code

    output = check_output_folder(args.output_dir)
    overrides = yaml.safe_load(args.config_overrides or "{}")
    if not isinstance(overrides, dict):
        raise InputError(f"--config_overrides is {args.config_overrides!r}; write '{{field: value, ...}}'.")
    if args.num_labels is not None:
        overrides["num_labels"] = args.num_labels
    try:
        model = load_official(args.family, args.weights, args.hyper_parameters, **overrides)
    except (StrictDataclassError, TypeError) as error:
        raise InputError(f"--config_overrides {overrides} cannot be used: {error}") from error
    model.save_pretrained(output)
    create_image_processor(model.config).save_pretrained(output)
    write_code(output)
    print(f"{type(model).__name__}, {model.num_parameters() / 1e6:.2f} M parameters -> {output}")
    return 0
