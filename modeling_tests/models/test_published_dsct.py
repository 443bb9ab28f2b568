"""DSCT: parameter counts, multiply-adds and checkpoint keys of the published variants, without allocating weights."""

import json

import pytest
import torch

import hf_denseseg
from hf_denseseg import DsctForImageClassification, DsctForSemanticSegmentation, DsctModel
from reference import reference_folder

# Section 2 of the specification: name, classes -> parameters; section 9: paper's FLOPs in G at 769 (19) or 512 (150).
PARAMETERS = {
    ("dsct-tiny-sac", 19): 23_390_371,
    ("dsct-tiny-sapp", 19): 26_331_299,
    ("dsct-small-sac", 19): 37_360_915,
    ("dsct-small-sapp", 19): 40_301_843,
    ("dsct-base-sac", 19): 82_813_299,
    ("dsct-base-sapp", 19): 85_754_227,
    ("dsct-base-sac", 150): 82_914_038,
    ("dsct-base-sapp", 150): 85_787_894,
}
PUBLISHED_GIGA = (179.4, 289.9, 338.7, 432.8, 654.8, 732.4, 253.2, 288.2)


# Section 4.2: recipes whose names match -> their values.
TRAINING = {"lr_scheduler_type": "polynomial", "learning_rate": 1e-4, "scale_range": [0.5, 2.0], "flip": True}
RECIPE_VALUES = {
    "dsct_*_cityscapes_*": TRAINING | {"crop_size": [769, 769], "per_device_train_batch_size": 8},
    "dsct_*_ade20k_*": TRAINING | {"crop_size": [512, 512], "per_device_train_batch_size": 16},
}

# Configuration fields that make a recipe's model small enough for two steps in a test.
REDUCED = {
    "spatial_hidden_sizes": [8, 16, 32],
    "stem_channels": 8,
    "hidden_size": 32,
    "num_hidden_layers": 6,
    "num_attention_heads": 2,
    "decoder_hidden_size": 16,
}


@pytest.mark.parametrize("row", range(len(PARAMETERS)))
def test_parameters_and_multiply_adds_equal_the_paper(row):
    (name, num_labels), parameters = list(PARAMETERS.items())[row]
    info = hf_denseseg.model_info(name, (769, 769) if num_labels == 19 else (512, 512), num_labels=num_labels)
    assert info.parameters == parameters
    assert info.multiply_adds == pytest.approx(PUBLISHED_GIGA[row] * 1e9, rel=0.005)
    assert info.executed_multiply_adds < info.multiply_adds


@pytest.mark.parametrize("size, parameters", [("tiny", 22_882_704), ("small", 36_263_424), ("base", 81_175_136)])
def test_encoder_has_the_parameters_of_conformer(size, parameters):
    with torch.device("meta"):
        encoder = DsctModel(hf_denseseg.create_config(f"dsct-{size}-sac"))
    assert sum(each.numel() for each in encoder.parameters()) == parameters


@pytest.mark.parametrize("variant", ["tiny", "small", "base"])
def test_every_key_of_the_official_checkpoint_is_used_or_named(variant, caplog):
    manifest = reference_folder("dsct") / f"manifest_conformer_{variant}.json"
    shapes = {name: shape for name, shape in json.loads(manifest.read_text()).items() if name != "_totals"}
    assert len(shapes) == 718
    with torch.device("meta"):
        official = {name: torch.empty(shape) for name, shape in shapes.items()}
        model = hf_denseseg.load_official("dsct", official, f"dsct-{variant}-sac")
    assert type(model) is DsctForSemanticSegmentation
    named = [name for name in shapes if name in caplog.text]
    assert named == [name for name in shapes if "_cls_head" in name] and len(named) == 4


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_variant_of_the_pre_training_takes_the_whole_official_checkpoint(size):
    """Sec. 4.2: strides to 1/32; every tensor has a place, the classifiers too."""
    manifest = reference_folder("dsct") / f"manifest_conformer_{size}.json"
    shapes = {name: shape for name, shape in json.loads(manifest.read_text()).items() if name != "_totals"}
    with torch.device("meta"):
        official = {name: torch.empty(shape) for name, shape in shapes.items()}
        model = hf_denseseg.load_official("dsct", official, f"dsct-{size}")
        outputs = model(torch.empty(1, 3, 224, 224))
    assert type(model) is DsctForImageClassification
    assert (model.config.num_labels, model.config.output_stride) == (1000, 32)
    assert outputs.logits.shape == (1, 1000)
    assert model.dsct(torch.empty(1, 3, 224, 224, device="meta")).spatial_map.shape[-2:] == (7, 7)


def test_pre_trained_encoder_of_an_own_run_goes_under_a_head(tmp_path):
    """The stride of the two differs, and no tensor does."""
    sizes = {key: REDUCED[key] for key in ("spatial_hidden_sizes", "stem_channels", "hidden_size")}
    fields = sizes | {"num_hidden_layers": 6, "num_attention_heads": 2}
    run = hf_denseseg.create_model("dsct-tiny", num_labels=10, **fields)
    run.save_pretrained(tmp_path)
    model = hf_denseseg.load_official("dsct", tmp_path, "dsct-tiny-sac", num_labels=5, **fields)
    assert type(model) is DsctForSemanticSegmentation and model.config.output_stride == 8
    expected = run.dsct.state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in model.dsct.state_dict().items())
