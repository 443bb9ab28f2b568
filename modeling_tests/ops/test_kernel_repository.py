"""What the kernel's repository shows its users: the benchmark's classes verify themselves, the example runs."""

import os
import subprocess
import sys

import pytest
import torch

from hf_denseseg.ops.kernel_paths import BUILD, SOURCE
from msda_cases import needs_kernel

pytestmark = pytest.mark.skipif(bool(needs_kernel()), reason="needs the built kernel: denseseg kernels build")


@pytest.fixture(scope="module")
def benchmark():
    from kernels import get_local_kernel
    from kernels.cli.benchmark import discover_benchmark_classes

    script = SOURCE / "benchmarks" / "benchmark.py"
    (found,) = discover_benchmark_classes(script, script.parent)
    sizes = sys.modules[found.__module__]
    sizes.SHAPES, sizes.TOKENS, sizes.QUERIES = [8, 6, 4, 3], 60, 7
    found.kernel = get_local_kernel(BUILD, backend="cpu")
    return found


def test_every_workload_gives_what_plain_torch_gives(benchmark):
    workloads = [name.removeprefix("benchmark_") for name in dir(benchmark) if name.startswith("benchmark_")]
    assert len(workloads) >= 5
    for name in workloads:
        torch.manual_seed(benchmark.seed)
        instance = benchmark()
        instance.kernel, instance.device = benchmark.kernel, "cpu"
        getattr(instance, f"setup_{name}")()
        getattr(instance, f"benchmark_{name}")()
        expected = getattr(instance, f"verify_{name}")()
        share = 1e-2 if "bfloat16" in name else 1e-5  # of the largest value
        torch.testing.assert_close(instance.out, expected, rtol=0, atol=share * float(expected.abs().max()))


def test_the_example_runs():
    environment = {**os.environ, "LOCAL_KERNELS": f"hf-denseseg/ms-deform-attn={BUILD}", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, SOURCE / "example.py"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-2:] == ["torch.Size([1, 5, 256])", "torch.Size([1, 10, 256])"]
