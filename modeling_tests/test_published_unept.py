"""UN-EPT: published sizes, costs, results and training settings, and the sizes at which a recipe takes seconds."""

import json

import pytest
import torch

import hf_denseseg
from hf_denseseg import UneptForSemanticSegmentation
from reference import reference_folder

RECIPE_ROWS = {}
RECIPE_VALUES = {}

# Configuration fields that make a recipe's model small enough for two steps in a test.
REDUCED = {
    "image_size": [32, 48],
    "depths": [1, 1, 1, 1],
    "base_channels": 8,
    "stem_channels": 8,
    "backbone_hidden_size": 16,
    "backbone_num_attention_heads": 2,
    "out_layers": [1, 2, 3],
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_points": 4,
    "intermediate_size": 32,
    "spatial_channels": [8, 12],
    "head_channels": 8,
}

# Section 11 of the specification: variant, classes -> parameters.
PARAMETERS = {
    ("unept-resnet50", 150): 32_357_942,
    ("unept-deit-base", 150): 94_842_326,
    ("unept-deit-base", 60): 94_819_196,
}
# The same: mmcv's counter at 480 x 480 with BatchNorm counted (the paper prints 99.1 for DeiT), and torch's own.
GIGA = {"unept-resnet50": (138.66, 140.15), "unept-deit-base": (99.052, 115.86)}
MANIFESTS = {
    "r50_ade20k_150": ("unept-resnet50", 448),
    "deit_ade20k_150": ("unept-deit-base", 267),
    "deit_pcontext_60": ("unept-deit-base", 267),
}


@pytest.mark.parametrize("row", PARAMETERS, ids=lambda row: "-".join(map(str, row)))
def test_parameters_are_those_of_the_official_network(row):
    name, num_labels = row
    with torch.device("meta"):
        model = hf_denseseg.create_model(name, num_labels=num_labels)
    assert model.num_parameters() == PARAMETERS[row]


@pytest.mark.parametrize("name", GIGA)
def test_multiply_adds_are_those_of_the_paper_and_the_honest_ones_near_the_specification(name):
    published, honest = GIGA[name]
    info = hf_denseseg.model_info(name, (480, 480), num_labels=150)
    assert info.multiply_adds / 1e9 == pytest.approx(published, rel=0.005)
    assert info.executed_multiply_adds / 1e9 == pytest.approx(honest, rel=0.015)


@pytest.mark.parametrize("manifest", MANIFESTS)
def test_every_key_of_the_official_checkpoint_is_used(manifest, caplog):
    name, count = MANIFESTS[manifest]
    path = reference_folder("unept") / f"manifest_{manifest}.json"
    shapes = {key: shape for key, shape in json.loads(path.read_text()).items() if not key.startswith("__")}
    assert len(shapes) == count
    with torch.device("meta"):
        official = {key: torch.empty(shape) for key, shape in shapes.items()}
        model = hf_denseseg.load_official("unept", official, name)
    assert type(model) is UneptForSemanticSegmentation
    assert model.config.num_labels == int(manifest.rpartition("_")[2]) and model.config.image_size == 480
    assert f"Loaded {count} tensors of the checkpoint; dropped those without use: none" in caplog.text
