"""Calibration: scores against their formulas in plain loops, the temperature against a search, one process and two."""

import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.optimize import minimize_scalar
from test_evaluation import evaluator, left_half
from transformers import pipeline

import processes
from hf_denseseg.cli import main
from hf_denseseg.data.synthetic.scenes import SYNTHETIC_SPEC
from hf_denseseg.errors import InputError
from hf_denseseg.evaluation.calibration import (
    SAMPLED,
    TEMPERATURES,
    Calibration,
    best_temperature,
    calibration_scores,
    sampled_places,
    slopes,
)
from hf_denseseg.inference import SlidingWindowSegmentationPipeline, segmentation
from hf_denseseg.inference.preprocessing import Preprocessing
from hf_denseseg.inference.segmentation import (
    class_probabilities,
    log_probability_strips,
    segment,
    segment_with_confidence,
)
from hf_denseseg.inference.settings import InferenceSettings
from hf_denseseg.models.auto.pretrained import load_image_processor, load_trained_model
from hf_denseseg.models.auto.registration import create_image_processor, create_model
from test_published_dsct import REDUCED

PREPROCESSING = Preprocessing((0.5,) * 3, (0.25,) * 3)


def random_scores(seed, classes=4, size=(9, 11), sharpness=2.0):
    generator = torch.Generator().manual_seed(seed)
    logits = sharpness * torch.randn(classes, *size, generator=generator)
    label = torch.distributions.Categorical(logits=logits.permute(1, 2, 0)).probs.argmax(-1)
    noise = torch.rand(size, generator=generator) < 0.4
    label = torch.where(noise, torch.randint(0, classes, size, generator=generator), label).to(torch.uint8)
    label[0, :3] = 255
    return logits.log_softmax(0), label


def scores_in_plain_loops(images, bins=15):
    """ECE, Brier score and log-likelihood as Guo et al. 2017 and Brier 1950 define them, pixel by pixel."""
    members = [[] for _ in range(bins)]
    brier, likelihood, count = 0.0, 0.0, 0
    for scores, label in images:
        for y in range(label.shape[0]):
            for x in range(label.shape[1]):
                given = int(label[y, x])
                if given == 255:
                    continue
                p = [math.exp(value) for value in scores[:, y, x].tolist()]
                top = max(range(len(p)), key=lambda k: p[k])
                place = next(m for m in range(bins) if p[top] <= (m + 1) / bins or m == bins - 1)
                members[place].append((p[top], top == given))
                brier += sum((p[k] - (k == given)) ** 2 for k in range(len(p)))
                likelihood -= math.log(p[given])
                count += 1
    error = 0.0
    for each in filter(None, members):
        accuracy, confidence = (sum(part) / len(each) for part in zip(*((r, c) for c, r in each), strict=True))
        error += len(each) / count * abs(accuracy - confidence)
    return error, brier / count, likelihood / count


def test_scores_equal_their_formulas_and_add_up_over_strips_and_images():
    images = [random_scores(seed) for seed in range(3)]
    total = np.zeros(len(Calibration(4).counts()), dtype=np.int64)
    for scores, label in images:
        calibration = Calibration(4)
        for rows in (slice(0, 4), slice(4, None)):
            calibration.add(scores[:, rows].argmax(0), scores[:, rows], label[rows])
        total += np.array(calibration.counts())
    found = calibration_scores(total.tolist())
    expected = scores_in_plain_loops(images)
    keys = ("calibration_error", "brier_score", "negative_log_likelihood")
    np.testing.assert_allclose([found[key] for key in keys], expected, rtol=1e-5)
    assert sum(row["pixels"] for row in found["reliability"]) == 3 * (99 - 3)


def test_perfect_and_missing_predictions():
    calibration = Calibration(2)
    assert calibration_scores(calibration.counts())["calibration_error"] is None
    scores = torch.tensor([[0.0, -torch.inf]]).T[:, :, None]  # sure of class 0
    calibration.add(scores.argmax(0), scores, torch.tensor([[0]]))
    found = calibration_scores(calibration.counts())
    assert (found["calibration_error"], found["brier_score"], found["negative_log_likelihood"]) == (0, 0, 0)
    calibration.add(scores.argmax(0), scores, torch.tensor([[1]]))
    assert calibration_scores(calibration.counts())["brier_score"] == 1  # of 0 and 2
    assert calibration_scores(calibration.counts())["negative_log_likelihood"] == 50  # of 0 and 100


@pytest.mark.parametrize("sharpness", [0.5, 2.0, 8.0])
def test_the_temperature_minimizes_the_likelihood(sharpness):
    images = [random_scores(seed, sharpness=sharpness) for seed in range(4)]
    pairs = [(scores[:, label < 4].double(), label[label < 4].long()) for scores, label in images]

    def likelihood(inverse):
        return sum(float(torch.nn.functional.cross_entropy(inverse * z.T, y, reduction="sum")) for z, y in pairs)

    expected = 1 / minimize_scalar(likelihood, bounds=(0.05, 20), method="bounded", options={"xatol": 1e-9}).x
    found = best_temperature(np.sum([slopes(*pair) for pair in pairs], 0).tolist())
    assert found == pytest.approx(expected, rel=2e-3)
    for _, label in images:  # all pixels of a small image are used
        assert sampled_places(label, 4).tolist() == np.flatnonzero(label.numpy() < 4).tolist()


def test_a_temperature_without_an_optimum_ends_at_the_limit():
    sure = torch.tensor([[0.9], [0.1]]).log()
    assert best_temperature(slopes(sure, torch.tensor([0]))) == pytest.approx(TEMPERATURES[0])
    assert best_temperature(slopes(sure, torch.tensor([1]))) == pytest.approx(TEMPERATURES[-1])
    assert best_temperature(slopes(sure[:, :0], torch.tensor([], dtype=torch.long))) == 1
    large = torch.zeros(300, 400, dtype=torch.uint8)
    places = sampled_places(large, 2)
    assert len(places) == SAMPLED == len(places.unique()) and places.max() < large.numel()


PROTOCOLS = (
    {},
    {"mode": "slide", "crop_size": (24, 24), "stride": (16, 16)},
    {"scales": (0.5, 1.0), "flip": True},
    {"scales": (0.5, 1.0), "average": "logits"},
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("checkpoint")
    model = create_model("dsct-tiny-sac", id2label=SYNTHETIC_SPEC.id2label, **REDUCED)
    with torch.no_grad():  # probabilities that differ from each other
        for name, value in model.named_parameters():
            if "decode_head" in name:
                value.mul_(3)
    model.save_pretrained(folder)
    create_image_processor(model.config, do_resize=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(checkpoint):
    return load_trained_model(str(checkpoint)).eval()


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=str)
def test_a_temperature_changes_probabilities_by_their_power_and_no_class(model, protocol):
    image = torch.randint(0, 256, (3, 40, 56), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    plain, cooled = InferenceSettings(**protocol), InferenceSettings(**protocol, temperature=2.5)
    p, q = (class_probabilities(model, image, each, PREPROCESSING).double() for each in (plain, cooled))
    expected = p ** (1 / 2.5)
    torch.testing.assert_close(q, expected / expected.sum(0), atol=1e-5, rtol=1e-4)
    ids, confidence = segment_with_confidence(model, image, cooled, PREPROCESSING)
    assert torch.equal(ids, segment(model, image, plain, PREPROCESSING))
    torch.testing.assert_close(confidence.double(), q.gather(0, ids[None])[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7])
def test_one_logit_is_compared_with_labels_as_it_is_segmented(threshold):
    torch.manual_seed(0)
    model = create_model("dsct-tiny-sac", num_labels=1, **REDUCED).eval()
    image = torch.randint(0, 256, (3, 40, 56), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    settings = InferenceSettings(threshold=threshold, temperature=3.0)
    ((top, ids, scores),) = log_probability_strips(model, image, settings, PREPROCESSING, (40, 56), 2)
    assert top == 0 and torch.equal(ids, segment(model, image, settings, PREPROCESSING))
    torch.testing.assert_close((scores[1].exp() > threshold).long(), ids)
    assert torch.equal(segment_with_confidence(model, image, settings, PREPROCESSING)[0], ids)


def test_a_large_map_is_compared_in_strips(model, monkeypatch):
    image = torch.randint(0, 256, (3, 70, 56), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    whole = list(log_probability_strips(model, image, InferenceSettings(), PREPROCESSING, (140, 90), 11))
    monkeypatch.setattr(segmentation, "LARGEST_MAP", 1000)
    strips = list(log_probability_strips(model, image, InferenceSettings(), PREPROCESSING, (140, 90), 11))
    assert [top for top, *_ in whole] == [0] and [top for top, *_ in strips] == [0, 64, 128]
    torch.testing.assert_close(torch.cat([scores for *_, scores in strips], 1), whole[0][2], atol=1e-5, rtol=1e-5)


def test_training_measures_the_probabilities_on_request(tmp_path):
    words = ["train", "--config_overrides", json.dumps(REDUCED), "--dataset", "synthetic@48x64", "--use_cpu"]
    words += ["--max_train_samples", "4", "--max_eval_samples", "2", "--crop_size", "32", "48", "--max_steps", "1"]
    assert main([*words, "--calibration", "--output_dir", str(tmp_path)]) == 0
    scores = json.loads((tmp_path / "results.json").read_text())["scores"]
    assert 0 <= scores["calibration_error"] <= 1 and len(scores["reliability"]) == 15


@pytest.mark.parametrize("value", [0, -1.0, "warm", True, float("nan")])
def test_temperatures_that_are_none_are_refused(value):
    with pytest.raises(InputError, match="temperature"):
        InferenceSettings(temperature=value)


DATA = ["--dataset", "synthetic:30@48x64", "--use_cpu"]


@pytest.mark.parametrize("order", [None, [1, 0]])
def test_counts_are_the_same_with_calibration_and_the_journal_knows_the_difference(tmp_path, order):
    label = torch.zeros(12, 16, dtype=torch.uint8)
    label[0, :5], label[3:7] = 255, 1
    pairs = [(torch.zeros(3, 12, 16, dtype=torch.uint8), label)] * 3
    first, second = (evaluator(tmp_path, left_half, pairs, 2) for _ in range(2))
    first.class_order = second.class_order = None if order is None else torch.tensor(order)
    with pytest.raises(KeyboardInterrupt), first.resumable_evaluation():
        raise KeyboardInterrupt
    second.fit_temperature()
    with second.resumable_evaluation():
        assert {key: second.scores[key] for key in first.scores} == first.scores
        # Every pixel is predicted with certainty, in whichever order its classes are.
        assert second.scores["calibration_error"] == pytest.approx(1 - first.scores["pixel_accuracy"], abs=1e-6)


def test_one_process_and_two_fit_and_score_alike(checkpoint, tmp_path, capsys):
    folders = [shutil.copytree(checkpoint, tmp_path / name) for name in ("one", "two")]
    words = ["evaluate", "{}", *DATA, "--fit_temperature", "--output_dir"]
    assert main([words[0], str(folders[0]), *words[2:], str(tmp_path / "out0")]) == 0
    assert "calibration error (ECE)" in capsys.readouterr().out
    processes.run_two([words[0], str(folders[1]), *words[2:], str(tmp_path / "out1")], "29583", tmp_path)
    scores = [json.loads((tmp_path / f"out{k}" / "results.json").read_text())["scores"] for k in range(2)]
    assert scores[0] == scores[1]
    settings = [InferenceSettings.load(folder) for folder in folders]
    assert settings[0] == settings[1] and settings[0].temperature == scores[0]["fitted_temperature"] != 1
    # The saved temperature is used: the likelihood gets better, the counts stay.
    assert main(["evaluate", str(folders[0]), *DATA, "--calibration", "--output_dir", str(tmp_path / "after")]) == 0
    after = json.loads((tmp_path / "after" / "results.json").read_text())
    assert after["protocol"]["temperature"] == settings[0].temperature
    assert after["scores"]["confusion_matrix"] == scores[0]["confusion_matrix"]
    assert after["scores"]["negative_log_likelihood"] < scores[0]["negative_log_likelihood"]
    page = (tmp_path / "after" / "index.html").read_text()
    assert "Brier score" in page and f"temperature {settings[0].temperature:.4g}" in page


def test_pipeline_and_predict_use_the_saved_temperature(checkpoint, model, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    InferenceSettings(temperature=3.0).save(folder)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    preprocessing = Preprocessing.from_image_processor(load_image_processor(str(folder)))
    ids, confidence = segment_with_confidence(model, image, InferenceSettings(temperature=3.0), preprocessing)
    expected = {SYNTHETIC_SPEC.classes[k]: float(confidence[ids == k].mean()) for k in ids.unique().tolist()}
    found = pipeline(
        "image-segmentation", model=str(folder), pipeline_class=SlidingWindowSegmentationPipeline, device="cpu"
    )(Image.fromarray(pixels))
    assert {row["label"]: row["score"] for row in found} == pytest.approx(expected, abs=1e-5)
    words = ["predict", str(folder), str(tmp_path / "a.png"), "--output_dir", str(tmp_path / "out"), "--device", "cpu"]
    assert main([*words, "--write", "probabilities", "masks"]) == 0
    (file,) = (tmp_path / "out" / "probabilities").glob("*.npz")
    saved = np.load(file)["probabilities"].astype(np.float64)
    np.testing.assert_allclose(saved.max(0), confidence.numpy(), atol=2e-3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--test_flip"], "leave --test_flip out"),
        (["--submission", "a.zip"], "no labels to fit a temperature to"),
    ],
)
def test_what_cannot_be_fitted_is_refused(checkpoint, tmp_path, capsys, words, message):
    files = sorted(path.name for path in checkpoint.iterdir())
    words = ["evaluate", str(checkpoint), *DATA, "--fit_temperature", *words, "--output_dir", str(tmp_path / "out")]
    assert main(words) == 2
    assert re.search(message, capsys.readouterr().err)
    assert sorted(path.name for path in checkpoint.iterdir()) == files and not (tmp_path / "out").exists()
