"""Processes of their own for runs that are killed or work together, without the seconds of imports that each takes.

They are forked from one that has done nothing but import the package, so they know nothing of the tests before.
`conftest.py` forks that one before the first test, since the imports of pytest serve it as well.
"""

import multiprocessing
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing import connection, forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["hf_denseseg.cli", "hf_denseseg.training.run", __name__])


def fork_server() -> None:
    """Start the fork server as a fork of this process instead of a new interpreter that imports everything again."""
    if sys.version_info >= (3, 14):
        return  # its server wants a key, so there the first process that is needed starts it as usual
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(connection.arbitrary_address("AF_UNIX"))
    listener.listen()
    alive_read, alive_write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(alive_write)  # the server ends when the last process that holds it ends
        try:
            forkserver.main(listener.detach(), alive_read, preload=[])
        finally:
            os._exit(0)
    os.close(alive_read)
    server = forkserver._forkserver
    server._forkserver_address, server._forkserver_alive_fd, server._forkserver_pid = (
        listener.getsockname(),
        alive_write,
        pid,
    )
    listener.close()


def _run(
    words: list[str], environment: dict[str, str], report: str | None, prepare: Callable[[], None] | None
) -> None:
    os.environ.update(environment)
    if prepare is not None:
        prepare()
    from hf_denseseg.cli import main

    with open(report or os.devnull, "w") as output:
        sys.stdout = sys.stderr = output
        try:
            code = main(words)
        except BaseException:
            traceback.print_exc()
            code = 1
    os._exit(code)


def start(
    words: list[str],
    environment: dict[str, str] | None = None,
    report: str | None = None,
    prepare: Callable[[], None] | None = None,
) -> BaseProcess:
    """Start `denseseg <words>`; what it prints goes to the file `report`, `prepare` is called in it first."""
    process = CONTEXT.Process(target=_run, args=(words, environment or {}, report, prepare))
    process.start()
    return process


def kill_when_complete(process: BaseProcess, checkpoint: Path) -> None:
    """Kill a run, as `kill -9` does, as soon as it has saved this checkpoint."""
    deadline = time.monotonic() + 240
    while not (checkpoint / "complete.json").exists():
        assert process.is_alive() and time.monotonic() < deadline, "the run ended before it could be killed"
        time.sleep(0.01)
    process.kill()
    process.join()


def run_two(
    words: list[str],
    port: str,
    folder: Path,
    environment: dict[str, str] | None = None,
    prepare: Callable[[], None] | None = None,
) -> None:
    """Run `denseseg <words>` in two processes that work together, as `torchrun` would start them."""
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    if torch.cuda.device_count() < 2:
        common["CUDA_VISIBLE_DEVICES"] = ""  # two processes cannot share one GPU
    common |= environment or {}
    reports = [folder / f"rank{rank}.txt" for rank in (0, 1)]
    ranks = [
        start(words, {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, str(report), prepare)
        for rank, report in enumerate(reports)
    ]
    for process in ranks:
        process.join(300)
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
    assert codes == [0, 0], [report.read_text()[-2000:] for report in reports]
