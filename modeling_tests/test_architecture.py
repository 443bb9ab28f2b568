"""The shape of the package: floors, one road, no circle, families apart, copies equal, a light import."""

import ast
import functools
import importlib.util
import re
from pathlib import Path

import pytest

import hf_denseseg
import new_python
from reference import REPOSITORY

ROOT = Path(hf_denseseg.__file__).parent
SCRIPTS = REPOSITORY / "scripts"
FILES = sorted(ROOT.rglob("*.py"))
FAMILIES = {path.parent.name for path in ROOT.glob("models/*/configuration_*.py")}
# Top down; a folder or module of the package imports only from its own floor and from floors below.
FLOORS = (
    ("cli", "commands"),
    ("training",),
    ("inference", "reports"),
    ("evaluation", "visualization"),
    ("models", "data"),
    ("ops",),
    ("files", "errors"),
)
# Recipe -> data -> image processor -> model -> inference -> evaluation -> reports: nothing imports what stands to its
# right. The recipe is read by `training` alone, which stands above all of them.
ROAD = ("data", "models.image_processing", "models", "inference", "evaluation", "reports")


def module_name(path: Path) -> str:
    return ".".join(("hf_denseseg", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")


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


GRAPH = {module_name(path): imports_of(path) for path in FILES}


def floor_of(module: str) -> int:
    """Number of a module's floor, 0 at the top."""
    room = module.split(".")[1]
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms)


def test_every_folder_has_a_floor():
    rooms = {path.name.removesuffix(".py") for path in ROOT.iterdir() if path.suffix in ("", ".py")}
    assert rooms - {"__init__", "__pycache__"} == {room for rooms in FLOORS for room in rooms}
    assert len(rooms - {"__init__", "__pycache__"}) <= 12


@pytest.mark.parametrize("module", GRAPH)
def test_imports_go_downwards(module):
    if module == "hf_denseseg":  # hands names on, and is imported by no module of the package but for its version
        return
    upwards = {name for name in GRAPH[module] - {"hf_denseseg"} if floor_of(name) < floor_of(module)}
    assert not upwards, f"{module} imports from a higher floor: {sorted(upwards)}"


def test_nothing_imports_the_face_of_the_package_but_for_its_version():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            if isinstance(node, ast.Import):
                assert "hf_denseseg" not in names, f"{path} imports the whole package"
            if isinstance(node, ast.ImportFrom) and node.module == "hf_denseseg":
                assert names == ["__version__"], f"{path} takes {names} from the face of the package"


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of nodes that reach each other."""
    reach = {node: closure(graph, node) for node in graph}
    groups = {frozenset([other for other in reach[node] if node in reach.get(other, ())]) for node in graph}
    return [sorted(group) for group in groups if group]


def closure(graph: dict[str, set[str]], start: str) -> set[str]:
    """All nodes that can be reached from one."""
    seen, left = set(), list(graph[start])
    while left:
        node = left.pop()
        if node not in seen and node in graph:
            seen.add(node)
            left += graph[node]
    return seen


def room_graph() -> dict[str, set[str]]:
    """Imports between the rooms (folders and modules of the package root)."""
    rooms: dict[str, set[str]] = {}
    for module, names in GRAPH.items():
        if module != "hf_denseseg":
            own = module.split(".")[1]
            rooms.setdefault(own, set()).update({name.split(".")[1] for name in names - {"hf_denseseg"}} - {own})
    return rooms


def test_there_is_no_circle():
    assert not circles({module: names for module, names in GRAPH.items() if module != "hf_denseseg"})
    assert not circles(room_graph())
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == [["b", "c"]]


def place_on_the_road(module: str) -> int | None:
    """Number of the part of the road that a module belongs to."""
    own = [number for number, part in enumerate(ROAD) if f"{module}.".startswith(f"hf_denseseg.{part}.")]
    return min(own, default=None)


def test_the_road_runs_one_way():
    for module, names in GRAPH.items():
        own = place_on_the_road(module)
        later = {name for name in names if own is not None and (place_on_the_road(name) or 0) > own}
        assert not later, f"{module} ({ROAD[own or 0]}) imports what comes after it: {sorted(later)}"
    assert any("hf_denseseg.training.recipe" in names for module, names in GRAPH.items() if ".commands." in module)


def longest_chain() -> list[str]:
    """The longest chain of imports, each module importing the next."""

    @functools.cache
    def chain(module: str) -> tuple[str, ...]:
        below = (chain(name) for name in GRAPH[module] if name in GRAPH and name != "hf_denseseg")
        return (module, *max(below, key=len, default=()))

    return list(max((chain(module) for module in GRAPH if module != "hf_denseseg"), key=len))


def test_import_chains_stay_short():
    assert len(longest_chain()) <= 12, longest_chain()


def test_no_family_imports_another():
    for path in (ROOT / "models").glob("*/*.py"):
        others = {name.split(".")[2] for name in imports_of(path) if name.startswith("hf_denseseg.models.")}
        assert not others & (FAMILIES - {path.parent.name}), f"{path.name} imports {sorted(others)}"


def test_family_folders_have_the_same_files():
    for folder in (ROOT / "models").iterdir():
        if not (folder / f"configuration_{folder.name}.py").exists():
            continue
        parts = ("configuration", "modeling", "convert", "image_processing", "reference")
        expected = {f"{part}_{folder.name}.py" for part in parts} | {"README.md"}
        assert expected <= {path.name for path in folder.iterdir()}


def test_configurations_check_their_types():
    """Postponed annotations would switch the field checks off without a word."""
    for path in (ROOT / "models").glob("*/configuration_*.py"):
        assert "from __future__ import annotations" not in path.read_text()


def test_import_is_light():
    """`import hf_denseseg` loads neither datasets nor plotting, and leaves warnings and logging as they were."""
    script = (
        "import sys, warnings, torchvision, transformers.modeling_utils; warnings.resetwarnings()\n"
        "before = list(warnings.filters); there = set(sys.modules); import hf_denseseg\n"
        "added = [each for each in warnings.filters if each not in before]; assert not added, added\n"
        "heavy = {'cv2', 'scipy', 'matplotlib', 'gradio', 'datasets', 'evaluate', 'pandas'}\n"
        "assert not heavy & there - {'scipy'}\n"  # transformers itself loads scipy where there is one
        "print(*sorted(heavy & (set(sys.modules) - there)))"
    )
    done = new_python.run(["-c", script])
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


@pytest.mark.parametrize("path", sorted(SCRIPTS.rglob("*.py")), ids=lambda path: path.name)
def test_scripts_import_names_that_exist(path):
    """The type checker reads the package only."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "hf_denseseg":
            for alias in node.names:
                module = importlib.import_module(node.module)
                inside = hasattr(module, "__path__") and importlib.util.find_spec(f"{node.module}.{alias.name}")
                assert inside or hasattr(module, alias.name), f"{node.module} has no {alias.name}"
