"""What the README tells a reader works."""

import importlib.util
import re
from pathlib import Path

from hf_denseseg.cli import COMMANDS
from hf_denseseg.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_python_snippets_run_in_the_order_they_stand(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(snippets) >= 3
    names: dict = {}
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), names)
    assert "(320, 240)" in capsys.readouterr().out


def test_commands_and_files_it_names_exist():
    for command in re.findall(r"^denseseg (\w+)", README, flags=re.MULTILINE):
        assert command in COMMANDS, command
    for path in re.findall(r"(scripts/recipes/[\w./]+\.yaml)", README):
        load_recipe(ROOT / path)
    for path in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / path).exists(), path


def test_every_command_is_named():
    line = next(line for line in README.splitlines() if line.startswith("`denseseg demo |"))
    assert [name for name in COMMANDS if f" {name} " not in line.replace("`", " ")] == []


def test_readme_stays_short():
    assert len(README.splitlines()) <= 235


def test_figures_are_those_of_the_result_files():
    spec = importlib.util.spec_from_file_location("update_figures", ROOT / "scripts" / "update_figures.py")
    update_figures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(update_figures)
    block = README.partition(update_figures.START)[2].partition(update_figures.END)[0]
    assert block == update_figures.block(), "run `python scripts/update_figures.py`"
