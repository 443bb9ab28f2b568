"""Binary segmentation by one logit: train, resume, evaluate, predict, pipelines, of our models and of others."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from transformers import AutoModelForSemanticSegmentation, pipeline

import transformers_models
from hf_denseseg.cli import main
from hf_denseseg.inference.pipeline import SlidingWindowSegmentationPipeline
from test_published_dsct import REDUCED

SPEC = "classes: [background, lesion]\nraw_to_train: {0: 0, 255: 1}\n"
WORDS = ("--crop_size", "64", "64", "--per_device_train_batch_size", "4", "--use_cpu", "--scale_range", "1", "1")
OURS = ("--model", "dsct-tiny-sac", "--config_overrides", json.dumps({**REDUCED, "num_labels": 1}))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Bright boxes on a dark ground; masks of 0 and 255."""
    folder, random = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 3)):
        for kind in ("images", "labels"):
            (folder / split / kind).mkdir(parents=True)
        for number in range(count):
            top, left = random.integers(4, 28, 2)
            mask = np.zeros((64, 80), np.uint8)
            mask[top : top + 28, left : left + 36] = 255
            pixels = random.integers(0, 60, (64, 80, 3)) + (mask[..., None] > 0) * 150
            Image.fromarray(pixels.astype(np.uint8)).save(folder / split / "images" / f"{number}.png")
            Image.fromarray(mask).save(folder / split / "labels" / f"{number}.png")
    (folder / "labels.yaml").write_text(SPEC)
    return folder


def train(data, output, *words):
    return main(["train", "--dataset", str(data), *WORDS, "--output_dir", str(output), *words])


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    output = tmp_path_factory.mktemp("run")
    schedule = ("--max_steps", "80", "--save_steps", "40", "--eval_steps", "80", "--learning_rate", "3e-3")
    assert train(data, output, *OURS, *schedule) == 0
    return output


def evaluate(checkpoint, data, output, *words):
    assert main(["evaluate", str(checkpoint), "--dataset", str(data), "--output_dir", str(output), *words]) == 0
    return json.loads((output / "results.json").read_text())["scores"]


def predict(checkpoint, data, output, *words):
    images = str(data / "val" / "images")
    assert main(["predict", str(checkpoint), images, "--output_dir", str(output), *words]) == 0
    return np.stack([np.asarray(Image.open(output / "masks" / f"{number}.png")) for number in range(3)])


def label_maps(data):
    return np.stack([np.asarray(Image.open(data / "val" / "labels" / f"{number}.png")) for number in range(3)]) == 255


def test_both_classes_are_learned_and_scored(run, data, tmp_path):
    config = AutoModelForSemanticSegmentation.from_pretrained(run / "model").config
    assert config.num_labels == 1 and config.id2label == {0: "background", 1: "lesion"}
    scores = evaluate(run / "model", data, tmp_path)
    rows = {row["class"]: row for row in scores["per_class"]}
    assert list(rows) == ["background", "lesion"] and min(row["iou"] for row in rows.values()) > 0.8
    assert scores["mean_iou"] == pytest.approx((rows["background"]["iou"] + rows["lesion"]["iou"]) / 2)
    assert all(0 < row["boundary_iou"] < 1 for row in rows.values())


def test_scores_are_those_of_the_predicted_masks(run, data, tmp_path):
    masks, ground_truth = predict(run / "model", data, tmp_path / "p") == 1, label_maps(data)
    scores = evaluate(run / "model", data, tmp_path / "e")
    for row, found, true in zip(scores["per_class"], (~masks, masks), (~ground_truth, ground_truth), strict=True):
        assert row["iou"] == pytest.approx((found & true).sum() / (found | true).sum(), abs=1e-9)
    raw = predict(run / "model", data, tmp_path / "raw", "--raw_ids")
    assert np.array_equal(raw, masks * 255)


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("--test_scales", "0.75", "1", "--test_flip"),
        ("--test_crop_size", "48", "48"),
        ("--test_crop_size", "48", "48", "--tile_above_pixels", "100"),
        ("--test_average", "logits", "--test_flip"),
    ],
)
def test_masks_follow_the_probability_and_the_threshold_in_every_protocol(run, data, tmp_path, words):
    """The probabilities of both classes do not depend on the threshold, and the masks are where they pass it."""
    whole = [word for word in words if word not in ("--tile_above_pixels", "100")]
    predict(run / "model", data, tmp_path / "p", *whole, "--write", "masks", "probabilities")
    for threshold in ("0.5", "0.05", "0.9"):
        output = tmp_path / threshold
        given = (*words, "--test_threshold", threshold)
        masks = predict(run / "model", data, output, *given, "--write", "masks", "confidence")
        for number, mask in enumerate(masks):
            with np.load(tmp_path / "p" / "probabilities" / f"{number}.npz") as file:
                background, lesion = file["probabilities"].astype(np.float64)
            assert np.allclose(background + lesion, 1, atol=2e-3)
            clear = abs(lesion - float(threshold)) > 2e-3  # stored as float16
            assert np.array_equal((mask == 1)[clear], (lesion > float(threshold))[clear])
            confidence = np.asarray(Image.open(output / "confidence" / f"{number}.png")) / 255
            assert np.allclose(confidence, np.where(mask, lesion, background), atol=5e-3)


def test_the_threshold_is_part_of_the_saved_protocol(data, run, tmp_path):
    words = ("--max_steps", "1", "--model", str(run / "model"), "--test_threshold", "0.8", "--learning_rate", "1e-9")
    assert train(data, tmp_path / "run", *words) == 0
    model = tmp_path / "run" / "model"
    assert AutoModelForSemanticSegmentation.from_pretrained(model).config.num_labels == 1  # as in the checkpoint
    masks = predict(model, data, tmp_path / "saved") == 1
    assert np.array_equal(masks, predict(model, data, tmp_path / "given", "--test_threshold", "0.8") == 1)
    assert 0 < masks.sum() < (predict(model, data, tmp_path / "half", "--test_threshold", "0.5") == 1).sum()
    scores, ground_truth = evaluate(model, data, tmp_path / "e"), label_maps(data)
    assert scores["per_class"][1]["iou"] == pytest.approx(
        (masks & ground_truth).sum() / (masks | ground_truth).sum(), abs=1e-9
    )
    images = [str(data / "val" / "images" / f"{number}.png") for number in range(3)]
    for options in ({}, {"pipeline_class": SlidingWindowSegmentationPipeline}):
        found = pipeline("image-segmentation", model=str(model), device="cpu", **options)(images)
        for mask, parts in zip(masks, found, strict=True):
            shown = {part["label"]: np.asarray(part["mask"]) == 255 for part in parts}
            assert set(shown) == {"background", "lesion"} and np.array_equal(shown["background"], ~shown["lesion"])
            assert (shown["lesion"] != mask).mean() < 0.002  # up to rounding at the threshold
    sliding = pipeline(
        "image-segmentation", str(model), device="cpu", pipeline_class=SlidingWindowSegmentationPipeline
    )
    assert [part["label"] for part in sliding(images[0], threshold=0.9999)] == ["background"]


def test_an_interrupted_run_continues(run, data, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()
    for name in ("checkpoint-80", "model"):
        shutil.rmtree(tmp_path / "run" / name)
    schedule = ("--max_steps", "80", "--save_steps", "40", "--eval_steps", "80", "--learning_rate", "3e-3")
    assert train(data, tmp_path / "run", *OURS, *schedule) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    expected = json.loads((run / "results.json").read_text())
    assert results["training"]["resumed_from_step"] == 40
    assert results["scores"]["mean_iou"] == pytest.approx(expected["scores"]["mean_iou"], abs=1e-3)


@pytest.mark.parametrize("name", transformers_models.MODELS)
def test_models_of_transformers_may_have_one_logit_too(name, data, tmp_path):
    checkpoint = transformers_models.save(name, tmp_path / name)
    protocol = ("--test_mode", "slide", "--test_crop_size", "64", "64", "--test_threshold", "0.4")
    words = ("--model", str(checkpoint), "--config_overrides", "{num_labels: 1}", "--max_steps", "2", *protocol)
    assert train(data, tmp_path / "run", *words, "--loss", "ce+dice", "--class_weights", "[1.0, 3.0]") == 0
    model = tmp_path / "run" / "model"
    config = AutoModelForSemanticSegmentation.from_pretrained(model).config
    assert config.num_labels == 1 and config.id2label == {0: "lesion"}
    scores = evaluate(model, data, tmp_path / "e")
    assert [row["class"] for row in scores["per_class"]] == ["background", "lesion"]
    masks, ground_truth = predict(model, data, tmp_path / "p") == 1, label_maps(data)
    assert scores["per_class"][1]["iou"] == pytest.approx(
        (masks & ground_truth).sum() / (masks | ground_truth).sum(), abs=1e-9
    )
    card = (model / "README.md").read_text()
    assert "pipeline_class=OneLogit" in card and "threshold 0.4" in card
    images = [str(data / "val" / "images" / f"{number}.png") for number in range(3)]
    kind = SlidingWindowSegmentationPipeline
    segment = pipeline("image-segmentation", model=str(model), device="cpu", pipeline_class=kind)
    parts = segment(images, threshold=0.4, crop_size=(64, 64))
    assert {part["label"] for each in parts for part in each} <= {"background", "lesion"}
    assert train(data, tmp_path / "more", "--model", str(model), "--max_steps", "1", *protocol) == 0
    config = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "more" / "model").config
    assert config.num_labels == 1


def test_what_one_logit_cannot_do_is_refused(run, data, tmp_path, capsys):
    def refused(*words):
        assert train(data, tmp_path / "run", "--max_steps", "1", *words) == 2
        assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())
        return capsys.readouterr().err

    two = ("--model", "dsct-tiny-sac", "--config_overrides", json.dumps(REDUCED))
    assert "threshold 0.4 is for models with one logit" in refused(*two, "--test_threshold", "0.4")
    assert "Give a probability between 0 and 1" in refused(*OURS, "--test_threshold", "1.5")
    three = ("--model", "dsct-tiny-sac", "--config_overrides", json.dumps({**REDUCED, "num_labels": 3}))
    assert "num_labels is 3, but labels has 2 classes" in refused(*three)
    weighted = ("--class_weights", "[1.0, 3.0]", "--loss", "dice")
    assert "dice judges the foreground only" in refused(*OURS, *weighted)
    words = ["--dataset", "synthetic@64x96", *WORDS, "--max_steps", "1", "--output_dir", str(tmp_path / "run")]
    assert main(["train", *OURS, *words]) == 2
    assert "num_labels is 1, but" in capsys.readouterr().err
    words = ["features", str(run / "model"), "--dataset", str(data), "--output_dir", str(tmp_path / "f")]
    assert main(words) == 2
    assert "one class token" in capsys.readouterr().err


def test_a_checkpoint_of_one_logit_is_trained_on_with_two_on_request(run, data, tmp_path):
    words = ("--model", str(run / "model"), "--config_overrides", "{num_labels: 2}", "--max_steps", "1")
    assert train(data, tmp_path, *words) == 0
    config = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "model").config
    assert config.num_labels == 2 and not config.one_logit
