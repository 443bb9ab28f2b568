"""SETR: every key of the official checkpoints, encoders of timm and transformers, and weights that do not fit."""

import json

import pytest
import timm
import torch
from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer
from transformers import BeitConfig, BeitModel, DeiTConfig, DeiTForImageClassification, ViTConfig, ViTModel

import hf_denseseg
from closeness import assert_same_outputs
from hf_denseseg.errors import InputError, RunError
from hf_denseseg.models.auto.pretrained import load_trained_model
from reference import FIXTURES, reference_folder

SIZES = {"model": "SETR-pup", "image_size": 48, "hidden_size": 16, "depth": 3, "num_heads": 2, "num_classes": 4}
SIZES |= {"aux_layers_zero_based": [0, 2], "decoder_channels": 8}
TIMM = {"img_size": 48, "patch_size": 16, "embed_dim": 16, "depth": 3, "num_heads": 2, "num_classes": 5}
THEIRS = {"image_size": 48, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
THEIRS |= {"intermediate_size": 64, "layer_norm_eps": 1e-6}
MANIFESTS = [
    f"{head}_{encoder}_{data}"
    for head, encoder, data in (
        *(("naive", "vit_large", data) for data in ("ade20k_512", "cityscapes_768", "pascal_context_480")),
        *(("pup", "vit_large", data) for data in ("ade20k_512", "cityscapes_768", "pascal_context_480")),
        *(("mla", "vit_large", data) for data in ("ade20k_512", "cityscapes_768", "pascal_context_480")),
        *((head, "deit_base", data) for head in ("pup", "mla") for data in ("ade20k_512", "cityscapes_768")),
        *(("naive", encoder, "cityscapes_768") for encoder in ("vit_base", "deit_base")),
    )
]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def randomized(model):
    """The model in eval mode without a zero weight, so that no part drops out of the comparison."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model.eval()


def last_block(model, pixel_values):
    """Output of timm's last block, before the norm."""
    found = []
    model.blocks[-1].register_forward_hook(lambda module, inputs, output: found.append(output))
    model.forward_features(pixel_values)
    return found[0]


@pytest.mark.parametrize("manifest", MANIFESTS)
def test_every_official_key_is_used_or_named(manifest, caplog):
    path = reference_folder("setr") / f"manifest_{manifest}.json"
    shapes = json.loads(path.read_text())
    totals = shapes.pop("__totals__")
    with torch.device("meta"):
        official = {name: torch.empty(shape) for name, shape in shapes.items()}
        name = "-".join(["setr", *manifest.split("_")[:3]])
        model = hf_denseseg.load_official("setr", official, name)
    dropped = [name for name in shapes if name in caplog.text]
    assert dropped == [name for name in shapes if ".conv_seg." in name] and dropped
    counted = model.num_parameters() + sum(official[name].numel() for name in dropped)
    assert counted / 1e6 == pytest.approx(totals["parameters_M"], abs=6e-5)
    assert model.config.image_size == int(manifest.split("_")[-1])


def test_all_manifests_are_tested():
    found = {path.stem.removeprefix("manifest_") for path in reference_folder("setr").glob("manifest_*.json")}
    assert found == set(MANIFESTS) and len(found) == 15


@torch.no_grad()
@pytest.mark.parametrize("shared", [None, False, True])
def test_timm_encoders_give_the_same_tokens(shared, monkeypatch):
    """Plain ViT, and BEiT with a table of relative positions per layer or one for all, both by timm's own code."""
    if shared is None:
        theirs = VisionTransformer(**TIMM)
    else:
        kind = {"use_shared_rel_pos_bias": shared, "use_rel_pos_bias": not shared}
        theirs = Beit(**TIMM, **kind, use_abs_pos_emb=False, init_values=0.1)
    theirs = randomized(theirs)
    fetched = []
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: fetched.append((name, pretrained)) or theirs)
    encoder = "vit" if shared is None else "beit"
    name = "vit_base_patch16_384.augreg_in21k_ft_in1k"
    model = hf_denseseg.load_official("setr", f"timm:{name}", SIZES, encoder=encoder)
    assert fetched == [(name, True)]
    pixel_values = torch.randn(2, 3, 48, 48)
    found = model.setr(pixel_values).last_hidden_state
    expected = last_block(theirs, pixel_values)
    torch.testing.assert_close(found, expected, atol=1e-5 * float(expected.std()), rtol=0)


@torch.no_grad()
def test_distilled_deit_loses_its_token_and_that_position(tmp_path):
    theirs = randomized(timm.create_model("deit_tiny_distilled_patch16_224", img_size=48, depth=1))
    state = theirs.state_dict()
    torch.save({"model": state}, tmp_path / "deit.pth")
    sizes = SIZES | {"hidden_size": 192, "depth": 1, "num_heads": 3, "aux_layers_zero_based": [0]}
    model = hf_denseseg.load_official("setr", tmp_path / "deit.pth", sizes)
    embeddings = model.setr.encoder.embeddings
    assert torch.equal(embeddings.position_embeddings[:, 0], state["pos_embed"][:, 0])
    assert torch.equal(embeddings.position_embeddings[:, 1:], state["pos_embed"][:, 2:])
    del state["dist_token"]
    with pytest.raises(InputError, match="dist_token"):
        hf_denseseg.load_official("setr", state, sizes)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["vit", "deit", "beit"])
def test_transformers_checkpoints_give_the_same_tokens(kind, tmp_path):
    if kind == "vit":
        theirs = ViTModel(ViTConfig(**THEIRS))
    elif kind == "deit":
        theirs = DeiTForImageClassification(DeiTConfig(**THEIRS))
    else:
        theirs = BeitModel(BeitConfig(**THEIRS, use_relative_position_bias=True))
    randomized(theirs).save_pretrained(tmp_path)
    model = hf_denseseg.load_official("setr", tmp_path, SIZES, encoder="beit" if kind == "beit" else "vit")
    if kind == "deit":  # its distillation token takes part in attention; SETR leaves it out
        table = theirs.deit.embeddings.position_embeddings
        assert torch.equal(model.setr.encoder.embeddings.position_embeddings, table[:, [0, *range(2, 11)]])
        assert torch.equal(model.setr.encoder.layers[2].mlp.fc1.weight, theirs.deit.layers[2].mlp.fc1.weight)
        return
    pixel_values = torch.randn(2, 3, 48, 48)
    expected = theirs(pixel_values, output_hidden_states=True).hidden_states[-1]
    found = model.setr(pixel_values).last_hidden_state
    torch.testing.assert_close(found, expected, atol=1e-5 * float(expected.std()), rtol=0)


@torch.no_grad()
def test_relative_positions_are_resized_at_load_as_transformers_does_on_the_fly():
    theirs = randomized(BeitModel(BeitConfig(**THEIRS, use_relative_position_bias=True), add_pooling_layer=False))
    model = hf_denseseg.load_official("setr", theirs.state_dict(), SIZES, encoder="beit", image_size=80)
    assert len(model.setr.encoder.beit.layers[0].relative_position_bias.relative_position_bias_table) == 9 * 9 + 3
    pixel_values = torch.randn(1, 3, 80, 80)
    expected = theirs(pixel_values, output_hidden_states=True).hidden_states[-1]
    found = model.setr(pixel_values).last_hidden_state
    torch.testing.assert_close(found, expected, atol=1e-5 * float(expected.std()), rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("image_size, grid", [(80, (5, 5)), ([64, 96], (4, 6))])
def test_position_tables_of_another_grid_are_interpolated_with_a_note(image_size, grid, caplog):
    theirs = randomized(VisionTransformer(**TIMM))
    model = hf_denseseg.load_official("setr", theirs.state_dict(), SIZES, image_size=image_size)
    assert f"from 3x3 to {grid[0]}x{grid[1]} patches" in caplog.text
    assert model.setr.encoder.embeddings.position_embeddings.shape == (1, 1 + grid[0] * grid[1], 16)
    # The same as keeping the table and interpolating on the fly.
    kept = hf_denseseg.load_official("setr", theirs.state_dict(), SIZES)
    pixel_values = torch.randn(1, 3, 16 * grid[0], 16 * grid[1])
    expected = model.setr(pixel_values).last_hidden_state
    assert_same_outputs(kept.setr(pixel_values).last_hidden_state, expected)


def official_case(head="mla_small"):
    return FIXTURES / "setr" / head / "weights.safetensors", FIXTURES / "setr" / head / "config.json"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model": "SETR-pup", "aux_layers_zero_based": [0]}, "decoder 'mla', but 'pup' was asked for"),
        ({"model": "SETR-fpn"}, "SETR-naive, SETR-pup or SETR-mla"),
        ({"batch_norm_eps": 1e-3}, "only 1e-5"),
        ({"mla_channels": 32}, "differ"),
        ({"depth": None}, "lack depth"),
        ({"num_classes": 9}, "wrong shapes"),
    ],
)
def test_hyper_parameters_of_another_network_are_refused(change, message):
    weights, config = official_case()
    changed = {**json.loads(config.read_text()), **change}
    changed = {name: value for name, value in changed.items() if name != "depth" or value is not None}
    with pytest.raises(InputError, match=message):
        hf_denseseg.load_official("setr", weights, changed)


def test_encoders_of_another_kind_are_refused():
    vit, beit = VisionTransformer(**TIMM).state_dict(), Beit(**TIMM, use_rel_pos_bias=True).state_dict()
    with pytest.raises(InputError, match="plain ViT, but the encoder is 'beit'"):
        hf_denseseg.load_official("setr", vit, SIZES, encoder="beit")
    with pytest.raises(InputError, match="BEiT, but the encoder is 'vit'"):
        hf_denseseg.load_official("setr", beit, SIZES)
    vit["pos_embed"] = torch.zeros(1, 12, 16)
    with pytest.raises(InputError, match="12 entries, which is no square grid"):
        hf_denseseg.load_official("setr", vit, SIZES)


def test_weights_that_cannot_be_fetched_are_named(tmp_path):
    with pytest.raises(RunError, match="nobody/no-such-model"):
        hf_denseseg.load_official("setr", "nobody/no-such-model", SIZES)
    with pytest.raises(RunError, match="nobody/no-such-model.v2"):  # a dot does not make it a file name
        hf_denseseg.load_official("setr", "nobody/no-such-model.v2", SIZES)
    with pytest.raises(InputError, match="nowhere.pth do not exist"):
        hf_denseseg.load_official("setr", "nowhere.pth", SIZES)
    with pytest.raises(InputError, match="Unknown timm model 'vit_huge_patch99'"):
        hf_denseseg.load_official("setr", "timm:vit_huge_patch99", SIZES)
    with pytest.raises(InputError, match="tag"):
        hf_denseseg.load_official("setr", "timm:vit_tiny_patch16_224.nonsense", SIZES)
    with pytest.raises(RunError, match="timm could not fetch vit_tiny_patch16_224"):  # the tests are offline
        hf_denseseg.load_official("setr", "timm:vit_tiny_patch16_224", SIZES)
    with pytest.raises(InputError, match="no folder of a transformers model"):
        hf_denseseg.load_official("setr", tmp_path, SIZES)


def test_saved_checkpoint_keeps_its_table_and_refuses_another(tmp_path):
    fields = {"image_size": 48, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    model = hf_denseseg.create_model("setr-naive-vit-base", **fields, auxiliary_layers=[0])
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        hf_denseseg.SetrForSemanticSegmentation.from_pretrained(tmp_path, image_size=64)
    with pytest.raises(InputError, match=r"position_embeddings.*`image_size` stays"):
        load_trained_model(str(tmp_path), image_size=64, num_labels=7, ignore_mismatched_sizes=True)
    other = load_trained_model(str(tmp_path), num_labels=7, ignore_mismatched_sizes=True)
    table = "setr.encoder.embeddings.position_embeddings"
    assert torch.equal(other.get_parameter(table), model.get_parameter(table))
