"""Doubtful labels: which regions a model contradicts, their order, and the command that lists them."""

import csv
import re

import numpy as np
import pytest
import torch
from PIL import Image

import processes
from hf_denseseg import load_segmentation
from hf_denseseg.cli import main
from hf_denseseg.data.synthetic.scenes import SYNTHETIC_SPEC
from hf_denseseg.evaluation.label_doubt import doubtful_regions
from hf_denseseg.models.auto.registration import create_image_processor, create_model
from test_published_dsct import REDUCED


def floods(mask):
    """Connected sets of the pixels of a mask, by flooding."""
    left, found = {(int(y), int(x)) for y, x in np.argwhere(mask)}, []
    while left:
        queue = [left.pop()]
        part = set(queue)
        while queue:
            y, x = queue.pop()
            for near in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
                if near in left:
                    left.remove(near)
                    part.add(near)
                    queue.append(near)
        found.append(part)
    return found


def regions_in_plain_loops(label, probabilities):
    """(doubt, pixels, label, predicted, box) by the words of the docstring."""
    classes, predicted, regions = len(probabilities), probabilities.argmax(0), []
    for given in range(classes):
        for segment in floods(label == given):
            wrong = {place for place in segment if predicted[place] != given}
            parts = [segment]
            if 2 * len(wrong) <= len(segment):
                mask = np.zeros(label.shape, bool)
                mask[tuple(np.array([*wrong]).T) if wrong else ([], [])] = True
                parts = floods(mask)
            for part in parts:
                mean = sum(-np.log(probabilities[given][place]) for place in part) / len(part)
                others = [int(predicted[place]) for place in part if place in wrong]
                other = min(set(others), key=lambda k: (-others.count(k), k))
                rows, columns = zip(*part, strict=True)
                box = (min(rows), min(columns), max(rows) - min(rows) + 1, max(columns) - min(columns) + 1)
                regions.append((mean * np.log(len(part)), len(part), given, other, box))
    return sorted(regions)


@pytest.mark.parametrize("seed", range(5))
def test_regions_are_those_of_plain_loops(seed):
    random = np.random.default_rng(seed)
    label = random.integers(0, 3, (6, 9)).repeat(3, 0).repeat(2, 1).astype(np.uint8)
    probabilities = random.dirichlet((0.5,) * 3, (18, 9)).repeat(2, 1).transpose(2, 0, 1)
    probabilities = 0.6 * probabilities + 0.4 * (label == np.arange(3)[:, None, None])
    label[4:6, 3:8] = 255
    own = np.log(np.take_along_axis(probabilities, np.where(label < 3, label, 0)[None].astype(int), 0)[0])
    found, numbers = doubtful_regions(label, probabilities.argmax(0), own, np.log(probabilities.max(0)), 3)
    assert [each.doubt for each in found] == sorted((each.doubt for each in found), reverse=True)
    given = sorted((r.doubt, r.pixels, r.label, r.predicted, (r.top, r.left, r.height, r.width)) for r in found)
    expected = regions_in_plain_loops(label, probabilities)
    assert len(given) == len(expected) > 3
    for one, other in zip(given, expected, strict=True):
        assert one[0] == pytest.approx(other[0]) and one[1:] == other[1:]
    for region in found:
        assert (numbers == region.number).sum() == region.pixels
    large, _ = doubtful_regions(label, probabilities.argmax(0), own, np.log(probabilities.max(0)), 3, min_pixels=8)
    assert large == [each for each in found if each.pixels >= 8]


def test_a_hidden_object_is_found_inside_the_class_around_it():
    """A person labeled as road, and a car labeled as person: the second is a segment, the first is not."""
    label = np.zeros((20, 30), np.uint8)
    label[10:16, 20:28] = 1
    predicted = np.zeros((20, 30), int)
    predicted[2:8, 3:9], predicted[10:16, 20:28] = 1, 2
    own, best = np.full((20, 30), np.log(0.9)), np.full((20, 30), np.log(0.9))
    own[predicted != label] = np.log(0.01)
    found, _ = doubtful_regions(label, predicted, own, best, 3)
    assert [(r.label, r.predicted, r.top, r.left, r.height, r.width) for r in found] == [
        (1, 2, 10, 20, 6, 8),
        (0, 1, 2, 3, 6, 6),
    ]
    assert found[0].label_probability == pytest.approx(0.01) and found[0].predicted_probability == pytest.approx(0.9)
    assert found[0].doubt == pytest.approx(-np.log(0.01) * np.log(48))


def test_nothing_to_doubt():
    label = np.full((3, 4), 255, np.uint8)
    zeros = np.zeros((3, 4))
    assert doubtful_regions(label, zeros.astype(int), zeros, zeros, 2)[0] == []
    label[:] = 0
    assert doubtful_regions(label, zeros.astype(int), zeros, zeros, 2)[0] == []


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("checkpoint")
    model = create_model("dsct-tiny-sac", id2label=SYNTHETIC_SPEC.id2label, **REDUCED)
    model.save_pretrained(folder)
    create_image_processor(model.config, do_resize=False).save_pretrained(folder)
    return str(folder)


DATA = ["--dataset", "synthetic:30@48x64", "--split", "val", "--use_cpu", "--min_pixels", "20"]


@pytest.fixture(scope="module")
def complete(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("complete")
    assert main(["data", "doubt", checkpoint, *DATA, "--output_dir", str(folder)]) == 0
    return folder


def test_the_table_lists_regions_of_one_class_and_the_page_shows_the_first(complete, checkpoint):
    rows = list(csv.DictReader((complete / "doubts.csv").open()))
    doubts = [float(row["doubt"]) for row in rows]
    assert doubts == sorted(doubts, reverse=True) and len(rows) > 12
    labels = {row["id"]: np.array(row["label"]) for row in load_segmentation("synthetic:30@48x64", "val").dataset}
    for row in rows:
        top, left, height, width, pixels = (int(row[key]) for key in ("top", "left", "height", "width", "pixels"))
        inside = labels[row["image"]][top : top + height, left : left + width]
        assert inside.shape == (height, width) and row["label"] != row["predicted"]
        assert 20 <= pixels <= (inside == SYNTHETIC_SPEC.label2id[row["label"]]).sum()
        doubt = -np.log(float(row["label_probability"])) * np.log(pixels)
        assert float(row["doubt"]) == pytest.approx(doubt, abs=0.01)
    page = (complete / "index.html").read_text()
    assert page.count("data:image/jpeg") == 24 and f"<h2>1. {rows[0]['image']}</h2>" in page
    assert "http" not in re.sub(r"base64,[^\"]*", "", page) and checkpoint not in page
    assert sorted(path.name for path in complete.iterdir()) == ["doubts.csv", "index.html"]


def test_an_interrupted_ranking_continues_in_two_processes_to_the_same_table(
    checkpoint, complete, tmp_path, monkeypatch
):
    from hf_denseseg.training.tasks import doubt

    find, done = doubt._find, []

    def stopping(*arguments):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(1)
        return find(*arguments)

    words = ["data", "doubt", checkpoint, *DATA, "--output_dir", str(tmp_path / "out")]
    with monkeypatch.context() as patch:
        patch.setattr(doubt, "_find", stopping)
        assert main(words) == 1
    assert not (tmp_path / "out" / "doubts.csv").exists()
    processes.run_two(words, "29577", tmp_path)
    assert "2 of 6 images finished before" in (tmp_path / "rank0.txt").read_text()
    assert (tmp_path / "out" / "doubts.csv").read_text() == (complete / "doubts.csv").read_text()
    assert not (tmp_path / "out" / "doubt_journal").exists()


def test_only_the_most_doubtful_are_kept(checkpoint, complete, tmp_path, monkeypatch):
    from hf_denseseg.training.tasks import doubt

    monkeypatch.setattr(doubt, "MOST", 5)
    assert main(["data", "doubt", checkpoint, *DATA, "--output_dir", str(tmp_path)]) == 0
    expected = (complete / "doubts.csv").read_text().splitlines()[:6]
    assert (tmp_path / "doubts.csv").read_text().splitlines() == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dataset", "synthetic", "--min_pixels", "0"], "--min_pixels is 0. Give 1 or more"),
        (["--dataset", "synthetic", "--split", "holiday"], "holiday"),
        (["--dataset", "nowhere/at/all"], "nowhere/at/all"),
        (["--dataset", "{pairs}"], "has 11 classes, .* has 2"),
    ],
)
def test_bad_input_is_refused(checkpoint, tmp_path, capsys, words, message):
    for part in ("images", "labels"):
        (tmp_path / "pairs" / "train" / part).mkdir(parents=True)
        Image.new("RGB" if part == "images" else "L", (8, 8)).save(tmp_path / "pairs" / "train" / part / "a.png")
    (tmp_path / "pairs" / "classes.json").write_text('["wall", "door"]')
    words = [word.format(pairs=tmp_path / "pairs") for word in words]
    assert main(["data", "doubt", checkpoint, *words, "--output_dir", str(tmp_path / "out")]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
