"""UN-EPT: published sizes, costs, results and training settings, and the sizes at which a recipe takes seconds."""

import json

import pytest
import torch

import hf_denseseg
from hf_denseseg import UneptForSemanticSegmentation
from reference import reference_folder

# Section 10 of the specification, Sec. 4.2 of the paper: recipes whose names match -> their values.
RECIPE_VALUES = {
    "unept_*": {
        "learning_rate": 1e-5,
        "head_learning_rate_multiplier": 10.0,
        "weight_decay": 1e-4,
        "decay_everything": True,
        "lr_scheduler_type": "constant",
        "loss_normalization": "all",
        "per_device_train_batch_size": 16,
        "scale_range": [0.5, 2.0],
        "cat_max_ratio": 0.75,
        "flip": True,
        "photometric_distortion": True,
        "test_mode": "slide",
        "test_pad_to_window": True,
    },
    "unept_*_160k": {
        "crop_size": [480, 480],
        "test_crop_size": [480, 480],
        "test_stride": [160, 160],
        "lr_scheduler_kwargs": {"drop_at": 126 / 160, "factor": 0.1},
    },
    "unept_[!a]*_160k": {"config_overrides": {"image_size": 480, "loss_weights": "code"}},
    "unept_*_ade20k_*": {"base_size": [512, 2048], "test_base_size": [512, 2048]},
    "unept_*_pascal_context_*": {"base_size": [520, 520], "test_base_size": [520, 520]},
    "unept_*_cityscapes_*": {
        "config_overrides": {"image_size": 768, "loss_weights": "code"},
        "crop_size": [768, 768],
        "test_crop_size": [768, 768],
        "lr_scheduler_kwargs": {"drop_at": 0.6667, "factor": 0.1},
        "train_split": "train",
    },
    "unept_resnet50_*": {"encoder_weights": "timm:resnet50c.gluon_in1k"},
    "unept_deit_base_*": {"encoder_weights": "facebook/deit-base-distilled-patch16-384"},
}

LONG_RUNS = ("unept_ablation_*",)

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


def points_of(levels, points):
    """Offsets and weights of all points: 3 numbers, 8 heads, linear layers from 256, four attentions."""
    return 4 * 3 * 8 * levels * points * 257


SPATIAL = 3 * 64 * 9 + 64 * 128 * 9 + 128 * 256 * 9 + 2 * (64 + 128 + 256)  # three convolutions and their norms
HEADS = 2 * (256 * 256 + 2 * 256) + 256 * 2 + 256 * 8  # boundary and direction
ABLATIONS = {  # Tables 5 and 6: fields -> parameters more than those of the full network
    "no spatial branch": ({"use_spatial_branch": False}, -SPATIAL - HEADS),
    "L = 1": ({"num_levels": 1}, points_of(1, 16) - points_of(3, 16) - (512 + 1024 + 2) * 256 - 2 * 256),
    "N = 4": ({"num_points": 4}, points_of(3, 4) - points_of(3, 16)),
    "N = 64": ({"num_points": 64}, points_of(3, 64) - points_of(3, 16)),
}


@pytest.mark.parametrize("row", ABLATIONS)
def test_ablations_differ_by_the_parameters_of_what_they_leave_out(row):
    """One level less is a projection and an encoding less (of stages 2 and 3 with L = 1), and its points."""
    fields, difference = ABLATIONS[row]
    with torch.device("meta"):
        model = hf_denseseg.create_model("unept-resnet50", num_labels=150, **fields)
    assert model.num_parameters() - PARAMETERS[("unept-resnet50", 150)] == difference


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
def test_multiply_adds_are_those_of_the_paper_and_all_of_them_near_the_specification(name):
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
