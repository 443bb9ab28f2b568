"""Names, Auto classes, counts and conversion, as users reach them."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForSemanticSegmentation
from transformers.models.auto.modeling_auto import MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES

import hf_denseseg
from hf_denseseg.errors import InputError
from hf_denseseg.models import conversion
from hf_denseseg.models.auto import registration
from hf_denseseg.models.flops import count_operations
from reference import FIXTURES

CASE = FIXTURES / "dsct" / "encoder_eps_64x64"
SIZES = {"spatial_hidden_sizes": [8, 16, 24], "hidden_size": 16, "num_hidden_layers": 6, "num_attention_heads": 2}


def test_models_are_listed_sorted_and_by_pattern():
    names = hf_denseseg.list_models()
    assert names == sorted(names)
    kinds = [f"dsct-{size}{head}" for size in ("base", "small", "tiny") for head in ("", "-sac", "-sapp")]
    assert hf_denseseg.list_models("dsct-*") == kinds
    assert hf_denseseg.list_models("dsct-*-sac") == kinds[1::3]
    assert hf_denseseg.list_models("nothing*") == []


def test_unknown_names_propose_the_nearest():
    with pytest.raises(ValueError, match="dsct-base-sac"):
        hf_denseseg.create_model("dsct-bse-sac")
    with pytest.raises(ValueError, match="num_labels"):
        hf_denseseg.create_config("dsct-base-sac", num_label=19)
    with pytest.raises(ValueError, match="'dsct'"):
        hf_denseseg.load_official("dsc", {}, {})


def test_model_is_built_on_the_meta_device_with_overrides():
    with torch.device("meta"):
        model = hf_denseseg.create_model("dsct-tiny-sapp", num_labels=7)
    assert model.config.num_labels == 7 and model.device.type == "meta"
    assert type(model).__name__ == model.config.architectures[0] == "DsctForSemanticSegmentation"


def test_registering_twice_changes_nothing():
    before = dict(MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES)
    assert registration.register().keys() >= {"DsctConfig", "DsctForSemanticSegmentation", "DsctImageProcessorPil"}
    assert before == MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES
    assert before["dsct"] == "DsctForSemanticSegmentation"
    model = AutoModelForSemanticSegmentation.from_config(AutoConfig.for_model("dsct", **SIZES))
    assert type(model) is hf_denseseg.DsctForSemanticSegmentation


# --- counting


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_operations_are_counted_as_by_hand(attention):
    with torch.device("meta"):
        convolution, norm, linear = torch.nn.Conv2d(4, 6, 3, padding=1), torch.nn.BatchNorm2d(6), torch.nn.Linear(6, 8)
        image = torch.empty(1, 4, 10, 12)
    norm.eval()

    def run():
        tokens = linear(norm(convolution(image)).flatten(2).transpose(1, 2))[:, None]
        if attention == "sdpa":
            return torch.nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)
        return (tokens @ tokens.transpose(2, 3)).softmax(-1) @ tokens

    counts = count_operations(run)
    assert counts.layer_multiply_adds == 120 * (4 * 6 * 9) + 120 * 6 * 8
    assert counts.norm_outputs == 120 * 6
    assert counts.product_multiply_adds == 2 * 120 * 120 * 8


# --- official checkpoints


@pytest.fixture
def official():
    return conversion.read_weights(CASE / "weights.safetensors")


@pytest.mark.parametrize("wrapper", [None, "model", "state_dict"])
@pytest.mark.parametrize("ending", [".safetensors", ".pth", ".bin", ".tar"])
def test_checkpoint_files_of_every_kind_are_read(official, tmp_path, ending, wrapper):
    path = tmp_path / f"weights{ending}"
    if ending == ".safetensors":
        save_file(official, path)
    else:
        torch.save({wrapper: official, "epoch": 3} if wrapper else official, path)
    read = conversion.read_weights(path)
    assert read.keys() == official.keys() and all(torch.equal(read[name], official[name]) for name in official)


class Malicious:
    """What a pickle may hold; loading it would call print."""

    def __reduce__(self):
        return print, ("code was run",)


def test_code_in_a_checkpoint_is_not_run(tmp_path, capsys):
    torch.save({"model": Malicious()}, tmp_path / "weights.pth")
    with pytest.raises(InputError, match="safetensors"):
        conversion.read_weights(tmp_path / "weights.pth")
    assert "code was run" not in capsys.readouterr().out


@pytest.mark.parametrize("ending", [".safetensors", ".pth"])
@pytest.mark.parametrize("content", [b"", b"not weights at all"])
def test_damaged_file_is_named(tmp_path, ending, content):
    path = tmp_path / f"weights{ending}"
    path.write_bytes(content)
    with pytest.raises(InputError, match=str(path)):
        conversion.read_weights(path)


def test_missing_file_and_unknown_ending_are_named(tmp_path):
    with pytest.raises(InputError, match="do not exist"):
        conversion.read_weights(tmp_path / "no.pth")
    (tmp_path / "weights.txt").write_text("x")
    with pytest.raises(InputError, match="unknown ending"):
        conversion.read_weights(tmp_path / "weights.txt")


def test_unused_missing_and_wrongly_shaped_keys_come_in_one_error(official):
    del official["bn1.weight"]
    official["extra.weight"] = torch.zeros(1)
    official["trans_norm.bias"] = torch.zeros(5)
    with pytest.raises(InputError) as error:
        hf_denseseg.load_official("dsct", official, CASE / "config.json")
    for part in ("unused keys: extra.weight", "missing keys: dsct.encoder.stem.norm.weight", "trans_norm.bias [5]"):
        assert part in str(error.value)


def test_weights_without_classifiers_give_the_encoder(official):
    encoder_only = {name: value for name, value in official.items() if "cls_head" not in name}
    assert type(hf_denseseg.load_official("dsct", encoder_only, CASE / "config.json")) is hf_denseseg.DsctModel


@pytest.mark.parametrize(
    "change, message",
    [
        ({"patch_size": 32}, "only 16"),
        ({"spatial_strides": [4, 8, 16, 16]}, "spatial_strides"),
        ({"dilation_from_block": 3}, "dilation_from_block"),
        ({"depth": None}, "lack depth"),
    ],
)
def test_hyper_parameters_of_another_network_are_refused(official, change, message):
    config = {**json.loads((CASE / "config.json").read_text()), **change}
    config = {name: value for name, value in config.items() if value is not None or name == "dilation_from_block"}
    with pytest.raises(InputError, match=message):
        hf_denseseg.load_official("dsct", official, config)


def test_image_processors_are_made_by_name_too():
    name = "hlg-mobile"
    by_name, by_config = map(hf_denseseg.create_image_processor, (name, hf_denseseg.create_config(name)))
    assert by_name.to_dict() == by_config.to_dict() and by_name.task == "image-classification"
