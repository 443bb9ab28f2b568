"""SETR: published sizes, costs and training settings, and the sizes at which a recipe takes seconds."""

import pytest
import torch

import hf_denseseg

# Section 4.1 and the released configurations: recipes whose names match -> their values.
RECIPE_VALUES = {
    "setr_*": {
        "optim": "sgd",
        "optim_args": "momentum=0.9",
        "weight_decay": 0.0,
        "head_learning_rate_multiplier": 10.0,
        "lr_scheduler_type": "polynomial",
        "lr_scheduler_kwargs": {"power": 0.9, "lr_end": 1e-4},
        "loss_normalization": "all",
        "scale_range": [0.5, 2.0],
        "cat_max_ratio": 0.75,
        "flip": True,
        "photometric_distortion": True,
        "test_mode": "slide",
        "test_raise_short_side": True,
    },
    "setr_*_cityscapes_*": {
        "crop_size": [768, 768],
        "base_size": [1025, 2049],
        "per_device_train_batch_size": 8,
        "test_crop_size": [768, 768],
        "test_stride": [512, 512],
        "test_base_size": [1025, 2049],
    },
    "setr_*_ade20k_*": {
        "crop_size": [512, 512],
        "base_size": [512, 2048],
        "test_crop_size": [512, 512],
        "test_stride": [341, 341],
        "test_base_size": [512, 2048],
    },
    "setr_*_pascal_context_*": {
        "crop_size": [480, 480],
        "base_size": [520, 520],
        "test_crop_size": [480, 480],
        "test_stride": [320, 320],
        "test_base_size": [520, 520],
    },
    "setr_*_ade20k_160k": {"per_device_train_batch_size": 16, "config_overrides": {"image_size": 512}},
    "setr_*_pascal_context_80k": {"per_device_train_batch_size": 16, "config_overrides": {"image_size": 480}},
    "setr_*_cityscapes_?0k": {"config_overrides": {"image_size": 768}},
    "setr_*_batch_8": {"per_device_train_batch_size": 8},
    "setr_*_no_auxiliary": {"config_overrides": {"image_size": 768, "use_auxiliary_head": False}},
    "setr_*_2step": {"config_overrides": {"image_size": 768, "pup_upsampling": 4}},
    "setr_*_random": {"config_overrides": {"image_size": 768}, "encoder_weights": None},
    "setr_naive_*": {"learning_rate": 0.01},
    "setr_pup_*_cityscapes_*": {"learning_rate": 0.01},
    "setr_pup_*_ade20k_*": {"learning_rate": 0.001},
    "setr_pup_*_pascal_context_*": {"learning_rate": 0.001},
    "setr_mla_*_cityscapes_*": {"learning_rate": 0.002},
    "setr_mla_*_ade20k_*": {"learning_rate": 0.001},
    "setr_mla_*_pascal_context_*": {"learning_rate": 0.001},
    "setr_*_vit_large_cityscapes_?0k": {"encoder_weights": "google/vit-large-patch16-384"},
    "setr_*_vit_large_ade20k_*": {"encoder_weights": "google/vit-large-patch16-384"},
    "setr_*_vit_large_pascal_context_*": {"encoder_weights": "google/vit-large-patch16-384"},
    "setr_*_vit_base_*": {"encoder_weights": "google/vit-base-patch16-384"},
    "setr_*_deit_base_*": {"encoder_weights": "facebook/deit-base-distilled-patch16-384"},
    "setr_*_beit_large_*": {"encoder_weights": "microsoft/beit-large-patch16-224-pt22k"},
}

# Configuration fields that make a recipe's model small enough for two steps in a test.
REDUCED = {
    "image_size": [32, 48],
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "decoder_hidden_size": 8,
    "mla_layers": [0, 1, 2, 3],
    "mla_hidden_size": 8,
    "auxiliary_layers": [1, 3],
}

# Section 5 of the specification: variant, classes, side -> parameters in millions with auxiliary heads (of which the
# unused `conv_seg`, 512 -> classes with bias in each head, is no part here), multiply-adds in G.
COUNTED = {
    ("setr-naive-vit-large", 19, 768): (306.58, 959.7),
    ("setr-naive-vit-large", 150, 512): (305.67, 362.3),
    ("setr-mla-vit-large", 19, 768): (310.81, 973.7),
    ("setr-mla-vit-large", 150, 512): (310.57, 378.2),
    ("setr-pup-vit-large", 19, 768): (319.11, 1079.4),
    ("setr-pup-vit-large", 150, 512): (318.31, 417.7),
    ("setr-naive-vit-base", 19, 768): (88.27, 295.5),
    ("setr-naive-deit-base", 19, 768): (88.27, 295.5),
    ("setr-mla-vit-base", 19, 768): (92.50, 309.5),
    ("setr-mla-deit-base", 150, 512): (92.59, 123.3),
    ("setr-pup-vit-base", 19, 768): (98.12, 414.0),
    ("setr-pup-deit-base", 150, 512): (97.64, 162.1),
}
# The same for the encoder of BEiT-L alone, in millions.
BEIT = {512: 304.6, 768: 306.6}


@pytest.mark.parametrize("row", COUNTED, ids=lambda row: "-".join(map(str, row)))
def test_parameters_and_multiply_adds_are_those_of_the_specification(row):
    name, num_labels, side = row
    parameters, giga = COUNTED[row]
    info = hf_denseseg.model_info(name, (side, side), num_labels=num_labels)
    config = hf_denseseg.create_config(name)
    heads = 1 + (4 if config.decode_head == "mla" else len(config.auxiliary_layers))
    assert (info.parameters + heads * 513 * num_labels) / 1e6 == pytest.approx(parameters, abs=0.006)
    assert info.multiply_adds / 1e9 == pytest.approx(giga, abs=0.06)


@pytest.mark.parametrize("side", BEIT)
@pytest.mark.parametrize("head", ["pup", "mla"])
def test_beit_encoder_has_its_parameters_and_the_cost_of_vit(head, side):
    config = hf_denseseg.create_config(f"setr-{head}-beit-large", image_size=side)
    with torch.device("meta"):
        encoder = hf_denseseg.SetrModel(config)
    assert encoder.num_parameters() / 1e6 == pytest.approx(BEIT[side], abs=0.06)
    beit, vit = (hf_denseseg.model_info(f"setr-{head}-{name}", (side, side)) for name in ("beit-large", "vit-large"))
    assert beit.multiply_adds == pytest.approx(vit.multiply_adds, rel=0.005)


def test_published_variants_are_the_eleven_of_the_paper():
    names = {
        f"setr-{head}-{name}" for head in ("naive", "pup", "mla") for name in ("vit-large", "vit-base", "deit-base")
    }
    assert set(hf_denseseg.list_models("setr-*")) == names | {"setr-pup-beit-large", "setr-mla-beit-large"}
