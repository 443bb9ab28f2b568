"""The notebooks of docs/notebooks/ run, and the committed outputs have no errors, warnings or paths of a machine."""

import json
import os
import re
import sys
from pathlib import Path

import pytest

from reference import REPOSITORY

sys.path.append(str(REPOSITORY / "scripts"))
import notebooks  # noqa: E402 - a script

FILES = sorted(notebooks.FOLDER.glob("*.ipynb"))
FAST = "kernel"  # the others train


def text_of(value) -> str:
    return "".join(value) if isinstance(value, list) else str(value)


def code_cells(path: Path) -> list[dict]:
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


def outputs_of(path: Path) -> list[dict]:
    return [output for cell in code_cells(path) for output in cell["outputs"]]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_committed_outputs_are_those_of_the_committed_source(path):
    notebook = json.loads(path.read_text())
    assert notebook["metadata"]["source_hash"] == notebooks.source_hash(notebook["cells"]), "run `make notebooks`"
    cells = code_cells(path)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    kinds = [kind for output in outputs_of(path) for kind in output.get("data", ())]
    assert {"image/png", "image/jpeg"} & set(kinds)
    assert path.stat().st_size < 400 * 1024


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_committed_outputs_are_tidy(path):
    """Neither errors nor warnings, progress bars, or places of the machine that ran them."""
    for output in outputs_of(path):
        assert output["output_type"] != "error" and output.get("name") != "stderr", output
        texts = [output.get("text", ""), output.get("data", {}).get("text/plain", "")]
        for text in map(text_of, texts):
            assert not re.search(r"Warning|it/s\]|(^|[\s'\"=(])/[a-z]+/|0x[0-9a-f]{6}", text), text


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_links_lead_somewhere(path):
    for cell in json.loads(path.read_text())["cells"]:
        for target in re.findall(r"\]\((?!https?://)([^)#]+)", text_of(cell["source"])):
            assert (path.parent / target).exists(), target


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=() if path.stem == FAST else pytest.mark.slow, id=path.stem) for path in FILES],
)
def test_no_cell_fails(path):
    pytest.importorskip("nbclient", reason="needs the extra `dev`")
    folders = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(REPOSITORY / "src"), *filter(None, folders)]))
        notebook = notebooks.executed(path)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    committed = code_cells(path)
    assert [cell.source for cell in cells] == [text_of(cell["source"]) for cell in committed]
    for cell, kept in zip(cells, committed, strict=True):
        kinds = [{output["output_type"] for output in each["outputs"]} for each in (cell, kept)]
        assert "error" not in kinds[0] and kinds[0] >= kinds[1] - {"stream"}


def test_an_image_is_kept_once():
    data = {"image/png": "a" * 9, "image/jpeg": "b" * 4, "text/plain": "<PIL.Image.Image size=2x2 at 0x7F00AA>"}
    notebooks.keep_smaller_image(data)
    assert data == {"image/jpeg": "bbbb", "text/plain": "<PIL.Image.Image size=2x2>"}
    alone = {"image/png": "a", "text/plain": "<Figure size 800x300 with 2 Axes>"}
    notebooks.keep_smaller_image(alone)
    assert alone == {"image/png": "a", "text/plain": "<Figure size 800x300 with 2 Axes>"}
