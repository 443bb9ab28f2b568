"""The shape of the package: import floors, families apart, copies equal, a light import."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hf_denseseg

ROOT = Path(hf_denseseg.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
FAMILIES = {path.parent.name for path in ROOT.glob("models/*/configuration_*.py")}
FLOORS = ("everything else", "training, tasks, model_card, reports", "commands", "cli")
MIDDLE = {"training", "reports"}


def module_name(path: Path) -> str:
    return ".".join(("hf_denseseg", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")


def floor_of(module: str) -> int:
    """Number of a module's floor in `FLOORS`."""
    part = module.split(".")[1] if "." in module else "cli"
    if part in ("cli", "commands"):
        return FLOORS.index(part)
    return 1 if part in MIDDLE else 0


def imports_of(path: Path) -> set[str]:
    """Modules of the package that a file imports, anywhere in it."""
    known = {module_name(each) for each in FILES}
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            deeper = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (deeper & known) or {node.module}
        elif isinstance(node, ast.ImportFrom) and node.level:
            raise AssertionError(f"{path}: relative import; write the full name")
    return {name for name in found if name.split(".")[0] == "hf_denseseg"}


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_go_downwards(path):
    own = module_name(path)
    if own == "hf_denseseg":
        return
    upwards = {name for name in imports_of(path) if name != "hf_denseseg" and floor_of(name) > floor_of(own)}
    assert not upwards, f"{own} ({FLOORS[floor_of(own)]}) imports from a higher floor: {sorted(upwards)}"


def test_no_family_imports_another():
    for path in (ROOT / "models").glob("*/*.py"):
        others = {name.split(".")[2] for name in imports_of(path) if name.startswith("hf_denseseg.models.")}
        assert not others & (FAMILIES - {path.parent.name}), f"{path.name} imports {sorted(others)}"


def test_family_folders_have_the_same_files():
    for folder in (ROOT / "models").iterdir():
        if not (folder / f"configuration_{folder.name}.py").exists():
            continue
        parts = ("configuration", "modeling", "convert", "image_processing", "literal")
        expected = {f"{part}_{folder.name}.py" for part in parts} | {"README.md"}
        assert expected <= {path.name for path in folder.iterdir()}


def test_configurations_check_their_types():
    """Postponed annotations would switch the field checks off without a word."""
    for path in (ROOT / "models").glob("*/configuration_*.py"):
        assert "from __future__ import annotations" not in path.read_text()


def test_import_is_light():
    """`import hf_denseseg` loads neither data sets nor plotting, and leaves warnings and logging as they were."""
    script = (
        "import sys, warnings, torchvision, transformers.modeling_utils\n"
        "before = list(warnings.filters); there = set(sys.modules); import hf_denseseg\n"
        "added = [each for each in warnings.filters if each not in before]; assert not added, added\n"
        "heavy = {'cv2', 'scipy', 'matplotlib', 'gradio', 'datasets', 'evaluate', 'pandas'}\n"
        "print(*sorted(heavy & (set(sys.modules) - there)))"  # transformers itself loads scipy where there is one
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == []


def blocks() -> dict[str, ast.AST]:
    """Every class and function of the modeling files by `module.Name`."""
    found = {}
    for path in (ROOT / "models").glob("*/*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                found[f"{path.stem}.{node.name}"] = node
    return found


def shape_of(node: ast.AST, family: str) -> str:
    """Syntax tree without the family's prefix and without docstrings."""
    tree = ast.parse(ast.unparse(node))
    for each in ast.walk(tree):
        if isinstance(each, ast.ClassDef | ast.FunctionDef) and ast.get_docstring(each) is not None:
            each.body = each.body[1:]
    return re.sub(rf"\b{family.capitalize()}(?=[A-Z])", "", ast.dump(tree))


COPY = re.compile(r"# Same as (\w+) in modeling_(\w+)\n(?:@.*\n)*(?:class|def) (\w+)")


def test_copied_blocks_are_equal_up_to_the_prefix():
    """A comment `# Same as SetrMLP in modeling_setr` above a class promises it."""
    known = blocks()
    for path in (ROOT / "models").glob("*/*.py"):
        for original, family, copy in COPY.findall(path.read_text()):
            expected = shape_of(known[f"modeling_{family}.{original}"], family)
            assert shape_of(known[f"{path.stem}.{copy}"], path.parent.name) == expected, f"{copy} is not {original}"


def test_unequal_copies_would_be_found():
    texts = ("class SetrA:\n    b = SetrC(1)", 'class HlgA:\n    """D."""\n    b = HlgC(1)', "class HlgA:\n    b = 2")
    first, same, other = (ast.parse(text).body[0] for text in texts)
    assert shape_of(first, "setr") == shape_of(same, "hlg") != shape_of(other, "hlg")


def test_sizes_stay_readable():
    """Written lines: modeling file 900, configuration 150, other modules 350, commands 120; 60 in a function."""
    for path in FILES:
        text = path.read_text()
        lines = [line for line in text.splitlines() if line.strip()]
        limit = 900 if path.stem.startswith("modeling_") else 150 if path.stem.startswith("configuration_") else 350
        limit = 120 if path.parent.name == "commands" else limit
        assert len(lines) <= limit, f"{path} has {len(lines)} lines, at most {limit}"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                first = node.body[1].lineno if ast.get_docstring(node) and len(node.body) > 1 else node.body[0].lineno
                assert node.end_lineno - first < 60, f"{path}: {node.name} is too long"
