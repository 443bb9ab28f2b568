"""Launch the Triton kernels of multi-scale deformable attention: forward and backward, on CUDA.

Two signatures share the device code (`_triton_kernels.py`). The fused one takes raw offsets (pixels), raw logits and
reference points, and does the softmax and the location arithmetic inside. The sampled one is that of the kernels
hub: locations in [0, 1] and weights that are already normalized. Letters in shapes: B images, Q queries, S value
tokens (the pixels of all levels), M heads, D head size, L levels, P points per level.

Import this module only when a kernel is about to run: a CPU-only install may lack Triton or a driver.
"""

import warnings

import torch
import triton
from torch.nn import functional as F

from ._triton_kernels import backward_kernel, forward_kernel

MAX_HEAD_SIZE = 256
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_SCORES = 256  # levels times points: the logits of a query are one tile
OLDEST_GPU = (8, 0)  # compute capability; older ones have no bfloat16

# Elements of the gathered tile (queries x points x head size) per thread, and least number of warps per program.
# Chosen by reading the code compiled for sm_90 (16-byte loads, additions four wide, no spills), not yet measured on a
# GPU. Half the elements cost more instructions per point, twice as many spill. Four warps keep neighboring queries,
# which read the same pixels, on one L1 cache; one warp would need a tenth fewer instructions.
TILE = (32, 4)
TILE_BACKWARD_WIDE = (16, 2)  # head sizes from 64 up, where four reductions over the head size are in flight


def unserved(value: torch.Tensor) -> str | None:
    """Why these kernels do not support a value map (B, S, M, D), or None if they do."""
    if value.shape[3] > MAX_HEAD_SIZE:
        return f"a head size of {value.shape[3]} is above {MAX_HEAD_SIZE}, the widest tile of the Triton kernels"
    if value.dtype not in DTYPES:
        return f"{value.dtype} is not computed, since the Triton kernels work in float32"
    if value.is_cuda and torch.version.hip is not None:
        return "the Triton kernels are written and checked for NVIDIA GPUs only"
    if value.is_cuda and (capability := torch.cuda.get_device_capability(value.device)) < OLDEST_GPU:
        return f"the GPU has compute capability {capability}, and the Triton kernels need {OLDEST_GPU}"
    return None


def tile(points: int, head_size: int, backward: bool) -> tuple[int, int]:
    """Queries per program and warps per program, for `points` per level and `head_size` channels per head."""
    per_thread, warps = TILE_BACKWARD_WIDE if backward and head_size >= 64 else TILE
    per_query = triton.next_power_of_2(points) * head_size
    warps = min(max(warps, per_query // (32 * per_thread)), 16)
    return max(1, 32 * warps * per_thread // per_query), warps


def _launch(kernel, tensors, value, points, scores, reference_points, spatial_shapes, backward) -> None:
    """Run `kernel` over (query blocks, heads, images) on the device of `value`."""
    batch, tokens, heads, head_size = value.shape
    _, queries, _, levels, per_level, _ = points.shape
    block, warps = tile(per_level, head_size, backward)
    sizes = {} if backward else {"SCORES_PADDED": triton.next_power_of_2(levels * per_level)}
    shared_reference = reference_points is None or reference_points.shape[0] == 1
    with torch.cuda.device_of(value):
        kernel[(triton.cdiv(queries, block), heads, batch)](
            value, points, scores, reference_points, tuple(float(size) for size in spatial_shapes), *tensors,
            tokens, queries, points.stride(0), points.stride(1), scores.stride(0), scores.stride(1),
            0 if shared_reference else queries * levels * 2,
            HEADS=heads, LEVELS=levels, POINTS=per_level, HEAD_SIZE=head_size,
            POINTS_PADDED=triton.next_power_of_2(per_level), BLOCK_QUERIES=block, SAMPLED=reference_points is None,
            num_warps=warps, enable_fp_fusion=True, **sizes,
        )  # fmt: skip


def _checked(value, points, scores, spatial_shapes):
    """`value` (with padded heads), `points` and `scores` in the layout that the kernels read.

    Raises:
        ValueError: the kernels do not support these sizes, or the levels do not add up to the tokens.
    """
    levels, per_level = points.shape[3], points.shape[4]
    if (reason := unserved(value)) is not None:
        raise ValueError(f"ms-deform-attn: {reason}. Use the plain torch path instead.")
    if levels * per_level > MAX_SCORES:
        raise ValueError(
            f"ms-deform-attn: {levels} levels of {per_level} points were given, and the Triton kernels take up to "
            f"{MAX_SCORES} points in all. Use the plain torch path instead."
        )
    sizes = list(zip(spatial_shapes[::2], spatial_shapes[1::2], strict=True))
    tokens = sum(height * width for height, width in sizes)
    if len(sizes) != levels or tokens != value.shape[1]:
        raise ValueError(
            f"`spatial_shapes` {sizes} has {len(sizes)} levels and {tokens} pixels, but `value` has {value.shape[1]} "
            f"tokens and the locations have {levels} levels. Give the (height, width) of every level, in order."
        )
    return _filled(value).contiguous(), _packed_rows(points, 4), _packed_rows(scores, 3)


def _filled(heads: torch.Tensor) -> torch.Tensor:
    """(..., D) with zeros after the last channel of every head, up to a power of two: tiles have no other widths."""
    missing = max(16, triton.next_power_of_2(heads.shape[-1])) - heads.shape[-1]
    return F.pad(heads, (0, missing)) if missing else heads


def _filled_rows(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """(B, Q, M * D) with every head padded like the value map."""
    return _filled(rows.unflatten(2, (heads, -1))).flatten(2).contiguous()


def _packed_rows(tensor: torch.Tensor, trailing: int) -> torch.Tensor:
    """`tensor` itself if its last `trailing` dimensions are contiguous (a slice of a fused Linear is), else a copy."""
    wanted = 1
    for dimension in range(tensor.ndim - 1, tensor.ndim - 1 - trailing, -1):
        if tensor.shape[dimension] != 1 and tensor.stride(dimension) != wanted:
            return tensor.contiguous()
        wanted *= tensor.shape[dimension]
    return tensor


def _refuse_if_deterministic() -> None:
    """Additions into the gradient of the value map have no fixed order, so its last bits vary between runs."""
    if not torch.are_deterministic_algorithms_enabled():
        return
    message = (
        "The Triton backward of ms_deform_attn adds into the gradient of `value` in no fixed order, so it is not "
        "deterministic. Use the CPU kernel, or allow it with `torch.use_deterministic_algorithms(False)`."
    )
    if not torch.is_deterministic_algorithms_warn_only_enabled():
        raise RuntimeError(message)
    warnings.warn(message, stacklevel=3)


def forward(
    value: torch.Tensor,
    offsets: torch.Tensor,
    logits: torch.Tensor,
    reference_points: torch.Tensor,
    spatial_shapes: list[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Deformable attention from raw offsets, raw logits and reference points.

    Args:
        value: (B, S, M, D) value map, float32, bfloat16 or float16; accumulated in float32.
        offsets: (B, Q, M, L, P, 2) float32 offsets (x, y) in pixels of each level; rows may be strided.
        logits: (B, Q, M, L, P) logits of the softmax over levels and points; rows may be strided.
        reference_points: (B or 1, Q, L, 2) float32 reference points (x, y) in [0, 1].
        spatial_shapes: height and width of every level, [H0, W0, H1, W1, ...].

    Returns:
        Output (B, Q, M * D) in the dtype of `value`, and the log-sum-exp of the logits (B, Q, M) in float32.

    Raises:
        ValueError: the kernels do not support these sizes, or the levels do not add up to S tokens.
    """
    head_size = value.shape[3]
    value, offsets, logits = _checked(value, offsets, logits, spatial_shapes)
    out = value.new_empty(*offsets.shape[:3], value.shape[3])
    lse = value.new_empty(offsets.shape[:3], dtype=torch.float32)
    reference_points = reference_points.float().contiguous()
    _launch(forward_kernel, (out, lse), value, offsets, logits, reference_points, spatial_shapes, backward=False)
    return out[..., :head_size].flatten(2), lse


def backward(
    grad: torch.Tensor,
    value: torch.Tensor,
    offsets: torch.Tensor,
    logits: torch.Tensor,
    reference_points: torch.Tensor,
    spatial_shapes: list[int],
    out: torch.Tensor,
    lse: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `forward`.

    Args:
        grad: (B, Q, M * D) gradient of the output.
        value: as given to `forward`; so are `offsets`, `logits`, `reference_points` and `spatial_shapes`.
        offsets: see `forward`.
        logits: see `forward`.
        reference_points: see `forward`.
        spatial_shapes: see `forward`.
        out: output of `forward`.
        lse: log-sum-exp from `forward`.

    Returns:
        Gradients of `value` (its dtype, accumulated in float32), `offsets` (float32) and `logits` (their dtype).

    Raises:
        RuntimeError: deterministic algorithms are required; the additions have no fixed order.
        ValueError: as in `forward`.
    """
    _refuse_if_deterministic()
    heads, head_size = value.shape[2:]
    value, offsets, logits = _checked(value, offsets, logits, spatial_shapes)
    grad_value = torch.zeros(value.shape, dtype=torch.float32, device=value.device)
    grad_offsets = torch.empty(offsets.shape, dtype=torch.float32, device=value.device)
    grad_logits = torch.empty(logits.shape, dtype=logits.dtype, device=value.device)
    rows = (_filled_rows(out, heads), lse.contiguous(), _filled_rows(grad, heads))
    tensors = (*rows, grad_value, grad_offsets, grad_logits)
    reference_points = reference_points.float().contiguous()
    _launch(backward_kernel, tensors, value, offsets, logits, reference_points, spatial_shapes, backward=True)
    return grad_value[..., :head_size].to(value.dtype).contiguous(), grad_offsets, grad_logits


def forward_sampled(
    value: torch.Tensor,
    sampling_locations: torch.Tensor,
    attention_weights: torch.Tensor,
    spatial_shapes: list[int],
) -> torch.Tensor:
    """Deformable attention from locations and normalized weights (the signature of the kernels hub).

    Args:
        value: (B, S, M, D) value map, float32, bfloat16 or float16; accumulated in float32.
        sampling_locations: (B, Q, M, L, P, 2) locations (x, y) in [0, 1]; 16-bit locations lose most of a pixel.
        attention_weights: (B, Q, M, L, P) weights, used as they are.
        spatial_shapes: height and width of every level, [H0, W0, H1, W1, ...].

    Returns:
        Output (B, Q, M * D) in the dtype of `value`.

    Raises:
        ValueError: as in `forward`.
    """
    head_size = value.shape[3]
    value, locations, weights = _checked(value, sampling_locations, attention_weights, spatial_shapes)
    out = value.new_empty(*locations.shape[:3], value.shape[3])
    _launch(forward_kernel, (out, None), value, locations, weights, None, spatial_shapes, backward=False)
    return out[..., :head_size].flatten(2)


def backward_sampled(
    grad: torch.Tensor,
    value: torch.Tensor,
    sampling_locations: torch.Tensor,
    attention_weights: torch.Tensor,
    spatial_shapes: list[int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `forward_sampled`.

    Args:
        grad: (B, Q, M * D) gradient of the output.
        value: as given to `forward_sampled`; so are the two tensors and the shapes that follow.
        sampling_locations: see `forward_sampled`.
        attention_weights: see `forward_sampled`.
        spatial_shapes: see `forward_sampled`.

    Returns:
        Gradients of `value` (accumulated in float32), `sampling_locations` and `attention_weights`, in their dtypes.

    Raises:
        RuntimeError: as in `backward`.
        ValueError: as in `forward`.
    """
    _refuse_if_deterministic()
    heads, head_size = value.shape[2:]
    value, locations, weights = _checked(value, sampling_locations, attention_weights, spatial_shapes)
    grad_value = torch.zeros(value.shape, dtype=torch.float32, device=value.device)
    grad_locations = torch.empty(locations.shape, dtype=locations.dtype, device=value.device)
    grad_weights = torch.empty(weights.shape, dtype=weights.dtype, device=value.device)
    tensors = (None, None, _filled_rows(grad, heads), grad_value, grad_locations, grad_weights)
    _launch(backward_kernel, tensors, value, locations, weights, None, spatial_shapes, backward=True)
    return grad_value[..., :head_size].to(value.dtype).contiguous(), grad_locations, grad_weights
