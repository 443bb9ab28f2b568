"""HLG: published sizes, costs and training settings, and the sizes at which a recipe takes seconds."""

import json
from typing import Any

import pytest
import torch

import hf_denseseg
from hf_denseseg.models.auto.registration import reference_implementation
from hf_denseseg.models.flops import count_forward
from hf_denseseg.models.hlg.reference_hlg import published_multiply_adds
from reference import reference_folder

# Recipes that differ from another one only in the size of the encoder or in a field that other tests cover.
LONG_RUNS = ("hlg_maskrcnn_[sml]*", "hlg_ablation_*")

# Section 8 of the specification, Sec. 4.2 of the paper: recipes whose names match -> their values.
RECIPE_VALUES: dict[str, dict[str, Any]] = {
    "hlg_*_imagenet_300_epochs": {
        "task": "image-classification",
        "crop_size": [224, 224],
        "auto_augment": "rand-m9-mstd0.5-inc1",
        "color_jitter": 0.4,
        "random_erasing": 0.25,
        "mixup": 0.8,
        "cutmix": 1.0,
        "mixup_switch_probability": 0.5,
        "label_smoothing": 0.1,
        "per_device_train_batch_size": 1024,
        "learning_rate": 5e-4 * 1024 / 512,
        "weight_decay": 0.05,
        "warmup_steps": 20 * 1251,
        "max_grad_norm": 5.0,
        "lr_scheduler_type": "cosine",
        "lr_scheduler_kwargs": {"lr_end": 5e-6 * 2, "warmup_start": 5e-7 * 2},
        "ema_decay": 0.99996,
    },
    "hlg_*_coco_1x": {
        "optim": "adamw_torch",
        "learning_rate": 1e-4,
        "weight_decay": 1e-4,
        "no_decay_names": ["norm"],
        "per_device_train_batch_size": 16,
        "warmup_steps": 500,
        "lr_scheduler_kwargs": {"drop_at": [0.66667, 0.91667], "factor": 0.1, "warmup_start": 1e-7},
        "shortest_edge": [640, 672, 704, 736, 768, 800],
        "longest_edge": 1333,
        "flip": True,
        "test_base_size": [800, 1333],
    },
    "hlg_maskrcnn_*": {"task": "instance-segmentation"},
    "hlg_retinanet_*": {"task": "object-detection"},
    "hlg_*_small_coco_1x": {"config_overrides": {"drop_path_rate": 0.1}},
    "hlg_*_large_coco_1x": {"config_overrides": {"drop_path_rate": 0.3}},
    "hlg_pup_*": {
        "optim": "adamw_torch",
        "learning_rate": 6e-5,
        "weight_decay": 0.0,
        "head_learning_rate_multiplier": 10.0,
        "lr_scheduler_type": "polynomial",
        "lr_scheduler_kwargs": {"power": 1.0, "lr_end": 0.0, "warmup_start": 6e-11},
        "warmup_steps": 1500,
        "per_device_train_batch_size": 16,
        "loss_normalization": "all",
    },
    "hlg_*_ade20k_160k": {"crop_size": [512, 512], "test_crop_size": [512, 512], "test_stride": [341, 341]},
    "hlg_*_ade20k_*": {"test_raise_short_side": True},
    "hlg_*_cityscapes_*": {"test_raise_short_side": True},
    "hlg_pup_*_cityscapes_80k": {"max_steps": 80_000},
    "hlg_*_cityscapes_?0k": {"crop_size": [768, 768], "test_crop_size": [768, 768], "test_stride": [512, 512]},
}

# Configuration fields that make a recipe's model small enough for two steps in a test.
REDUCED = {
    "hidden_sizes": [16, 16, 32, 32],
    "depths": [1, 1, 2, 1],
    "num_attention_heads": [1, 1, 2, 2],
    "decoder_hidden_size": 32,
    "auxiliary_hidden_size": 8,
    "pyramid_hidden_size": 32,
    "region_hidden_sizes": [64, 32],
}

# Table 7, and the specification's count: multiply-adds at 224 x 224 in G, with one of the two attention products.
CLASSIFICATION_GIGA = {"mobile": 0.86, "tiny": 2.14, "small": 4.71, "medium": 9.01, "large": 15.88}
# The specification's count of SETR-PUP-HLG at 512 x 512 and 150 classes with the rules of the release, in G: with
# attention products, and without.
SEGMENTATION_GIGA = {"small": (282, 267), "medium": (306, 290), "large": (381, 363)}
# Manifest -> published name, and fields for this manifest.
MANIFESTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"classification_{size}_stem31": (f"hlg-{size}", {}) for size in CLASSIFICATION_GIGA},
    **{f"classification_{size}_stem33": (f"hlg-{size}", {}) for size in CLASSIFICATION_GIGA},
    **{
        f"classification_{size}_release{depth}_stem33": (f"hlg-{size}-release", {})
        for size, depth in (("mobile", ""), ("medium", "_depth14"), ("large", "_depth14"))
    },
    **{
        f"setr_pup_hlg_{size}_{data}_stem33": (f"hlg-pup-{size}", {})
        for size in ("small", "medium", "large")
        for data in ("ade20k", "cityscapes")
    },
}


def read_manifest(name):
    content = json.loads((reference_folder("hlg") / f"manifest_{name}.json").read_text())
    totals = content.pop("__totals__")
    with torch.device("meta"):
        return {key: torch.empty(shape) for key, shape in content.items()}, totals


@pytest.mark.parametrize("manifest", MANIFESTS)
def test_every_key_of_an_official_checkpoint_is_used_and_the_parameters_are_exact(manifest, caplog):
    """The sizes come from the weights, so the name need not be the one of the release."""
    name, fields = MANIFESTS[manifest]
    official, totals = read_manifest(manifest)
    with torch.device("meta"):
        model = hf_denseseg.load_official("hlg", official, name, **fields)
    assert model.num_parameters() / 1e6 == pytest.approx(totals["parameters_M"], abs=5.1e-5)
    assert f"Loaded {totals['keys']} tensors of the checkpoint" in caplog.text
    assert "dropped those without use: none" in caplog.text
    assert not model.config.mask_padding
    assert model.config.global_bias == ("flat" if manifest.startswith("classification") else "tuple4")


@pytest.mark.parametrize("size", ["small", "medium", "large"])
def test_every_key_of_a_dense_backbone_is_used(size, caplog):
    official, totals = read_manifest(f"dense_backbone_{size}_stem33")
    with torch.device("meta"):
        model = hf_denseseg.load_official("hlg", official, f"hlg-upernet-{size}")
    assert model.hlg.num_parameters() / 1e6 == pytest.approx(totals["parameters_M"], abs=5.1e-5)
    assert f"Loaded {totals['keys']} tensors of the encoder" in caplog.text


@pytest.mark.parametrize("name", ["hlg-tiny", "hlg-mobile", "hlg-medium-release"])
def test_a_name_builds_the_network_of_its_manifest(name):
    """The variant itself, not sizes read from weights."""
    manifest = "classification_medium_release_depth14_stem33" if "release" in name else None
    official, totals = read_manifest(manifest or f"classification_{name.removeprefix('hlg-')}_stem31")
    with torch.device("meta"):
        model = hf_denseseg.create_model(name, num_labels=1000)
    assert model.num_parameters() / 1e6 == pytest.approx(totals["parameters_M"], abs=5.1e-5)
    assert len(model.state_dict()) == len(official)


def count_reference(name, side, **fields):
    with torch.device("meta"):
        model = hf_denseseg.create_model(name, **fields)
    return count_forward(reference_implementation(model), (side, side))


@pytest.mark.parametrize("size", CLASSIFICATION_GIGA)
def test_classification_costs_what_the_paper_says(size):
    counts = count_reference(f"hlg-{size}", 224, num_labels=1000)
    assert published_multiply_adds(counts) / 1e9 == pytest.approx(CLASSIFICATION_GIGA[size], abs=0.006)


@pytest.mark.parametrize("size", SEGMENTATION_GIGA)
def test_segmentation_costs_what_the_specification_counts(size):
    counts = count_reference(f"hlg-pup-{size}", 512, mask_padding=False, global_bias="tuple4", num_labels=150)
    layers = counts.layer_multiply_adds / 1e9
    assert (layers + counts.product_multiply_adds / 1e9, layers) == pytest.approx(SEGMENTATION_GIGA[size], abs=0.6)


ABLATIONS = {  # Tables 12 to 14: size, fields -> parameters in M and multiply-adds in G; the paper's own after them
    "DWConv": ("tiny", {"window_embedding": "convolution"}, (11.10, 2.14)),  # 11.0 M
    "plain + plain": ("tiny", {"local_attention": "plain"}, (11.00, 2.14)),  # 11.0 M
    "dila 5": ("tiny", {"dilated_window_size": 5}, (11.00, 2.15)),  # 11.0 M
    "dila 8": ("tiny", {"dilated_window_size": 8}, (11.00, 2.15)),  # 11.0 M
    "baseline": ("small", {"local_attention": "none", "mlp_type": "plain"}, (26.32, 4.06)),  # 24.5 M, 4.0 G
    "+ DWMLP": ("small", {"local_attention": "none"}, (24.15, 4.34)),  # 24.2 M, 4.2 G
    "++ shared local": ("small", {"local_attention": "plain"}, (24.20, 4.71)),  # 24.2 M, 4.7 G
}


@pytest.mark.parametrize("row", ABLATIONS)
def test_ablations_have_the_size_that_the_readme_names(row):
    size, fields, expected = ABLATIONS[row]
    info = hf_denseseg.model_info(f"hlg-{size}", (224, 224), num_labels=1000, **fields)
    assert (info.parameters / 1e6, info.multiply_adds / 1e9) == pytest.approx(expected, abs=0.0051)


def test_model_info_gives_the_published_count():
    info = hf_denseseg.model_info("hlg-mobile", (224, 224), num_labels=1000)
    assert info.multiply_adds / 1e9 == pytest.approx(CLASSIFICATION_GIGA["mobile"], abs=0.006)
    assert info.executed_multiply_adds == pytest.approx(0.9133e9, rel=0.002)


# UperNet with 150 classes as the specification counts it, in millions: backbone, head, auxiliary head.
UPERNET = {"small": (23.4, 31.5, 0.9), "medium": (47.0, 31.5, 0.9), "large": (83.2, 33.3, 1.2)}


@pytest.mark.parametrize("size", UPERNET)
def test_upernet_has_the_parameters_of_the_specification(size):
    with torch.device("meta"):
        model = hf_denseseg.create_model(f"hlg-upernet-{size}", num_labels=150)
    parts = (model.hlg, model.decode_head, model.auxiliary_head)
    counted = tuple(sum(each.numel() for each in part.parameters()) / 1e6 for part in parts)
    assert counted == pytest.approx(UPERNET[size], abs=0.06)
