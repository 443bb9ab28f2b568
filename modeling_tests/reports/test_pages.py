"""Tables and pages from plain results: one table everywhere, and names of any kind do no harm."""

import html.parser
import json

import pytest
import torch
from PIL import Image

from hf_denseseg.data.labels import LabelSpec
from hf_denseseg.evaluation.segmentation_scores import Evaluation, count_image
from hf_denseseg.reports.class_table import class_table, percent
from hf_denseseg.reports.evaluation_page import Drawn, write_page
from hf_denseseg.reports.model_card import write_card
from hf_denseseg.reports.rendering import image_uri, render
from hf_denseseg.reports.run_page import format_scores, write_report

HOSTILE = ("<script>alert(1)</script>", "salt & pepper", 'the "left" one\'s')
SPEC = LabelSpec(name="<b>own</b> & 'ours'", classes=HOSTILE, categories={"<i>both</i>": HOSTILE[:2]})


class Tags(html.parser.HTMLParser):
    """Every tag with its attributes, and the text between."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def evaluation():
    """Three images: one right, one with a mistake, one without any label."""
    evaluation = Evaluation(SPEC)
    label = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 255]], dtype=torch.uint8)
    right, wrong = label % 255, torch.where(label == 1, 2, label) % 255
    for number, pair in enumerate([(right, label), (wrong, label), (right, torch.full_like(label, 255))]):
        evaluation.add(number, count_image(*pair, 3))
    return evaluation


@pytest.fixture(scope="module")
def results(evaluation):
    return {
        "task": "semantic-segmentation",
        "model": "runs/<b>bold/model",
        "model_type": "dsct",
        "parameters": 1_234_567,
        "dataset": SPEC.name,
        "split": "<val>",
        "images": 3,
        "protocol": {"mode": "whole", "crop_size": None, "note": "</pre><b>"},
        "scores": evaluation.scores(),
        "steps": 7,
        "recipe": {"label_spec": "<own>.yaml"},
        "versions": {"torch": "2<3"},
        "command": "denseseg evaluate '<model>' --test_flip",
    }


def check_page(page):
    """Only our own tags are in the page, nothing is fetched, and every name can be read."""
    found = Tags(page)
    known = {"html", "meta", "title", "style", "script", "h1", "h2", "p", "div", "b", "table", "tr", "th", "td"}
    assert {tag for tag, _ in found.tags} <= known | {"span", "img", "pre", "figure", "figcaption"}
    assert sum(tag == "script" for tag, _ in found.tags) == 1 and page.count("alert(1)") == page.count("alert(1)&lt;")
    for _, attributes in found.tags:
        assert attributes.keys() <= {"class", "style", "src", "alt", "lang", "charset"}
        assert attributes.get("src", "data:image/").startswith("data:image/")
    for name in (*HOSTILE, SPEC.name):
        assert name in found.text
    return found


def test_names_are_escaped_on_the_page_of_a_run(tmp_path, results):
    for name in ("images.png", "learning_curve.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    (tmp_path / "recipe.yaml").write_text("dataset: '</pre><script>'\n")
    write_report(tmp_path, results, SPEC)
    found = check_page((tmp_path / "index.html").read_text())
    assert "dataset: '</pre><script>'" in found.text and "<val>" in found.text and "1.23 M" in found.text
    assert [attributes["alt"] for tag, attributes in found.tags if tag == "img"] == ["images", "learning curve"]


def test_names_are_escaped_on_the_page_of_an_evaluation(tmp_path, results, evaluation):
    drawn = [
        Drawn(f"\"/><img src='x{number}'>.png", evaluation.images[number], Image.new("RGB", (4, 4)))
        for number in range(3)
    ]
    write_page(tmp_path, results, SPEC, protocol="whole & <all>", chance="'", worst=drawn[1:], best=drawn[:1])
    found = check_page((tmp_path / "index.html").read_text())
    assert "whole & <all>" in found.text and results["command"] in found.text and "</pre><b>" in found.text
    assert "<i>both</i>" in found.text and "torch 2<3" in found.text and "<b>bold/model on <b>own" in found.text
    assert [attributes["alt"] for tag, attributes in found.tags if tag == "img"][1:] == [
        each.name for each in (drawn[1], drawn[2], drawn[0])
    ]
    assert f"mostly {HOSTILE[1]} taken for {HOSTILE[2]} (42.86 % of the pixels)" in found.text
    assert "mIoU – %, pixel accuracy – %" in found.text  # the image without a label


def test_terminal_pages_and_card_show_the_same_table(tmp_path, results, evaluation):
    table = class_table("semantic-segmentation", results["scores"])
    assert table.heads == ("class", "IoU %", "accuracy %", "boundary IoU %", "pixels")
    assert [row[0] for row in table.rows] == list(HOSTILE) and table.rows[0][1:3] == ("100.00", "100.00")
    assert table.rows[2][2] == "–" and table.bars == (1.0, 0.5, 0.0)  # the third class is only predicted
    lines = format_scores(results).splitlines()
    for line, cells in zip(lines, [table.heads, *table.rows], strict=False):
        assert line.split()[1 - len(cells) :] == " ".join(cells[1:]).split()[1 - len(cells) :]
    assert len({len(line) for line in lines[:5]}) == 1 and lines[4] == "-" * len(lines[0])
    assert lines[5].split() == ["mIoU", percent(results["scores"]["mean_iou"])]
    write_card(tmp_path, results, SPEC)
    card = (tmp_path / "README.md").read_text()
    for cells in (table.heads, *table.rows):
        assert f"| {' | '.join(cells[:-1])} |\n" in card


@pytest.mark.parametrize(("value", "text"), [(None, "–"), (0.0, "0.00"), (0.12345, "12.35"), (1.0, "100.00")])
def test_fractions_are_shown_in_percent_with_two_decimals(value, text):
    assert percent(value) == text


def test_a_value_that_a_template_lacks_is_an_error():
    import jinja2

    with pytest.raises(jinja2.UndefinedError, match="results"):
        render("run_page.html", title="t")


def test_files_and_drawn_images_are_embedded():
    assert image_uri(b"abc", "png") == "data:image/png;base64,YWJj"
    assert image_uri(Image.new("RGB", (2, 2)), "jpeg").startswith("data:image/jpeg;base64,/9j/")


def test_results_that_were_read_from_json_give_the_same_table(results):
    scores = json.loads(json.dumps(results["scores"]))
    assert class_table("semantic-segmentation", scores) == class_table("semantic-segmentation", results["scores"])
