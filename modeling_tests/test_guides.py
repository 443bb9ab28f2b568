"""Every code block of the site's pages runs, in the order of its page, or says in its first line what it needs.

A page has a folder of its own. `denseseg` runs in this process, `torchrun` in two forked ones, all else in a shell.
Pages that build on docs/start.md find what it made. A yaml block is the file that its first line names, and each line
of a text block must have been printed on the page before; `…` stands for anything.
"""

import contextlib
import functools
import io
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from guide_data import BROUGHT
from hf_denseseg import example_checkpoint
from hf_denseseg.cli import main, parse_arguments
from hf_denseseg.training.recipe import recipe_fields
from msda_cases import needs_kernel
from processes import run_two
from reference import REPOSITORY

sys.path.append(str(REPOSITORY / "scripts"))
import site_hooks  # noqa: E402 - a script

START = "docs/start.md"
PAGES = [START, *(f"docs/{path.name}" for path in (REPOSITORY / "docs").glob("*.md") if path.name != "start.md")]
PAGES += [file for page, file in site_hooks.ELSEWHERE.items() if not page.startswith(("changelog", "cards/"))]
SLOW = ("docs/deploy.md",)  # traces three exports
BLOCK = re.compile(r"^```(.*)\n((?:.*\n)*?)^```$", flags=re.MULTILINE)
NEEDS = re.compile(r"(?:#|//) needs (.+)\n")
# What a block may need -> whether it is there, so that the block runs.
NEEDED = {
    "a GPU": False,
    "a network": False,
    "minutes": False,
    "hours": False,
    "a benchmark": False,
    "your data": False,
    "a browser": False,
    "a C++ compiler": not needs_kernel(),
}


def blocks(page):
    """Language, code and needs of each block of a page."""
    for language, code in BLOCK.findall((REPOSITORY / page).read_text()):
        found = NEEDS.match(code)
        yield language, code, found[1].split(" and ") if found else []


@pytest.mark.parametrize("page", PAGES)
def test_every_block_runs_or_names_what_it_needs(page):
    text = (REPOSITORY / page).read_text()
    assert text.count("\n```") == 2 * len(BLOCK.findall(text)), "a block has no end"
    for language, code, needs in blocks(page):
        assert language in ("bash", "python", "yaml", "js", "text", ""), language
        assert set(needs) <= NEEDED.keys(), f"{needs}: write one of {list(NEEDED)}"
        assert language != "js" or needs, "no test runs JavaScript: begin with `// needs a browser`"
        if language in ("text", ""):
            assert not re.search(r"^(\$ |denseseg |python |pip |make |torchrun )", code, flags=re.MULTILINE), code


@pytest.mark.parametrize("page", PAGES)
def test_options_of_commands_that_do_not_run_exist(page):
    for language, code, needs in blocks(page):
        for line in code.replace("\\\n", " ").splitlines() if language == "bash" and needs else ():
            words = shlex.split(line, comments=True)
            if words[:1] == ["denseseg"]:
                keys = [word[2:] for word in parse_arguments(words[1:]).overrides if word.startswith("--")]
                assert set(keys) <= recipe_fields().keys()


class Guide:
    """Runs the blocks of a page in a folder."""

    def __init__(self, folder):
        self.folder, self.names, self.printed = folder, {}, io.StringIO()

    def run(self, page):
        (self.folder / "scripts").symlink_to(REPOSITORY / "scripts")  # as in a checkout
        BROUGHT.get(page, lambda folder: None)(self.folder)
        log = logging.StreamHandler(self.printed)
        logging.getLogger().addHandler(log)
        try:
            caught = contextlib.redirect_stdout(self.printed), contextlib.redirect_stderr(self.printed)
            with contextlib.chdir(self.folder), caught[0], caught[1]:
                for language, code, needs in blocks(page):
                    if language and all(NEEDED[need] for need in needs):
                        getattr(self, language)(code, page)
        finally:
            logging.getLogger().removeHandler(log)

    def bash(self, code, page):
        code = code.replace("$(denseseg models --example)", example_checkpoint())
        for line in code.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if not words:
                continue
            if words[0] == "denseseg":
                plain = shlex.shlex(line, posix=True, punctuation_chars=True)
                assert not {"|", "&&", ";", ">", "<", "&"} & set(plain), f"more than a command: {line}"
                expected = re.search(r"# exit code (\d)", line)
                assert main(words[1:]) == int(expected[1] if expected else 0), self.failed(line)
            elif words[:5] == ["torchrun", "--nproc_per_node", "2", "-m", "hf_denseseg.cli"]:
                run_two(words[5:], "29641", self.folder, prepare=functools.partial(os.chdir, self.folder))
            else:
                self.shell(line)

    def shell(self, line):
        path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
        environment = os.environ | {"PATH": path, "PYTHONPATH": str(REPOSITORY / "src")}
        done = subprocess.run(["bash", "-ec", line], env=environment, capture_output=True, text=True)
        self.printed.write(done.stdout + done.stderr)
        assert done.returncode == 0, self.failed(line)

    def python(self, code, page):
        exec(compile(code, page, "exec"), self.names)

    def yaml(self, code, page):
        name = re.match(r"# ([\w./-]+\.yaml)\b", code)
        assert name, f"the first line of a yaml block names its file: {code}"
        assert name[1] in (REPOSITORY / page).read_text().split(code)[1], f"nothing uses {name[1]}"
        (self.folder / name[1]).write_text(code)

    def text(self, code, page):
        for line in code.splitlines():
            wanted = ".*".join(map(re.escape, line.strip().split("…")))
            assert re.search(wanted, self.printed.getvalue()), self.failed(f"this was not printed: {line}")

    def failed(self, what):
        return f"{what}\n{self.printed.getvalue()[-3000:]}"


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """The folder in which docs/start.md ran."""
    folder = tmp_path_factory.mktemp("start")
    Guide(folder).run(START)
    return folder


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[pytest.mark.slow] if page in SLOW else [])
        for page in PAGES
        if any(language and all(NEEDED[need] for need in needs) for language, _, needs in blocks(page))
    ],
)
def test_blocks_run_in_the_order_they_stand(page, started, tmp_path):
    if page == START:
        return  # has run
    for name in ("streets", "runs"):
        shutil.copytree(started / name, tmp_path / name, ignore=shutil.ignore_patterns("checkpoint-*"))
    Guide(tmp_path).run(page)
