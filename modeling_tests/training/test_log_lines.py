"""What a run prints while it trains: a line per log entry."""

import pytest

from hf_denseseg.cli import main
from hf_denseseg.training.log_lines import duration, log_line


def test_lines_of_training_evaluation_and_the_end():
    logs = {"loss": 1.23456, "grad_norm": 0.5, "learning_rate": 0.0002, "epoch": 0.3}
    assert log_line(logs, 20, 1400, 2000.0) == "step   20/1400  loss 1.235  lr 0.0002  grad norm 0.5  33 min left"
    logs = {"eval_mean_iou": 0.41234, "eval_pixel_accuracy": 0.9, "eval_runtime": 3.0, "epoch": 1.0}
    assert log_line(logs, 700, 1400, 1.0) == "step  700/1400  evaluation: mean_iou 0.4123, pixel_accuracy 0.9"
    assert log_line({"train_runtime": 3725.0, "train_loss": 2.0}, 5, 5, 0.0) == "step 5/5  1 h 02 min of training"
    assert log_line({"eval_mean_iou": 0.5}, 0, 0, 0.0) == "evaluation: mean_iou 0.5"  # `denseseg evaluate`


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (99, "99 s"), (100, "2 min"), (3570, "1 h 00 min"), (12000, "3 h 20 min")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize("bar", [False, True])
def test_a_run_prints_lines_and_no_dictionaries(bar, tmp_path, capfd):
    words = ["train", "--model", "dsct-tiny-sac", "--dataset", "synthetic:4@64x96", "--crop_size", "64", "64"]
    small = "{spatial_hidden_sizes: [8, 16, 32], hidden_size: 32, num_attention_heads: 2, num_hidden_layers: 6}"
    words += ["--config_overrides", small, "--max_steps", "2", "--logging_steps", "1", "--use_cpu"]
    words += ["--per_device_train_batch_size", "2", "--output_dir", str(tmp_path), "--disable_tqdm", str(not bar)]
    assert main(words) == 0
    printed = capfd.readouterr()
    lines = (printed.out + printed.err).replace("\r", "\n").splitlines()
    trained = [line for line in lines if line.startswith("step ") and "loss" in line]
    assert [line.split()[1] for line in trained] == ["1/2", "2/2"] and trained[1].endswith("0 s left")
    assert any("evaluation: mean_iou" in line for line in lines) and not any(line.startswith("{") for line in lines)
