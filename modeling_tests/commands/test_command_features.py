"""`denseseg features`: the mathematics against plain loops and numpy, sampling, and the command from end to end."""

import json
import math
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from transformers import SegformerConfig, SegformerForImageClassification

import hf_denseseg
from hf_denseseg.cli import main
from hf_denseseg.data.labels import LabelSpec
from hf_denseseg.errors import InputError
from hf_denseseg.evaluation import class_separability
from hf_denseseg.inference.introspection import class_features
from hf_denseseg.inference.preprocessing import Preprocessing
from hf_denseseg.inference.segmentation import InferenceSettings
from hf_denseseg.models.auto.registration import create_image_processor
from hf_denseseg.visualization import class_features as figures
from test_published_dsct import REDUCED as TINY_DSCT
from test_published_hfgd import REDUCED as TINY_HFGD
from test_published_hlg import REDUCED as TINY_HLG
from test_published_unept import REDUCED as TINY_UNEPT
from tiny_models import TINY_SETR

PLAIN = Preprocessing((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), None)
WHOLE = InferenceSettings()


class ColorModel(nn.Module):
    """Its features are the colors of an image averaged over cells of 2x2 pixels, its class tokens the primary colors.

    `functional` calls the classifier as a function with stopped gradients, as HFGD does; `pad` adds a margin to the
    maps and cuts the logits, as HLG does.
    """

    def __init__(self, functional=False, pad=0):
        super().__init__()
        self.config = types.SimpleNamespace(num_labels=3)
        self.classifier = nn.Conv2d(3, 3, kernel_size=1)
        self.auxiliary = nn.Conv2d(3, 3, kernel_size=1)
        self.functional, self.pad = functional, pad
        with torch.no_grad():
            self.classifier.weight.copy_(4 * torch.eye(3)[..., None, None])
            self.classifier.bias.zero_()

    def forward(self, pixel_values):
        features = F.pad(F.avg_pool2d(pixel_values, 2), (0, self.pad, 0, self.pad))
        height, width = (side // 2 for side in pixel_values.shape[-2:])
        weight, bias = self.classifier.weight, self.classifier.bias
        logits = F.conv2d(features, weight.detach(), bias.detach()) if self.functional else self.classifier(features)
        self.auxiliary(features)  # runs later, but the logits do not depend on it
        return types.SimpleNamespace(logits=logits[..., :height, :width])


def stripes(widths, height=8):
    """An image of red, green and blue stripes with its labels."""
    labels = np.repeat(np.arange(3), widths)[None].repeat(height, 0).astype(np.uint8)
    colors = np.eye(3, dtype=np.uint8) * 255
    return {"image": Image.fromarray(colors[labels]), "label": labels}


def collect(model, rows, settings=WHOLE, points=500, seed=0):
    tokens = class_features.find_class_tokens(model)
    parts = class_features.labeled_features(model, tokens, rows, PLAIN, settings)
    return class_separability.sample_features(parts, len(tokens), points, seed)


def run(*words):
    return main(["features", *map(str, words)])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    model = hf_denseseg.create_model("dsct-tiny-sac", **{**TINY_DSCT, "num_labels": 11})
    model.save_pretrained(folder)
    create_image_processor(model.config, do_resize=False).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("num_labels", [2, 3, 8])  # UN-EPT's other heads have 2 and 8 channels
@pytest.mark.parametrize(
    "name, sizes, path",
    [
        ("dsct-tiny-sac", TINY_DSCT, "decode_head.classifier"),
        ("dsct-tiny-sapp", TINY_DSCT, "decode_head.classifier"),
        ("unept-resnet50", TINY_UNEPT, "classifier"),
        ("hlg-pup-small", TINY_HLG, "decode_head.classifier"),
        ("hlg-upernet-small", TINY_HLG, "decode_head.classifier"),
        ("hfgd-resnet50", TINY_HFGD, "class_tokens"),
        ("setr-mla-vit-base", {**TINY_SETR, "mla_layers": [0, 1, 2, 3]}, "decode_head.classifier"),
    ],
)
def test_the_class_tokens_of_every_family_are_its_classifier(name, sizes, path, num_labels):
    model = hf_denseseg.create_model(name, **{**sizes, "num_labels": num_labels}).eval()
    assert class_features.find_class_tokens(model).data_ptr() == model.get_submodule(path).weight.data_ptr()


@pytest.mark.parametrize("functional", [False, True])
def test_a_classifier_called_as_a_function_is_found_and_an_auxiliary_head_is_not_taken(functional):
    model = ColorModel(functional).requires_grad_(not functional)
    assert class_features.find_class_tokens(model).data_ptr() == model.classifier.weight.data_ptr()


def test_a_model_without_such_a_convolution_is_refused():
    model = ColorModel()
    model.config.num_labels = 4
    with pytest.raises(InputError, match="no convolution that gives its logits one channel per class"):
        class_features.find_class_tokens(model)


def test_token_confidence_equals_plain_loops():
    tokens = torch.randn(4, 5, 1, 1)
    confidence = class_separability.token_confidence(tokens)
    rows = tokens[..., 0, 0].tolist()
    for i, a in enumerate(rows):
        exponentials = [math.exp(sum(x * y for x, y in zip(a, b, strict=True))) for b in rows]
        for j in range(4):
            assert float(confidence[i, j]) == pytest.approx(exponentials[j] / sum(exponentials), rel=1e-6)


def test_token_confidence_is_what_the_classifier_predicts_for_a_token():
    classifier = nn.Conv2d(6, 4, kernel_size=1, bias=False)
    with torch.no_grad():
        predicted = classifier(classifier.weight).softmax(1)[..., 0, 0]
        wide = nn.Conv2d(6, 4, kernel_size=3, bias=False)
        predicted_wide = wide(wide.weight).softmax(1)[..., 0, 0]
    torch.testing.assert_close(class_separability.token_confidence(classifier.weight).float(), predicted)
    torch.testing.assert_close(class_separability.token_confidence(wide.weight).float(), predicted_wide)


def test_orthogonal_tokens_depend_on_no_other_class_and_equal_ones_on_all():
    torch.testing.assert_close(class_separability.token_confidence(9 * torch.eye(5)).float(), torch.eye(5))
    assert class_separability.token_confidence(torch.ones(5, 7)).unique().tolist() == pytest.approx([0.2])


@pytest.mark.parametrize("model", [ColorModel(), ColorModel(functional=True), ColorModel(pad=3)])
def test_features_are_the_classifiers_input_under_the_true_label(model):
    found = collect(model, [stripes([4, 6, 10])])
    assert found.confusion.tolist() == [[8, 0, 0], [0, 12, 0], [0, 0, 20]]
    for k, samples in enumerate(found.samples):
        assert torch.equal(samples, torch.eye(3)[k].expand(len(samples), 3))
        assert len(samples) == found.confusion[k, k]


def test_ignored_pixels_and_absent_classes_give_no_features():
    row = stripes([4, 6, 10])
    row["label"] = np.where(row["label"] == 1, 255, row["label"]).astype(np.uint8)
    assert [len(each) for each in collect(ColorModel(), [row]).samples] == [8, 0, 20]


def test_windows_of_the_protocol_see_the_same_cells():
    row = stripes([4, 6, 10])
    whole = collect(ColorModel(), [row])
    settings = InferenceSettings("slide", (4, 10), (4, 10))
    windows = collect(ColorModel(), [row], settings=settings)
    assert torch.equal(whole.confusion, windows.confusion)
    halved = collect(ColorModel(), [row], settings=InferenceSettings(base_size=(4, 10)))
    assert halved.confusion.sum() * 4 == whole.confusion.sum()


def test_labels_are_those_of_the_pixels_in_the_middle_of_the_cells():
    label = torch.arange(12 * 18).view(12, 18)
    cells = class_features._cell_labels(label, (2, 3, 4, 6), (6, 9), (2, 3))
    # The view is half as large as the label map; its window's cells are 2x2 pixels, 4x4 of the label map.
    assert cells.tolist() == [[(4 + 4 * i + 2) * 18 + 6 + 4 * j + 2 for j in range(3)] for i in range(2)]


def noisy_rows(count=4):
    rng = np.random.default_rng(0)
    rows = [stripes([2, 10, 20]) for _ in range(count)]
    for row in rows:
        noise = rng.integers(0, 256, (8, 32, 3), dtype=np.uint8)
        row["image"] = Image.fromarray(noise)
    return rows


def test_every_class_gets_equally_many_points_and_a_rare_one_all_it_has():
    found = collect(ColorModel(), noisy_rows(), points=40)
    assert [len(each) for each in found.samples] == [16, 40, 40]
    assert found.confusion.sum(1).tolist() == [16, 80, 160]
    assert len(found.samples[2].unique(dim=0)) == 40, "a cell was drawn twice"


def test_the_seed_decides_the_sample():
    first, same, other = (collect(ColorModel(), noisy_rows(), points=20, seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first.samples, same.samples, strict=True))
    assert not torch.equal(first.samples[2], other.samples[2])


def test_the_sample_is_even_over_all_images():
    """A feature tells its image; 400 of 1,600 cells, 4 images: 100 each, give or take four deviations of 7.5."""
    rows = []
    for value in (10, 60, 110, 160):
        image = Image.fromarray(np.full((40, 40, 3), value, dtype=np.uint8))
        rows.append({"image": image, "label": np.zeros((40, 40), np.uint8)})
    samples = collect(ColorModel(), rows, points=400).samples[0]
    _, counts = samples[:, 0].unique(return_counts=True)
    assert len(counts) == 4 and ((counts - 100).abs() < 4 * 7.5).all()


def test_classes_taken_for_each_other_are_shown():
    confusion = torch.diag(torch.tensor([100, 100, 100, 100, 0, 100]))
    confusion[1, 3], confusion[3, 1], confusion[0, 4], confusion[5, 0] = 50, 5, 900, 20
    assert class_separability.most_confused(confusion, 2) == [1, 3]
    assert class_separability.most_confused(confusion, 4) == [0, 1, 3, 5]
    assert class_separability.most_confused(confusion, 8) == [0, 1, 2, 3, 5], "class 4 has no pixel"
    assert class_separability.most_confused(torch.diag(torch.tensor([1, 9, 5])), 2) == [1, 2], (
        "the largest if all is right"
    )
    assert class_separability.most_confused(torch.diag(torch.tensor([0, 9]))) == [1]


def test_separability_equals_its_formula_in_plain_loops():
    samples = [torch.randn(n, 3) + shift for n, shift in ((5, 0), (4, 2), (1, -1))]
    found = class_separability.separability(samples)
    means = [each.double().mean(0).numpy() for each in samples]
    middle = sum(means) / 3
    between = sum(((mean - middle) ** 2).sum() for mean in means) / 3
    spreads = [
        np.mean([((x - mean) ** 2).sum() for x in each.double().numpy()])
        for each, mean in zip(samples, means, strict=True)
    ]
    assert found["scatter_ratio"] == pytest.approx(between / np.mean(spreads), rel=1e-6)
    widths = []
    for k, own in enumerate(samples):
        for i, x in enumerate(own):
            if len(own) == 1:
                widths.append(0.0)
                continue
            a = sum(float((x - y).norm()) for y in own) / (len(own) - 1)
            b = min(np.mean([float((x - y).norm()) for y in each]) for j, each in enumerate(samples) if j != k)
            assert i < len(own)
            widths.append((b - a) / max(a, b))
    assert found["silhouette"] == pytest.approx(np.mean(widths), abs=1e-6)


def test_separability_tells_separated_classes_from_mixed_ones_at_any_scale_and_rotation():
    cloud = torch.randn(2, 200, 6)
    apart = [cloud[0], cloud[1] + 20]
    far, mixed = class_separability.separability(apart), class_separability.separability(list(cloud))
    assert far["scatter_ratio"] > 50 and far["silhouette"] > 0.85
    assert mixed["scatter_ratio"] < 0.1 and abs(mixed["silhouette"]) < 0.1
    rotation, _ = torch.linalg.qr(torch.randn(6, 6))
    turned = class_separability.separability([7 * each @ rotation + 3 for each in apart])
    assert turned == pytest.approx(far, rel=1e-4)
    points = class_separability.separability([torch.zeros(3, 2), torch.ones(3, 2)])
    assert points == {"scatter_ratio": None, "silhouette": 1.0}


def test_pca_equals_numpys_singular_vectors():
    features = torch.randn(30, 5) * torch.tensor([1, 4, 2, 0.5, 0.1]) + 3
    plane, variance = figures.project(features)
    centered = features.double().numpy() - features.double().numpy().mean(0)
    _, values, rows = np.linalg.svd(centered)
    expected = centered @ rows[:2].T
    np.testing.assert_allclose(plane.abs(), np.abs(expected), atol=1e-5)
    assert (plane.gather(0, plane.abs().argmax(0, keepdim=True)) > 0).all()
    assert variance == pytest.approx((values[:2] ** 2).sum() / (values**2).sum())
    flat, variance = figures.project(torch.tensor([[1.0], [2.0]]))
    assert flat[:, 1].tolist() == [0, 0] and variance == pytest.approx(1)


def test_other_projections_get_the_features_and_the_seed(monkeypatch):
    """A stand-in takes the place of umap-learn, which is an extra."""

    class Umap:
        def __init__(self, n_neighbors, random_state, n_jobs):
            assert (n_neighbors, random_state, n_jobs) == (9, 3, 1)

        def fit_transform(self, features):
            return features[:, :2] * 2

    monkeypatch.setitem(sys.modules, "umap", types.SimpleNamespace(UMAP=Umap))
    features = torch.randn(10, 4)
    plane, variance = figures.project(features, "umap", seed=3)
    assert variance is None
    torch.testing.assert_close(plane.float(), 2 * (features - features.mean(0))[:, :2])


@pytest.mark.parametrize("name, module", [("umap", "umap"), ("tsne", "sklearn")])
def test_real_projections_keep_two_far_clouds_apart(name, module):
    pytest.importorskip(module, reason="the extra `umap` is not installed")
    clouds = torch.randn(2, 40, 8)
    clouds[1] += 30
    plane, _ = figures.project(clouds.flatten(0, 1), name)
    assert class_separability.separability([plane[:40], plane[40:]])["silhouette"] > 0.5


@pytest.mark.parametrize("count", [2, 19, 171])
def test_the_matrix_names_every_class_and_its_diagonal_is_bright(count):
    names = [f"class number {k}" for k in range(count)]
    confidence = class_separability.token_confidence(9 * torch.eye(count))
    figure = np.asarray(figures.token_figure(confidence, names)).astype(int)
    assert max(figure.shape[:2]) < 2400
    cell = min(max(1000 // count, 12), 40)
    corner = figure.shape[0] - 6 - 20 - 6 - cell * count  # below: scale and gaps
    margin = corner - 20
    for k in (0, count - 1):
        # Not the middle of a cell: values are written there.
        bright, dark = (figure[corner + k * cell + 1, 6 + margin + j * cell + 1] for j in (k, (k + 1) % count))
        assert tuple(bright) == (253, 231, 37) and tuple(dark) == (68, 1, 84)


def test_dots_have_the_colors_of_their_classes():
    spec = LabelSpec("test", ("left", "right", "unused"), ((200, 10, 10), (10, 10, 200), (10, 200, 10)))
    samples = {k: torch.randn(50, 4) + 40 * k for k in (0, 1)}
    figure, variance = figures.feature_figure(samples, spec, "title")
    assert variance > 0.9
    colors = np.asarray(figure)[20:-40].astype(int)  # without title and legend
    found = {tuple(color) for color in colors.reshape(-1, 3)}
    assert {(200, 10, 10), (10, 10, 200)} <= found and (10, 200, 10) not in found
    places = [np.argwhere((colors == color).all(-1))[:, 1] for color in ((200, 10, 10), (10, 10, 200))]
    assert places[0].max() < places[1].min() or places[1].max() < places[0].min()


def test_the_command_writes_two_figures_and_the_numbers_the_same_each_time(checkpoint, tmp_path, capsys):
    words = [checkpoint, "--dataset", "synthetic@64x96", "--max_eval_samples", 3, "--points", 20]
    for name in ("one", "two"):
        assert run(*words, "--output_dir", tmp_path / name) == 0
    assert "mean of the diagonal" in capsys.readouterr().out
    for name in ("tokens.png", "features.png"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
        assert len(Image.open(tmp_path / "one" / name).getcolors(10**6)) > 20, f"{name} is empty"
    numbers = json.loads((tmp_path / "one/features.json").read_text())
    assert numbers["model_type"] == "dsct" and numbers["token_shape"] == [11, TINY_DSCT["decoder_hidden_size"], 1, 1]
    weight = hf_denseseg.DsctForSemanticSegmentation.from_pretrained(checkpoint).decode_head.classifier.weight
    tokens = weight.detach().double().flatten(1).numpy()
    exponentials = np.exp(tokens @ tokens.T)
    diagonal = np.diag(exponentials / exponentials.sum(1, keepdims=True))
    assert list(numbers["token_confidence"].values()) == pytest.approx(diagonal.tolist())
    assert numbers["diagonal_mean"] == pytest.approx(diagonal.mean())
    assert len(numbers["points"]) == 8 and max(numbers["points"].values()) == 20
    assert numbers["settings"]["points"] == 20 and numbers["images"] == 3
    assert set(numbers["separability"]) == {"scatter_ratio", "silhouette"}


def test_named_classes_are_shown(checkpoint, tmp_path):
    words = ["--dataset", "synthetic@64x96", "--max_eval_samples", 2, "--classes", "sky", "road", "road"]
    assert run(checkpoint, "--output_dir", tmp_path, *words) == 0
    numbers = json.loads((tmp_path / "features.json").read_text())
    assert list(numbers["points"]) == ["road", "sky"]


@pytest.mark.parametrize(
    "words, message",
    [
        (["--classes", "rode", "sky"], "Unknown class of synthetic-street-11 'rode'. Did you mean 'road'"),
        (["--classes", "road"], "At least two classes"),
        (["--classes", "road", "fence", "--max_eval_samples", "1"], "fence: no pixel in these images"),
        (["--classes", "road", "rider", "--max_eval_samples", "1"], "rider: no point on the feature maps"),
        (["--max_eval_samples", "0"], "--max_eval_samples is 0. Give 1 or more"),
        (["--points", "1"], "--points is 1. Give 2 or more"),
        (["--eval_split", "nowhere"], "nowhere"),
        (["--device", "warp"], "Device 'warp' cannot be used"),
    ],
)
def test_wrong_options_end_with_a_reason_and_no_file(checkpoint, tmp_path, capsys, words, message):
    words = ["--dataset", "synthetic@64x96", *words]
    assert run(checkpoint, "--output_dir", tmp_path / "out", *words) == 2
    assert message in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


def test_a_missing_extra_is_named_with_its_command(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in ("umap", "tsne"):
        words = ["--dataset", "synthetic", "--output_dir", tmp_path, "--projection", name]
        assert run(checkpoint, *words) == 2
        assert "pip install 'hf-denseseg[umap]'" in capsys.readouterr().err


def test_checkpoints_for_other_tasks_or_classes_are_refused(tmp_path, capsys):
    config = SegformerConfig(hidden_sizes=[8] * 4, depths=[1] * 4, num_attention_heads=[1] * 4)
    SegformerForImageClassification(config).save_pretrained(tmp_path / "classifier")
    model = hf_denseseg.create_model("dsct-tiny-sac", **{**TINY_DSCT, "num_labels": 3})
    model.save_pretrained(tmp_path / "three")
    create_image_processor(model.config).save_pretrained(tmp_path / "three")
    for name, message in (("classifier", "is a checkpoint for image-classification"), ("three", "knows 3 classes")):
        assert run(tmp_path / name, "--dataset", "synthetic@64x96", "--output_dir", tmp_path / "out") == 2
        assert message in capsys.readouterr().err
