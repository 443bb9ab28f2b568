"""The built kernel, loaded as a user loads it, against grid_sample in float64.

Run it on a build that is not on the hub with `LOCAL_KERNELS=hf-denseseg/ms-deform-attn=build pytest tests`.
"""

import kernels
import pytest
import torch
from torch.nn import functional as F

REPOSITORY = "hf-denseseg/ms-deform-attn"
SHAPES = [7, 9, 4, 5, 1, 3]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"))]


def load(device):
    """The build for a device."""
    try:
        return kernels.get_kernel(REPOSITORY, version=1, backend=device, trust_remote_code=[REPOSITORY])
    except (FileNotFoundError, ValueError, OSError) as error:
        pytest.skip(f"no build for {device}: {error}")


def inputs(device, points=4, head_size=32, dtype=torch.float32):
    """Random value, offsets, logits and reference points of two images with two heads."""
    generator = torch.Generator().manual_seed(0)
    levels = len(SHAPES) // 2
    value = torch.randn(2, 86, 2, head_size, generator=generator).to(dtype)
    offsets = 2 * torch.randn(2, 19, 2, levels, points, 2, generator=generator)
    logits = torch.randn(2, 19, 2, levels, points, generator=generator)
    reference_points = torch.rand(2, 19, levels, 2, generator=generator)
    return [tensor.to(device) for tensor in (value, offsets, logits, reference_points)]


def sampled_definition(value, locations, weights):
    """Weighted sum over levels of what grid_sample reads."""
    batch, _, heads, head_size = value.shape
    queries, points = locations.shape[1], locations.shape[4]
    out, start = 0, 0
    for level, (height, width) in enumerate(zip(SHAPES[::2], SHAPES[1::2], strict=True)):
        image = value[:, start : start + height * width].permute(0, 2, 3, 1)
        grid = 2 * locations[:, :, :, level].transpose(1, 2).reshape(batch * heads, queries, points, 2) - 1
        read = F.grid_sample(image.reshape(batch * heads, head_size, height, width), grid, align_corners=False)
        share = weights[:, :, :, level].transpose(1, 2).reshape(batch * heads, 1, queries, points)
        out = out + (read * share).sum(3).view(batch, heads * head_size, queries).transpose(1, 2)
        start += height * width
    return out


def definition(value, offsets, logits, reference_points):
    """Softmax and location arithmetic in front of `sampled_definition`."""
    sizes = offsets.new_tensor(SHAPES).view(-1, 2).flip(1)
    locations = reference_points[:, :, None, :, None] + offsets / sizes[:, None]
    return sampled_definition(value, locations, logits.flatten(3).softmax(-1).view_as(logits))


def assert_equal(function, reference, tensors, tolerance):
    """Output and the gradients of the first three tensors, by relative error."""
    found = [tensor.detach().requires_grad_(i < 3) for i, tensor in enumerate(tensors)]
    exact = [tensor.detach().double().requires_grad_(i < 3) for i, tensor in enumerate(tensors)]
    out, wanted = function(*found), reference(*exact)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    out.backward(grad)
    wanted.backward(grad.double())
    pairs = [(out, wanted), *((f.grad, e.grad) for f, e in zip(found[:3], exact[:3], strict=True))]
    for actual, expected in pairs:
        assert (actual.double() - expected).norm() <= tolerance * expected.norm()


@pytest.mark.kernels_ci
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("points", "head_size"), [(4, 32), (16, 32), (5, 16), (4, 64), (3, 24)])
def test_raw_offsets_and_logits_give_what_grid_sample_gives(device, points, head_size):
    """The fused function, in float32."""
    kernel = load(device)
    assert_equal(
        lambda *args: kernel.ms_deform_attn(*args, SHAPES), definition, inputs(device, points, head_size), 1e-5
    )


@pytest.mark.kernels_ci
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 4e-3), (torch.float16, 5e-4)])
def test_sixteen_bit_values_are_summed_in_float32(device, dtype, tolerance):
    """The fused function with values of 16 bits and coordinates of 32."""
    kernel = load(device)
    assert_equal(
        lambda *args: kernel.ms_deform_attn(*args, SHAPES), definition, inputs(device, dtype=dtype), tolerance
    )


@pytest.mark.kernels_ci
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # the layer computes what is not served in torch
def test_the_layer_takes_what_transformers_gives(device, dtype):
    """The layer with the signature of the kernels hub."""
    kernel = load(device)
    value, offsets, logits, _ = inputs(device, dtype=dtype)
    layer = kernel.layers.MultiScaleDeformableAttention()
    shapes = list(zip(SHAPES[::2], SHAPES[1::2], strict=True))

    def run(value, locations, weights):
        starts = torch.tensor([0, 63, 83], device=device)
        return layer(value, torch.tensor(shapes, device=device), shapes, starts, locations, weights, 64)

    assert_equal(run, sampled_definition, [value, offsets.sigmoid(), logits.softmax(-1)], 1e-5)
