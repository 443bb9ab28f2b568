"""The GPU session in miniature: every stage runs on a CPU and leaves its figures."""

import json
import subprocess
import sys

import pytest

from reference import REPOSITORY


@pytest.mark.slow
def test_a_dry_run_goes_through_every_stage(tmp_path):
    script = REPOSITORY / "scripts" / "gpu_session.py"
    subprocess.run([sys.executable, str(script), "--dry_run", "--output", str(tmp_path)], check=True)
    commands = json.loads((tmp_path / "session.json").read_text())["commands"]
    states = {row["name"]: row["state"] for row in commands}
    assert set(states.values()) == {"done"}
    assert {"tests", "attention", "camvid_train", "camvid_train_test", "camvid_train_val_test"} <= set(states)
    figures = json.loads((tmp_path / "msda_cuda.json").read_text())["figures"]
    assert figures["unept-encoder-deit"]["initial_float32"]["forward"]["ours_error"] < 1e-4
    assert json.loads((tmp_path / "cuda_dsct-tiny-sac.json").read_text())["figures"]["forward"]["time_ratio"] > 0
    assert json.loads((tmp_path / "camvid_train_test" / "results.json").read_text())["split"] == "test"


def test_a_session_without_time_says_so_and_starts_nothing(tmp_path):
    script = REPOSITORY / "scripts" / "gpu_session.py"
    words = ["--dry_run", "--minutes", "0.01", "--output", str(tmp_path)]
    subprocess.run([sys.executable, str(script), *words], check=True)
    commands = json.loads((tmp_path / "session.json").read_text())["commands"]
    assert {row["state"] for row in commands} == {"no time left"}
