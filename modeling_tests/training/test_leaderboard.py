"""The leaderboard: its rows are models, a small one runs and resumes, its table and figure hold what the runs gave."""

import argparse
import importlib.util
import itertools
import json
import sys

import pytest
import torch
import yaml

from hf_denseseg.data.class_names import ClassNames
from hf_denseseg.models.flops import count_forward
from hf_denseseg.training.arguments import ModelArguments
from hf_denseseg.training.recipe import load_recipe
from hf_denseseg.training.starting_model import build_model
from reference import REPOSITORY

ROWS = REPOSITORY / "scripts" / "leaderboards" / "camvid.yaml"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "scripts"))
    spec = importlib.util.spec_from_file_location("leaderboard", REPOSITORY / "scripts" / "leaderboard.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row_of(seconds, runs):
    known = {"recipe": {}, "seconds_per_step": seconds, "steps": 10, "multiply_adds": 2_000_000_000, "search": []}
    cost = {"processor": "P", "cpu_seconds": 9.0, "parameters": 1_500_000, "peak_memory_bytes": 2**30}
    cost |= {"train_images_per_second": 8.0, "eval_images_per_second": 20.0, "state": "done"}
    made = [
        {"seed": seed, "mean_iou_percent": scores[-1], "curve": [[5, scores[0]], [10, scores[1]]], **cost}
        for seed, scores in enumerate(runs)
    ]
    return known | {"runs": made}


def test_best_row_comes_first_and_a_failed_run_is_told(script, tmp_path):
    rows = {"low": row_of(1.0, [(10.0, 20.0), (12.0, 24.0)]), "high": row_of(0.5, [(10.0, 40.0)])}
    rows["broken"] = row_of(1.0, []) | {"runs": [{"seed": 0, "state": "failed: exit code 2: no"}]}
    results = {"plan": "d", "dataset": "d", "budget_cpu_seconds": 10, "environment": {"processor": "P"}, "rows": rows}
    script.write(results, tmp_path)
    lines = (tmp_path / "d.md").read_text().splitlines()
    high, low, broken = lines[-3:]
    assert high.startswith("| high | 40.00 | 1 | 10 | 1.50 | 2.00 | 8.0 / 20.0 | 1024 | 9 |")
    assert low.startswith("| low | 22.00 ± 2.83 | 2 |") and "failed: exit code 2: no" in broken
    assert len({line.count("|") for line in lines[2:]}) == 1
    assert json.loads((tmp_path / "d.json").read_text()) == results and (tmp_path / "d.png").stat().st_size > 5000


def test_a_plan_with_a_base_shows_what_each_row_gains_with_the_same_seed(script, tmp_path):
    rows = {"base": row_of(1.0, [(1.0, 20.0), (1.0, 22.0)]), "change": row_of(1.0, [(1.0, 23.0), (1.0, 24.0)])}
    results = {"plan": "d", "dataset": "d", "budget_cpu_seconds": 10, "environment": {"processor": "P"}, "rows": rows}
    script.write(results | {"base": "base"}, tmp_path)
    change, base = (tmp_path / "d.md").read_text().splitlines()[-2:]
    assert change.startswith("| change | 23.50") and change.endswith("| +2.50 ± 0.71 |")  # 3 and 2
    assert base.startswith("| base | 21.00") and base.endswith("| – |")
    gains = (tmp_path / "d.png").read_bytes()
    script.write(results, tmp_path)
    assert gains != (tmp_path / "d.png").read_bytes()  # learning curves
    script.write(
        results | {"base": "base", "rows": {"change": rows["change"]}}, tmp_path
    )  # `--rows change` comes first
    assert (tmp_path / "d.md").read_text().splitlines()[-1].endswith("| – |")


def test_every_plan_gives_complete_recipes(script, tmp_path):
    for path in ROWS.parent.glob("*.yaml"):
        plan = yaml.safe_load(path.read_text())
        args = argparse.Namespace(output_dir=tmp_path, data="synthetic", encoder_weights="w.safetensors")
        for name, images in itertools.product(plan["rows"], plan.get("images", {"": {}})):
            row = script.Row(name, plan, args)
            recipe = row.recipe | row.expanded({"images": images})
            (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
            if recipe["model"] != "smp-unet":
                assert load_recipe(tmp_path / "recipe.yaml").model.model == recipe["model"], (path.name, name)
        assert plan.get("base", name) in plan["rows"]
        assert list(plan.get("images", ())) == plan.get("search", {}).get("images", [])


def test_a_search_takes_one_key_after_the_other(script, tmp_path, monkeypatch):
    plan = yaml.safe_load(ROWS.read_text())
    args = argparse.Namespace(output_dir=tmp_path, data="synthetic", encoder_weights=None)
    row, asked = script.Row("DSCT", plan, args), []

    def train(folder, recipe, command):
        asked.append(recipe)
        if recipe["learning_rate"] == 2.0 and recipe.get("base_size") == [4, 4]:
            raise RuntimeError("exit code 1: no")
        return {"scores": {"mean_iou": recipe["learning_rate"] / 10 + 0.1 * ("base_size" in recipe)}, "images": 3}

    monkeypatch.setattr(script, "train", train)
    row.images = {"full": {}, "third": {"base_size": [4, 4]}, "half": {"base_size": [6, 6], "test_base_size": [6, 6]}}
    tried = row.search(50, {"learning_rate": [1.0, 2.0, 1.5], "images": ["full", "third", "half"]})
    rates = [(1.0, "full"), (2.0, "full"), (1.5, "full"), (2.0, "third"), (2.0, "half")]
    assert [(each["settings"]["learning_rate"], each["settings"]["images"]) for each in tried] == rates
    assert [each["mean_iou_percent"] for each in tried] == pytest.approx([10.0, 20.0, 15.0, 0.0, 30.0])
    assert tried[3]["state"] == "failed: exit code 1: no"
    assert script.best(tried) == {"learning_rate": 2.0, "images": "half"} and script.best([]) == {}
    assert asked[-1]["test_base_size"] == [6, 6] and "images" not in asked[-1] and asked[-1]["max_steps"] == 50
    assert {recipe["eval_fraction"] for recipe in asked} == {script.HELD_BACK}


def test_a_row_of_equal_cost_gets_the_steps_of_the_base(script, tmp_path):
    plan = yaml.safe_load((ROWS.parent / "camvid_from_scratch.yaml").read_text())
    args = argparse.Namespace(output_dir=tmp_path, data="synthetic", encoder_weights=None)
    name = "cosine schedule"
    row = script.Row(name, plan, args)
    assert "same_cost" not in row.recipe
    base = row_of(0.5, [(10.0, 20.0)])
    started = script.start_row(row, plan, {plan["base"]: base}, 300.0)
    assert started["steps"] == base["steps"] and started["seconds_per_step"] == 0.5 and started["runs"] == []
    assert started["recipe"] == plan["rows"][name]
    with pytest.raises(SystemExit, match="gets the steps of 'the recipe': name that row too"):
        script.start_row(row, plan, {}, 300.0)


def test_operations_are_counted_at_the_size_of_the_test(script, tmp_path, monkeypatch):
    plan = yaml.safe_load((ROWS.parent / "camvid_from_scratch.yaml").read_text())
    args = argparse.Namespace(output_dir=tmp_path, data="synthetic", encoder_weights=None)
    counted = []
    done = argparse.Namespace(stdout="7\n")
    monkeypatch.setattr(script.subprocess, "run", lambda words, **_: counted.append(words[-2:]) or done)
    monkeypatch.setattr(script.Row, "seconds_per_step", lambda row: 0.5)
    for name, size in (("crops by class", ["360", "480"]), ("images at half their size", ["180", "240"])):
        started = script.start_row(script.Row(name, plan, args), plan, {}, 300.0)
        assert started["multiply_adds"] == 7 and started["steps"] == 600 and counted[-1] == size
    plan = yaml.safe_load(ROWS.read_text())
    script.multiply_adds(script.Row("DSCT", plan, args), plan, {"learning_rate": 1.0, "images": "two thirds"})
    assert counted[-1] == ["240", "320"]


# The U-Net's package is no dependency.
OWN = {name: row for name, row in yaml.safe_load(ROWS.read_text())["rows"].items() if row["model"] != "smp-unet"}


@pytest.mark.parametrize("name", OWN)
def test_every_row_is_a_model_of_the_size_that_a_cpu_trains(name):
    row = OWN[name]
    arguments = ModelArguments(model=row["model"], config_overrides=row.get("config_overrides"))
    with torch.device("meta"):
        model = build_model(arguments, ClassNames("c", tuple(f"class {number}" for number in range(11))))
    counts = count_forward(model.to("meta"), (192, 256))
    assert sum(each.numel() for each in model.parameters()) < 12e6
    assert counts.layer_multiply_adds + counts.product_multiply_adds < 6e9


@pytest.mark.slow
def test_a_small_leaderboard_runs_and_goes_on(script, tmp_path, monkeypatch, capsys):
    plan = yaml.safe_load(ROWS.read_text())
    plan["shared"] |= {"crop_size": [64, 96], "per_device_train_batch_size": 2, "dataloader_num_workers": 0}
    plan["shared"] |= {"class_weights": None, "eval_split": "val"}
    plan["rows"] = {name: plan["rows"][name] for name in ("DSCT", "SegFormer-B0")}
    plan["images"] = {"full": {}, "half": {"base_size": [32, 48], "test_base_size": [32, 48], "crop_size": [32, 48]}}
    plan["search"] = {"learning_rate": [1.0e-3], "images": ["full", "half"]}
    (tmp_path / "scripts" / "leaderboards").mkdir(parents=True)
    (tmp_path / "scripts" / "leaderboards" / "synthetic.yaml").write_text(yaml.safe_dump(plan))
    monkeypatch.setattr(script, "ROOT", tmp_path)
    monkeypatch.setattr(script, "TIMED_STEPS", (1, 2))
    words = ["--dataset", "synthetic", "--data", "synthetic:12@64x96", "--budget_cpu_seconds", "0.5", "--seeds", "1"]
    words += ["--output_dir", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    monkeypatch.setattr(sys, "argv", ["leaderboard.py", *words])
    assert script.main() == 0
    results = json.loads((tmp_path / "results" / "synthetic.json").read_text())
    for row in results["rows"].values():
        assert [run["state"] for run in row["runs"]] == ["done"] and row["search"][0]["images"] < 12
        assert all("state" not in each for each in row["search"]) and len(row["search"]) == 2
        assert len(row["runs"][0]["curve"]) >= 2 and row["multiply_adds"] > 0
    monkeypatch.setattr(script, "train", None)  # nothing runs again
    assert script.main() == 0
    monkeypatch.setattr(sys, "argv", ["leaderboard.py", *words, "--budget_cpu_seconds", "9"])
    with pytest.raises(SystemExit, match=r"budget_cpu_seconds 0.5, not 9.0"):
        script.main()
    plan["rows"]["DSCT"]["learning_rate"] = 0.5
    (tmp_path / "scripts" / "leaderboards" / "synthetic.yaml").write_text(yaml.safe_dump(plan))
    monkeypatch.setattr(sys, "argv", ["leaderboard.py", *words])
    with pytest.raises(SystemExit, match=r"runs of 'DSCT' with another recipe"):
        script.main()
