"""`denseseg models`: the published variants, their sizes and costs."""

import argparse
import json


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `models` to the command line."""
    parser = subparsers.add_parser(
        "models",
        help="list the published variants",
        description="List the published variants: parameters and multiply-adds, counted without allocating weights.",
        epilog="examples:\n  denseseg models 'dsct-*' --image_size 512 512\n"
        '  denseseg predict "$(denseseg models --example)" street.jpg --output_dir masks',
    )
    parser.add_argument("pattern", nargs="?", default="*", help="glob pattern, such as 'dsct-*' (default: all)")
    parser.add_argument(
        "--image_size",
        nargs=2,
        type=int,
        default=(512, 512),
        metavar=("H", "W"),
        help="height and width in pixels for the multiply-adds (default: 512 512)",
    )
    parser.add_argument("--example", action="store_true", help="print the folder of the trained model in the package")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def main(args: argparse.Namespace) -> int:
    """Print one line per variant."""
    from hf_denseseg.models.auto.example import example_checkpoint
    from hf_denseseg.models.auto.registration import list_models, model_info

    if args.example:
        print(example_checkpoint())
        return 0
    rows = {name: model_info(name, image_size=tuple(args.image_size)) for name in list_models(args.pattern)}
    if args.json:
        print(json.dumps({name: vars(info) for name, info in rows.items()}, indent=1))
        return 0
    height, width = args.image_size
    print(f"{'name':<24}{'parameters M':>14}{f'GMACs {height}x{width}':>18}{'activations M':>16}")
    for name, info in rows.items():
        print(
            f"{name:<24}{info.parameters / 1e6:>14.2f}{info.multiply_adds / 1e9:>18.1f}{info.activations / 1e6:>16.1f}"
        )
    return 0
