"""A recipe that follows from the data and the machine: the rules by cases, and the command from folder to run."""

import json
import math

import numpy as np
import pytest
import yaml
from PIL import Image
from test_training import TINY

from hf_denseseg.cli import main
from hf_denseseg.data.synthetic.scenes import SYNTHETIC_SPEC, render_scene
from hf_denseseg.errors import InputError
from hf_denseseg.training.derived_recipe import (
    CPU_MODEL,
    GIB,
    HIGHEST_WEIGHT,
    Machine,
    Statistics,
    derive,
    derived_recipe,
    median_size,
    this_machine,
)
from hf_denseseg.training.recipe import load_recipe, make_recipe
from raster_files import write_bands
from reference import REPOSITORY

LAPTOP = Machine(2, 8 * GIB)
H100 = Machine(16, 128 * GIB, 80 * GIB, True)
SMALL_GPU = Machine(4, 16 * GIB, 8 * GIB)
# Fractions of the 11 classes of CamVid's training images.
FRACTIONS = (0.24, 0.29, 0.012, 0.36, 0.05, 0.11, 0.013, 0.015, 0.07, 0.008, 0.005)
CAMVID = Statistics(367, 101, {(360, 480): 367}, tuple(each / sum(FRACTIONS) for each in FRACTIONS))


def keys_of(statistics=CAMVID, machine=LAPTOP, **given):
    return {choice.key: choice.value for choice in derive(statistics, machine, given)}


def test_camvid_on_a_laptop_gets_about_what_was_made_by_hand():
    found = keys_of()
    path = REPOSITORY / "scripts" / "recipes" / "dsct" / "dsct_tiny_sac_camvid_cpu.yaml"
    by_hand = yaml.safe_load(path.read_text())
    same = ("model", "config_overrides", "crop_size", "scale_range", "per_device_train_batch_size", "learning_rate")
    for key in ("base_size", "test_base_size"):  # boxes: images of 3:4 have the same size in both
        assert found[key] == [240, 240] and by_hand[key] == [180, 240]
    for key in (
        *same,
        "photometric_distortion",
        "weight_decay",
        "max_grad_norm",
        "dataloader_num_workers",
        "train_split",
        "eval_split",
    ):
        assert found[key] == by_hand[key], key
    for key in ("max_steps", "ema_decay", "warmup_steps"):
        assert found[key] == pytest.approx(by_hand[key], rel=0.2), key
    assert sum(f * w for f, w in zip(CAMVID.fractions, found["class_weights"], strict=True)) == pytest.approx(1, 0.01)


CASES = {
    "no validation split": (CAMVID._replace(eval_fraction=0.2), LAPTOP, {"eval_fraction": 0.2, "eval_split": None}),
    "a large GPU": (
        CAMVID,
        H100,
        {"model": "dsct-small-sac", "bf16": True, "crop_size": [352, 480], "config_overrides": None},
    ),
    "a large GPU and much data": (
        CAMVID._replace(images=20_000, sizes={(512, 683): 1}),
        H100,
        {"model": "dsct-base-sac", "max_steps": 80_000, "crop_size": [448, 576], "per_device_train_batch_size": 16},
    ),
    "a small GPU": (
        CAMVID._replace(sizes={(1024, 2048): 1}),
        SMALL_GPU,
        {"model": "dsct-tiny-sac", "per_device_train_batch_size": 2, "bf16": None, "dataloader_num_workers": 3},
    ),
    "two classes": (
        CAMVID._replace(fractions=(0.7, 0.3)),
        LAPTOP,
        {"config_overrides": CPU_MODEL | {"num_labels": 1}, "class_weights": None},
    ),
    "two classes on a GPU": (CAMVID._replace(fractions=(0.7, 0.3)), H100, {"config_overrides": {"num_labels": 1}}),
    "a class that never occurs": (
        CAMVID._replace(fractions=(0.98999, 0.01, 0.00001, 0.0)),
        LAPTOP,
        {"class_weights": [0.92, 9.11, HIGHEST_WEIGHT, 1.0]},
    ),
    "a satellite": (
        CAMVID._replace(num_channels=4, pixel_range=[0, 4095]),
        LAPTOP,
        {"num_channels": 4, "pixel_range": [0, 4095]},
    ),
    "large images on a CPU": (
        CAMVID._replace(sizes={(1024, 2048): 5}),
        LAPTOP,
        {"base_size": [240, 240], "test_base_size": [240, 240], "crop_size": [112, 240]},
    ),
    "tiny images": (CAMVID._replace(sizes={(20, 50): 5}), LAPTOP, {"crop_size": [16, 48], "base_size": None}),
    "few images": (CAMVID._replace(images=3), LAPTOP, {"max_steps": 400}),
    "little memory": (CAMVID, Machine(1, 2 * GIB), {"per_device_train_batch_size": 4, "dataloader_num_workers": 0}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_each_case(case):
    statistics, machine, expected = CASES[case]
    found = keys_of(statistics, machine)
    assert {key: found.get(key) for key in expected} == expected
    values = {**found, "dataset": "synthetic"}
    values.pop("bf16", None)  # transformers refuses it on machines without
    recipe = make_recipe(values, "test")
    assert recipe.training.eval_steps * 4 <= recipe.training.max_steps
    assert recipe.training.save_steps % recipe.training.eval_steps == 0


def test_given_keys_win_and_the_others_follow_from_them():
    choices = derive(CAMVID, LAPTOP, {"max_steps": 100, "crop_size": [64, 64], "eval_strategy": "steps"})
    found = {choice.key: choice for choice in choices}
    assert found["max_steps"].value == 100 and found["max_steps"].reason == "given on the command line"
    assert found["eval_strategy"].value == "steps"
    assert found["eval_steps"].value == 20 and found["warmup_steps"].value == 5
    low, _ = found["scale_range"].value
    assert low == math.floor(20 * math.sqrt(64 * 64 / (1.5 * 180 * 240))) / 20 == 0.25
    own = keys_of(model="segformer-b0")
    assert own["model"] == "segformer-b0" and "config_overrides" not in own
    assert "base_size" not in own and own["crop_size"] == [128, 192]  # larger models keep images of this size
    large = keys_of(CAMVID._replace(sizes={(1024, 2048): 5}), model="segformer-b0")
    assert large["base_size"] == large["test_base_size"] == [512, 512] and large["crop_size"] == [96, 256]
    wide = keys_of(base_size=[120, 480])
    assert wide["test_base_size"] == [120, 480] and wide["crop_size"] == [112, 160]  # images of 120x160
    weights = {choice.key: choice for choice in derive(CAMVID, H100, {"encoder_weights": "a.pth"})}
    # A new head learns nothing in a few hundred steps at the rate of a trained encoder.
    assert weights["head_learning_rate_multiplier"].value == 10 and "head_learning_rate_multiplier" not in found
    assert weights["learning_rate"].value == 1.0e-4 and "given encoder weights" in weights["model"].reason
    assert "random weights" in found["model"].reason and "nothing is downloaded" in found["model"].reason


@pytest.mark.parametrize(
    "given",
    [
        {"eval_strategy": "no"},
        {"eval_strategy": "epoch"},
        {"save_steps": 30},
        {"eval_steps": 7},
        {"loss": "dice"},
        {"loss": "ce+lovasz"},
        {"model": "segformer-b0"},
        {"model": "hlg-pup-small"},
        {"per_device_train_batch_size": 1},
        {"eval_fraction": 0.4},
    ],
    ids=str,
)
@pytest.mark.parametrize("classes", [2, 11])
def test_no_given_key_contradicts_a_derived_one(given, classes):
    statistics = CAMVID if classes == 11 else CAMVID._replace(fractions=(0.95, 0.05))
    found = keys_of(statistics, **given)
    recipe = make_recipe({**found, "dataset": "synthetic"}, "test")
    assert recipe.given == {**found, "dataset": "synthetic"} and given.items() <= found.items()
    if "loss" in given and classes == 2:
        assert ("class_weights" in found) == given["loss"].startswith("ce")


def test_sizes_and_machine():
    assert median_size({(10, 50): 3, (30, 20): 1, (40, 60): 1}) == (10, 50)
    assert this_machine(True).gpu_bytes == 0 and this_machine(True).cores >= 1 and this_machine(True).ram_bytes > GIB


@pytest.fixture
def folder(tmp_path):
    """Pairs without a validation split."""
    for part in ("images", "labels"):
        (tmp_path / "street" / "train" / part).mkdir(parents=True)
    for number in range(8):
        image, label = render_scene("train", number, (48, 64))
        image.save(tmp_path / "street" / "train" / "images" / f"{number}.png")
        Image.fromarray(np.asarray(label, np.uint8)).save(tmp_path / "street" / "train" / "labels" / f"{number}.png")
    (tmp_path / "street" / "classes.json").write_text(json.dumps(list(SYNTHETIC_SPEC.classes)))
    return tmp_path / "street"


def test_from_a_folder_to_a_run_and_from_its_recipe_to_the_next(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["train", str(folder), "--config_overrides", json.dumps(TINY), "--use_cpu", "--max_steps", "2"]
    words += ["--dataloader_num_workers", "0"]
    assert main(words) == 0
    shown = capsys.readouterr().err
    assert "crop_size: [48, 64] (about 33,280 pixels for a CPU" in shown
    assert "max_steps: 2 (given on the command line)" in shown
    run = tmp_path / "runs" / "street"
    text = (run / "recipe.yaml").read_text()
    assert "held back\neval_fraction: 0.3\n" in text
    recipe, results = load_recipe(run / "recipe.yaml"), json.loads((run / "results.json").read_text())
    assert results["steps"] == 2 and results["recipe"]["crop_size"] == recipe.data.crop_size == [48, 64]
    assert recipe.to_yaml() == yaml.safe_dump(yaml.safe_load(text), sort_keys=False)
    # The same command continues the run by its own recipe, here a finished one.
    assert main(words) == 0
    assert (run / "recipe.yaml").read_text() == text
    # The file is a recipe like others.
    assert main(["train", str(run / "recipe.yaml"), "--output_dir", "next", "--max_steps", "1"]) == 0
    assert json.loads((tmp_path / "next" / "results.json").read_text())["steps"] == 1


def test_channels_and_range_are_those_of_the_files(folder, tmp_path):
    for path in (folder / "train" / "images").iterdir():
        values = np.asarray(Image.open(path)).astype(np.uint16) * 16
        path.unlink()
        write_bands(path.with_suffix(".tif"), np.concatenate([values, values[..., :1]], -1))
    recipe = derived_recipe(str(folder), {"use_cpu": True, "output_dir": str(tmp_path / "out")})
    assert (recipe.data.num_channels, recipe.data.pixel_range) == (4, [0, 4095])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("rank", "printed"), [("0", True), ("1", False)])
def test_one_of_several_processes_prints_the_reasons(folder, tmp_path, monkeypatch, capsys, rank, printed):
    monkeypatch.setenv("RANK", rank)
    words = ["train", str(folder), "--use_cpu", "--output_dir", str(tmp_path / "out"), "--print_config"]
    assert main(words) == 0
    assert ("learning_rate: " in capsys.readouterr().err) == printed


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"task": "object-detection"}, "Without a recipe only semantic-segmentation is trained"),
        ({"dataset": "synthetic"}, "take --dataset out"),
        ({"eval_split": "holiday"}, "holiday"),
        ({"early_stopping_patience": 0}, "early_stopping_patience is 0"),
        ({"train_split": "tomorrow"}, "tomorrow"),
    ],
)
def test_bad_input_is_refused(folder, tmp_path, given, message):
    with pytest.raises(InputError, match=message):
        derived_recipe(str(folder), {"use_cpu": True, "output_dir": str(tmp_path / "out"), **given})
    assert not (tmp_path / "out").exists()


def test_a_folder_without_data_and_label_maps_without_classes_are_refused(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert main(["train", str(tmp_path / "empty")]) == 2
    for path in (folder / "train" / "labels").iterdir():
        Image.fromarray(np.full((48, 64), 255, np.uint8)).save(path)
    assert main(["train", str(folder)]) == 2
    assert "no label map of 'train' has a class" in capsys.readouterr().err and not (tmp_path / "runs").exists()
