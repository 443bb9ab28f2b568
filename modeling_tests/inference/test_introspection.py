"""The internals of a model: the mathematics against plain loops, and `denseseg predict --show` from end to end."""

import json
import math
import re

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import SegformerConfig, SegformerForSemanticSegmentation

import hf_denseseg
from closeness import assert_same_outputs
from hf_denseseg.cli import main
from hf_denseseg.errors import InputError
from hf_denseseg.inference.introspection.attention import attention_rollout, relative_points, spread_layers, token_grid
from hf_denseseg.inference.introspection.features import feature_image
from hf_denseseg.inference.introspection.inspection import ShowSettings, check_showable, inspect_model, inspection_view
from hf_denseseg.inference.introspection.positions import position_similarity, position_table
from hf_denseseg.inference.preprocessing import Preprocessing
from hf_denseseg.models.auto.registration import create_image_processor
from test_published_dsct import REDUCED as TINY_DSCT
from tiny_models import TINY_SETR

NAMES = ["setr-pup-vit-base", "setr-mla-vit-base", "setr-pup-beit-large", "dsct-tiny-sac", "dsct-tiny-sapp"]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def tiny_model(name):
    torch.manual_seed(0)
    if name.startswith("dsct"):
        return hf_denseseg.create_model(name, num_labels=3, **TINY_DSCT).eval()
    layers = {"mla_layers": [0, 1, 2, 3]} if "mla" in name else {"auxiliary_layers": [1, 3]}
    return hf_denseseg.create_model(name, **TINY_SETR, **layers).eval()


@pytest.fixture(scope="module", params=NAMES)
def model(request):
    return tiny_model(request.param)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    for name in ("setr-pup-vit-base", "dsct-tiny-sac"):
        model = tiny_model(name)
        model.save_pretrained(folder / name)
        create_image_processor(model.config).save_pretrained(folder / name)
    return folder


@pytest.fixture
def street(tmp_path):
    path = tmp_path / "street.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 130, 3), dtype=np.uint8)).save(path)
    return path


def show(checkpoint, *words):
    return main(["predict", str(checkpoint), *map(str, words)])


def test_position_similarity_equals_cosines_in_plain_loops():
    grid = (2, 3)
    table = torch.randn(1, 2 + 6, 5)
    similarity = position_similarity(table, grid)
    assert similarity.shape == (2, 3, 2, 3)
    rows = table[0, 2:].tolist()
    for first, a in enumerate(rows):
        for second, b in enumerate(rows):
            product = sum(x * y for x, y in zip(a, b, strict=True))
            lengths = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(y * y for y in b))
            place = (*divmod(first, 3), *divmod(second, 3))
            assert float(similarity[place]) == pytest.approx(product / lengths, abs=1e-5)


def test_rollout_equals_plain_loops_and_its_rows_sum_to_one():
    attentions = [torch.rand(2, 4, 4).softmax(-1) for _ in range(3)]
    expected = np.eye(4)
    for attention in attentions:
        mixed = np.zeros((4, 4))
        for i in range(4):
            for j in range(4):
                mixed[i, j] = 0.5 * (attention[0, i, j] + attention[1, i, j]) / 2 + 0.5 * (i == j)
            mixed[i] /= mixed[i].sum()
        expected = np.array(
            [[sum(mixed[i, k] * expected[k, j] for k in range(4)) for j in range(4)] for i in range(4)]
        )
    rollout = attention_rollout(attentions)
    np.testing.assert_allclose(rollout, expected, atol=1e-6)
    np.testing.assert_allclose(rollout.sum(-1), 1, atol=1e-6)
    np.testing.assert_allclose(attention_rollout([a.mean(0) for a in attentions]), expected, atol=1e-6)


def test_rollout_of_weights_that_do_not_sum_to_one_still_does():
    np.testing.assert_allclose(attention_rollout([torch.rand(5, 5) * 9]).sum(-1), 1, atol=1e-6)


def test_rollout_of_nothing_is_refused():
    with pytest.raises(InputError, match="at least one layer"):
        attention_rollout([])


def test_feature_image_does_not_depend_on_offset_scale_and_rotation_of_the_channels():
    features = torch.randn(6, 5, 7).double() * torch.tensor([9, 5, 3, 1, 1, 1])[:, None, None]
    colored = feature_image(features, (10, 14))
    assert colored.shape == (3, 10, 14) and colored.dtype == torch.uint8
    rotation, _ = torch.linalg.qr(torch.randn(6, 6).double())
    turned = torch.einsum("ij,jhw->ihw", rotation, features)
    for other in (features * 7, features + torch.randn(6, 1, 1), features.flip(0), turned):
        assert (feature_image(other, (10, 14)).int() - colored.int()).abs().max() <= 1


def test_feature_image_separates_what_differs():
    """Two halves that differ in one channel among noise get clearly different red; the largest score is bright."""
    features = torch.randn(16, 8, 8) * 0.01
    features[3, :, :2] += 5
    red = feature_image(features, (8, 8))[0].float()
    assert red[:, :2].min() > red[:, 2:].max() + 100


@pytest.mark.parametrize("shape", [(1, 4, 4), (2, 4, 4), (5, 1, 1), (5, 4, 4)])
def test_feature_image_of_few_channels_or_of_none_that_varies_is_painted_too(shape):
    flat = feature_image(torch.ones(shape), (6, 6))
    assert flat.shape == (3, 6, 6) and ((flat == 127) | (flat == 128)).all()
    assert feature_image(torch.rand(shape), (6, 6)).shape == (3, 6, 6)


def test_token_grid_follows_from_the_number_of_tokens():
    for rows, columns in [(32, 32), (16, 32), (4, 6), (24, 33)]:
        for extra in (0, 1, 2):
            assert token_grid(rows * columns + extra, (rows * 16, columns * 16)) == (rows, columns)
    assert token_grid(4 * 6 + 3, (64, 96)) is None
    assert token_grid(49, (64, 96)) is None


def test_layers_are_spread_as_in_the_paper():
    assert spread_layers(24) == (1, 9, 17, 24)
    assert spread_layers(3) == (1, 2, 3) and spread_layers(1) == (1,)


def test_inspection_gives_what_the_models_own_outputs_say(model):
    """Attention row and rollout of the picked token, and the features, from the tensors the model itself returns."""
    pixel_values = torch.randn(1, 3, 64, 96)
    point = (0.7, 0.3)  # column 4 of 6, row 1 of 4
    found = inspect_model(model, pixel_values, [point])
    assert model.config._attn_implementation == "sdpa", "the model was not put back"
    model.set_attn_implementation("eager")
    with torch.no_grad():
        outputs = model(pixel_values, output_attentions=True, output_hidden_states=True)
    model.set_attn_implementation("sdpa")
    assert len(found.attention) == len(found.features) == model.config.num_hidden_layers == len(outputs.attentions)
    extra = outputs.attentions[0].shape[-1] - 24
    token = extra + 1 * 6 + 4
    for number, layer in enumerate(found.attention, start=1):
        expected = outputs.attentions[number - 1][0, :, token, extra:].view(-1, 4, 6)
        torch.testing.assert_close(layer.heads[0], expected)
        rollout = attention_rollout(each[0] for each in outputs.attentions[:number])
        torch.testing.assert_close(layer.rollout[0], rollout[token, extra:].view(4, 6))
        tokens = outputs.hidden_states[number][0, extra:]
        torch.testing.assert_close(found.features[number - 1], tokens.T.reshape(-1, 4, 6))


def test_inspection_leaves_no_hook_and_no_other_result(model):
    pixel_values = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        before = model(pixel_values).logits
    counts = []
    for _ in range(2):  # the first one makes transformers install its own hooks for good
        inspect_model(model, pixel_values)
        counts.append(sum(len(module._forward_hooks) for module in model.modules()))
    assert counts[0] == counts[1]
    with torch.no_grad():
        assert_same_outputs(model(pixel_values).logits, before)


def test_decoder_parts_are_shown_in_the_order_of_their_work():
    pup = inspect_model(tiny_model("setr-pup-vit-base"), torch.randn(1, 3, 64, 96), kinds=["features"])
    assert list(pup.decoder) == ["norm", *(f"convolutions.{k}" for k in range(4)), "classifier"]
    assert [tuple(each.shape[1:]) for each in pup.decoder.values()][1:] == [(4, 6), (8, 12), (16, 24), (32, 48)] + [
        (32, 48)
    ]
    assert pup.attention == []
    sapp = inspect_model(tiny_model("dsct-tiny-sapp"), torch.randn(1, 3, 64, 96), kinds=["features"])
    unified = ["unify_spatial", "unify_context"]
    assert list(sapp.decoder) == [*unified, "convolutions.0", "convolutions.1", "convolutions.2", "classifier"]
    mla = inspect_model(tiny_model("setr-mla-vit-base"), torch.randn(1, 3, 64, 96), kinds=["features"])
    assert list(mla.decoder) == [*(f"streams.{k}" for k in range(4)), "classifier"]


def test_both_streams_of_dsct_are_shown():
    """BMVC 2021, Figure 4: the last three stages; the context stream's maps are those of its layers."""
    model = tiny_model("dsct-tiny-sac")
    pixel_values = torch.randn(1, 3, 64, 96)
    found = inspect_model(model, pixel_values, kinds=["features"])
    assert list(found.spatial) == ["stage2", "stage3", "stage4"]
    with torch.no_grad():
        outputs = model.dsct(pixel_values)
    torch.testing.assert_close(found.spatial["stage4"], outputs.spatial_map[0])
    assert len(found.features) == model.config.num_hidden_layers
    assert inspect_model(tiny_model("setr-pup-vit-base"), pixel_values, kinds=["features"]).spatial == {}


def test_the_inspected_image_is_bounded_whatever_the_size_of_the_original(model):
    preprocessing = Preprocessing((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    for size, expected in (
        ((1024, 2048), (64, 128)),
        ((100, 75), (96, 64)),
        ((5, 9), (32, 32)),
        ((3, 900), (32, 128)),
    ):
        image = torch.zeros(3, *size, dtype=torch.uint8)
        assert inspection_view(image, model, 128, preprocessing).shape == (1, 3, *expected)


def test_points_are_fractions_of_the_sides_and_the_center_by_default():
    assert relative_points((), (10, 20), "a.png") == [(0.5, 0.5)]
    assert relative_points([(0, 0), (19.5, 5)], (10, 20), "a.png") == [(0.0, 0.0), (0.975, 0.5)]
    for point in ((20, 0), (0, 10), (-1, 3)):
        with pytest.raises(InputError, match="outside a.png, which is 20 wide and 10 high"):
            relative_points([point], (10, 20), "a.png")


@pytest.mark.parametrize(
    "name, grid", [("setr-pup-vit-base", (4, 4)), ("setr-pup-beit-large", None), ("dsct-tiny-sac", None)]
)
def test_only_a_learned_table_of_positions_is_one(name, grid):
    found = position_table(tiny_model(name))
    assert (found[1] if found else None) == grid


def test_what_a_model_cannot_show_is_refused_with_what_it_can():
    config = SegformerConfig(hidden_sizes=[8] * 4, depths=[1] * 4, num_attention_heads=[1] * 4)
    segformer = SegformerForSemanticSegmentation(config).eval()
    for model, kind, message in (
        (tiny_model("dsct-tiny-sac"), "positions", "learns no table .* It can show: attention, features"),
        (segformer, "attention", "not every layer attends .* It can show: features"),
    ):
        with pytest.raises(InputError, match=message):
            check_showable(model, ShowSettings((kind,)))
    check_showable(segformer, ShowSettings(("features",), layers=(4,)))
    with pytest.raises(InputError, match="Layer 5 does not exist. .* layers 1 to 4"):
        check_showable(segformer, ShowSettings(("features",), layers=(5,)))


def test_attention_forced_onto_one_patch_is_brightest_there(checkpoints, street, tmp_path):
    """Positions alone make the tokens; one of them is the key of every query."""
    model = tiny_model("setr-pup-vit-base")
    row, column = 1, 3
    with torch.no_grad():
        embeddings = model.setr.encoder.embeddings
        embeddings.projection.weight.zero_()
        embeddings.projection.bias.zero_()
        embeddings.cls_token.zero_()
        embeddings.position_embeddings.normal_()
        forced = embeddings.position_embeddings[0, 1 + row * 4 + column]
        for layer in model.setr.encoder.layers:
            attention = layer.attention
            normed = layer.layernorm_before(forced)
            attention.q_proj.weight.zero_()
            attention.q_proj.bias.copy_(normed)  # all queries point to the forced token's key
            attention.k_proj.weight.copy_(torch.eye(32))
            attention.k_proj.bias.zero_()
            for branch in (attention.o_proj, layer.mlp.fc2):
                branch.weight.zero_()
                branch.bias.zero_()
    model.save_pretrained(tmp_path / "forced")
    create_image_processor(model.config).save_pretrained(tmp_path / "forced")
    Image.new("RGB", (64, 64)).save(tmp_path / "black.png")
    words = [tmp_path / "black.png", "--output_dir", tmp_path / "out", "--show", "attention", "--layers", 4]
    assert show(tmp_path / "forced", *words, "--point", 8, 60) == 0
    figure = np.asarray(Image.open(tmp_path / "out/shown/black_attention.png")).astype(int)
    # Second row, first tile: the mean of the heads over a black image, 300 pixels wide from (6, 20 + 300 + 6 + 20).
    tile = figure[346:646, 6:306]
    y, x = np.unravel_index(tile.sum(-1).argmax(), tile.shape[:2])
    assert (y // 75, x // 75) == (row, column)


def test_show_writes_readable_figures_and_masks_once(checkpoints, street, tmp_path, capsys):
    output = tmp_path / "out"
    words = [street, "--output_dir", output, "--show_size", 64, "--show", "attention", "features", "positions"]
    assert show(checkpoints / "setr-pup-vit-base", *words, "--point", 1, 2, 120, 60, "--point", 60, 30) == 0
    written = sorted(path.name for path in (output / "shown").iterdir())
    assert written == ["positions.png", "street_attention.png", "street_features.png"]
    assert (output / "masks/street.png").exists()
    for path in (output / "shown").iterdir():
        colors = Image.open(path).getcolors(10**6)
        assert len(colors) > 50, f"{path.name} is empty"
    # The red dot of the second of three points: image tiles are 300 pixels wide.
    figure = np.asarray(Image.open(output / "shown/street_attention.png"))
    height = round(300 * 70 / 130)
    top = 5 * (20 + height + 6) + 20
    assert tuple(figure[top + round(60 / 70 * height), 6 + round(120 / 130 * 300)]) == (255, 0, 0)
    record = json.loads((output / "results.json").read_text())["images"][0]
    assert record["attention"] == "shown/street_attention.png"
    capsys.readouterr()
    show(checkpoints / "setr-pup-vit-base", *words, "--point", 1, 2, 120, 60, 60, 30)
    assert "0 images predicted, 1 finished before" in capsys.readouterr().out
    show(checkpoints / "setr-pup-vit-base", *words, "--point", 5, 5)
    assert "1 image predicted, 0 left out" in capsys.readouterr().out


def test_show_does_not_change_the_masks(checkpoints, street, tmp_path):
    for name, words in (("plain", []), ("shown", ["--show", "attention", "features"])):
        assert show(checkpoints / "dsct-tiny-sac", street, "--output_dir", tmp_path / name, *words) == 0
    plain, shown = ((tmp_path / name / "masks/street.png").read_bytes() for name in ("plain", "shown"))
    assert plain == shown
    assert not (tmp_path / "plain/shown").exists()
    assert sorted(path.name for path in (tmp_path / "shown/shown").iterdir()) == [
        "street_attention.png",
        "street_features.png",
    ]


@pytest.mark.parametrize(
    "words, message",
    [
        (["--show", "positions"], "cannot show positions: its encoder learns no table"),
        (["--show", "attention", "--layers", 1, 7], "Layer 7 does not exist. .* layers 1 to 6"),
        (["--show", "features", "--layers", 0], "Layer 0 does not exist"),
        (["--show", "attention", "--point", 1, 2, 3], "--point has 3 numbers"),
        (["--show", "attention", "--show_size", 8], "at least 32"),
        (["--show", "features", "--point", 1, 2], "--point changes nothing here. Add --show attention"),
        (["--layers", 1], "--layers changes nothing here. Add --show attention or features"),
        (["--show_size", 64], "--show_size changes nothing here. Add --show attention"),
    ],
)
def test_wrong_options_end_before_any_work(checkpoints, street, tmp_path, capsys, words, message):
    assert show(checkpoints / "dsct-tiny-sac", street, "--output_dir", tmp_path / "out", *words) == 2
    assert not list((tmp_path / "out").glob("*/*"))
    error = capsys.readouterr().err
    assert error.count("error:") == 1 and re.search(message, error)


def test_an_image_that_lacks_the_point_is_left_out_with_the_reason(checkpoints, street, tmp_path, capsys):
    Image.new("RGB", (200, 100)).save(tmp_path / "large.png")
    words = [
        street,
        tmp_path / "large.png",
        "--output_dir",
        tmp_path / "out",
        "--show",
        "attention",
        "--point",
        150,
        90,
    ]
    assert show(checkpoints / "setr-pup-vit-base", *words) == 1
    assert "Point 150 90 lies outside street, which is 130 wide and 70 high" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out/shown").iterdir()] == ["large_attention.png"]
