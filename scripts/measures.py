"""Measure the shape of the package: entries, imports, sizes, comments, types and words.

python scripts/measures.py                    this checkout
python scripts/measures.py --source FOLDER    another tree's src/hf_denseseg, for a comparison
"""

import argparse
import ast
import functools
import io
import json
import re
import tokenize
from collections.abc import Iterable
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[1] / "src" / "hf_denseseg"
LONGEST_MODULE = 350
# Words for which the field has others: image, prediction, ground truth, fraction, license, dataset, figure, flip, ...
WORDS = (
    *(
        "picture",
        "answer",
        "truth",
        "share",
        "licence",
        "data set",
        "sheet",
        "mirror",
        "anew",
        "commonest",
        "likeness",
    ),
    *(
        "settle",
        "void",
        "labelled",
        "labeller",
        "literal",
        "band",
        "remedy",
        "mend",
        "drop-out",
        "up-sampling",
        "colour",
    ),
)


def module_name(path: Path, source: Path) -> str:
    """Dotted name of a file of the package."""
    return ".".join((source.name, *path.relative_to(source).with_suffix("").parts)).removesuffix(".__init__")


def imports(tree: ast.AST, known: Iterable[str]) -> set[str]:
    """Modules of the package that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} & set(known) or {node.module}
    return found & set(known)


def reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    """All nodes that can be reached from one."""
    seen: set[str] = set()
    left = list(graph[start])
    while left:
        node = left.pop()
        if node not in seen:
            seen.add(node)
            left += graph[node]
    return seen


def longest_chain(graph: dict[str, set[str]]) -> int | None:
    """Modules in the longest chain of imports; None where there is a circle."""
    if any(node in reachable(graph, node) for node in graph):
        return None

    @functools.cache
    def length(module: str) -> int:
        return 1 + max(map(length, graph[module]), default=0)

    return max(map(length, graph))


def comments_and_code(text: str) -> tuple[int, int]:
    """Lines with a comment, and lines of code (neither blank, nor comment alone, nor docstring)."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    comments = {token.start[0] for token in tokens if token.type == tokenize.COMMENT}
    tree, docstrings = ast.parse(text), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            docstrings |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    written = {number for number, line in enumerate(text.splitlines(), 1) if line.strip()}
    alone = {number for number, line in enumerate(text.splitlines(), 1) if line.strip().startswith("#")}
    return len(comments), len(written - alone - docstrings)


def measure(source: Path) -> dict[str, object]:
    """All measures of a package folder."""
    files = sorted(source.rglob("*.py"))
    texts = {module_name(path, source): path.read_text() for path in files}
    trees = {name: ast.parse(text) for name, text in texts.items()}
    graph = {name: imports(tree, texts) - {source.name, name} for name, tree in trees.items() if name != source.name}
    counted = [comments_and_code(text) for text in texts.values()]
    arguments = [
        ast.unparse(each.annotation) if each.annotation else ""
        for tree in trees.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        for each in (*node.args.args, *node.args.kwonlyargs)
        if each.arg not in ("self", "cls")
    ]
    prose = "\n".join(
        path.read_text() for path in source.rglob("*") if path.suffix in (".py", ".md", ".yaml", ".jinja")
    )
    lines = {name: len(text.splitlines()) for name, text in texts.items()}
    return {
        "entries in the package root": len(
            {path.name for path in source.iterdir()} - {"__pycache__", "__init__.py", "py.typed"}
        ),
        "modules": len(files),
        "lines": sum(lines.values()),
        "circles of imports": sum(node in reachable(graph, node) for node in graph),
        "modules in the longest import chain": longest_chain(graph),
        f"modules above {LONGEST_MODULE} lines": sorted(n for n, count in lines.items() if count > LONGEST_MODULE),
        "comment lines / code lines, %": round(100 * sum(c for c, _ in counted) / sum(n for _, n in counted), 1),
        "arguments typed as bare Any, %": round(100 * arguments.count("Any") / len(arguments), 1),
        "words": {word: len(re.findall(rf"(?i)(?<!ground )\b{word}(s|d|ed)?\b", prose)) for word in WORDS},
    }


def main() -> None:
    """Print the measures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, default=SOURCE, help="package folder (default: of this checkout)")
    print(json.dumps(measure(parser.parse_args().source), indent=1))


if __name__ == "__main__":
    main()
