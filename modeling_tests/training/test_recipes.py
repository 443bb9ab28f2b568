"""Every shipped recipe parses, holds the published values, and runs on embedded data.

`published/<family>.yaml` holds every row of the paper's tables, each with its recipe or the reason why it has none.
`test_published_<family>.py` defines what the recipes of a family must contain: `RECIPE_VALUES`, glob pattern of recipe
names -> values; `REDUCED`, configuration fields that make its models small; and optionally `LONG_RUNS`, glob patterns
of recipes that run in the slow tests only.
"""

import fnmatch
import functools
import importlib
import json
import re

import pytest
import yaml

from detection_model_tester import few_regions
from hf_denseseg import list_models
from hf_denseseg.cli import main
from hf_denseseg.models.auto.registration import create_config, families
from hf_denseseg.models.auto.tasks import task_of_class
from hf_denseseg.reports.model_card import published_rows
from hf_denseseg.training import run as training_run
from hf_denseseg.training.recipe import load_recipe
from hf_denseseg.training.tasks.segmentation import inference_settings
from hf_denseseg.visualization.learning_curve import save_learning_curve
from published_rows import agrees, paper_rows
from reference import REPOSITORY

FOLDER = REPOSITORY / "scripts" / "recipes"
RECIPES = {path.stem: path for path in sorted(FOLDER.rglob("*.yaml"))}
PUBLISHED = {family: importlib.import_module(f"test_published_{family}") for family in families()}

SHORT = [
    *("--encoder_weights", "null", "--freeze", "null", "--train_split", "train", "--eval_split", "val", "--use_cpu"),
    *("--max_steps", "2", "--max_train_samples", "2", "--max_eval_samples", "1", "--save_strategy", "no"),
    *("--per_device_train_batch_size", "2"),
]
DETECTION = [
    *("--dataset", "synthetic@96x128", "--shortest_edge", "32", "--longest_edge", "48"),
    *("--test_base_size", "32", "48"),
]
SMALL = {
    "semantic-segmentation": ["--dataset", "synthetic@64x96", "--crop_size", "32", "48", "--base_size", "32", "64"],
    "image-classification": ["--dataset", "synthetic@40x48", "--crop_size", "32", "32"],
    "object-detection": DETECTION,
    "instance-segmentation": [*DETECTION, "--per_device_train_batch_size", "1"],  # its heads take seconds per image
}
PADDED = ["--test_crop_size", "81", "113"]  # larger than the image
WINDOW = ["--test_crop_size", "32", "48", "--test_stride", "32", "48", "--test_base_size", "64", "96"]


def family_of(name):
    return name.partition("_")[0]


@functools.cache
def recipe_of(name):
    return load_recipe(RECIPES[name])


def first_step(recipe):
    """The first recipe of a schedule of several, with a published name; each later one names the run before it."""
    before = re.fullmatch(r"runs/(\w+)/model", recipe.model.model)
    return first_step(recipe_of(before[1])) if before else recipe


@pytest.fixture(scope="module", autouse=True)
def quick_runs(tmp_path_factory):
    """Replace what takes longer than two steps: the learning curve, the same in every run, and many regions."""
    curve = tmp_path_factory.mktemp("curve") / "learning_curve.png"
    save_learning_curve([{"loss": 1.0, "step": 1}], curve)
    drawn = curve.read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        few_regions(patch)
        patch.setattr(training_run, "save_learning_curve", lambda history, path, *score: path.write_bytes(drawn))
        yield


def timed(name):
    """The recipe, marked as slow if it is one of its family's `LONG_RUNS`."""
    patterns = getattr(PUBLISHED[family_of(name)], "LONG_RUNS", ())
    long = any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
    return pytest.param(name, marks=pytest.mark.slow if long else ())


@pytest.mark.parametrize("name", [timed(name) for name in RECIPES])
def test_recipe_runs_two_steps_on_embedded_data(name, tmp_path):
    recipe = recipe_of(name)
    start = first_step(recipe).model
    reduced = (start.config_overrides or {}) | PUBLISHED[family_of(name)].REDUCED
    task = recipe.model.task
    window = WINDOW if recipe.data.test_mode == "slide" else PADDED if recipe.data.test_crop_size else []
    words = ["--model", start.model, "--config_overrides", json.dumps(reduced), "--output_dir", str(tmp_path)]
    assert main(["train", str(RECIPES[name]), *SHORT, *SMALL[task], *window, *words]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert (results["steps"], results["task"]) == (2, task)
    if task == "semantic-segmentation":
        assert results["protocol"]["mode"] == recipe.data.test_mode


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_names_a_model_of_its_family_and_a_test_protocol(name):
    recipe = recipe_of(name)
    start = first_step(recipe).model
    assert start.model in list_models(f"{family_of(name)}-*")
    config = create_config(start.model, **(start.config_overrides or {}))
    assert config.model_type == family_of(name)
    assert task_of_class(config.architectures[0]) == recipe.model.task
    assert getattr(config, "image_size", None) in (None, *recipe.data.crop_size)
    settings = inference_settings(recipe.data)
    if settings.mode == "slide":
        assert settings.crop_size == tuple(recipe.data.crop_size)


@pytest.mark.parametrize("family", families())
def test_every_row_of_the_paper_has_a_recipe_with_its_figures_or_a_reason(family):
    for row in paper_rows(family):
        assert bool(row.recipe) != bool(row.out), f"{row.place}: give a recipe or the reason why there is none"
        if not row.recipe:
            continue
        recipe = recipe_of(row.recipe)
        assert row.steps == recipe.training.max_steps, row.place
        found = [each for each in published_rows(recipe.model.published) if agrees(each, row)]
        assert bool(found) != bool(row.differs), f"{row.place}: {row.figures}, {recipe.model.published}"


@pytest.mark.parametrize("family", families())
def test_recipes_publish_nothing_but_rows_of_the_paper(family):
    rows = paper_rows(family)
    known = set()
    for name in (name for name in RECIPES if family_of(name) == family):
        recipe = recipe_of(name)
        for published in published_rows(recipe.model.published):
            assert any(agrees(published, row) for row in rows if row.recipe == name), f"{name}: {published}"
            variant = published.get("variant", recipe.model.model)
            key = (variant, published["dataset"], recipe.training.max_steps, published.get("note"))
            assert key not in known, f"{name} and another recipe look the same in the card of {variant}"
            known.add(key)


def test_rows_without_a_recipe_are_counted(capsys):
    rows = [(family, row) for family in families() for row in paper_rows(family)]
    out = [(family, row) for family, row in rows if not row.recipe]
    with capsys.disabled():
        print(f"\n{len(rows)} published rows, {len(out)} without a recipe:")
        for family, row in out:
            print(f"  {family}, {row.place} ({' / '.join(row.figures.values())}): {row.out}")
    assert len(out) < len(rows) / 10


@pytest.mark.parametrize("family", families())
def test_recipes_hold_the_published_values(family):
    for pattern, expected in PUBLISHED[family].RECIPE_VALUES.items():
        names = fnmatch.filter(RECIPES, pattern)
        assert names, f"no recipe is called {pattern}"
        for name in names:
            given = recipe_of(name).given
            found = {key: given.get(key, "absent") for key in expected}
            assert found == expected, name


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_short_and_contains_its_command(name):
    text = RECIPES[name].read_text()
    assert f"denseseg train scripts/recipes/{RECIPES[name].parent.name}/{name}.yaml" in text
    assert len(text.splitlines()) <= 40
    assert max(map(len, text.splitlines())) <= 119
    assert isinstance(yaml.safe_load(text), dict)
