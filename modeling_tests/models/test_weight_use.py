"""Every published variant, in reduced size, under offloading, adapters, computed weights and hooks."""

import importlib
import json
from typing import Any

import pytest
import torch

import partial_training
import weight_use
from detection_model_tester import EMPTY, TWO, few_regions
from hf_denseseg import create_config, create_model, list_models

NUM_LABELS = 5
# Parts that no published variant has in its defaults; recipes choose them.
PARTS: dict[str, dict[str, Any]] = {
    "hfgd-resnet50": {
        "fapn, aspp": {"upsampler": "fapn", "extra_encoding": "aspp"},
        "upernet, ppm": {"upsampler": "upernet", "extra_encoding": "ppm"},
        "deeplabv3plus, sa_car": {"upsampler": "deeplabv3plus", "extra_encoding": "sa_car"},
        "ocr": {"extra_encoding": "ocr"},
        "fcn beside it": {"extra_encoding": "identity", "guidance": False, "auxiliary_fcn": "joint"},
        "sfpn, identity": {"upsampler": "sfpn", "extra_encoding": "identity", "axial_projections": "shared"},
    },
    "unept-resnet50": {"context only": {"num_levels": 1, "use_spatial_branch": False}},
    "hlg-small": {
        "max": {"window_embedding": "max", "global_bias": "flat"},
        "plain": {"mlp_type": "plain", "local_attention": "plain", "dilated_window_size": 5},
        "tuple4": {"window_embedding": "convolution", "global_bias": "tuple4", "mask_padding": False},
    },
}


def reduced(name: str) -> dict[str, Any]:
    return dict(importlib.import_module(f"test_published_{name.partition('-')[0]}").REDUCED)


def structures() -> list[Any]:
    """Name and fields of each structure that is left when the sizes are reduced."""
    seen: dict[str, Any] = {}
    for name in list_models():
        choices = {"": {}, **PARTS.get(name, {})}
        for part, fields in choices.items():
            fields = reduced(name) | fields
            if hasattr(create_config(name), "drop_path_rate"):
                fields["drop_path_rate"] = 0.1  # else many differ in nothing but this rate
            config = create_config(name, num_labels=NUM_LABELS, **fields).to_dict()
            label = f"{name}: {part}" if part else name
            found = pytest.param((name, fields), id=label)
            seen.setdefault(json.dumps(config, sort_keys=True, default=str), found)
    return list(seen.values())


@pytest.fixture(params=structures())
def model(request, monkeypatch):
    few_regions(monkeypatch)
    torch.manual_seed(0)
    name, fields = request.param
    model = create_model(name, num_labels=NUM_LABELS, **fields).eval()
    weight_use.randomize_running_statistics(model)
    return model


@pytest.fixture
def batch(model):
    generator = torch.Generator().manual_seed(1)
    labels: Any
    pixel_values = torch.randn(2, 3, 64, 96, generator=generator)
    if type(model).__module__.endswith("detection"):
        pixel_values, labels = torch.randn(2, 3, 96, 128, generator=generator), [TWO, EMPTY]
    elif type(model).__name__.endswith("ForImageClassification"):
        labels = torch.tensor([1, 4])
    else:
        labels = torch.randint(0, NUM_LABELS, (2, 64, 96), generator=generator)
    return {"pixel_values": pixel_values, "labels": labels}


def test_offloaded_weights_give_the_same_outputs(model, batch, tmp_path):
    weight_use.check_offloading(model, batch["pixel_values"], tmp_path)


def test_adapters_on_every_layer_learn_and_merge(model, batch, tmp_path):
    batch["pixel_values"] = batch["pixel_values"].double()
    weight_use.check_lora(model.double(), batch, tmp_path)


def test_a_frozen_encoder_stays_as_it_is(model, batch):
    partial_training.check_frozen_encoder(model, batch)


def test_computed_weights_count_as_stored_ones(model, batch):
    weight_use.check_parametrized_weights(model.double(), batch["pixel_values"].double())


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_hooks_of_every_module_with_weights_are_called(model, batch, training):
    assert not weight_use.silent_modules(model.train(training), batch)
