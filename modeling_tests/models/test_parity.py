"""Recorded outputs of the official implementations against ours.

Runs over every case below `$DENSESEG_REFERENCE` and `fixtures/`. A family says in `parity_<family>.py` how a case is
run: `run_case(folder, config, inputs) -> {recorded name: tensor}`, and the tolerance in units of each tensor's
standard deviation (`SCALE = "std"`, the default) or of its largest value (`"largest"`); or `tolerance(name, recorded)`
as an absolute number. Losses are recorded in the config.
"""

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

from hf_denseseg.models.auto.registration import families
from reference import FIXTURES, REFERENCE, case_folders

CASES = case_folders()


def name_of(case: Path) -> str:
    """`<family>/<case>`, with a mark for the copies inside the repository."""
    return f"{case.parent.name}/{case.name}" + (" (fixture)" if FIXTURES in case.parents else "")


@torch.no_grad()
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_recorded_tensors_are_reproduced(case):
    family = case.parent.name
    if family not in families():
        pytest.skip(f"family {family} is not in the package yet")
    parity = importlib.import_module(f"parity_{family}")
    config = json.loads((case / "config.json").read_text())
    recorded = load_file(case / "io.safetensors")
    losses = config.get("losses_weighted", {})
    recorded |= {name: torch.tensor(value, dtype=torch.float64) for name, value in losses.items()}
    if losses:
        recorded["loss_total"] = torch.tensor(sum(losses.values()), dtype=torch.float64)
    ours = parity.run_case(case, config, recorded)
    compared = [name for name in recorded if name not in parity.INPUTS]
    missing = [name for name in compared if name not in ours]
    assert compared and not missing, f"we return nothing for the recorded {missing}"
    errors = {}
    for name in compared:
        expected = recorded[name].double()
        assert ours[name].shape == expected.shape, (
            f"{name}: {tuple(ours[name].shape)}, recorded {tuple(expected.shape)}"
        )
        error = (ours[name].double() - expected).abs().max().item()
        allowed = allowed_error(parity, name, expected)
        if not error <= allowed:
            errors[name] = f"{error:.3g}, allowed {allowed:.3g}"
    assert not errors, f"errors above tolerance: {errors}"


def allowed_error(parity: ModuleType, name: str, expected: torch.Tensor) -> float:
    """Absolute tolerance of one tensor."""
    if hasattr(parity, "tolerance"):
        return parity.tolerance(name, expected)
    largest = getattr(parity, "SCALE", "std") == "largest" or expected.numel() == 1
    scale = (expected.abs().max() if largest else expected.std()).item()
    return parity.TOLERANCE * max(scale, 1e-30)


def test_every_family_has_a_fixture():
    assert {path.parent.name for path in CASES if FIXTURES in path.parents} >= set(families())


def test_the_folder_outside_is_read():
    if not REFERENCE.is_dir():
        pytest.skip(f"no folder {REFERENCE}; set DENSESEG_REFERENCE to the folder with the recorded outputs")
    assert any(REFERENCE in path.parents for path in CASES)
