"""Deformable attention in plain torch: the definition, against plain loops and recorded outputs."""

import importlib

import pytest
import torch

from hf_denseseg.errors import InputError
from hf_denseseg.inference.export.engines import ENGINES
from hf_denseseg.inference.export.formats import FORMATS
from hf_denseseg.ops import ms_deform_attn, sample_locations
from msda_cases import plain_loops, random_call

SHAPES = [(5, 7), (3, 4), (1, 6)]


@pytest.mark.parametrize("columns", [2, 4])
@pytest.mark.parametrize("shared", [False, True])
def test_plain_torch_equals_plain_loops(columns, shared):
    call = random_call(SHAPES, batch=2, columns=columns, shared_references=shared, channels=5, dtype=torch.float64)
    torch.testing.assert_close(ms_deform_attn(*call, SHAPES), plain_loops(*call, SHAPES), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(
    ("channels", "levels", "points", "columns"), [(4, 1, 1, 2), (5, 3, 4, 2), (32, 2, 5, 4), (4, 3, 16, 4)]
)
def test_gradients_are_those_of_the_function(channels, levels, points, columns):
    shapes = [(3, 4), (2, 3), (1, 5)][:levels]
    call = random_call(
        shapes, queries=2, heads=1, channels=channels, points=points, columns=columns, dtype=torch.float64
    )
    inputs = [tensor.requires_grad_() for tensor in call]
    assert torch.autograd.gradcheck(lambda *tensors: ms_deform_attn(*tensors, shapes), inputs, eps=1e-7, atol=1e-5)


def test_given_locations_run_from_edge_to_edge():
    """The signature of the kernels hub: 0 is the left edge of the first pixel, 1 the right edge of the last."""
    value, offsets, logits, references = random_call(SHAPES, dtype=torch.float64)
    size = torch.tensor([shape[::-1] for shape in SHAPES], dtype=torch.float64)
    locations = references[:, :, None, :, None] + offsets / size[:, None]
    weights = logits.flatten(-2).softmax(-1).view(logits.shape)
    expected = plain_loops(value, offsets, logits, references, SHAPES)
    torch.testing.assert_close(sample_locations(value, locations, weights, SHAPES), expected)


def test_sixteen_bit_values_are_sampled_in_float32(monkeypatch):
    """`grid_sample` of 16-bit maps reads wrong places on the CPU from 182 x 182 pixels on."""
    monkeypatch.setenv("DENSESEG_MSDA", "reference")
    value, offsets, logits, references = random_call([(200, 200)], queries=50)
    exact = ms_deform_attn(value.bfloat16().float(), offsets, logits, references, [(200, 200)])
    found = ms_deform_attn(value.bfloat16(), offsets, logits, references, [(200, 200)])
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, exact.bfloat16())


def test_many_queries_are_sampled_in_chunks(monkeypatch):
    call = random_call(SHAPES, queries=40, dtype=torch.float64)
    expected = ms_deform_attn(*call, SHAPES)
    module = importlib.import_module("hf_denseseg.ops.reference")
    monkeypatch.setattr(module, "LARGEST_SAMPLE", 2000)
    torch.testing.assert_close(ms_deform_attn(*call, SHAPES), expected, atol=1e-14, rtol=1e-14)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda call: call.__setitem__(1, call[1][..., :1]), "needs"),
        (lambda call: call.__setitem__(0, call[0][:, :-1]), "tokens"),
        (lambda call: call.__setitem__(0, call[0][:, :, :1]), "heads"),
        (lambda call: call.__setitem__(3, call[3][..., :1]), "columns"),
        (lambda call: call.__setitem__(3, call[3][:, :2]), "reference points"),
    ],
)
def test_tensors_of_shapes_that_do_not_match_are_refused(change, message):
    call = random_call(SHAPES, batch=2)
    change(call)
    with pytest.raises(InputError, match=message):
        ms_deform_attn(*call, SHAPES)


def test_a_graph_for_all_sizes_gives_the_same_in_onnx_runtime_and_openvino(tmp_path):
    """Sizes are symbols there; OpenVINO makes `(1,)` of a scalar that is filled with one."""

    class Sampled(torch.nn.Module):
        def forward(self, features):  # (1, C, H, W)
            shape = tuple(features.shape[-2:])
            value = features.flatten(2).mT[:, :, None]  # (1, H*W, 1, C)
            locations = torch.linspace(0.1, 0.8, 5).view(1, 5, 1, 1, 1, 1).expand(-1, -1, -1, -1, 3, 2)
            return (sample_locations(value, locations, torch.full((1, 5, 1, 1, 3), 0.4), [shape]),)

    sides = dict.fromkeys((2, 3), torch.export.Dim.AUTO)
    program = torch.export.export(Sampled(), (torch.zeros(1, 4, 16, 24),), dynamic_shapes=(sides,))
    features = torch.randn(1, 4, 11, 17, generator=torch.Generator().manual_seed(0))
    (expected,) = Sampled()(features)
    for name in ("onnx", "openvino"):
        path = tmp_path / FORMATS[name].file
        FORMATS[name].write(program, path, "features", ("sampled",))
        torch.testing.assert_close(ENGINES[name](path)(features)[0], expected, atol=1e-5, rtol=1e-5)
