"""Backbones of others under HFGD: every weight arrives, numerically."""

import importlib.util
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from transformers import ConvNextConfig, ConvNextModel, ResNetConfig, ResNetModel, SwinConfig, SwinModel

import hf_denseseg
from hf_denseseg.errors import InputError
from test_modeling_hfgd import STAGES, TINY, TINY_RESNET

DECODER = {name: value for name, value in TINY.items() if name != "backbone_config"}
SIZES = {
    "resnet": (ResNetModel, {name: value for name, value in TINY_RESNET.items() if name != "model_type"}),
    "convnext": (ConvNextModel, {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 12, 16, 24], "out_features": STAGES}),
    "swin": (
        SwinModel,
        {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 2, "out_features": STAGES},
    ),  # of Swin's maps none is as small as a window: there the model alone shrinks it
}
CONFIGS = {"resnet": ResNetConfig, "convnext": ConvNextConfig, "swin": SwinConfig}


SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "convert_efficientnet_lite0.py"


@pytest.fixture(scope="module")
def convert():
    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def randomize(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                value.uniform_(0.5, 1.5) if name.endswith("running_var") else value.normal_(std=0.2)
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("name", SIZES)
def test_folder_of_transformers_gives_its_coarsest_map(name, tmp_path):
    """Without the norm that Swin and ConvNeXt apply to it, which HFGD leaves out."""
    model_class, sizes = SIZES[name]
    model = randomize(model_class(CONFIGS[name](**sizes)))
    model.save_pretrained(tmp_path)
    config = {"model_type": name, **sizes}
    ours = hf_denseseg.load_official("hfgd", str(tmp_path), "hfgd-resnet50", backbone_config=config, **DECODER)
    pixel_values = torch.randn(1, 3, 128, 128)
    if name == "swin":  # what comes before the last norm
        expected = model(pixel_values, output_hidden_states=True).reshaped_hidden_states[-1]
    else:
        expected = model(pixel_values, output_hidden_states=True).hidden_states[-1]
    found = ours.hfgd(pixel_values, output_feature_maps=True).feature_maps[-1]
    scale = float(expected.std())
    torch.testing.assert_close(found, expected, atol=1e-4 * scale, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "mobilenetv3_small_050"])
def test_a_classifier_s_layers_behind_the_last_stage_are_dropped(name, caplog):
    theirs = randomize(timm.create_model(name, pretrained=False))
    reference = timm.create_model(name, pretrained=False, features_only=True, out_indices=[1, 2, 3, 4]).eval()
    kept = {key: value for key, value in theirs.state_dict().items() if key in reference.state_dict()}
    reference.load_state_dict(kept, strict=True)
    config = {"model_type": "timm_backbone", "backbone": name, "out_indices": [1, 2, 3, 4]}
    ours = hf_denseseg.load_official("hfgd", theirs.state_dict(), "hfgd-resnet50", backbone_config=config, **DECODER)
    assert "conv_head" in caplog.text and "classifier" in caplog.text
    pixel_values = torch.randn(1, 3, 64, 96)
    expected = reference(pixel_values)[-1]
    found = ours.hfgd(pixel_values, output_feature_maps=True).feature_maps[-1]
    torch.testing.assert_close(found, expected, atol=1e-4 * float(expected.std()), rtol=1e-4)


def test_weights_renamed_by_position_are_those_of_timm(convert, tmp_path, capsys):
    network = timm.create_model(convert.NETWORK, pretrained=False)
    foreign = {f"_{number}": value for number, value in enumerate(network.state_dict().values())}
    torch.save(foreign, tmp_path / "lite0.pth")
    assert convert.main([str(tmp_path / "lite0.pth"), str(tmp_path / "lite0.safetensors")]) == 0
    state = load_file(tmp_path / "lite0.safetensors")
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    torch.save(dict(reversed(foreign.items())), tmp_path / "wrong.pth")
    assert convert.main([str(tmp_path / "wrong.pth"), str(tmp_path / "no.safetensors")]) == 2
    assert "shape" in capsys.readouterr().err and not (tmp_path / "no.safetensors").exists()


@torch.no_grad()
@pytest.mark.parametrize("inner", ["transformers", "timm"])
def test_resnet_of_timm_and_torchvision_fits_both_kinds_of_backbone(inner):
    theirs = randomize(timm.create_model("resnet18", pretrained=False))
    config = {"model_type": "resnet", "layer_type": "basic", "depths": [2, 2, 2, 2], "out_features": STAGES}
    config |= {"hidden_sizes": [64, 128, 256, 512]}
    if inner == "timm":
        config = {"model_type": "timm_backbone", "backbone": "resnet18", "out_indices": [1, 2, 3, 4]}
    ours = hf_denseseg.load_official("hfgd", theirs.state_dict(), "hfgd-resnet50", backbone_config=config, **DECODER)
    pixel_values = torch.randn(1, 3, 64, 64)
    expected = theirs.forward_features(pixel_values)
    found = ours.hfgd(pixel_values, output_feature_maps=True).feature_maps[-1]
    torch.testing.assert_close(found, expected, atol=1e-4 * float(expected.std()), rtol=1e-4)


def test_backbone_of_an_hfgd_run_is_taken_and_its_decoder_left(tmp_path, caplog):
    torch.manual_seed(0)
    run = hf_denseseg.create_model("hfgd-resnet50", **TINY, num_labels=7)
    run.save_pretrained(tmp_path)
    fields = {**TINY, "upsampler": "sfpn", "num_labels": 3}
    ours = hf_denseseg.load_official("hfgd", str(tmp_path), "hfgd-resnet50", **fields)
    for name, value in run.hfgd.backbone.state_dict().items():
        assert torch.equal(ours.hfgd.backbone.state_dict()[name], value), name
    assert "context_encoder.linear.weight" in caplog.text  # named as dropped


def test_weights_of_another_backbone_are_refused_with_the_lists():
    theirs = timm.create_model("resnet18", pretrained=False).state_dict()
    with pytest.raises(InputError, match="wrong shapes: hfgd.backbone"):
        hf_denseseg.load_official("hfgd", theirs, "hfgd-resnet50", **TINY)


def test_a_complete_official_model_cannot_be_loaded_since_there_is_none():
    with pytest.raises(InputError, match="only layers can be loaded: axial_attention"):
        hf_denseseg.load_official("hfgd", {}, {"level": "model", "module": "hfgd"})
