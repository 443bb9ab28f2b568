"""New Python processes that have imported torch and transformers, which takes seconds, but not the package.

They are forked from one that `conftest.py` starts before it imports the package and before the first test.
"""

import os
import runpy
import sys
import tempfile
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from types import SimpleNamespace

from reference import REPOSITORY

TESTS = REPOSITORY / "modeling_tests"
_server: list[Connection] = []


def start_server() -> None:
    """Fork the process that all others are forked from; nothing of the package may be imported yet."""
    assert "hf_denseseg" not in sys.modules
    ours, theirs = Pipe()
    if os.fork() == 0:
        ours.close()  # else it would never see the end of the tests
        try:
            _serve(theirs)
        finally:
            os._exit(0)
    theirs.close()
    _server.append(ours)


def _serve(requests: Connection) -> None:
    while True:
        try:
            request = requests.recv()
        except EOFError:
            return
        pid = os.fork()
        if pid == 0:
            _run(*request)
        requests.send(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


def _run(words: list[str], folder: str, environment: dict[str, str], output: str, errors: str) -> None:
    """Be `python <words>` in the folder."""
    code = 1
    try:
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        for number, name in ((1, output), (2, errors)):
            file = os.open(name, os.O_WRONLY)
            os.dup2(file, number)
            os.close(file)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        _forget_the_tests(environment)
        _execute(words)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _forget_the_tests(environment: dict[str, str]) -> None:
    """Remove the modules beside this one, and make the path that of a new interpreter."""
    for name, module in list(sys.modules.items()):
        if Path(getattr(module, "__file__", None) or "/").is_relative_to(TESTS):
            del sys.modules[name]
    first = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    foreign = {"", str(REPOSITORY), *first}
    sys.path[:] = first + [path for path in sys.path if path not in foreign and not Path(path).is_relative_to(TESTS)]


def _execute(words: list[str]) -> None:
    kind, *rest = words
    if kind == "-c":
        sys.path.insert(0, "")
        sys.argv = [kind, *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    elif kind == "-m":
        sys.path.insert(0, os.getcwd())
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(kind).parent))
        sys.argv = words
        runpy.run_path(kind, run_name="__main__")


def run(
    words: Sequence[object], folder: Path | None = None, environment: dict[str, str] | None = None
) -> SimpleNamespace:
    """Run `python <words>` and wait; `-c`, `-m` and a script are understood.

    Returns:
        `returncode`, `stdout` and `stderr`, as `subprocess.run` gives them.
    """
    with tempfile.NamedTemporaryFile("r") as output, tempfile.NamedTemporaryFile("r") as errors:
        environment = dict(os.environ if environment is None else environment)
        _server[0].send(
            ([str(word) for word in words], str(folder or Path.cwd()), environment, output.name, errors.name)
        )
        assert _server[0].poll(600), f"python {words[:1]} does not end"
        return SimpleNamespace(returncode=_server[0].recv(), stdout=output.read(), stderr=errors.read())
