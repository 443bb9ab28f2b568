"""The layout of `--help`: as wide as the terminal, however wide the source is."""

import argparse
import re
import textwrap
from collections.abc import Iterator


class HelpFormatter(argparse.HelpFormatter):
    """Wrap descriptions and epilogs to the terminal, see `laid_out`; names with a hyphen stay whole."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(laid_out(text, width))


def laid_out(text: str, width: int) -> Iterator[str]:
    """Lines of at most `width` columns, words permitting.

    A paragraph ends before a blank line, before an indented one, and after a colon. An indented line is a command,
    continued after a backslash where it is too long, or a name, two spaces or more, and its meaning, which keeps to
    its own column.

    Args:
        text: description or epilog of a parser.
        width: columns.
    """
    paragraph: list[str] = []
    for line in [*re.sub(r" \\\n\s*", " ", text).splitlines(), ""]:
        if line[:1].strip():
            paragraph.append(line)
            if not line.endswith(":"):
                continue
        yield from textwrap.wrap(" ".join(paragraph), width, break_long_words=False, break_on_hyphens=False)
        paragraph = []
        if not line.strip():
            yield ""
        elif line[0].isspace():
            yield from _entry(line, width)


def _entry(line: str, width: int) -> Iterator[str]:
    """One indented line."""
    indent = " " * (len(line) - len(line.lstrip()))
    if name := re.match(r"\s*\S.*?\s{2,}(?=\S)", line):
        hanging = " " * name.end()
        wrapped = textwrap.wrap(line[name.end() :], width - name.end(), break_long_words=False, break_on_hyphens=False)
        yield from (f"{hanging if number else name[0]}{each}" for number, each in enumerate(wrapped))
        return
    # An option stays with its values, and what is quoted in one piece.
    parts = re.findall(r"--\w+(?: (?![-|&])(?:'[^']*'|\S)+)*|(?:'[^']*'|\S)+", line)
    row = indent + parts[0]
    for part in parts[1:]:
        if len(row) + 1 + len(part) > width - 2:  # room for the backslash
            yield f"{row} \\"
            row = f"{indent}    {part}"
        else:
            row += f" {part}"
    yield row
