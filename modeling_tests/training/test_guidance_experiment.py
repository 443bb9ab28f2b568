"""The guidance experiment: its arms differ only in guidance and axial attention; its table has the right numbers."""

import importlib.util
import json
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


def test_every_arm_starts_from_the_same_backbone_and_finished_runs_are_kept(script, tmp_path, monkeypatch, capsys):
    words = [
        "--dataset",
        "synthetic:5@64x96",
        "--steps",
        "1",
        "--backbone_steps",
        "1",
        "--seeds",
        "0",
        "--arms",
        "SemanticFPN",
        "full HFGM",
    ]
    folders = ["--output_dir", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    monkeypatch.setattr(sys, "argv", ["guidance_experiment.py", *words, *folders])
    assert script.main() == 0
    results = json.loads((tmp_path / "results" / "synthetic-street-11.json").read_text())
    assert {arm: len(scores) for arm, scores in results["mean_iou_percent"].items()} == {
        "SemanticFPN": 1,
        "full HFGM": 1,
    }
    recipes = [(tmp_path / "runs" / f"arm{number}_seed0.yaml").read_text() for number in (0, 3)]
    switches = ("guidance:", "axial_attention:", "output_dir:")
    rest = {"\n".join(line for line in text.splitlines() if not line.strip().startswith(switches)) for text in recipes}
    assert len(rest) == 1 and "runs/backbone/model" in rest.pop()
    monkeypatch.setattr(experiments.subprocess, "run", None)  # nothing is trained again
    assert script.main() == 0
    assert json.loads((tmp_path / "results" / "synthetic-street-11.json").read_text()) == results


def test_table_gives_mean_spread_and_paired_interval(script):
    scores = {"SemanticFPN": [30.0, 32.0, 34.0], "+ guidance": [31.0, 31.5, 36.0]}
    results = {"dataset": "d", "images": 3, "steps": 5, "learning_rate": 0.001, "seeds": [0, 1, 2]}
    results |= {"mean_iou_percent": scores, "backbone": {"steps": 7, "dataset": "s", "mean_iou_percent": 40.0}}
    row = next(line for line in script.table(results).splitlines() if line.startswith("| + guidance"))
    gains = [1.0, -0.5, 2.0]
    mean, half = statistics.mean(gains), 4.302653 * statistics.stdev(gains) / 3**0.5  # t of 97.5 %, 2 degrees
    own = scores["+ guidance"]
    assert f"{statistics.mean(own):.2f} ± {statistics.stdev(own):.2f}" in row
    assert f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]" in row and row.endswith("47.67 |")


def test_every_arm_is_the_model_that_it_is_called(script):
    for arm, fields in script.ARMS.items():
        config = create_config("hfgd-resnet50", **(script.MODEL | script.LITE0 | fields))
        full = arm.endswith("HFGM")
        assert (config.guidance, config.axial_attention) == (full or "guidance" in arm, full or "axial" in arm), arm
        kind = next((name for name in ("UperNet", "FaPN") if name in arm), "sfpn")
        assert config.upsampler == kind.lower(), arm
        same = script.ARMS[script.BASES.get(arm, arm)]
        switches = ("guidance", "axial_attention")
        assert {k: v for k, v in same.items() if k not in switches} == {
            k: v for k, v in fields.items() if k not in switches
        }
