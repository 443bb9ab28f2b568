"""HFGD in training runs: several processes share their class centers, a killed run resumes to the same result."""

import json

import pytest
import yaml
from safetensors.torch import load_file

import processes
from hf_denseseg import HfgdConfig
from hf_denseseg.cli import main
from hf_denseseg.training.optimization import warn_of_stale_statistics
from test_published_hfgd import REDUCED

WORDS = [
    *("train", "--model", "hfgd-resnet50", "--config_overrides", yaml.safe_dump(REDUCED, default_flow_style=True)),
    *("--dataset", "synthetic@64x96", "--max_train_samples", "4", "--max_eval_samples", "1", "--eval_split", "val"),
    *(
        "--crop_size",
        "64",
        "96",
        "--scale_range",
        "1.0",
        "1.0",
        "--flip",
        "false",
        "--photometric_distortion",
        "false",
    ),
    *("--cat_max_ratio", "1.0", "--use_cpu", "--logging_steps", "1", "--learning_rate", "1.0e-2"),
]


def losses(folder):
    history = json.loads((folder / "results.json").read_text())["history"]
    return [entry["loss"] for entry in history if "loss" in entry]


@pytest.mark.slow  # test_hfgd_regularization compares two processes exactly
def test_two_processes_train_with_the_loss_of_one(tmp_path):
    """Every weight has a gradient; each process's BatchNorm sees half the batch, so the losses agree roughly."""
    words = [*WORDS, "--max_steps", "2", "--save_strategy", "no"]
    two = ["--per_device_train_batch_size", "2", "--output_dir", str(tmp_path / "two")]
    processes.run_two([*words, *two], "29551", tmp_path)
    one = ["--per_device_train_batch_size", "4", "--output_dir", str(tmp_path / "one")]
    assert main([*words, *one]) == 0
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=0.2)


def test_a_killed_run_ends_as_an_undisturbed_one(tmp_path):
    words = [*WORDS, "--max_steps", "6", "--save_steps", "3", "--per_device_train_batch_size", "2"]
    words += ["--eval_strategy", "no", "--output_dir"]
    assert main([*words, str(tmp_path / "complete")]) == 0
    run = processes.start([*words, str(tmp_path / "killed")])
    processes.kill_when_complete(run, tmp_path / "killed" / "checkpoint-3")
    assert main([*words, str(tmp_path / "killed")]) == 0
    complete, killed = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("complete", "killed"))
    assert complete.keys() == killed.keys()
    assert all(bool((value == killed[name]).all()) for name, value in complete.items())


@pytest.mark.parametrize("momentum, steps, kept", [(0.0003, 2000, "55 %"), (0.0003, 30_000, None), (0.1, 100, None)])
def test_run_too_short_for_its_batch_norms_is_warned_of(momentum, steps, kept, caplog):
    """The published momentum of 0.0003 keeps 0.9997^2000 = 0.55 of the statistics after 2,000 steps."""
    warn_of_stale_statistics(HfgdConfig(batch_norm_momentum=momentum), steps)
    assert ("batch_norm_momentum: 0.1" in caplog.text) == (kept is not None)
    assert kept is None or kept in caplog.text
