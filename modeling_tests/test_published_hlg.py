"""HLG: published sizes, costs, results and training settings, and the sizes at which a recipe takes seconds."""

import json
from typing import Any

import pytest
import torch

import hf_denseseg
from hf_denseseg.counting import count_forward
from hf_denseseg.models.hlg.literal_hlg import literal, published_multiply_adds
from reference import reference_folder

RECIPE_ROWS: dict[tuple[Any, ...], tuple[Any, ...]] = {}
RECIPE_VALUES: dict[str, dict[str, Any]] = {}

# Configuration fields that make a recipe's model small enough for two steps in a test.
REDUCED = {
    "hidden_sizes": [16, 16, 32, 32],
    "depths": [1, 1, 2, 1],
    "num_attention_heads": [1, 1, 2, 2],
    "decoder_hidden_size": 32,
    "auxiliary_hidden_size": 8,
}

# Table 5, and what the specification counts: multiply-adds at 224 x 224 in G, of the two attention products one.
CLASSIFICATION_GIGA = {"mobile": 0.86, "tiny": 2.14, "small": 4.71, "medium": 9.01, "large": 15.88}
# The specification's count of SETR-PUP-HLG at 512 x 512 and 150 classes with the rules of the release, in G: with
# attention products, and without.
SEGMENTATION_GIGA = {"small": (282, 267), "medium": (306, 290), "large": (381, 364)}
# Published name, its fields for this manifest -> manifest.
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


def count_literal(name, side, **fields):
    with torch.device("meta"):
        model = hf_denseseg.create_model(name, **fields)
    return count_forward(literal(model), (side, side))


@pytest.mark.parametrize("size", CLASSIFICATION_GIGA)
def test_classification_costs_what_the_paper_says(size):
    counts = count_literal(f"hlg-{size}", 224, num_labels=1000)
    assert published_multiply_adds(counts) / 1e9 == pytest.approx(CLASSIFICATION_GIGA[size], abs=0.006)


@pytest.mark.parametrize("size", SEGMENTATION_GIGA)
def test_segmentation_costs_what_the_specification_counts(size):
    counts = count_literal(f"hlg-pup-{size}", 512, mask_padding=False, global_bias="tuple4", num_labels=150)
    layers = counts.layer_multiply_adds / 1e9
    assert (layers + counts.product_multiply_adds / 1e9, layers) == pytest.approx(SEGMENTATION_GIGA[size], abs=0.6)


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
