"""A run started before modules and keys were renamed continues; old names are refused with the new ones.

`fixtures/older_runs/before_the_move/` holds `run/`, the folder of a run of that time, killed after step 2 of 4, its
recipe with the current keys, and `finished.safetensors`, the weights that it reached after step 4.
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch.optim.swa_utils import get_ema_multi_avg_fn

from hf_denseseg.cli import main
from hf_denseseg.errors import InputError
from hf_denseseg.training.arguments import RENAMED_KEYS
from hf_denseseg.training.ema import ExponentialMovingAverage
from hf_denseseg.training.recipe import load_recipe, recipe_fields
from reference import FIXTURES

OLD = FIXTURES / "older_runs" / "before_the_move"


def test_a_run_started_before_the_move_resumes_to_the_same_weights(tmp_path, monkeypatch):
    """The average of that time had its full decay from the first step; the weights saved are averages."""

    def former(self, averages, weights, updates):
        get_ema_multi_avg_fn(self.decay)(averages, weights, updates)

    monkeypatch.setattr(ExponentialMovingAverage, "_move", former)
    shutil.copytree(OLD / "run", tmp_path / "run")
    assert main(["train", str(OLD / "recipe.yaml"), "--output_dir", str(tmp_path / "run")]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["training"]["resumed_from_step"] == 2 and results["steps"] == 4
    found, expected = (
        load_file(tmp_path / "run" / "model" / "model.safetensors"),
        load_file(OLD / "finished.safetensors"),
    )
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)
    start = load_file(OLD / "run" / "checkpoint-2" / "model.safetensors")
    assert any((value - start[name]).abs().max() > 1e-3 for name, value in expected.items()), "nothing was learned"


def test_former_keys_are_refused_with_their_new_names(tmp_path):
    known = recipe_fields()
    for old, new in RENAMED_KEYS.items():
        assert new in known and old not in known
        with pytest.raises(InputError, match=f"{old} has another name now. Did you mean '{new}'"):
            load_recipe(None, [f"--{old}", "1"])
    (tmp_path / "recipe.yaml").write_text("max_class_ratio: 0.75\n")
    with pytest.raises(InputError, match="'cat_max_ratio'"):
        load_recipe(tmp_path / "recipe.yaml")
