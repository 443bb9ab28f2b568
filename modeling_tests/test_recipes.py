"""Every shipped recipe parses, names its source for every value, and runs on embedded data."""

import json
from pathlib import Path

import pytest
import yaml

from hf_denseseg import list_models
from hf_denseseg.cli import main
from hf_denseseg.recipe import load_recipe

FOLDER = Path(__file__).resolve().parents[1] / "scripts" / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))

# DSCT, Tables 1 to 5: (variant, data, steps) -> mIoU in percent, single scale and multi-scale.
DSCT_ROWS = {
    ("dsct-tiny-sapp", "Cityscapes val", 40_000): (76.74, 78.95),
    ("dsct-tiny-sac", "Cityscapes val", 40_000): (76.95, 78.74),
    ("dsct-small-sapp", "Cityscapes val", 40_000): (79.72, 80.79),
    ("dsct-small-sac", "Cityscapes val", 40_000): (80.04, 81.50),
    ("dsct-base-sapp", "Cityscapes val", 40_000): (81.43, 82.60),
    ("dsct-base-sac", "Cityscapes val", 40_000): (81.23, 82.73),
    ("dsct-base-sapp", "Cityscapes val", 80_000): (81.85, 83.31),
    ("dsct-base-sac", "Cityscapes val", 80_000): (81.28, 82.58),
    ("dsct-base-sapp", "ADE20K val", 160_000): (48.18, 49.11),
    ("dsct-base-sac", "ADE20K val", 160_000): (48.66, 49.27),
    ("dsct-base-sapp", "Cityscapes test", 20_000): (None, 82.25),
    ("dsct-base-sac", "Cityscapes test", 20_000): (None, 82.41),
}

# The recipe's own keys with a model and crop that take seconds.
TINY = {"spatial_hidden_sizes": [8, 16, 32], "stem_channels": 8, "hidden_size": 32, "num_hidden_layers": 6}
REDUCED = [
    *("--config_overrides", json.dumps(TINY | {"num_attention_heads": 2, "decoder_hidden_size": 16})),
    *("--encoder_weights", "null", "--dataset", "synthetic@64x96", "--train_split", "train", "--eval_split", "val"),
    *("--max_steps", "2", "--max_train_samples", "4", "--max_eval_samples", "1", "--save_strategy", "no"),
    *("--crop_size", "32", "48", "--base_size", "32", "64", "--per_device_train_batch_size", "2", "--use_cpu"),
]
WINDOW = ["--test_crop_size", "48", "48", "--test_stride", "32", "32", "--test_base_size", "64", "96"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_runs_two_steps_on_embedded_data(path, tmp_path):
    recipe = load_recipe(path)
    model = recipe.model.model if recipe.model.model in list_models() else "dsct-base-" + path.stem.split("_")[2]
    window = WINDOW if recipe.data.test_mode == "slide" else []
    words = [*REDUCED, *window, "--model", model, "--output_dir", str(tmp_path)]
    assert main(["train", str(path), *words]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["steps"] == 2
    assert results["protocol"]["mode"] == recipe.data.test_mode


def test_every_published_row_of_dsct_has_its_recipe():
    found = {}
    for path in RECIPES:
        recipe = load_recipe(path)
        published = recipe.model.published
        if path.stem.startswith("dsct") and published:
            variant = published.get("variant", recipe.model.model)
            percent = [published.get(key) for key in ("mean_iou", "mean_iou_multi_scale")]
            key = (variant, published["dataset"], recipe.training.max_steps)
            found[key] = tuple(value and round(100 * value, 2) for value in percent)
    assert found == DSCT_ROWS


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_short_and_says_how_to_run_it(path):
    text = path.read_text()
    assert f"denseseg train scripts/recipes/{path.name}" in text
    assert len(text.splitlines()) <= 40
    assert max(map(len, text.splitlines())) <= 119
    assert isinstance(yaml.safe_load(text), dict)
