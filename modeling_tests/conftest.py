"""No test touches the network, and every test leaves the number of threads as it was."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

import functools
import gc
import importlib
import socket

import pytest


def pytest_configure(config):
    """Fork the servers of `new_python` and `processes` where tests run: with `-n`, in its workers."""
    if getattr(config.option, "numprocesses", None) and not hasattr(config, "workerinput"):
        return
    for name in ("torchvision", "transformers.pipelines", "transformers.models.auto.image_processing_auto"):
        importlib.import_module(name)
    import new_python

    new_python.start_server()
    for name in (
        "hf_denseseg.cli",
        "hf_denseseg.training.run",
        "hf_denseseg.training.tasks.segmentation",
        "matplotlib.figure",
    ):
        importlib.import_module(name)
    import processes
    from hf_denseseg.data import segmentation

    # The same scenes serve many runs, and drawing them is a third of the time of a short one.
    segmentation.render_scene = functools.lru_cache(500)(segmentation.render_scene)
    gc.freeze()
    processes.fork_server()


def pytest_collection_finish():
    """Imports live to the end: if the collector looked at them, `gc.collect()` of each Trainer would take 0.3 s."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(5_000, 20, 20)  # compiling leaves so many objects that looking at all of them takes as long


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Refuse every connection beyond this machine."""
    connect = socket.socket.connect

    def guarded(self, address):
        host = address[0] if isinstance(address, tuple) else ""
        assert host in ("", "localhost", "127.0.0.1", "::1"), f"a test connects to {host}"
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


def pytest_collection_modifyitems(items):
    """Skip what is marked `gpu` on a machine without CUDA."""
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs CUDA"))
