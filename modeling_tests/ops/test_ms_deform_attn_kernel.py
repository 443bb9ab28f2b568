"""The compiled deformable attention on the CPU, against the definition in float64 and plain loops."""

import pytest
import torch

from closeness import assert_same_outputs
from hf_denseseg.errors import RunError
from hf_denseseg.ops import ms_deform_attn
from hf_denseseg.ops.kernel_loading import choose_path, find_kernel
from hf_denseseg.ops.reference import ms_deform_attn_reference
from msda_cases import needs_kernel, plain_loops, random_call, relative_error

pytestmark = pytest.mark.skipif(bool(needs_kernel()), reason=needs_kernel() or "there is one")
SHAPES = [(6, 9), (3, 4), (1, 7)]
INSTRUCTION_SETS = ("generic", "AVX2", "AVX-512")


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request):
    """Each one that this processor has; the best one is restored afterwards."""
    kernel = find_kernel("cpu").kernel
    best = kernel.instruction_set()
    try:
        kernel.instruction_set(request.param)
    except RuntimeError:
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    kernel.instruction_set(best)


def results(function, call, shapes, dtype=None):
    """Output and the four gradients for a fixed gradient of the output."""
    leaves = [tensor.detach().to(dtype or tensor.dtype).requires_grad_() for tensor in call]
    out = function(*leaves, shapes)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def assert_close_to_definition(call, shapes, tolerance):
    assert choose_path(call[0], call[1]) == "compiled"
    exact = results(ms_deform_attn_reference, [tensor.double() for tensor in call], shapes)
    for name, found, expected in zip(
        ("out", "value", "offsets", "logits", "references"), results(ms_deform_attn, call, shapes), exact, strict=True
    ):
        assert relative_error(found, expected) <= tolerance, name


@pytest.mark.parametrize("channels", [16, 32, 48, 64, 128, 30, 4, 160])
def test_every_head_size_equals_the_definition(instruction_set, channels):
    assert_close_to_definition(random_call(SHAPES, batch=2, channels=channels), SHAPES, 1e-5)


@pytest.mark.parametrize(("levels", "points"), [(1, 1), (1, 5), (3, 1), (3, 4), (3, 16), (4, 16), (4, 64)])
def test_every_number_of_points_equals_the_definition(instruction_set, levels, points):
    shapes = [(6, 9), (3, 4), (1, 7), (1, 1)][:levels]
    assert_close_to_definition(random_call(shapes, queries=19, points=points), shapes, 1e-5)


@pytest.mark.parametrize("queries", [1, 63, 700])
@pytest.mark.parametrize("shared", [False, True])
def test_few_and_many_queries_equal_the_definition(queries, shared):
    """Many queries are computed head by head on packed values, few in place."""
    call = random_call(SHAPES, batch=3, queries=queries, points=16, shared_references=shared)
    assert_close_to_definition(call, SHAPES, 1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 4e-3), (torch.float16, 5e-4)])
def test_sixteen_bit_values_are_rounded_once(dtype, tolerance):
    value, *rest = random_call(SHAPES, batch=2, queries=30)
    call = [value.to(dtype), *rest]
    assert ms_deform_attn(*call, SHAPES).dtype == dtype
    assert_close_to_definition(call, SHAPES, tolerance)


def test_a_large_map_in_sixteen_bits_equals_float32():
    """More than 32767 values, where `grid_sample` of 16-bit tensors reads wrong addresses."""
    value, *rest = random_call([(190, 200)], queries=30)
    exact = ms_deform_attn_reference(value.bfloat16().double(), *(tensor.double() for tensor in rest), [(190, 200)])
    assert relative_error(ms_deform_attn(value.bfloat16(), *rest, [(190, 200)]), exact) <= 4e-3


def test_points_on_and_beyond_the_border_follow_the_definition(instruction_set):
    """-1, -0.5, 0, W - 1, W - 0.5 and W exactly, far outside, infinite and NaN."""
    height, width = 4, 6
    special = [-1.0, -0.5, 0.0, width - 1.0, width - 0.5, float(width), 1e30, -1e30, float("inf"), float("nan"), 2.25]
    value = random_call([(height, width)], heads=1, channels=16)[0].double()
    pixels = torch.tensor([[x, y] for x in special for y in special], dtype=torch.float64)
    references = torch.zeros(1, len(pixels), 1, 2, dtype=torch.float64)
    offsets = (pixels + 0.5).view(1, -1, 1, 1, 1, 2)
    logits = torch.zeros(1, len(pixels), 1, 1, 1, dtype=torch.float64)
    expected = plain_loops(value, offsets, logits, references, [(height, width)])
    call = [tensor.float() for tensor in (value, offsets, logits, references)]
    torch.testing.assert_close(ms_deform_attn(*call, [(height, width)]), expected.float())
    *_, grad_offsets, _, _ = results(ms_deform_attn, call, [(height, width)])
    outside = ~((pixels > -1) & (pixels < torch.tensor([width, height]))).all(-1)
    assert grad_offsets.isfinite().all()
    assert (grad_offsets.view(-1, 2)[outside] == 0).all()


def test_points_outside_add_exactly_nothing():
    call = random_call(SHAPES)
    call[1] = torch.full_like(call[1], 1e6)
    found = results(ms_deform_attn, call, SHAPES)
    assert all((tensor == 0).all() for tensor in found)


def test_values_that_no_point_reads_do_not_matter(instruction_set):
    """Not even as infinity times a weight of zero."""
    value, offsets, logits, references = random_call([(5, 5)], heads=1, queries=3, points=2)
    offsets[:, :, :, :, 0] = 1.2 - (references * 5 - 0.5)[:, :, None]  # between pixels 1 and 2
    offsets[:, :, :, :, 1] = 1e9
    expected = ms_deform_attn(value, offsets, logits, references, [(5, 5)])
    value[:, [0, 4, 20, 24, 18]] = float("inf")
    assert torch.equal(ms_deform_attn(value, offsets, logits, references, [(5, 5)]), expected)


def test_nan_and_infinite_logits_propagate_as_in_softmax():
    value, offsets, logits, references = random_call(SHAPES, queries=4)
    logits[0, 0, 0, 0, 0] = float("nan")
    logits[0, 1, 0, 0, 0] = float("-inf")
    logits[0, 2, 0, 0, 0] = float("inf")
    found = ms_deform_attn(value, offsets, logits, references, SHAPES)
    torch.testing.assert_close(
        found, ms_deform_attn_reference(value, offsets, logits, references, SHAPES), equal_nan=True
    )


def test_slices_of_one_projection_are_read_in_place():
    value, offsets, logits, references = random_call(SHAPES, batch=2)
    fused = torch.cat([offsets.flatten(2), logits.flatten(2)], -1)
    strided = fused[..., : offsets[0, 0].numel()].view(offsets.shape), fused[..., offsets[0, 0].numel() :]
    found = ms_deform_attn(value, strided[0], strided[1].view(logits.shape), references, SHAPES)
    assert_same_outputs(found, ms_deform_attn(value, offsets, logits, references, SHAPES))


@pytest.mark.parametrize(("heads", "queries"), [(8, 300), (1, 300), (2, 5)])
def test_one_two_and_four_threads_agree_bit_for_bit(heads, queries):
    call = random_call(SHAPES, heads=heads, queries=queries, points=16)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 4, 1):
            torch.set_num_threads(threads)
            found.append(results(ms_deform_attn, call, SHAPES))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_images_of_a_batch_do_not_affect_each_other():
    call = random_call(SHAPES, batch=3, queries=90, points=16)
    order = [2, 0, 1]
    permuted = results(ms_deform_attn, [tensor[order] for tensor in call], SHAPES)[0]
    assert_same_outputs(permuted, results(ms_deform_attn, call, SHAPES)[0][order])


def test_the_operator_passes_the_checks_of_torch():
    call = [tensor.requires_grad_() for tensor in random_call(SHAPES, batch=2)]
    flat = [size for shape in SHAPES for size in shape]
    torch.library.opcheck(torch.ops.hf_denseseg.ms_deform_attn.default, (*call, flat))


def test_a_compiled_function_takes_other_image_sizes():
    """No graph break, and no recompilation for the second new size."""
    count = 0

    def backend(graph, example):
        nonlocal count
        count += 1
        return graph

    def run(value, offsets, logits, references, maps):
        return ms_deform_attn(value, offsets, logits, references, [tuple(m.shape) for m in maps]) * 2

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=backend)
    for height in (11, 13, 17):  # all sizes differ: torch would specialize on equal ones
        shapes = [(height, 9), (height + 8, 7)]
        call = random_call(shapes, queries=height * 3, heads=3, points=5)
        found = compiled(*call, [torch.empty(shape) for shape in shapes])
        torch.testing.assert_close(found, ms_deform_attn(*call, shapes) * 2)
    assert count == 1


def test_an_exported_program_keeps_the_operator():
    class Attend(torch.nn.Module):
        def forward(self, value, offsets, logits, references):
            return ms_deform_attn(value, offsets, logits, references, SHAPES)

    call = random_call(SHAPES)
    program = torch.export.export(Attend(), tuple(call))
    assert "hf_denseseg.ms_deform_attn.default" in {str(node.target) for node in program.graph.nodes}
    torch.testing.assert_close(program.module()(*call), ms_deform_attn(*call, SHAPES))


@pytest.mark.parametrize("direct", [False, True])
def test_autocast_leaves_coordinates_alone(direct):
    call = [tensor.requires_grad_() for tensor in random_call(SHAPES)]
    exact = ms_deform_attn_reference(*(tensor.double() for tensor in call), SHAPES)
    flat = [size for shape in SHAPES for size in shape]
    with torch.autocast("cpu", torch.bfloat16):
        operator = torch.ops.hf_denseseg.ms_deform_attn
        out = operator(*call, flat)[0] if direct else ms_deform_attn(*call, SHAPES)
    assert out.dtype == torch.bfloat16
    assert relative_error(out, exact) <= 4e-3
    out.sum().backward()
    assert call[1].grad.dtype == torch.float32


def test_a_second_derivative_is_refused_with_the_fix():
    call = [tensor.requires_grad_() for tensor in random_call(SHAPES)]
    (first,) = torch.autograd.grad(ms_deform_attn(*call, SHAPES).sum(), call[0], create_graph=True)
    with pytest.raises(RunError, match="DENSESEG_MSDA=reference"):
        torch.autograd.grad(first.sum(), call[2])


def test_the_layer_for_transformers_equals_the_definition():
    """Same positional arguments as transformers and the kernels hub; gradients, and no graph break."""
    value, offsets, logits, references = random_call(SHAPES, batch=2)
    size = torch.tensor([shape[::-1] for shape in SHAPES])
    locations = (references[:, :, None, :, None] + offsets / size[:, None]).requires_grad_()
    weights = logits.flatten(-2).softmax(-1).view(logits.shape)
    layer = find_kernel("cpu").kernel.layers.MultiScaleDeformableAttention()
    starts = torch.tensor([0, 54, 66])

    def run(value, locations, weights):
        return layer(value, size.flip(-1), SHAPES, starts, locations, weights, 64)

    expected = ms_deform_attn_reference(value, offsets, logits, references, SHAPES)
    torch.testing.assert_close(run(value, locations, weights), expected, atol=1e-5, rtol=1e-5)
    compiled = torch.compile(run, fullgraph=True, backend="eager")(value, locations, weights)
    compiled.sum().backward()
    (plain,) = torch.autograd.grad(run(value, locations, weights).sum(), locations)
    torch.testing.assert_close(locations.grad, plain)


def test_the_layer_computes_in_plain_torch_what_the_kernel_does_not_serve():
    """Also when compiled: float64 stays float64."""
    value, offsets, logits, references = random_call(SHAPES, dtype=torch.float64)
    layer = find_kernel("cpu").kernel.layers.MultiScaleDeformableAttention()
    size = torch.tensor([shape[::-1] for shape in SHAPES])
    locations = references[:, :, None, :, None] + offsets / size[:, None]
    arguments = (size.flip(-1), SHAPES, torch.tensor([0, 54, 66]), locations)
    weights = logits.flatten(-2).softmax(-1).view(logits.shape)
    expected = ms_deform_attn_reference(value, offsets, logits, references, SHAPES)
    for run in (layer, torch.compile(layer, fullgraph=True, backend="eager")):
        torch.testing.assert_close(run(value, *arguments, weights, 64), expected, atol=1e-12, rtol=1e-12)
