"""What the README and the pages of docs/ name exists; `test_guides.py` runs their code."""

import importlib.util
import re
from pathlib import Path

import pytest

from hf_denseseg import list_models
from hf_denseseg.cli import COMMANDS
from hf_denseseg.models.auto import registration
from hf_denseseg.reports.model_card import paper_of
from hf_denseseg.training.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PAGES = {page.name: page.read_text() for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_files_it_names_exist(page):
    text, folder = PAGES[page], ROOT if page == "README.md" else ROOT / "docs"
    for command in re.findall(r"^denseseg (\w+)", text, flags=re.MULTILINE):
        assert command in COMMANDS, command
    for path in re.findall(r"(scripts/recipes/[\w./]+\.yaml)", text):
        load_recipe(ROOT / path)
    for path in re.findall(r"\]\((?!http|#)([^)#]+)", text):
        assert (folder / path).exists(), path


def test_every_command_is_named():
    line = next(line for line in README.splitlines() if line.startswith("`denseseg demo |"))
    assert [name for name in COMMANDS if f" {name} " not in line.replace("`", " ")] == []


def test_the_first_screen_shows_a_result_and_code():
    assert len(README.split()) <= 900
    first = "\n".join(README.splitlines()[:40])
    assert re.search(r"!\[[^]]+\]\(docs/images/\w+\.(png|jpg)\)", first) and "```" in first
    assert "```python" in "\n".join(README.splitlines()[:60])


def test_the_tree_is_that_of_the_package():
    page = PAGES["structure.md"]
    named = set(re.findall(r"^  (\w+)/ ", page, flags=re.MULTILINE))
    folders = {path.name for path in (ROOT / "src" / "hf_denseseg").iterdir() if (path / "__init__.py").exists()}
    assert named == folders
    for family in registration.families():
        assert f"{family}/" in page


def test_tables_are_those_of_the_folders_and_result_files():
    spec = importlib.util.spec_from_file_location("update_figures", ROOT / "scripts" / "update_figures.py")
    update_figures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(update_figures)
    for page in update_figures.BLOCKS:
        assert update_figures.updated(page) == page.read_text(), f"{page}: run `python scripts/update_figures.py`"


def test_a_family_without_a_row_in_the_leaderboard_has_no_line_on_it(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import published_tables

    assert published_tables.at_equal_budget("toy") == []
    (line,) = published_tables.at_equal_budget("unept")
    assert "UN-EPT" in line and "DSCT" not in line


def expanded(names: str) -> list[str]:
    """`a-{b,c}` -> a-b, a-c."""
    found = re.search(r"{([^{}]*)}", names)
    if found is None:
        return [names]
    return [each for part in found[1].split(",") for each in expanded(names.replace(found[0], part, 1))]


@pytest.mark.parametrize("family", registration.families())
def test_names_in_the_table_are_the_published_ones(family):
    patterns = re.findall(r"`([^`]+)`", paper_of(family)["variants"])
    assert sorted(name for names in patterns for name in expanded(names)) == list_models(f"{family}-*")
