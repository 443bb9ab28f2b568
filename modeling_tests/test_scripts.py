"""Every script tells how it is called."""

import re
import runpy
import sys

import pytest

from reference import REPOSITORY

SCRIPTS = [path for path in sorted((REPOSITORY / "scripts").glob("*.py")) if "argparse" in path.read_text()]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_help_has_an_example(path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [path.name, "--help"])
    monkeypatch.setattr(sys, "path", [str(path.parent), *sys.path])
    beside = {each.stem for each in SCRIPTS} - sys.modules.keys()
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(path), run_name="__main__")
    for name in beside & sys.modules.keys():  # imported with paths that end with this test
        del sys.modules[name]
    assert not ended.value.code
    assert re.search(rf"\b(python|torchrun) (\S+ )*scripts/{path.name}", capsys.readouterr().out)
