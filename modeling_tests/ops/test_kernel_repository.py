"""What the kernel's repository shows its users: the benchmark's classes verify themselves, the example runs."""

import os
import re
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
    shape, module, shape_of_model = done.stdout.splitlines()[-3:]
    assert (shape, shape_of_model) == ("torch.Size([1, 5, 256])", "torch.Size([1, 10, 256])")
    assert "transformers" not in module and "layers" in module


MAPPED = """
import torch
LayerRepository._resolve_revision = lambda self: "v1"  # else it asks the hub for the commit, even of LOCAL_KERNELS
from kernels import Mode, kernelize, replace_kernel_forward_from_hub, use_kernel_mapping
from transformers import DeformableDetrConfig, DeformableDetrModel, ResNetConfig
from transformers.models.deformable_detr.modeling_deformable_detr import MultiScaleDeformableAttention as Layer

# What the decorator of the layer does where transformers finds the version of kernels that it wants.
replace_kernel_forward_from_hub(Layer, "MultiScaleDeformableAttention")

sizes = {"embedding_size": 8, "hidden_sizes": [8, 16, 32, 64], "depths": [1, 1, 1, 1]}
backbone = ResNetConfig(**sizes, out_features=["stage2", "stage3", "stage4"])
config = DeformableDetrConfig(backbone_config=backbone, encoder_layers=1, decoder_layers=1, num_queries=10)
model = DeformableDetrModel(config).eval()
image = torch.randn(1, 3, 64, 64)
with torch.no_grad():
    expected = model(image).last_hidden_state
    with use_kernel_mapping(entry):
        model = kernelize(model, mode=Mode.INFERENCE, device="cpu")
    layer = next(each for each in model.modules() if type(each) is Layer)
    torch.testing.assert_close(model(image).last_hidden_state, expected)
print(layer.forward.__func__.__module__)
"""


def test_the_mapping_entry_runs_a_model_on_the_kernel():
    (entry,) = re.findall(r"```python\n(.*?)```", (SOURCE / "TRANSFORMERS.md").read_text(), flags=re.DOTALL)
    environment = {**os.environ, "LOCAL_KERNELS": f"hf-denseseg/ms-deform-attn={BUILD}", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", entry + MAPPED], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "transformers" not in done.stdout.splitlines()[-1]
