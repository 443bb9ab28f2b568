"""UN-EPT's training settings: which weights learn how fast, what decays, when the rate drops."""

import pytest
import torch

import hf_denseseg
from hf_denseseg.errors import InputError
from hf_denseseg.training import run as training_run
from hf_denseseg.training.optimization import parameter_groups, step_schedule
from hf_denseseg.training.recipe import load_recipe
from test_published_unept import REDUCED


def test_only_the_backbone_learns_at_the_base_rate_and_everything_decays():
    """Section 10: backbone 1e-5, everything else 1e-4, decay on norms, biases and tables too."""
    with torch.device("meta"):
        model = hf_denseseg.create_model("unept-deit-base", **REDUCED)
    groups = parameter_groups(
        model, learning_rate=1e-5, weight_decay=1e-4, head_multiplier=10.0, decay_everything=True
    )
    found = {name: (group["lr"], group["weight_decay"]) for group in groups for name in group["names"]}
    assert found.keys() == dict(model.named_parameters()).keys()
    for name, (rate, decay) in found.items():
        assert decay == 1e-4
        assert rate == pytest.approx(1e-5 if name.startswith("unept.backbone.") else 1e-4), name


def test_rate_drops_once():
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [weight], "lr": 1.0}])
    schedule = step_schedule(optimizer, total_steps=16, drop_at=0.75, factor=0.1)
    rates = []
    for _ in range(16):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == [1.0] * 12 + [0.1] * 4
    with pytest.raises(InputError, match="Give a fraction"):
        step_schedule(optimizer, total_steps=16, drop_at=12.0, factor=0.1)


def test_recipe_drops_the_rate_and_trains_with_targets_of_the_workers(tmp_path):
    words = [
        *("--model", "unept-resnet50", "--config_overrides", str(REDUCED), "--dataset", "synthetic@64x96"),
        *("--eval_split", "val", "--max_train_samples", "4", "--max_eval_samples", "1", "--crop_size", "32", "48"),
        *("--base_size", "32", "64", "--per_device_train_batch_size", "2", "--max_steps", "4", "--use_cpu"),
        *("--lr_scheduler_type", "constant", "--lr_scheduler_kwargs", "{drop_at: 0.5, factor: 0.1}"),
        *("--learning_rate", "0.001", "--logging_steps", "1", "--save_strategy", "no", "--eval_strategy", "no"),
        *("--output_dir", str(tmp_path)),
    ]
    history = training_run.train(load_recipe(None, words))["history"]
    rates = [entry["learning_rate"] for entry in history if "learning_rate" in entry]
    assert rates == pytest.approx([1e-3, 1e-3, 1e-4, 1e-4])
