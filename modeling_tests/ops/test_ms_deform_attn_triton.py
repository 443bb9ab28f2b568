"""The Triton kernels of deformable attention: in Triton's interpreter, compiled for sm_90 without a GPU, on a GPU."""

import importlib
import os
import re
import subprocess
import sys
import types

import pytest
import torch

from reference import REPOSITORY

triton = pytest.importorskip("triton", reason="Triton is not installed; it comes with the CUDA builds of torch")

FOLDER = REPOSITORY / "kernels" / "ms-deform-attn" / "torch-ext" / "ms_deform_attn"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 5e-4}

# Triton decides at import, once per process, whether it interprets: hence a separate process for all cases.
INTERPRETED = """
import importlib, sys, types
import torch
package = types.ModuleType("kernel")
package.__path__ = [sys.argv[1]]
sys.modules["kernel"] = package
triton_passes = importlib.import_module("kernel._triton")
results = {}
for name, (inputs, grad) in torch.load(sys.argv[2]).items():
    if len(inputs) == 5:
        out, lse = triton_passes.forward(*inputs)
        results[name] = (out, lse, *triton_passes.backward(grad, *inputs, out, lse))
    else:
        results[name] = (triton_passes.forward_sampled(*inputs), None, *triton_passes.backward_sampled(grad, *inputs))
torch.save(results, sys.argv[3])
"""


def definition(value, points, scores, reference_points, spatial_shapes):
    """Sum over the four pixels around every point, by index; locations in 0..1 without reference points."""
    levels = range(points.shape[3])
    image = torch.arange(value.shape[0]).view(-1, 1, 1, 1)
    head = torch.arange(value.shape[2]).view(-1, 1)
    weights = scores if reference_points is None else scores.flatten(3).softmax(-1).view_as(scores)
    out, start = 0, 0
    for level, height, width in zip(levels, spatial_shapes[::2], spatial_shapes[1::2], strict=True):
        size = torch.tensor([width, height])
        location = points[:, :, :, level]
        if reference_points is None:
            x, y = (location * size - 0.5).unbind(-1)
        else:
            x, y = (location + (reference_points[:, :, level] * size)[:, :, None, None] - 0.5).unbind(-1)
        inside = (x > -1) & (x < width) & (y > -1) & (y < height)
        x, y = torch.where(inside, x, 0), torch.where(inside, y, 0)
        for dx, dy in ((0, 0), (0, 1), (1, 0), (1, 1)):
            column, row = x.floor() + dx, y.floor() + dy
            readable = inside & (column >= 0) & (column < width) & (row >= 0) & (row < height)
            token = torch.where(readable, start + row * width + column, 0).long()
            pixel = torch.where(readable[..., None], value[image, token, head], 0)
            factors = (1 - x + column if dx == 0 else 1 - column + x) * (1 - y + row if dy == 0 else 1 - row + y)
            share = weights[:, :, :, level] * factors
            out = out + (share[..., None] * pixel).sum(3)
        start += height * width
    return out.flatten(2)


def expected(inputs, grad):
    """Output and the gradients of value, points and scores in float64."""
    *tensors, spatial_shapes = inputs
    leaves = [tensor.double().detach().requires_grad_() for tensor in tensors[:3]]
    reference_points = tensors[3].double() if len(tensors) == 4 else None
    out = definition(*leaves, reference_points, spatial_shapes)
    out.backward(grad.double())
    return out.detach(), *(leaf.grad for leaf in leaves)


def draw(spatial_shapes, points, head_size, batch=1, queries=17, heads=1, dtype=torch.float32, **options):
    """Random inputs and a random gradient of the output.

    Options: `score_dtype`, `shared` (one set of reference points for all images), `sliced` (offsets and logits are
    slices of one projection, whose rows are a part of a larger tensor), `sampled` (locations and weights).
    """
    generator = torch.Generator().manual_seed(0)
    levels = len(spatial_shapes) // 2
    tokens = sum(h * w for h, w in zip(spatial_shapes[::2], spatial_shapes[1::2], strict=True))
    value = torch.randn(batch, tokens, heads, head_size, generator=generator).to(dtype)
    grad = torch.randn(batch, queries, heads * head_size, generator=generator).to(dtype)
    count = heads * levels * points
    projected = torch.randn(batch, queries + 2, 3 * count + 1, generator=generator)[:, 1:-1]
    offsets = projected[..., : 2 * count].unflatten(2, (heads, levels, points, 2)).mul_(1.5)
    logits = projected[..., 2 * count : 3 * count].unflatten(2, (heads, levels, points))
    if not options.get("sliced"):
        offsets, logits = offsets.contiguous(), logits.to(options.get("score_dtype", torch.float32)).contiguous()
    reference_points = torch.rand(1 if options.get("shared") else batch, queries, levels, 2, generator=generator)
    if options.get("sampled"):
        return (value, offsets.sigmoid() * 1.4 - 0.2, logits.softmax(-1), spatial_shapes), grad
    return (value, offsets, logits, reference_points, spatial_shapes), grad


def off_the_centers(offsets, reference_points, spatial_shapes):
    """Move points that lie within 0.001 of a pixel center: the derivative jumps there, so rounding would choose it."""
    sizes = torch.tensor(spatial_shapes).view(-1, 2).flip(-1)
    pixels = (reference_points * sizes)[:, :, None, :, None] - 0.5 + offsets
    offsets += 0.002 * ((pixels - pixels.round()).abs() < 0.001)


def at_the_border(odd=()):
    """Points exactly on, next to and outside the border of a 4x8 map; every number is exact in float32."""
    xs = (-1.0, -0.5, 0.0, 7.0, 7.5, 8.0, 2.25, *odd)
    ys = (-1.0, -0.5, 0.0, 3.0, 3.5, 4.0, 1.75, *odd)
    (value, _, _, _, shapes), grad = draw([4, 8], len(ys), 16, queries=len(xs))
    x, y = torch.meshgrid(torch.tensor(xs), torch.tensor(ys), indexing="ij")
    offsets = torch.stack((x - 3.5, y - 1.5), -1)[None, :, None, None]
    return (value, offsets, torch.zeros(offsets.shape[:-1]), torch.full((1, len(xs), 1, 2), 0.5), shapes), grad


def all_outside():
    (value, offsets, logits, reference_points, shapes), grad = draw([3, 5], 4, 16)
    return (value, torch.full_like(offsets, 1e30), logits, reference_points, shapes), grad


def an_infinite_value_nobody_reads():
    """Pixel (0, 0) is where the points that are outside or not a number would be looked up."""
    (value, offsets, logits, reference_points, shapes), grad = at_the_border((float("nan"), float("inf")))
    value[:, 0] = float("inf")
    x, y = (offsets + torch.tensor([3.5, 1.5])).unbind(-1)
    offsets[((x > -1) & (x < 1) & (y > -1) & (y < 1))] = float("nan")
    return (value, offsets, logits, reference_points, shapes), grad


def shifted_logits(by):
    """A softmax does not change when a number is added to all logits, even if their exponentials overflow."""
    (value, offsets, logits, reference_points, shapes), grad = draw([3, 4], 5, 16)
    return (value, offsets, logits.mul(8).round() / 8 + by, reference_points, shapes), grad


CASES = {
    "one point": draw([5, 7], 1, 16, heads=2),
    "five points": draw([5, 7], 5, 32, queries=1, batch=3, shared=True),
    "UN-EPT": draw([3, 4, 1, 1, 1, 9], 16, 32),
    "UN-EPT, bfloat16": draw([3, 4, 1, 1, 1, 9], 16, 32, dtype=torch.bfloat16),
    "slices of one projection": draw([4, 6, 5, 1], 4, 32, batch=3, heads=2, sliced=True),
    "Deformable DETR, float16, head size 64": draw(
        [4, 6, 5, 1, 3, 3, 1, 1], 4, 64, dtype=torch.float16, score_dtype=torch.float16
    ),
    "one query, bfloat16 logits": draw(
        [3, 4, 2, 2], 4, 16, queries=1, batch=3, dtype=torch.bfloat16, score_dtype=torch.bfloat16
    ),
    "head size 24": draw([4, 6, 1, 5], 4, 24, heads=2),
    "sampled, head size 5": draw([4, 6], 2, 5, heads=3, sampled=True),
    "sampled": draw([4, 6, 5, 1], 4, 32, batch=2, heads=2, sampled=True),
    "sampled, float16": draw([4, 6, 1, 5], 5, 16, dtype=torch.float16, sampled=True),
    "at the border": at_the_border(),
    "not finite": at_the_border((float("nan"), float("inf"), float("-inf"), 1e30, -1e30)),
    "all outside": all_outside(),
    "an infinite value nobody reads": an_infinite_value_nobody_reads(),
    "logits around 4096": shifted_logits(4096.0),
    "logits around -4096": shifted_logits(-4096.0),
}


def relative_error(actual, wanted):
    """Norm of the difference over the norm of the expected; absolute where that is below 1 (as zero gradients)."""
    assert actual.shape == wanted.shape
    return ((actual.double() - wanted).norm() / wanted.norm().clamp(min=1)).item()


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """Results of the kernels for every case in Triton's interpreter."""
    folder = tmp_path_factory.mktemp("interpreted")
    torch.save(CASES, folder / "cases.pt")
    command = [sys.executable, "-c", INTERPRETED, str(FOLDER), str(folder / "cases.pt"), str(folder / "results.pt")]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return torch.load(folder / "results.pt")


@pytest.fixture
def passes(monkeypatch):
    """The module that launches the kernels, without the package around it."""
    package = types.ModuleType("ms_deform_attn_under_test")
    package.__path__ = [str(FOLDER)]
    monkeypatch.setitem(sys.modules, package.__name__, package)
    for name in ("_triton", "_triton_kernels"):
        monkeypatch.delitem(sys.modules, f"{package.__name__}.{name}", raising=False)
    return importlib.import_module(f"{package.__name__}._triton")


@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients_agree_with_the_definition(name, interpreted):
    inputs, grad = CASES[name]
    out, _, *grads = interpreted[name]
    tolerance = TOLERANCE[inputs[0].dtype]
    if "409" in name:  # log-sum-exp is kept in float32, where numbers of this size are 5e-4 apart
        tolerance = 1e-3
    wanted_out, *wanted_grads = expected(inputs, grad)
    assert out.dtype == inputs[0].dtype
    assert relative_error(out, wanted_out) <= min(tolerance, 4e-3)
    for wanted, actual, given in zip(wanted_grads, grads, inputs[:3], strict=True):
        assert actual.dtype == given.dtype
        limit = max(tolerance, TOLERANCE[given.dtype])
        assert relative_error(actual, wanted) <= limit, f"gradient of {tuple(given.shape)}"


@pytest.mark.parametrize("name", ["UN-EPT", "slices of one projection", "logits around 4096", "logits around -4096"])
def test_log_sum_exp_is_that_of_the_logits(name, interpreted):
    logits = CASES[name][0][2]
    torch.testing.assert_close(interpreted[name][1], logits.flatten(3).logsumexp(-1), rtol=1e-6, atol=1e-6)


def test_points_outside_the_map_add_exactly_nothing(interpreted):
    out, _, grad_value, grad_offsets, grad_logits = interpreted["all outside"]
    for tensor in (out, grad_value, grad_offsets, grad_logits):
        assert torch.count_nonzero(tensor) == 0


def test_an_infinite_value_does_not_leak_into_points_that_do_not_read_it(interpreted):
    assert all(torch.isfinite(tensor).all() for tensor in interpreted["an infinite value nobody reads"])


def test_slices_of_one_projection_are_read_without_a_copy(passes):
    _, offsets, logits, _, _ = CASES["slices of one projection"][0]
    assert not offsets.is_contiguous() and not logits.is_contiguous()
    assert passes._packed_rows(offsets, 4) is offsets and passes._packed_rows(logits, 3) is logits
    assert passes._packed_rows(offsets.transpose(2, 3), 4).is_contiguous()


def test_backward_refuses_to_be_deterministic(passes):
    inputs, grad = CASES["one point"]
    sampled, _ = CASES["sampled"]
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(RuntimeError, match="in no fixed order, so it is not deterministic"):
            passes.backward(grad, *inputs, grad, grad)
        with pytest.raises(RuntimeError, match="Use the CPU kernel"):
            passes.backward_sampled(grad, *sampled)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        (draw([2, 2], 1, 257)[0], "head size of 257 is above 256"),
        (draw([2, 2], 1, 16, dtype=torch.float64)[0], "float64 is not computed"),
        (draw([2, 2], 257, 16, queries=1)[0], "1 levels of 257 points were given"),
        ((*CASES["one point"][0][:-1], [5, 8]), "1 levels and 40 pixels, but `value` has 35 tokens"),
    ],
)
def test_what_the_kernels_do_not_support_is_refused_with_the_reason(inputs, reason, passes):
    with pytest.raises(ValueError, match=reason):
        passes.forward(*inputs)


class _Hopper:
    """Stand-in for the driver of an sm_90 GPU, so that a launch compiles as it would there, and stops."""

    def get_current_target(self):
        return triton.backends.compiler.GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("compiled"))


@pytest.fixture
def compiled(passes, monkeypatch, cache):
    """Function that returns what a forward or backward pass compiles to for sm_90, without a GPU."""
    monkeypatch.setenv("TRITON_CACHE_DIR", cache)
    results = []
    for name in ("forward_kernel", "backward_kernel"):
        kernel = getattr(passes, name)
        launch = type("Launch", (), {"__getitem__": lambda self, grid, k=kernel: _keep(k, grid, results)})()
        monkeypatch.setattr(passes, name, launch)

    def run(backward, inputs, grad):
        fused = len(inputs) == 5
        if backward:
            _ = passes.backward(grad, *inputs, grad, grad) if fused else passes.backward_sampled(grad, *inputs)
        else:
            _ = passes.forward(*inputs) if fused else passes.forward_sampled(*inputs)
        return results[-1]

    run.passes = passes
    triton.runtime.driver.set_active(_Hopper())
    yield run
    triton.runtime.driver.set_active(None)  # the driver of this machine is looked up again when it is needed


def _keep(kernel, grid, results):
    return lambda *arguments, **options: results.append(kernel.warmup(*arguments, grid=grid, **options))


def machine_code(kernel):
    try:
        return kernel.asm["sass"]
    except (FileNotFoundError, RuntimeError) as error:
        pytest.skip(f"Triton has no disassembler here: {error}")


UNEPT = {"spatial_shapes": [60, 60, 30, 30, 15, 15], "points": 16, "head_size": 32, "heads": 8}
DETR = {"spatial_shapes": [32, 32, 16, 16, 8, 8, 4, 4], "points": 4, "head_size": 32, "heads": 8}


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(
    "layer",
    [
        UNEPT,
        UNEPT | {"dtype": torch.bfloat16},
        UNEPT | {"dtype": torch.bfloat16, "sampled": True},
        DETR,
        DETR | {"dtype": torch.bfloat16},
        DETR | {"head_size": 64},
    ],
    ids=["UN-EPT", "UN-EPT bfloat16", "UN-EPT sampled", "DETR", "DETR bfloat16", "DETR head size 64"],
)
def test_compiled_code_loads_and_adds_16_bytes_at_a_time_and_spills_nothing(layer, backward, compiled):
    (value, *inputs), grad = draw(**layer)
    code = machine_code(compiled(backward, (value, *inputs), grad))
    block, warps = compiled.passes.tile(layer["points"], layer["head_size"], backward)
    gathered = 4 * block * layer["points"] * layer["head_size"] * value.element_size()  # bytes of a level
    assert len(re.findall(r"\bLDG\S*\.128\b", code)) >= gathered // (32 * warps * 16)
    assert not re.findall(r"\b(?:STL|LDL)\b", code)
    reductions = re.findall(r"\bRED\S*", code)
    assert bool(reductions) == backward
    assert all("F32x4" in reduction for reduction in reductions)


def test_offsets_of_gathered_pixels_are_64_bit(compiled):
    for backward in (False, True):
        code = compiled(backward, *draw(**UNEPT)).asm["ttir"]
        gathers = re.findall(r"tt\.addptr .*: tensor<\d+x\d+x\d+x!tt\.ptr<\w+>>, tensor<\S+x(i\d+)>", code)
        assert len(gathers) >= 4 and set(gathers) == {"i64"}
        tile = "x".join(str(size) for size in (compiled.passes.tile(16, 32, backward)[0], 16))
        assert len(re.findall(rf"arith\.muli .*: tensor<{tile}xi64>", code)) >= 4  # token times row, before the sum


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_another_image_size_does_not_recompile(backward, compiled):
    """Triton specializes integers that are 1 or divisible by 16, unless told not to."""
    sizes = [([16, 16, 1, 1, 1, 1, 1, 1], 272), ([5, 7, 1, 9, 2, 2, 1, 1], 33), ([1, 1, 32, 48, 1, 1, 16, 16], 1)]
    layers = [DETR | {"spatial_shapes": shapes, "queries": queries, "batch": 2} for shapes, queries in sizes]
    assert len({compiled(backward, *draw(**layer)).hash for layer in layers}) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients_agree_with_the_definition_on_a_gpu(name, passes):
    inputs, grad = CASES[name]
    given = [item.cuda() if isinstance(item, torch.Tensor) else item for item in inputs]
    if len(inputs) == 5:
        out, lse = passes.forward(*given)
        grads = passes.backward(grad.cuda(), *given, out, lse)
    else:
        out = passes.forward_sampled(*given)
        grads = passes.backward_sampled(grad.cuda(), *given)
    loose = 1e-3 if "409" in name else 0.0
    for wanted, actual in zip(expected(inputs, grad), (out, *grads), strict=True):
        assert relative_error(actual.cpu(), wanted) <= max(TOLERANCE[inputs[0].dtype], TOLERANCE[actual.dtype], loose)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_thousands_of_queries_agree_with_the_definition_on_a_gpu(dtype, passes):
    inputs, grad = draw([60, 60, 30, 30, 15, 15], 16, 32, batch=2, queries=2701, heads=8, dtype=dtype, shared=True)
    off_the_centers(*inputs[1::2], inputs[4])
    given = [item.cuda() if isinstance(item, torch.Tensor) else item for item in inputs]
    out, lse = passes.forward(*given)
    grads = passes.backward(grad.cuda(), *given, out, lse)
    again = passes.forward(*given)[0]
    assert torch.equal(out, again)
    for wanted, actual in zip(expected(inputs, grad), (out, *grads), strict=True):
        assert relative_error(actual.cpu(), wanted) <= max(TOLERANCE[dtype], TOLERANCE[actual.dtype])
