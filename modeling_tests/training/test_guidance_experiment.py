"""The guidance experiment: its arms differ only in guidance and axial attention; its table has the right numbers."""

import argparse
import importlib.util
import json
import shutil
import statistics
import sys

import pytest

from hf_denseseg.models.auto.registration import create_config
from reference import REPOSITORY

sys.path.append(str(REPOSITORY / "scripts"))
import experiments  # noqa: E402 - a module of the scripts


@pytest.fixture
def script(monkeypatch):
    path = REPOSITORY / "scripts" / "guidance_experiment.py"
    spec = importlib.util.spec_from_file_location("guidance_experiment", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    small = {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
    monkeypatch.setattr(module, "BACKBONE", module.BACKBONE | small)
    monkeypatch.setattr(module, "MODEL", module.MODEL | {"backbone_config": module.BACKBONE, "decoder_width": 16})
    monkeypatch.setattr(module, "PRETRAINING", module.PRETRAINING | {"dataset": "synthetic:5@64x96"})
    shared = {"crop_size": [64, 96], "per_device_train_batch_size": 2, "dataloader_num_workers": 0, "use_cpu": True}
    monkeypatch.setattr(module, "TRAINING", module.TRAINING | shared)
    return module


def test_every_arm_starts_from_the_same_backbone_and_results_are_kept(script, tmp_path, monkeypatch):
    words = ["--dataset", "synthetic:5@64x96", "--steps", "1", "--backbone_steps", "1", "--seeds", "0"]
    words += ["--arms", "SemanticFPN", "full HFGM"]
    folders = ["--output_dir", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    monkeypatch.setattr(sys, "argv", ["guidance_experiment.py", *words, *folders])
    assert script.main() == 0
    file = tmp_path / "results" / "synthetic_5_64x96_1_steps.json"
    results = json.loads(file.read_text())
    assert list(results["rows"]) == ["SemanticFPN", "full HFGM"]
    for row in results["rows"].values():
        assert [run["state"] for run in row["runs"]] == ["done"] and row["runs"][0]["images"] == 1
    recipes = [(tmp_path / "runs" / f"{arm}_1_steps_seed0.yaml").read_text() for arm in ("semanticfpn", "full_hfgm")]
    switches = ("guidance:", "axial_attention:", "output_dir:")
    rest = {"\n".join(line for line in text.splitlines() if not line.strip().startswith(switches)) for text in recipes}
    assert len(rest) == 1 and "runs/backbone/model" in rest.pop()
    real = experiments.subprocess.run

    def only_git(words, **kwargs):  # nothing is trained again
        assert words[0] == "git"
        return real(words, **kwargs)

    monkeypatch.setattr(experiments.subprocess, "run", only_git)
    shutil.rmtree(tmp_path / "runs" / "semanticfpn_1_steps_seed0")  # its result stands in the file
    assert script.main() == 0
    assert json.loads(file.read_text())["rows"] == results["rows"]
    monkeypatch.setattr(sys, "argv", ["guidance_experiment.py", *words, *folders, "--learning_rate", "0.5"])
    with pytest.raises(SystemExit, match="holds results with learning_rate 0.001, not 0.5"):
        script.main()


def run_of(seed, score, processor="P", seconds=9.0):
    known = {"seed": seed, "state": "done", "mean_iou_percent": score, "images": 3}
    return known | {"cpu_seconds": seconds, "processor": processor}


ON_P = {"environment": {"processor": "P"}}


def test_table_gives_mean_spread_and_paired_interval_and_tells_of_a_failed_run(script, tmp_path):
    scores = {"SemanticFPN": [30.0, 32.0, 34.0], "+ guidance": [31.0, 31.5, 36.0]}
    rows = {arm: {"runs": [run_of(*each) for each in enumerate(own)]} for arm, own in scores.items()}
    rows["FCN"] = {"runs": [run_of(0, 20.0), run_of(1, 20.0, "another", 1.0)]}
    rows["FaPN"] = {"runs": [{"seed": 0, "state": "failed: exit code 2: no"}]}
    results = {"dataset": "path/to/camvid", "steps": 5, "learning_rate": 0.001, "rows": rows}
    results |= {"backbone": {"steps": 7, "dataset": "s", "mean_iou_percent": 40.0}} | ON_P
    script.write(results, tmp_path)
    lines = (tmp_path / "camvid_5_steps.md").read_text().splitlines()
    row = next(line for line in lines if line.startswith("| + guidance"))
    gains = [1.0, -0.5, 2.0]
    mean, half = statistics.mean(gains), 4.302653 * statistics.stdev(gains) / 3**0.5  # t of 97.5 %, 2 degrees
    own = scores["+ guidance"]
    assert f"{statistics.mean(own):.2f} ± {statistics.stdev(own):.2f}" in row
    assert f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]" in row and row.endswith("47.67 |")
    assert "| CPU seconds on P |" in lines[2]
    assert lines[-2].startswith("| FCN | 20.00 ± 0.00 |") and "| 9 |" in lines[-2]  # the other processor's are not in
    assert "failed: exit code 2: no" in lines[-1] and len({line.count("|") for line in lines[2:]}) == 1


def test_second_table_has_the_mean_of_each_class(script, tmp_path):
    runs = [run_of(0, 50.0) | {"classes": {"road": 90.0, "pole": 0.0}}, run_of(1, 52.0) | {"classes": {"road": 94.0}}]
    results = {"dataset": "path/to/camvid", "steps": 5, "learning_rate": 0.001, "backbone": {"dataset": "s"}}
    results |= ON_P
    results["rows"] = {"FCN": {"runs": runs}, "FaPN": {"runs": [{"seed": 0, "state": "failed: no"}]}}
    script.write(results, tmp_path)
    lines = (tmp_path / "camvid_lite0_5_steps.md").read_text().splitlines()
    assert lines[-3:] == ["| arm | road | pole |", "|---|---|---|", "| FCN | 92.0 | 0.0 |"]
    assert (tmp_path / "camvid_lite0_5_steps.png").stat().st_size > 1000


def test_gain_pairs_seeds_that_both_have():
    base = {"runs": [run_of(0, 30.0), run_of(2, 31.0)]}
    assert experiments.gain({"runs": [run_of(2, 33.5), run_of(1, 99.0)]}, base) == "+2.50"
    assert experiments.gain(base, base) == experiments.gain(base, None) == "–"
    assert experiments.differences({"runs": [run_of(2, 33.5), run_of(0, 29.0)]}, base) == [-1.0, 2.5]


def test_every_row_gets_the_first_seed_before_the_second_and_what_failed_is_tried_again():
    tried, written = [], []

    def run(name, seed):
        tried.append((name, seed))
        if name == "b":
            raise RuntimeError("exit code 2")
        return {"mean_iou_percent": 50.0}

    rows = {"a": {"runs": [run_of(1, 40.0)]}, "b": {"runs": []}, "c": {"runs": []}}
    for expected in ([("a", 0), ("b", 0), ("b", 1)], [("b", 0), ("b", 1)]):
        experiments.train_seeds(rows, ["a", "b"], [0, 1], run, lambda: written.append(tried[-1]))
        assert tried == written == expected
        tried.clear(), written.clear()
    assert [each["mean_iou_percent"] for each in rows["a"]["runs"]] == [50.0, 40.0]
    assert [each["state"] for each in rows["b"]["runs"]] == ["failed: exit code 2"] * 2 and not rows["c"]["runs"]


def test_a_run_keeps_the_commit_and_the_processor_that_trained_it(tmp_path, monkeypatch):
    def pretend(words, **kwargs):
        (tmp_path / "run").mkdir()
        known = {"versions": {"commit": "first"}, "machine": {"processor": "P"}}
        (tmp_path / "run" / "results.json").write_text(json.dumps(known))
        return argparse.Namespace(returncode=0)

    monkeypatch.setattr(experiments, "current_commit", lambda: "second")
    monkeypatch.setattr(experiments.subprocess, "run", pretend)
    for _ in range(2):  # trained, then read
        run = experiments.train(tmp_path / "run", {})
        assert (run["commit"], run["processor"]) == ("first", "P")


def test_every_arm_is_the_model_that_it_is_called(script):
    for arm, fields in script.ARMS.items():
        config = create_config("hfgd-resnet50", **(script.MODEL | script.LITE0 | fields))
        full = "HFGM" in arm
        assert (config.guidance, config.axial_attention) == (full or "guidance" in arm, full or "axial" in arm), arm
        kind = next((name for name in ("UperNet", "FaPN") if name in arm), "none" if "FCN" in arm else "sfpn")
        assert config.upsampler == kind.lower(), arm
        base = script.BASES.get(arm, arm)
        same, images = script.ARMS[base], arm.endswith("images doubled")
        stops = {"no stops": False, "features stopped": "features", "tokens stopped": "tokens"}
        assert config.stop_gradient == stops.get(arm.partition(", ")[2], True)
        assert base.endswith("images doubled") == images
        switches = ("guidance", "axial_attention", "stop_gradient", *(["upsampler"] if kind == "none" else []))
        assert {k: v for k, v in same.items() if k not in switches} == {
            k: v for k, v in fields.items() if k not in switches
        }
