"""Figures of a boundary refinement: what is painted where, from the command too."""

import numpy as np
import pytest
import torch
from PIL import Image

import hf_denseseg
from hf_denseseg.cli import main
from hf_denseseg.inference.introspection.refinement import can_refine, inspect_refinement
from hf_denseseg.models.auto.registration import create_image_processor
from hf_denseseg.visualization.refinement import STEPS, Refinement, direction_image, refinement_figure, step_color
from test_published_unept import REDUCED

PALETTE = ((10, 20, 30), (200, 100, 0), (0, 150, 250))


@pytest.fixture
def model():
    """Boundary everywhere, each pixel refined by its right neighbor."""
    torch.manual_seed(0)
    model = hf_denseseg.create_model("unept-resnet50", **REDUCED, num_labels=3).eval()
    for head, chosen in ((model.boundary_head, 1), (model.direction_head, 4)):
        torch.nn.init.ones_(head[1].bias)
        torch.nn.init.zeros_(head[3].weight)
        torch.nn.init.ones_(head[3].weight[chosen])
    torch.nn.init.normal_(model.classifier.weight, std=5)
    return model


def test_every_step_has_a_color_of_its_own():
    assert len({step_color(*step) for step in STEPS}) == len(STEPS) == 8
    offsets = torch.zeros(2, 3, 3, dtype=torch.long)
    for row, column in STEPS:
        offsets[:, 1 + row, 1 + column] = torch.tensor((2 * row, 2 * column))
    painted = np.asarray(direction_image(Image.new("RGB", (3, 3)), offsets))
    for row, column in STEPS:
        assert tuple(painted[1 + row, 1 + column]) == step_color(row, column)
    assert len(set(painted[1, 1].tolist())) == 1, "no boundary: the faded image"


def test_refinement_is_read_from_the_model(model):
    found = inspect_refinement(model, torch.randn(1, 3, 32, 48))
    assert (found.offsets[0] == 0).all() and (found.offsets[1] == 1).all()
    assert torch.equal(found.refined[:, :-1], found.coarse[:, 1:])
    assert torch.equal(found.changed, found.coarse != found.refined) and found.changed.any()
    assert can_refine(model)


def test_figure_shows_the_five_images_side_by_side():
    coarse = torch.zeros(40, 400, dtype=torch.long)
    refined = coarse.clone()
    refined[:, 100:] = 2
    offsets = torch.zeros(2, 40, 400, dtype=torch.long)
    offsets[1, :, 90:110] = 1
    figure = np.asarray(refinement_figure(Image.new("RGB", (800, 80)), Refinement(coarse, refined, offsets), PALETTE))
    cell = lambda number, x: tuple(figure[40, 6 + number * 406 + x])  # noqa: E731
    assert cell(0, 50) == (0, 0, 0)
    assert cell(1, 50) == cell(1, 150) == PALETTE[0]
    assert cell(2, 95) == step_color(0, 1) != cell(2, 50)
    assert cell(3, 50) == PALETTE[0] and cell(3, 150) == PALETTE[2]
    assert cell(4, 150) == (255, 0, 0) != cell(4, 50)


def test_predict_writes_the_figure(model, tmp_path, capsys):
    model.save_pretrained(tmp_path / "model")
    create_image_processor(model.config).save_pretrained(tmp_path / "model")
    noise = np.random.default_rng(0).integers(0, 256, (70, 130, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "street.png")
    words = ["predict", tmp_path / "model", tmp_path / "street.png", "--output_dir", tmp_path / "out"]
    assert main([*map(str, words), "--show", "refinement", "--show_size", "96"]) == 0
    figure = Image.open(tmp_path / "out/shown/street_refinement.png")
    assert figure.width > 5 * 96 and len(figure.getcolors(10**6)) > 50


def test_a_model_without_refinement_says_so(tmp_path, capsys):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 32}
    layers = {"mla_layers": [0, 1, 2, 3], "decoder_hidden_size": 8, "mla_hidden_size": 8}
    model = hf_denseseg.create_model("setr-mla-vit-base", **sizes, **layers)
    model.save_pretrained(tmp_path / "model")
    create_image_processor(model.config).save_pretrained(tmp_path / "model")
    Image.new("RGB", (64, 64)).save(tmp_path / "street.png")
    words = ["predict", tmp_path / "model", tmp_path / "street.png", "--output_dir", tmp_path / "out"]
    assert main([*map(str, words), "--show", "refinement"]) == 2
    assert "cannot show refinement: it refines no boundaries" in capsys.readouterr().err
