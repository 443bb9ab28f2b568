"""The table of all variants: complete, equal to the models, and sortable on the site."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch

import hf_denseseg
from reference import REPOSITORY

sys.path.append(str(REPOSITORY / "scripts"))
import zoo_tables  # noqa: E402 - a script

PAGE = (REPOSITORY / "docs" / "zoo.md").read_text()
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
VARIANTS = json.loads(zoo_tables.FILE.read_text())["figures"]["variants"]


def test_every_variant_has_one_line():
    names = re.findall(r"^\| `([a-z0-9-]+)` \|", PAGE, flags=re.MULTILINE)
    assert sorted(names) == hf_denseseg.list_models() == sorted(VARIANTS)


@pytest.mark.parametrize(
    "name",
    ["dsct-tiny-sac", "hfgd-resnet50", "hlg-mobile", "hlg-maskrcnn-tiny", "setr-naive-deit-base", "unept-resnet50"],
)
def test_parameters_are_those_of_the_model(name):
    row = VARIANTS[name]
    fields = {"image_size": row["counted_size"][0]} if name.startswith("setr") else {}
    with torch.device("meta"):
        model = hf_denseseg.create_model(name, num_labels=row["counted_labels"], **fields)
    assert row["parameters"] == model.num_parameters()


def test_counts_are_those_that_papers_print():
    """DSCT Table 1, SETR Table 4, HFGD Table 9, UN-EPT Table 7, HLG Table 7, in G."""
    printed = {
        "setr-naive-vit-large": 363,
        "setr-mla-vit-large": 368,
        "hfgd-resnet50": 71.63,
        "unept-deit-base": 99.1,
        "hlg-large": 15.9,
    }
    for name, giga in printed.items():
        assert VARIANTS[name]["multiply_adds"] / 1e9 == pytest.approx(giga, rel=0.003), name


def test_a_line_holds_published_figures_recipes_and_card():
    line = next(line for line in PAGE.splitlines() if line.startswith("| `dsct-base-sac` |"))
    assert "| 48.66 / 49.27 | 81.28 / 82.58 | – | not measured |" in line
    assert "[ade20k_160k](../scripts/recipes/dsct/dsct_base_sac_ade20k_160k.yaml)" in line
    assert "[card](../model_cards/dsct-base-sac.md)" in line


def test_what_was_not_measured_says_so():
    columns = {"ADE20K val": ("mean_iou",)}
    counted = {"parameters": 1_000_000, "multiply_adds": 2_000_000_000, "counted_size": [512, 512]}
    line = zoo_tables.line("none", counted, [], columns)
    assert line == "| `none` | 1.0 | 2.0 | 512x512 | not measured | not measured | – | not measured | – | – |"
    timed = counted | {"eager_milliseconds": 1234.4, "onnx_reason": "regions"}
    assert "| 1,234 | not possible |" in zoo_tables.line("none", timed, [], columns)


def test_a_finished_run_of_a_recipe_is_shown_as_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(zoo_tables, "RESULTS", tmp_path)
    recipe = REPOSITORY / "scripts" / "recipes" / "dsct" / "dsct_base_sac_ade20k_160k.yaml"
    row = zoo_tables.Row(recipe, 160_000, {"dataset": "ADE20K val", "mean_iou": 0.4866})
    assert zoo_tables.measured(row, ("mean_iou",)) is None
    (tmp_path / recipe.stem).mkdir()
    run = {"scores": {"mean_iou": 0.471}, "dataset": "ade20k", "split": "val"}
    (tmp_path / recipe.stem / "results.json").write_text(json.dumps(run))
    assert zoo_tables.measured(row, ("mean_iou",)) == "47.10 (ade20k val)"


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_click_on_a_heading_sorts(tmp_path):
    """First click: ascending by number, what has none last; second click: descending."""
    cells = [("a", "1,200"), ("b", "not measured"), ("c", "– / 30.5"), ("d", "7")]
    rows = "".join(f"<tr><td>{name}</td><td>{value}</td></tr>" for name, value in cells)
    script = (REPOSITORY / "docs" / "sortable.js").read_text()
    click = (
        "const names = () => [...document.querySelectorAll('td:first-child')];"
        "const order = () => names().map((cell) => cell.textContent).join('');"
        "const head = document.querySelectorAll('th')[1], seen = [order()];"
        "for (let click = 0; click < 2; click++) { head.click(); seen.push(order()); }"
        "document.title = seen.join(' ');"
    )
    page = tmp_path / "page.html"
    page.write_text(
        '<meta charset="utf-8"><title></title><div class="sortable"><table><thead><tr><th>n</th><th>v</th></tr>'
        f"</thead><tbody>{rows}</tbody></table></div><script>{script}</script><script>{click}</script>"
    )
    words = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run([*words, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=60)
    assert "<title>abcd dcab acdb</title>" in done.stdout, done.stdout[:300]
