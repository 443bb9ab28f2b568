"""`denseseg card`: model cards of the published variants, from recipes and measured results."""

import argparse
import json
from pathlib import Path
from typing import Any

EPILOG = """examples:
  denseseg card                                every variant that has a recipe in scripts/recipes
  denseseg card dsct-base-sac --results runs   with the results of finished runs in runs/RECIPE_NAME

`denseseg train` writes the card of a trained model itself: model/README.md in the run folder."""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `card` to the command line."""
    parser = subparsers.add_parser(
        "card",
        help="write the model cards of the published variants",
        description="Write one model card per published variant, with published and measured numbers side by side.",
        epilog=EPILOG,
    )
    parser.add_argument("names", nargs="*", help="published names (default: all that have a recipe)")
    folder: dict[str, Any] = {"type": Path, "metavar": "FOLDER"}
    parser.add_argument("--recipes", **folder, default="scripts/recipes", help="of the recipes (default: %(default)s)")
    parser.add_argument("--results", **folder, help="of finished runs: RECIPE_NAME/results.json (default: none)")
    parser.add_argument("--output_dir", **folder, default="model_cards", help="to write (default: %(default)s)")


def main(args: argparse.Namespace) -> int:
    """Write the cards."""
    from hf_denseseg.errors import InputError
    from hf_denseseg.files import check_output_folder, write_atomic
    from hf_denseseg.reports.model_card import PublishedRow, published_rows, variant_card
    from hf_denseseg.training.recipe import load_recipe

    paths = sorted(args.recipes.rglob("*.yaml"))
    if not paths:
        raise InputError(f"No recipes (*.yaml) in {args.recipes}. Give their folder with --recipes.")
    output = check_output_folder(args.output_dir)
    rows_of: dict[str, list[PublishedRow]] = {}
    for path in paths:
        recipe = load_recipe(path)
        file = args.results / path.stem / "results.json" if args.results else None
        measured = json.loads(file.read_text())["scores"] if file and file.exists() else {}
        for place, published in enumerate(published_rows(recipe.model.published)):
            # A run is evaluated as its recipe says, which is what the first of several rows is about.
            scores = measured if place == 0 else {}
            row = PublishedRow(path.stem, recipe.data.dataset, recipe.training.max_steps, published, scores)
            # The last stage of a schedule starts from the checkpoint of an earlier run, so the row names its variant.
            rows_of.setdefault(published.get("variant", recipe.model.model), []).append(row)
    for variant in args.names or sorted(rows_of):
        own = rows_of.get(variant, [])
        write_atomic(output / f"{variant}.md", variant_card(variant, own))
        print(f"{output / variant}.md: {len(own)} published rows")
    return 0
