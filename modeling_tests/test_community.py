"""The files for contributors: what they name exists, and a release check notices what is wrong."""

import re
import sys

import pytest
import yaml

import hf_denseseg
from hf_denseseg.cli import COMMANDS
from reference import REPOSITORY

sys.path.append(str(REPOSITORY / "scripts"))
import release_check  # noqa: E402 - a script

FILES = [REPOSITORY / name for name in ("CONTRIBUTING.md", "AGENTS.md", "CITATION.cff")]
FILES += sorted(path for path in (REPOSITORY / ".github").rglob("*") if path.is_file())
MAKEFILE = (REPOSITORY / "Makefile").read_text()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_commands_and_files_that_it_names_exist(path):
    text = path.read_text()
    for target in re.findall(r"`?make ([\w-]+)", text):
        assert re.search(rf"^{target}:", MAKEFILE, flags=re.MULTILINE), target
    for command in re.findall(r"`denseseg ([a-z]+)", text):
        assert command in COMMANDS, command
    for name in re.findall(r"`((?:src|scripts|modeling_tests|docs)/[\w./-]+)`", text):
        assert (REPOSITORY / name).exists(), name
    for name in re.findall(r"python (scripts/\w+\.py)", text):
        assert (REPOSITORY / name).exists(), name
    for link in re.findall(r"\]\((?!http)([^)]+)\)", text):
        assert (path.parent / link).exists(), link


def test_forms_and_citation_are_valid():
    for path in (REPOSITORY / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        form = yaml.safe_load(path.read_text())
        assert {"name", "description", "body"} <= form.keys()
        assert all({"type", "attributes"} <= field.keys() and field["attributes"]["label"] for field in form["body"])
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors", "version", "license"} <= citation.keys()


def test_release_check_compares_the_versions(monkeypatch):
    assert release_check.versions() is None and release_check.figures() is None
    monkeypatch.setattr(hf_denseseg, "__version__", "9.9")
    assert "__version__ 9.9" in release_check.versions()
