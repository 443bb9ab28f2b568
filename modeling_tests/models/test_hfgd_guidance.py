"""Who learns from which loss: the table of gradients of the specification (section 3), for every upsampler."""

import json

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import (
    AutoModelForSemanticSegmentation,
    ResNetConfig,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SwinConfig,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from closeness import assert_same_outputs
from hf_denseseg import HfgdConfig, HfgdForSemanticSegmentation, SetrConfig
from hf_denseseg.errors import InputError
from hf_denseseg.models.hfgd.upsamplers_hfgd import HfgdOffsets
from test_modeling_hfgd import STAGES, TINY, TINY_RESNET

CLASSES = 5
UPERNET = UperNetConfig(
    backbone_config=SwinConfig(
        embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=3, out_features=STAGES
    ),
    hidden_size=16,
    num_labels=CLASSES,
)
SEGFORMER = SegformerConfig(
    depths=[1, 1, 1, 1],
    hidden_sizes=[8, 8, 16, 16],
    num_attention_heads=[1, 1, 2, 2],
    decoder_hidden_size=16,
    num_labels=CLASSES,
)
PAPER = {
    "u_sfpn": TINY,
    "u_sfpn, stride 2": TINY | {"output_stride": 2},
    "u_sfpn, merge 24, shared": TINY | {"merge_channels": 24, "axial_projections": "shared"},
    "sfpn, sa_car": TINY | {"upsampler": "sfpn", "extra_encoding": "sa_car"},
    "sfpn, identity": TINY | {"upsampler": "sfpn", "extra_encoding": "identity"},
    "fapn": TINY | {"upsampler": "fapn", "extra_encoding": "identity"},
    "upernet": TINY | {"upsampler": "upernet", "extra_encoding": "ppm"},
    "deeplabv3plus": TINY | {"upsampler": "deeplabv3plus", "extra_encoding": "aspp"},
    "UperNet of transformers": {"wrapped_config": UPERNET},
    "SegFormer of transformers": {"wrapped_config": SEGFORMER},
}
TEACHER = ("hfgd.backbone.", "hfgd.context_encoder.", "class_tokens.")
STUDENT = ("hfgd.upsampler.", "hfgd.reduce.", "hfgd.axial_attention.")
REGULARIZED = "hfgd.context_encoder.project."  # the one part of the teacher after the regularized map


def build(fields):
    torch.manual_seed(0)
    model = HfgdForSemanticSegmentation(HfgdConfig(num_labels=CLASSES, **fields)).train()
    for module in model.modules():
        if isinstance(module, HfgdOffsets):  # initialized with zeros, which pass no gradient to the layers before
            nn.init.normal_(module.weight, std=0.1)
    return model


def batch(side=96):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, CLASSES, (2, 6, 6), generator=generator)
    return {
        "pixel_values": torch.randn(2, 3, side, side, generator=generator),
        "labels": labels.repeat_interleave(side // 6, 1).repeat_interleave(side // 6, 2),
    }


def reached(model, loss):
    """Names of the parameters that a loss has a nonzero gradient for."""
    model.zero_grad()
    loss.backward(retain_graph=True)
    return {name for name, each in model.named_parameters() if each.grad is not None and each.grad.any()}


def names(model, *prefixes):
    return {name for name, _ in model.named_parameters() if name.startswith(prefixes)}


@pytest.mark.parametrize("fields", PAPER.values(), ids=PAPER.keys())
def test_each_loss_reaches_its_side_of_the_stops_and_nothing_else(fields):
    model = build(fields)
    losses = model(**batch()).loss_dict
    teacher, student = names(model, *TEACHER), names(model, *STUDENT)
    assert teacher | student == names(model, "")
    expected = {"guided": student, "high_level": teacher}
    after = names(model, "class_tokens.", REGULARIZED)
    expected |= {name: teacher - after for name in losses if name.startswith("car_") and name != "car_intra"}
    for name, group in expected.items():
        found = reached(model, losses[name])
        assert not found - group, f"{name} reaches {sorted(found - group)[:3]}"
        # A bias before a BatchNorm and the bias of keys have gradient 0 up to rounding.
        silent = {each for each in group - found if not each.endswith("bias")}
        assert len(silent) <= len(group) // 20, f"{name} does not reach {sorted(silent)[:5]}"
    if "car_intra" in losses:
        assert reached(model, losses["car_intra"]) <= teacher - after


def test_intra_loss_reaches_the_teacher_up_to_the_regularized_map():
    """Above its lower bound; at the start of training the loss is clamped there."""
    model = build(TINY)
    with torch.no_grad():
        model.hfgd.context_encoder.linear.weight.mul_(30)
    loss = model(**batch()).loss_dict["car_intra"]
    assert loss > 1e-4
    found = reached(model, loss)
    weights = {
        name for name in names(model, *TEACHER) - names(model, "class_tokens.", REGULARIZED) if "weight" in name
    }
    assert weights <= found and found <= names(model, *TEACHER)


@pytest.mark.parametrize("fields", PAPER.values(), ids=PAPER.keys())
def test_without_stops_the_guided_loss_reaches_everything(fields):
    model = build(fields | {"stop_gradient": False})
    found = reached(model, model(**batch()).loss_dict["guided"])
    silent = {name for name in names(model, "") - found if not name.endswith("bias")}
    assert len(silent) <= 3, sorted(silent)


@pytest.mark.parametrize("fields", PAPER.values(), ids=PAPER.keys())
def test_one_of_the_two_stops_leaves_the_other_way_open(fields):
    tokens = {"class_tokens.weight", "class_tokens.bias"}
    for stop in ("features", "tokens"):
        model = build(fields | {"stop_gradient": stop})
        found = reached(model, model(**batch()).loss_dict["guided"])
        assert found & tokens == (tokens if stop == "features" else set())
        assert bool(found & (names(model, *TEACHER) - tokens)) == (stop == "tokens")


def test_without_guidance_one_branch_learns_from_one_loss():
    model = build(TINY | {"guidance": False})
    outputs = model(**batch())
    assert outputs.high_level_logits is None and "high_level" not in outputs.loss_dict
    silent = {name for name in names(model, "") - reached(model, outputs.loss) if not name.endswith("bias")}
    assert not silent, sorted(silent)


def test_prediction_uses_the_tokens_that_the_high_level_map_trains():
    """Section 2: guided logits = U W^T + b with the W and b of the high-level logits."""
    model = build(TINY).eval()
    pixel_values = batch()["pixel_values"]
    outputs, features = model(pixel_values, output_auxiliary_logits=True), model.hfgd(pixel_values)
    weight, bias = model.class_tokens.weight[:, :, 0, 0], model.class_tokens.bias[:, None, None]
    for logits, maps in (
        (outputs.logits, features.last_hidden_state),
        (outputs.high_level_logits, features.high_level_features),
    ):
        torch.testing.assert_close(logits, torch.einsum("kc,bchw->bkhw", weight, maps) + bias)


def test_total_is_the_weighted_sum_of_the_losses():
    weights = {"high_level_loss_weight": 0.4, "car_intra_weight": 3.0, "car_inter_weight": 0.5}
    outputs = build(TINY | weights)(**batch())
    losses = outputs.loss_dict
    expected = losses["guided"] + 0.4 * losses["high_level"] + 3 * losses["car_intra"]
    torch.testing.assert_close(outputs.loss, expected + 0.5 * (losses["car_c2c"] + losses["car_c2p"]))


FOREIGN = {
    "upernet": (UperNetForSemanticSegmentation, UPERNET),
    "segformer": (SegformerForSemanticSegmentation, SEGFORMER),
}


@torch.no_grad()
@pytest.mark.parametrize("name", FOREIGN)
def test_guiding_a_model_keeps_its_weights_and_leaves_it_intact(name):
    """Without axial attention the guided model predicts as the model did; the classifier became the class tokens."""
    model_class, config = FOREIGN[name]
    torch.manual_seed(0)
    model = model_class(config).eval()
    pixel_values = torch.randn(1, 3, 64, 96)
    expected = model(pixel_values).logits
    guided = HfgdForSemanticSegmentation.guide(model, axial_attention=False).eval()
    logits = guided(pixel_values).logits
    if expected.shape != logits.shape:
        logits = torch.nn.functional.interpolate(logits, size=expected.shape[-2:], mode="bilinear")
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert_same_outputs(model(pixel_values).logits, expected)
    assert guided.config.id2label == model.config.id2label


@pytest.mark.parametrize("name", FOREIGN)
def test_guided_model_trains_and_survives_saving(name, tmp_path):
    model_class, config = FOREIGN[name]
    guided = HfgdForSemanticSegmentation.guide(model_class(config))
    guided.train()(**batch()).loss.backward()
    guided.eval().save_pretrained(tmp_path)
    loaded = AutoModelForSemanticSegmentation.from_pretrained(tmp_path)
    assert type(loaded) is HfgdForSemanticSegmentation
    with torch.no_grad():
        pixel_values = batch()["pixel_values"]
        assert_same_outputs(loaded(pixel_values).logits, guided(pixel_values).logits)


@torch.no_grad()
@pytest.mark.parametrize("fields", [{"wrapped_config": UPERNET}, TINY], ids=["wrapped", "own backbone"])
def test_checkpoint_with_the_former_name_of_wrapped_config_loads(fields, tmp_path):
    """`config.json` called the field `guided_config`; without a wrapped model its value is null."""
    model = build(fields).eval()
    model.save_pretrained(tmp_path)
    normal = AutoModelForSemanticSegmentation.from_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    saved["guided_config"] = saved.pop("wrapped_config")
    (tmp_path / "config.json").write_text(json.dumps(saved))
    loaded = AutoModelForSemanticSegmentation.from_pretrained(tmp_path)
    assert loaded.config.to_dict() == normal.config.to_dict() and not hasattr(loaded.config, "guided_config")
    pixel_values = batch()["pixel_values"]
    assert_same_outputs(loaded(pixel_values).logits, model(pixel_values).logits)


def test_class_counts_of_wrapper_and_wrapped_model_have_to_agree():
    with pytest.raises(StrictDataclassError, match="wrapped model has 5 classes and HFGD 3.*num_labels=5"):
        HfgdConfig(wrapped_config=UPERNET, num_labels=3)


def test_model_that_cannot_be_guided_is_refused():
    with pytest.raises(InputError, match="type 'setr' cannot be guided. Guidable: segformer, upernet"):
        HfgdForSemanticSegmentation(HfgdConfig(wrapped_config=SetrConfig(num_labels=2)))


def test_two_backbones_are_refused():
    with pytest.raises(StrictDataclassError, match="Give `backbone_config` or `wrapped_config`"):
        HfgdConfig(wrapped_config=UPERNET, backbone_config=ResNetConfig(**TINY_RESNET), num_labels=CLASSES)


def test_fields_that_a_wrapped_model_has_no_use_for_are_refused():
    with pytest.raises(StrictDataclassError, match="leave out `upsampler`"):
        HfgdConfig(wrapped_config=UPERNET, upsampler="fapn", num_labels=CLASSES)
