"""`scripts/messages.py` lists every error message of the package, and each is a sentence."""

import re
import sys

import pytest

from reference import REPOSITORY

sys.path.append(str(REPOSITORY / "scripts"))
import messages  # noqa: E402 - a script

FILES = sorted(messages.SOURCE.rglob("*.py"))


def test_inserted_values_are_shown_in_braces(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(
        'def f(n):\n    raise InputError(\n        f"--n is {n!r}. "\n        "Give " + str(n + 1) + "."\n    )\n'
    )
    assert list(messages.messages(path)) == [(2, "InputError", "--n is {n}. Give {str(n + 1)}.")]


def test_every_error_that_is_raised_is_listed():
    """Counted by the words in the files; AttributeErrors follow Python's own rules."""
    pattern = re.compile(r"raise (?!AttributeError)([A-Z]\w+)\(")
    for path in FILES:
        raised = pattern.findall(path.read_text())
        listed = [kind for _, kind, _ in messages.messages(path)]
        assert not set(raised) - messages.ERRORS and len(raised) <= len(listed), path


@pytest.mark.parametrize("kind", ["InputError", "RunError"])
def test_messages_are_sentences(kind):
    """Each ends with a full stop, a question, or a value that was inserted; none has two blanks in a row."""
    for path in FILES:
        for line, found, text in messages.messages(path):
            if found == kind:
                assert text.rstrip()[-1] in ".?}", f"{path}:{line}: {text}"
                assert "  " not in text.replace("\n  ", ""), f"{path}:{line}: {text}"


def test_the_list_is_printed_by_part_of_a_path(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["messages.py", "commands/card"])
    messages.main()
    text = capsys.readouterr().out
    assert re.match(r"commands/card\.py:\d+ InputError\n    No recipes", text) and text.endswith("\n1 messages\n")
