"""Every error message of the package in one list, as a newcomer meets them: file, line and text.

python scripts/messages.py           # all
python scripts/messages.py export    # those of files whose path holds this word
"""

import argparse
import ast
import textwrap
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[1] / "src" / "hf_denseseg"
ERRORS = {"InputError", "RunError", "ValueError", "NoSplitError", "NoLabelSpecError", "NoArea", "Fault"}


def text_of(node: ast.expr) -> str:
    """A message as it is written, with the inserted expressions in braces."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(each) for each in node.values)
    if isinstance(node, ast.FormattedValue):
        return "{" + ast.unparse(node.value) + "}"
    if isinstance(node, ast.BinOp):
        return text_of(node.left) + text_of(node.right)
    return "{" + ast.unparse(node) + "}"


def messages(path: Path) -> Iterator[tuple[int, str, str]]:
    """Line, error and text of each message in a module."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ERRORS and node.args:
            yield node.lineno, node.func.id, " | ".join(text_of(each) for each in node.args)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("word", nargs="?", default="", help="part of a path")
    word = parser.parse_args().word
    count = 0
    for path in sorted(SOURCE.rglob("*.py")):
        place = path.relative_to(SOURCE)
        for line, kind, text in sorted(messages(path)) if word in str(place) else ():
            count += 1
            print(f"{place}:{line} {kind}\n" + textwrap.indent(textwrap.fill(text, 112), "    "))
    print(f"{count} messages")


if __name__ == "__main__":
    main()
