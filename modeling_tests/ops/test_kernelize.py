"""Every folder of transformers with deformable attention runs on our kernel, with equal outputs and gradients."""

import importlib
import inspect
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from hf_denseseg.ops import kernelize_deformable_attention
from hf_denseseg.ops.kernelize import FUNCTION, LAYER
from msda_cases import needs_kernel

pytestmark = pytest.mark.skipif(bool(needs_kernel()), reason="needs the built kernel: denseseg kernels build")

FILES = sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py"))
WITH_LAYER = [path for path in FILES if f"class {LAYER}(nn.Module)" in path.read_text()]
WITH_FUNCTION = [path for path in FILES if f"def {FUNCTION}(" in path.read_text()]
SHAPES = [(6, 5), (3, 4)]
TOKENS = sum(height * width for height, width in SHAPES)


def module_of(path: Path):
    return importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}")


def call_inputs():
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(2, TOKENS, 4, 8, generator=generator)
    locations = torch.rand(2, 7, 4, 2, 3, 2, generator=generator)
    weights = torch.rand(2, 7, 4, 6, generator=generator).softmax(-1).view(2, 7, 4, 2, 3)
    return [each.requires_grad_() for each in (value, locations, weights)]


def result(run, inputs):
    """Output and gradients."""
    out = run(*inputs)
    return out.detach(), torch.autograd.grad(out.square().sum(), inputs)


class Model(nn.Module):
    """One layer of a folder, and a weight that tells the device."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.weight = layer, nn.Parameter(torch.zeros(1))

    def forward(self, value, locations, weights):
        shapes = torch.tensor(SHAPES)
        start = torch.tensor([0, SHAPES[0][0] * SHAPES[0][1]])
        return self.layer(value, shapes, SHAPES, start, locations, weights, 64)


def test_the_folders_are_those_that_we_know_of():
    assert {path.parent.name for path in WITH_LAYER} >= {"deformable_detr", "rt_detr", "grounding_dino", "rf_detr"}
    assert {path.parent.name for path in WITH_FUNCTION} == {"mask2former", "oneformer"}


@pytest.mark.parametrize("path", WITH_LAYER, ids=lambda path: path.parent.name)
def test_layer_gives_the_same_on_the_kernel(path):
    model, inputs = Model(getattr(module_of(path), LAYER)()), call_inputs()
    expected, plain = result(model, inputs), model.layer.forward.__func__
    assert kernelize_deformable_attention(model) is model
    found = result(model, inputs)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert model.layer.forward.__func__ is not plain


@pytest.mark.parametrize("path", WITH_FUNCTION, ids=lambda path: path.parent.name)
def test_function_gives_the_same_on_the_kernel(path, monkeypatch):
    module, inputs = module_of(path), call_inputs()
    plain = getattr(module, FUNCTION)
    monkeypatch.setattr(module, FUNCTION, plain)  # undone after the test
    expected = result(lambda *each: plain(each[0], SHAPES, *each[1:]), inputs)
    names = [name for name in vars(module) if name.endswith("PixelDecoderEncoderMultiscaleDeformableAttention")]
    model = getattr(module, names[0])(embed_dim=32, num_heads=4, n_levels=2, n_points=3)
    states = torch.randn(2, TOKENS, 32)
    call = {"encoder_hidden_states": states, "reference_points": torch.rand(2, TOKENS, 2, 2)}
    call |= {"spatial_shapes_list": SHAPES, "spatial_shapes": torch.tensor(SHAPES)}
    call |= {"level_start_index": torch.tensor([0, 30])}
    taken = inspect.signature(model.forward).parameters  # versions of transformers differ in the form of the shapes
    call = {name: value for name, value in call.items() if name in taken}
    before = model(states, **call)[0]
    assert kernelize_deformable_attention(model) is model and getattr(module, FUNCTION) is not plain
    replaced = getattr(module, FUNCTION)
    found = result(lambda *each: replaced(each[0], SHAPES, *each[1:]), inputs)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model(states, **call)[0], before, atol=1e-5, rtol=1e-4)
    assert kernelize_deformable_attention(model) is model and getattr(module, FUNCTION) is replaced
