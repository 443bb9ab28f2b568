"""The steps of docs/adding_an_architecture.md, followed: a toy family is added to a copy of the tree.

`fixtures/toy_family/` holds what a contributor writes, where it would lie, and can be copied as a template. Nothing
else of the tree is touched, and everything else must adapt. There, `official_toy.py` plays the authors' code, and
`use_toy.py` does what a user does.
"""

import importlib.util
import os
import re
import shutil
from pathlib import Path

import pytest

import new_python
from reference import FIXTURES, REPOSITORY

TEMPLATE = FIXTURES / "toy_family"
PLACES = {"models": "src/hf_denseseg/models", "modeling_tests": "modeling_tests", "scripts": "scripts"}

# Tests that it has to pass: the common ones, and its own except those of compiler and exporter, which are slow.
SELECTED_TESTS = {
    "models/test_modeling_toy": "not (compiles or exports)",
    "models/test_published_toy": "test",
    "models/test_parity": "toy or every_family",
    "training/test_recipes": "toy",
    "test_architecture": "toy or famil or copied",
    "test_readme": "table",
}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """The repository without its recipes, plus the toy family."""
    root = tmp_path_factory.mktemp("tree")
    without = shutil.ignore_patterns("__pycache__", "*.egg-info", "recipes", TEMPLATE.name)
    for name in ("src", "modeling_tests", "scripts", "docs"):
        shutil.copytree(REPOSITORY / name, root / name, ignore=without)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(REPOSITORY / name, root)
    for part, place in PLACES.items():
        shutil.copytree(
            TEMPLATE / part, root / place, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    spec = importlib.util.spec_from_file_location("official_toy", TEMPLATE / "official_toy.py")
    official = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(official)
    official.record_case(root / "modeling_tests" / "fixtures" / "toy" / "forward")
    return root


def run(tree, *words):
    """Run Python on the copied package; nothing of the real one is importable before it."""
    environment = {key: value for key, value in os.environ.items() if key != "DENSESEG_REFERENCE"}
    environment |= {"PYTHONPATH": str(tree / "src"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = new_python.run(words, tree, environment)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def output(tree, tmp_path_factory):
    """What `use_toy.py` prints; it follows the README from names to cards and rewrites the README's tables."""
    return run(tree, TEMPLATE / "use_toy.py", tree, tmp_path_factory.mktemp("used"))


def test_the_folder_alone_makes_it_usable_everywhere(output, tree):
    assert re.search(r"^toy-small +0\.01 ", output, flags=re.MULTILINE), output
    line = "| [Toy](src/hf_denseseg/models/toy/README.md) | A Toy That Segments (nowhere) | `toy-{small,large}` |"
    assert line in (tree / "README.md").read_text().splitlines()


def test_it_passes_the_common_tests(output, tree):
    files = [f"modeling_tests/{name}.py" for name in SELECTED_TESTS]
    chosen = " or ".join(f"({Path(name).name} and ({tests}))" for name, tests in SELECTED_TESTS.items())
    report = run(tree, "-m", "pytest", "-v", "-p", "no:cacheprovider", *files, "-k", chosen)
    for name in files:
        assert re.search(rf"^{name}::.* PASSED", report, flags=re.MULTILINE), f"no test of {name} ran:\n{report}"
    assert " SKIPPED" not in report, report


def test_the_page_names_what_was_added(tree):
    page = (REPOSITORY / "docs" / "adding_an_architecture.md").read_text()
    words = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", page, flags=re.DOTALL))
    files = [path.relative_to(tree) for path in tree.rglob("*") if path.suffix != ".pyc"]
    files = [path for path in files if "toy" in path.as_posix()]
    patterns = [word.replace("<family>", "toy") for word in words if re.search(r"\.\w+$|/$", word)]
    assert "modeling_toy.py" in patterns
    for pattern in patterns:
        found = any(path.match(pattern) for path in files) or (REPOSITORY / pattern).exists()
        assert found, f"the toy family has no {pattern}"
    folder = [path for path in files if path.parent.name == "toy" and path.suffix]
    unnamed = [path.name for path in folder if not any(path.match(pattern) for pattern in patterns)]
    assert folder and not unnamed, f"the page does not name {unnamed}"
    source = "\n".join((tree / path).read_text() for path in files if path.suffix == ".py")
    for name in (word for word in words if word.startswith("<Family>") or word.isupper()):
        assert re.search(rf"^(class )?{name.replace('<Family>', 'Toy')}\b", source, flags=re.MULTILINE), name
