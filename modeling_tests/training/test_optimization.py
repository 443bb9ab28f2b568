"""Schedules compared with their closed forms, and which weights decay."""

import math

import pytest
import torch
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification, TrainingArguments

import hf_denseseg
from hf_denseseg.errors import InputError
from hf_denseseg.training.optimization import (
    cosine_schedule,
    parameter_groups,
    polynomial_schedule,
    refuse_single_values,
    step_schedule,
)


def rates(schedule, steps, learning_rates=(1.0,), **options):
    parameters = [nn.Parameter(torch.zeros(1)) for _ in learning_rates]
    groups = [{"params": [each], "lr": rate} for each, rate in zip(parameters, learning_rates, strict=True)]
    optimizer = torch.optim.SGD(groups)
    scheduler = schedule(optimizer, total_steps=steps, **options)
    found = []
    for _ in range(steps):
        found.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return found


def test_cosine_starts_its_warmup_at_a_rate_and_ends_at_a_rate():
    """ImageNet recipe: from 1e-6 to 1e-3 in the warmup, then half a cosine to 1e-5."""
    found = rates(cosine_schedule, 20, (1e-3,), warmup_steps=5, lr_end=1e-5, warmup_start=1e-6)
    expected = [1e-6 + (1e-3 - 1e-6) * step / 5 for step in range(5)]
    expected += [1e-5 + (1e-3 - 1e-5) * (1 + math.cos(math.pi * step / 15)) / 2 for step in range(15)]
    assert [rate for (rate,) in found] == pytest.approx(expected)


def test_constant_rate_drops_after_8_and_11_of_12_epochs_and_warms_up():
    """mmdet's 1x schedule: 12 epochs of 10 steps, linear warmup from a thousandth of the rate."""
    options = {"drop_at": [8 / 12, 11 / 12], "factor": 0.1, "warmup_steps": 4, "warmup_start": 1e-7}
    found = [rate for (rate,) in rates(step_schedule, 120, (1e-4,), **options)]
    assert found[:4] == pytest.approx([1e-4 * (1 - (1 - step / 4) * (1 - 0.001)) for step in range(4)])
    assert found[4:80] == [1e-4] * 76
    assert found[80:110] == pytest.approx([1e-5] * 30)
    assert found[110:] == pytest.approx([1e-6] * 10)


def test_published_fractions_give_the_steps_of_the_1x_schedule():
    """12 epochs of 7,330 iterations: the rate drops after exactly 8 and 11 of them."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    factor = step_schedule(optimizer, total_steps=87960, drop_at=[0.66667, 0.91667], factor=0.1).lr_lambdas[0]
    drops = [step for step in range(1, 87960) if factor(step) != factor(step - 1)]
    assert drops == pytest.approx([8 * 7330, 11 * 7330], abs=1)


def test_warmup_of_the_polynomial_starts_at_the_given_rate_in_every_group():
    found = rates(polynomial_schedule, 10, (1e-4, 1e-3), warmup_steps=4, lr_end=0.0, warmup_start=1e-6)
    assert found[0] == pytest.approx([1e-6, 1e-6])
    assert found[2] == pytest.approx([(1e-6 + 1e-4) / 2, (1e-6 + 1e-3) / 2])
    assert found[4] == pytest.approx([1e-4, 1e-3])


@pytest.mark.parametrize("drop_at", [0.0, 1.5, [], [0.9, 0.5], [0.5, 0.5]])
def test_drops_that_are_not_ascending_fractions_are_refused(drop_at):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(InputError, match="drop_at is"):
        step_schedule(optimizer, total_steps=10, drop_at=drop_at, factor=0.1)


def test_final_rate_above_the_initial_rate_is_refused():
    with pytest.raises(InputError, match="lr_end is 0.01"):
        rates(cosine_schedule, 2, (1e-3,), warmup_steps=0, lr_end=0.01)


def test_only_named_weights_are_exempt_from_decay():
    """HLG detection: no decay where the name contains `norm`, but biases decay."""
    model = nn.ModuleDict({"linear": nn.Linear(2, 2), "norm1": nn.LayerNorm(2)})
    groups = parameter_groups(model, learning_rate=1.0, weight_decay=0.1, no_decay_names=["norm"])
    decay = {name: group["weight_decay"] for group in groups for name in group["names"]}
    assert decay == {"linear.weight": 0.1, "linear.bias": 0.1, "norm1.weight": 0.0, "norm1.bias": 0.0}


def settings(batch, world=1, accumulation=1):
    args = TrainingArguments(per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, use_cpu=True)
    if world > 1:
        args.__class__ = type("Args", (TrainingArguments,), {"world_size": world})
    return args


@pytest.fixture(scope="module")
def upernet():
    with torch.device("meta"):
        return hf_denseseg.create_model("hlg-upernet-small", depths=[1, 1, 1, 1])


@pytest.mark.parametrize("images, batch, proposed", [(9, 4, 5), (5, 2, 3), (7, 3, 4), (3, 1, 3), (13, 6, 7)])
def test_last_batch_of_one_image_is_refused_before_the_first_step(upernet, images, batch, proposed):
    """Pyramid pooling leaves one value per channel, whose variance torch refuses to take."""
    with pytest.raises(InputError, match=rf"{images} images in batches of {batch}\).*such as {proposed}\."):
        refuse_single_values(upernet, images, settings(batch), steps=100)
    assert images % proposed != 1


def test_runs_whose_batches_can_be_normalized_are_not_refused(upernet):
    refuse_single_values(upernet, 10, settings(4), steps=100)
    refuse_single_values(upernet, 9, settings(4), steps=2)  # ends before the last batch
    with pytest.raises(InputError):
        refuse_single_values(upernet, 9, settings(4, accumulation=2), steps=2)
    refuse_single_values(upernet, 9, settings(4, world=2), steps=100)  # processes fill up their batches
    sizes = {"embedding_size": 8, "hidden_sizes": [8], "depths": [1]}
    others = ResNetForImageClassification(ResNetConfig(**sizes)), nn.Sequential(nn.BatchNorm2d(3))
    for model in others:  # what is pooled at the end is not normalized
        refuse_single_values(model, 9, settings(4), steps=100)
