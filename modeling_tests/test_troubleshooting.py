"""The messages that docs/troubleshooting.md quotes are those of the source."""

import ast
import re
import sys

import pytest

from reference import REPOSITORY

sys.path.append(str(REPOSITORY / "scripts"))
import messages  # noqa: E402 - a script

PAGE = (REPOSITORY / "docs" / "troubleshooting.md").read_text()
QUOTED = [quoted for _, quoted in re.findall(r"^### (``?)(.+)\1$", PAGE, flags=re.MULTILINE)]


def strings():
    """Every string of the package, with expressions and format fields as `{}`."""
    for path in messages.SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant | ast.JoinedStr | ast.BinOp):
                text = messages.text_of(node)
                yield re.sub(r"%(\.\d)?[sdrgf]", "{}", text).replace("%%", "%")


TEXTS = [text for text in strings() if " " in text]


@pytest.mark.parametrize("quoted", QUOTED, ids=range(len(QUOTED)))
def test_a_quoted_message_stands_in_the_source(quoted):
    parts = [re.escape(part) for part in re.split(r"'?…'?", quoted) if part.strip()]
    pattern = re.compile(".*".join(parts), flags=re.DOTALL)
    assert any(pattern.search(text) for text in TEXTS)


def test_it_quotes_enough():
    assert 20 <= len(QUOTED) == len(set(QUOTED))
