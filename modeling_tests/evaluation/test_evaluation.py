"""The evaluator: mmsegmentation's scores, every protocol on models of known prediction, killed runs, the page."""

import csv
import html
import json
import re
import time

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import Dataset
from transformers import PreTrainedConfig, PreTrainedModel, SegformerImageProcessor
from transformers.modeling_outputs import SemanticSegmenterOutput

import processes
from hf_denseseg.cli import main
from hf_denseseg.data.labels import LabelSpec
from hf_denseseg.data.synthetic.scenes import SYNTHETIC_SPEC
from hf_denseseg.errors import InputError
from hf_denseseg.evaluation.segmentation_scores import Evaluation, confusions, count_image
from hf_denseseg.inference.predict.journal import Entry, Journal
from hf_denseseg.inference.settings import InferenceSettings
from hf_denseseg.models.auto.registration import create_image_processor, create_model
from hf_denseseg.training.arguments import TaskTrainingArguments
from hf_denseseg.training.data_arguments import DataArguments
from hf_denseseg.training.tasks.segmentation import inference_settings
from hf_denseseg.training.tasks.segmentation_trainer import SegmentationTrainer
from reference import REPOSITORY
from test_published_dsct import REDUCED

pytest.importorskip("scipy", reason="recall by size needs scipy, of the extra `train`")

IGNORE_INDEX = 255


def spec_of(count, **options):
    return LabelSpec("toy", tuple(f"class {k}" for k in range(count)), **options)


# Numbers


def mmseg_scores(pairs, count):
    """mmsegmentation, restated: `intersect_and_union` of each pair by histograms, summed; then aAcc, mIoU, mAcc."""
    areas = np.zeros((4, count))
    for prediction, label in pairs:
        prediction, label = prediction[label != IGNORE_INDEX], label[label != IGNORE_INDEX]
        bins = {"bins": count, "range": (0, count - 1)} if count > 1 else {"bins": 1, "range": (-0.5, 0.5)}
        intersect, of_prediction, of_label = (
            np.histogram(ids, **bins)[0] for ids in (prediction[prediction == label], prediction, label)
        )
        areas += np.stack([intersect, of_prediction + of_label - intersect, of_prediction, of_label])
    with np.errstate(invalid="ignore"):
        iou, accuracy = areas[0] / areas[1], areas[0] / areas[3]
    return {
        "pixel_accuracy": areas[0].sum() / areas[3].sum(),
        "mean_iou": np.nanmean(iou),
        "mean_accuracy": np.nanmean(accuracy),
        "frequency_weighted_iou": np.nansum(iou * areas[3]) / areas[3].sum(),
    }


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 12), images=st.integers(1, 5))
def test_scores_equal_mmsegmentation_on_random_maps(seed, count, images):
    """Ignored pixels, absent classes, a single class, images of several sizes, in any order and one of them twice."""
    rng = np.random.default_rng(seed)
    pairs = []
    for _ in range(images):
        shape = tuple(rng.integers(1, 12, 2))
        label = rng.integers(0, count, shape)
        label.flat[1:][rng.random(label.size - 1) < 0.3] = IGNORE_INDEX
        pairs.append((rng.integers(0, count, shape), label))
    evaluation = Evaluation(spec_of(count))
    vectors = [count_image(torch.from_numpy(p), torch.from_numpy(t).to(torch.uint8), count) for p, t in pairs]
    for number in rng.permutation(images):
        evaluation.add(int(number), vectors[number])
    evaluation.add(0, vectors[0])  # an image that two processes have predicted
    scores, expected = evaluation.scores(), mmseg_scores(pairs, count)
    assert {key: scores[key] for key in expected} == pytest.approx(expected, abs=1e-12)
    for number, (prediction, label) in enumerate(pairs):
        ious = [
            ((prediction == k) & (label == k)).sum()
            / (((prediction == k) & (label != IGNORE_INDEX)) | (label == k)).sum()
            for k in range(count)
            if (label == k).any()
        ]
        assert evaluation.images[number].mean_iou == pytest.approx(np.mean(ious), abs=1e-12)


def test_confusions_and_worst_images_are_found():
    evaluation = Evaluation(spec_of(3))
    label = torch.zeros(10, 10, dtype=torch.uint8)
    label[5:] = 1
    for number, wrong in enumerate([0, 30, 10, 30]):
        prediction = label.long()
        prediction.flatten()[50 : 50 + wrong] = 2
        evaluation.add(number, count_image(prediction, label, 3))
    assert evaluation.worst(2) == [1, 3] and evaluation.best(2) == [0, 2]
    assert evaluation.images[1].confusion == (1, 2, 0.3) and evaluation.images[0].confusion is None
    assert confusions(evaluation.scores()) == [("class 1", "class 2", 70, 70 / 200)]


def test_a_fully_ignored_image_has_no_score_and_changes_none():
    evaluation, label = Evaluation(spec_of(2)), torch.tensor([[0, 1], [1, 1]])
    evaluation.add(0, count_image(label, label, 2))
    before = evaluation.scores()
    evaluation.add(1, count_image(label, torch.full((2, 2), IGNORE_INDEX), 2))
    assert evaluation.scores() == before and evaluation.images[1][:3] == (None, None, 0)
    assert evaluation.worst(5) == [0]


# Protocols


class ToyConfig(PreTrainedConfig):
    model_type = "evaluation_toy"


class Toy(PreTrainedModel):
    """A model without learned weights, whose logits are a function of the image."""

    config: ToyConfig
    config_class = ToyConfig

    def __init__(self, predict, weight=0.0):
        super().__init__(ToyConfig())
        self.weight = nn.Parameter(torch.tensor(weight))
        self.predict = predict
        self.post_init()

    def forward(self, pixel_values, labels=None):
        return SemanticSegmenterOutput(logits=self.predict(pixel_values))


class Samples(Dataset):
    """Images and labels in memory, in the form of `EvalDataset`."""

    def __init__(self, pairs):
        self.pairs = pairs

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, number):
        image, label = self.pairs[number]
        return {"index": number, "image": image, "label": label, "id": f"image {number}"}


def evaluator(tmp_path, predict, pairs, count, weight=0.0, **protocol):
    arguments = TaskTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True)
    processor = SegformerImageProcessor(image_mean=[0.0] * 3, image_std=[1.0] * 3)
    options = {"image_processor": processor, "spec": spec_of(count), "settings": InferenceSettings(**protocol)}
    return SegmentationTrainer(Toy(predict, weight), arguments, **options, eval_dataset=Samples(pairs))


def halves(width):
    """1 in the left half of the columns that the model is given, 0 in the right half."""
    return (torch.arange(width) < width / 2).float()


def left_half(pixel_values):
    one = 20 * halves(pixel_values.shape[-1]).expand(len(pixel_values), 1, *pixel_values.shape[-2:])
    return torch.cat([20 - one, one], dim=1)


def by_size(pixel_values):
    """Class 1 with logits (0, 3) in images of more than 12 rows, class 0 with logits (1, 0) in others."""
    high = pixel_values.shape[-2] > 12
    values = torch.tensor([0.0, 3.0] if high else [1.0, 0.0])
    return values.view(1, 2, 1, 1).expand(len(pixel_values), 2, *pixel_values.shape[-2:])


@pytest.mark.parametrize(
    ("predict", "protocol", "columns"),
    [
        (left_half, {}, [1] * 8 + [0] * 8),
        (left_half, {"mode": "slide", "crop_size": (12, 8), "stride": (12, 8)}, [1, 1, 1, 1, 0, 0, 0, 0] * 2),
        # Windows at 0, 4 and 8: where two windows contradict each other the first class wins, as in argmax.
        (left_half, {"mode": "slide", "crop_size": (12, 8), "stride": (12, 4)}, [1] * 4 + [0] * 12),
        (left_half, {"flip": True}, [0] * 16),
        (by_size, {}, [0] * 16),
        (by_size, {"base_size": (24, 32)}, [1] * 16),
        # Probability of class 1: (sigmoid(-1) + sigmoid(3)) / 2 = 0.61.
        (by_size, {"scales": (1.0, 2.0)}, [1] * 16),
        # (sigmoid(-1) * 2 + sigmoid(3)) / 3 = 0.497, with flip the same.
        (by_size, {"scales": (0.5, 1.0, 2.0), "flip": True}, [0] * 16),
        (by_size, {"scales": (0.5, 1.0, 2.0), "average": "logits"}, [1] * 16),  # (-1 - 1 + 3) / 3 > 0
    ],
)
def test_each_protocol_gives_the_prediction_worked_out_by_hand(tmp_path, predict, protocol, columns):
    """12x16 images, counted at the label's own resolution."""
    rng = np.random.default_rng(0)
    label = torch.from_numpy(rng.integers(0, 2, (12, 16), dtype=np.uint8))
    label[0, :5] = IGNORE_INDEX
    trainer = evaluator(tmp_path, predict, [(torch.zeros(3, 12, 16, dtype=torch.uint8), label)], 2, **protocol)
    trainer.evaluate()
    prediction = np.tile(columns, (12, 1))
    expected = [[int(((label.numpy() == t) & (prediction == p)).sum()) for p in (0, 1)] for t in (0, 1)]
    assert trainer.scores["confusion_matrix"] == expected


def recipe_protocols():
    """The different test protocols of the shipped recipes, all lengths divided by 16."""
    found = {}
    for path in sorted((REPOSITORY / "scripts" / "recipes").rglob("*.yaml")):
        recipe = yaml.safe_load(path.read_text())
        if recipe.get("task", "semantic-segmentation") != "semantic-segmentation":
            continue
        keys = {key: value for key, value in recipe.items() if key.startswith("test_")}
        values = inference_settings(DataArguments(**keys)).to_dict()
        for key in ("crop_size", "stride", "base_size"):
            values[key] = values[key] and [max(length // 16, 4) for length in values[key]]
        found[json.dumps(values)] = values
    return list(found.values())


def test_every_protocol_of_the_recipes_counts_every_pixel_of_every_image(tmp_path):
    """Images of one color each, of several sizes, and a model that predicts the color: however they are resized,
    padded or cropped, the prediction is known."""
    rng = np.random.default_rng(1)
    pairs, expected = [], np.zeros((3, 3), dtype=np.int64)
    for number, shape in enumerate([(20, 31), (33, 33), (9, 64)]):
        label = rng.integers(0, 3, shape, dtype=np.uint8)
        label[rng.random(shape) < 0.2] = IGNORE_INDEX
        image = torch.zeros(3, *shape, dtype=torch.uint8)
        image[number] = 255
        pairs.append((image, torch.from_numpy(label)))
        expected[:, number] += np.bincount(label.ravel(), minlength=256)[:3]
    protocols = recipe_protocols()
    assert len(protocols) >= 8
    trainer = evaluator(tmp_path, lambda pixel_values: 9 * pixel_values, pairs, 3)
    for values in protocols:
        # The padding of a whole image has the mean color, black here, which changes no prediction.
        trainer.settings = InferenceSettings.from_dict(values)
        trainer.evaluate()
        assert trainer.scores["confusion_matrix"] == expected.tolist(), values


# The journal


def test_a_truncated_line_is_not_read(tmp_path):
    journal = Journal(tmp_path / "journal", {"checkpoint": "a"}, 0)
    assert not journal.prepare()
    entries = [Entry(number, 5, {"id": f"n {number}", "counts": [7, 2**60]}) for number in range(3)]
    for entry in entries:
        journal.add(entry)
    journal.close()
    (file,) = journal.folder.glob("process-*")
    file.write_bytes(file.read_bytes()[:-9])
    again = Journal(tmp_path / "journal", {"checkpoint": "a"}, 0)
    assert again.prepare() and again.read() == entries[:2]
    again.add(entries[2])
    assert again.read() == entries


def interrupted(trainer):
    """Evaluate, but fail before the results are written."""
    with pytest.raises(KeyboardInterrupt), trainer.resumable_evaluation():
        raise KeyboardInterrupt
    return trainer.scores


def test_only_the_same_evaluation_continues_and_changed_images_are_counted_again(tmp_path, caplog, monkeypatch):
    caplog.set_level("INFO")
    label = torch.tensor([[0, 1], [1, IGNORE_INDEX]], dtype=torch.uint8)
    pairs = [(torch.full((3, 2, 2), value, dtype=torch.uint8), label) for value in (0, 50, 100)]
    seen = []

    def predict(pixel_values):
        seen.append(round(255 * float(pixel_values.max())))
        return torch.cat([pixel_values[:, :1], 0.3 - pixel_values[:, :1]], dim=1)

    first = interrupted(evaluator(tmp_path, predict, pairs, 2))
    assert sorted(seen) == [0, 50, 100]
    second = evaluator(tmp_path, predict, pairs, 2)
    assert interrupted(second) == first and len(seen) == 3
    assert second.names == {0: "image 0", 1: "image 1", 2: "image 2"}
    pairs[1] = (pairs[1][0] + 10, label)
    interrupted(evaluator(tmp_path, predict, pairs, 2))
    assert seen[3:] == [60] and "1 images have changed since" in caplog.text
    interrupted(evaluator(tmp_path, predict, pairs, 2, flip=True))
    assert len(seen) == 4 + 6 and "made with another protocol" in caplog.text
    other = evaluator(tmp_path, predict, pairs, 2, weight=1.0, flip=True)
    with other.resumable_evaluation():
        assert len(seen) == 10 + 6 and "made with another checkpoint" in caplog.text
    assert not (tmp_path / "evaluation_journal").exists()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("checkpoint")
    model = create_model("dsct-tiny-sac", num_labels=SYNTHETIC_SPEC.num_labels, **REDUCED)
    model.save_pretrained(folder)
    create_image_processor(model.config, do_resize=False).save_pretrained(folder)
    return str(folder)


DATA = ["--dataset", "synthetic:60@48x64", "--use_cpu"]


@pytest.fixture(scope="module")
def complete(checkpoint, tmp_path_factory):
    """Folder of an uninterrupted evaluation of 12 images."""
    folder = tmp_path_factory.mktemp("complete")
    assert main(["evaluate", checkpoint, *DATA, "--output_dir", str(folder)]) == 0
    return folder


def counted(folder):
    files = (folder / "evaluation_journal").glob("process-*.jsonl")
    return sum(len(file.read_text().split()) > 0 and file.read_text().count("\n") - 1 for file in files)


def test_killed_evaluation_continues_with_two_processes_to_the_same_scores(checkpoint, complete, tmp_path):
    """kill -9 in the middle, then two processes: everything that is written equals an uninterrupted evaluation."""
    words, folder = ["evaluate", checkpoint, *DATA, "--output_dir", str(tmp_path / "killed")], tmp_path / "killed"
    process = processes.start(words)
    deadline = time.monotonic() + 120
    while counted(folder) < 3:
        assert process.is_alive() and time.monotonic() < deadline, "the run ended before it could be killed"
        time.sleep(0.002)
    process.kill()
    process.join()
    assert not (folder / "results.json").exists() and 3 <= counted(folder) < 12
    processes.run_two(words, "29561", tmp_path)
    assert "of 12 images finished before" in (tmp_path / "rank0.txt").read_text()
    expected, again = (json.loads((each / "results.json").read_text()) for each in (complete, folder))
    assert again["scores"] == expected["scores"] and expected["images"] == 12
    for name in ("classes.csv", "images.csv", "confusion.csv"):
        assert (folder / name).read_text() == (complete / name).read_text(), name
    assert not (folder / "evaluation_journal").exists()


# What is written


def test_tables_and_page_show_what_results_json_holds(checkpoint, complete):
    results = json.loads((complete / "results.json").read_text())
    scores = results["scores"]
    tables = {name: list(csv.DictReader((complete / f"{name}.csv").open())) for name in ("classes", "images")}
    assert [row["class"] for row in tables["classes"]] == list(SYNTHETIC_SPEC.classes)
    for row, expected in zip(tables["classes"], scores["per_class"], strict=True):
        for key in ("iou", "accuracy", "boundary_iou", "recall_small", "recall_large"):
            assert row[key] == ("" if expected[key] is None else str(expected[key]))
    own = [float(row["mean_iou"]) for row in tables["images"]]
    assert len(own) == 12 and scores["mean_image_iou"] == pytest.approx(np.mean(own), abs=1e-12)
    confused = list(csv.DictReader((complete / "confusion.csv").open()))
    matrix = np.array(scores["confusion_matrix"])
    assert sum(int(row["pixels"]) for row in confused) == matrix.sum() - np.trace(matrix)
    page = (complete / "index.html").read_text()
    assert page.count("data:image/jpeg") == 8 and page.count("<figure>") == 8  # 6 worst and 2 best of 12
    worst = min(tables["images"], key=lambda row: float(row["mean_iou"]))["id"]
    assert page.index(f"<figcaption>{worst}:") == page.index("<figcaption>")
    assert "http" not in re.sub(r"base64,[^\"]*", "", page) and "src=" not in page.replace('src="data:', "")
    assert f"{100 * scores['boundary_iou']:.2f} %" in page and results["command"] in html.unescape(page)
    assert checkpoint not in page and str(complete) not in page


def test_a_faulty_image_is_named_and_finished_counts_are_kept(tmp_path):
    label = torch.zeros(2, 2, dtype=torch.uint8)

    class Faulty(Samples):
        def __getitem__(self, number):
            if number == 2:
                raise InputError("c.png is cut short. Copy it again.")
            return super().__getitem__(number)

    trainer = evaluator(tmp_path, lambda pixel_values: pixel_values, [(torch.zeros(3, 2, 2).byte(), label)] * 3, 3)
    trainer.eval_dataset = Faulty(trainer.eval_dataset.pairs)
    with pytest.raises(InputError, match=r"c.png is cut short"), trainer.resumable_evaluation():
        pytest.fail("there are no results to write")
    assert counted(tmp_path) == 2


def test_classes_beyond_bytes_are_counted_as_those_below():
    """The same maps under other ids: every count moves with its class."""
    random = np.random.default_rng(0)
    few = torch.from_numpy(random.integers(0, 3, (2, 12, 15)).repeat(4, 1).repeat(4, 2))
    few[1][few[1] == 2] = IGNORE_INDEX
    few[1, :6, :6] = 2
    names = {0: 255, 1: 299, 2: 3, IGNORE_INDEX: 65535}
    many = few.clone().apply_(names.get).to(torch.int32)
    spec = [LabelSpec("s", tuple(map(str, range(count)))) for count in (3, 300)]
    small, large = (Evaluation(each) for each in spec)
    small.add(0, count_image(*few, 3))
    large.add(0, count_image(*many, 300))
    expected, found = small.scores(), large.scores()
    for old, new in list(names.items())[:3]:
        row, other = expected["per_class"][old], found["per_class"][new]
        assert {key: value for key, value in row.items() if key != "class"} == {
            key: value for key, value in other.items() if key != "class"
        }
    assert (found["mean_iou"], found["boundary_iou"]) == (expected["mean_iou"], expected["boundary_iou"])
    assert found["size_recall"] == expected["size_recall"]
    assert sum(row["pixels"] for row in found["per_class"]) == int((few[1] != IGNORE_INDEX).sum())
