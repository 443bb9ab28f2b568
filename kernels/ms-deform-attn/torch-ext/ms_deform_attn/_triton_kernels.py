"""Device code of multi-scale deformable attention for CUDA, in Triton; `_triton.py` launches it.

One program serves a block of neighboring queries of one head of one image. It works out each location once (not
once per channel), gathers the four pixels around it with 16-byte loads and accumulates in float32. The backward
kernel recomputes the locations and adds into a float32 gradient of the value map with atomics, four channels at a
time on sm_90. The gradient of the softmax needs no sum over points: it is the product of output and output gradient
(the identity of FlashAttention).

Letters in shapes: B images, Q queries, S value tokens (the pixels of all levels), M heads, D head size, L levels,
P points per level. `points` are offsets in pixels, or locations in [0, 1] if `SAMPLED`; `scores` are logits of the
softmax over levels and points, or weights that are already normalized. Tiles are padded to powers of two.
"""

import triton
import triton.language as tl


@triton.jit
def _rows(
    points, scores, num_queries, point_batch_stride, point_query_stride, score_batch_stride, score_query_stride,
    reference_batch_stride, LEVELS: tl.constexpr, POINTS: tl.constexpr, BLOCK_QUERIES: tl.constexpr,
):  # fmt: skip
    """Head, image, and where each query of this program starts in every tensor; all offsets are 64-bit."""
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    query = (tl.program_id(0) * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)).to(tl.int64)
    point_rows = points + batch * point_batch_stride + query * point_query_stride + head * (LEVELS * POINTS * 2)
    score_rows = scores + batch * score_batch_stride + query * score_query_stride + head * (LEVELS * POINTS)
    reference_offset = batch * reference_batch_stride + query * (2 * LEVELS)
    return head, batch, batch * num_queries + query, query < num_queries, point_rows, score_rows, reference_offset


@triton.jit
def _size(shapes, level, LEVELS: tl.constexpr):
    """Height and width of a level, as floats; a tuple cannot be indexed by a run-time value, hence the loop."""
    height = shapes[0]
    width = shapes[1]
    for other in tl.static_range(1, LEVELS):
        height = tl.where(level == other, shapes[2 * other], height)
        width = tl.where(level == other, shapes[2 * other + 1], width)
    return height, width


@triton.jit
def _softmax_sums(score_rows, query_mask, SCORES: tl.constexpr, SCORES_PADDED: tl.constexpr):
    """Largest logit of each query, and the sum of exponentials relative to it."""
    j = tl.arange(0, SCORES_PADDED)
    mask = query_mask[:, None] & (j < SCORES)[None, :]
    logits = tl.load(score_rows[:, None] + j[None, :], mask=mask, other=-float("inf")).to(tl.float32)
    largest = tl.where(query_mask, tl.max(logits, 1), 0.0)
    total = tl.sum(tl.exp(logits - largest[:, None]), 1)
    return largest, tl.where(query_mask, total, 1.0)


@triton.jit
def _weights(
    score_rows, shift, query_mask, level, POINTS: tl.constexpr, POINTS_PADDED: tl.constexpr, SAMPLED: tl.constexpr
):
    """Attention weights of a level: read as they are, or exponentials of the logits relative to `shift`."""
    j = tl.arange(0, POINTS_PADDED)
    mask = query_mask[:, None] & (j < POINTS)[None, :]
    absent = 0.0 if SAMPLED else -float("inf")  # a padded point weighs nothing, however small the other logits are
    scores = tl.load(score_rows[:, None] + level * POINTS + j[None, :], mask=mask, other=absent).to(tl.float32)
    return scores if SAMPLED else tl.exp(scores - shift[:, None])


@triton.jit
def _locations(
    point_rows, reference_rows, query_mask, level, height, width,
    POINTS: tl.constexpr, POINTS_PADDED: tl.constexpr, BLOCK_QUERIES: tl.constexpr, SAMPLED: tl.constexpr,
):  # fmt: skip
    """Pixel left of and above each point of a level, the distance to it, and which points touch the map."""
    j = tl.arange(0, 2 * POINTS_PADDED)
    mask = query_mask[:, None] & (j < 2 * POINTS)[None, :]
    # x and y lie side by side in memory: one wide load for both, parted in registers.
    pairs = tl.load(point_rows[:, None] + level * (2 * POINTS) + j[None, :], mask=mask, other=0.0).to(tl.float32)
    x, y = tl.split(tl.reshape(pairs, [BLOCK_QUERIES, POINTS_PADDED, 2]))
    if SAMPLED:
        x = x * width - 0.5
        y = y * height - 0.5
    else:
        reference_x = tl.load(reference_rows + 2 * level, mask=query_mask, other=0.0)
        reference_y = tl.load(reference_rows + 2 * level + 1, mask=query_mask, other=0.0)
        x += (reference_x * width - 0.5)[:, None]
        y += (reference_y * height - 0.5)[:, None]
    real = query_mask[:, None] & (tl.arange(0, POINTS_PADDED) < POINTS)[None, :]
    # The comparisons are false for NaN, so such a point adds nothing, like one outside the map.
    inside = real & (x > -1.0) & (x < width) & (y > -1.0) & (y < height)
    x = tl.where(inside, x, 0.0)
    y = tl.where(inside, y, 0.0)
    left = tl.floor(x)
    top = tl.floor(y)
    return left.to(tl.int32), top.to(tl.int32), x - left, y - top, inside


@triton.jit
def _corner(left, top, right_part, lower_part, inside, start, height, width, dx: tl.constexpr, dy: tl.constexpr):
    """Token of one of the four pixels around each point, its two bilinear factors, and whether it may be read."""
    x = left + dx
    y = top + dy
    factor_x = right_part if dx == 1 else 1.0 - right_part
    factor_y = lower_part if dy == 1 else 1.0 - lower_part
    readable = inside & (x >= 0) & (x < width) & (y >= 0) & (y < height)
    return start + y * width + x, factor_x, factor_y, readable


@triton.jit
def _channels(image_offset, tokens, head, HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr):
    """Element offset of every channel of `tokens` in the value map: (queries, points, D)."""
    first = image_offset + tokens.to(tl.int64) * (HEADS * HEAD_SIZE) + head * HEAD_SIZE
    return first[:, :, None] + tl.arange(0, HEAD_SIZE)[None, None, :]


@triton.jit
def _store_points(target, row, column, tile, query_mask, ROW: tl.constexpr, USED: tl.constexpr, PADDED: tl.constexpr):
    """Store the first `USED` columns of `tile` into rows of `ROW` elements without gaps."""
    j = tl.arange(0, PADDED)
    pointers = target + row[:, None] * ROW + column + j[None, :]
    tl.store(pointers, tile.to(target.dtype.element_ty), mask=query_mask[:, None] & (j < USED)[None, :])


# A new image size must not recompile a kernel. Shapes come as floats because Triton specializes the ints of
# a tuple whatever `do_not_specialize` says; below 2**24 they are exact.
_IMAGE_DEPENDENT = ["num_tokens", "num_queries", "reference_batch_stride"]


@triton.jit(do_not_specialize=_IMAGE_DEPENDENT)
def forward_kernel(
    value, points, scores, reference_points, shapes, out, lse, num_tokens, num_queries,
    point_batch_stride, point_query_stride, score_batch_stride, score_query_stride, reference_batch_stride,
    HEADS: tl.constexpr, LEVELS: tl.constexpr, POINTS: tl.constexpr, HEAD_SIZE: tl.constexpr,
    POINTS_PADDED: tl.constexpr, SCORES_PADDED: tl.constexpr, BLOCK_QUERIES: tl.constexpr, SAMPLED: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of one block of queries; grid (query blocks, heads, images), images slowest for L2."""
    head, batch, row, query_mask, point_rows, score_rows, reference_offset = _rows(
        points, scores, num_queries, point_batch_stride, point_query_stride, score_batch_stride, score_query_stride,
        reference_batch_stride, LEVELS, POINTS, BLOCK_QUERIES,
    )  # fmt: skip
    reference_rows = None if SAMPLED else reference_points + reference_offset
    shift = None
    total = None
    if not SAMPLED:
        shift, total = _softmax_sums(score_rows, query_mask, LEVELS * POINTS, SCORES_PADDED)
        tl.store(lse + row * HEADS + head, shift + tl.log(total), mask=query_mask)
    image_offset = batch * num_tokens * (HEADS * HEAD_SIZE)
    gathered = tl.zeros([BLOCK_QUERIES, POINTS_PADDED, HEAD_SIZE], tl.float32)
    start = 0
    # A loop and not unrolled levels: unrolled, ptxas moves the loads of all levels to the front and spills. One
    # stage, because the loads depend on each other and there is nothing to prefetch through shared memory.
    for level in tl.range(LEVELS, num_stages=1):
        height, width = _size(shapes, level, LEVELS)
        rows = height.to(tl.int32)
        columns = width.to(tl.int32)
        left, top, right_part, lower_part, inside = _locations(
            point_rows, reference_rows, query_mask, level, height, width,
            POINTS, POINTS_PADDED, BLOCK_QUERIES, SAMPLED,
        )  # fmt: skip
        weight = _weights(score_rows, shift, query_mask, level, POINTS, POINTS_PADDED, SAMPLED)
        for dy in tl.static_range(2):
            for dx in tl.static_range(2):
                token, factor_x, factor_y, readable = _corner(
                    left, top, right_part, lower_part, inside, start, rows, columns, dx, dy
                )
                channels = _channels(image_offset, token, head, HEADS, HEAD_SIZE)
                pixel = tl.load(value + channels, mask=readable[:, :, None], other=0.0).to(tl.float32)
                gathered += (weight * factor_x * factor_y)[:, :, None] * pixel
        start += rows * columns
    # Points are summed once at the end: inside the loop it would need exchanges between threads at every corner.
    result = tl.sum(gathered, 1)
    if not SAMPLED:
        result = result / total[:, None]
    channel = row[:, None] * (HEADS * HEAD_SIZE) + head * HEAD_SIZE + tl.arange(0, HEAD_SIZE)[None, :]
    tl.store(out + channel, result.to(out.dtype.element_ty), mask=query_mask[:, None])


@triton.jit
def _corner_gradients(
    value, grad_value, grad_row, weight, left, top, right_part, lower_part, inside, image_offset, start, rows, columns,
    head, HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr,
):  # fmt: skip
    """Gradients of weight, x and y (the last two per unit of weight) of a level; adds into `grad_value`."""
    grad_weight = tl.zeros_like(weight)
    grad_x = tl.zeros_like(weight)
    grad_y = tl.zeros_like(weight)
    for dy in tl.static_range(2):
        for dx in tl.static_range(2):
            token, factor_x, factor_y, readable = _corner(
                left, top, right_part, lower_part, inside, start, rows, columns, dx, dy
            )
            channels = _channels(image_offset, token, head, HEADS, HEAD_SIZE)
            pixel = tl.load(value + channels, mask=readable[:, :, None], other=0.0).to(tl.float32)
            product = tl.sum(pixel * grad_row[:, None, :], 2)
            grad_weight += factor_x * factor_y * product
            grad_x += factor_y * product if dx == 1 else -factor_y * product
            grad_y += factor_x * product if dy == 1 else -factor_x * product
            share = (weight * factor_x * factor_y)[:, :, None] * grad_row[:, None, :]
            tl.atomic_add(grad_value + channels, share, mask=readable[:, :, None], sem="relaxed")
    return grad_weight, grad_x, grad_y


@triton.jit(do_not_specialize=_IMAGE_DEPENDENT)
def backward_kernel(
    value, points, scores, reference_points, shapes, out, lse, grad, grad_value, grad_points, grad_scores,
    num_tokens, num_queries,
    point_batch_stride, point_query_stride, score_batch_stride, score_query_stride, reference_batch_stride,
    HEADS: tl.constexpr, LEVELS: tl.constexpr, POINTS: tl.constexpr, HEAD_SIZE: tl.constexpr,
    POINTS_PADDED: tl.constexpr, BLOCK_QUERIES: tl.constexpr, SAMPLED: tl.constexpr,
):  # fmt: skip
    """All gradients of one block of queries of one head; grid and loop as in the forward kernel."""
    head, batch, row, query_mask, point_rows, score_rows, reference_offset = _rows(
        points, scores, num_queries, point_batch_stride, point_query_stride, score_batch_stride, score_query_stride,
        reference_batch_stride, LEVELS, POINTS, BLOCK_QUERIES,
    )  # fmt: skip
    reference_rows = None if SAMPLED else reference_points + reference_offset
    channel = row[:, None] * (HEADS * HEAD_SIZE) + head * HEAD_SIZE + tl.arange(0, HEAD_SIZE)[None, :]
    grad_row = tl.load(grad + channel, mask=query_mask[:, None], other=0.0).to(tl.float32)
    head_row = row * HEADS + head
    shift = None
    mean_grad = None
    if not SAMPLED:
        shift = tl.load(lse + head_row, mask=query_mask, other=0.0)
        # The weighted mean over points of the gradients of the weights, without visiting the points.
        out_row = tl.load(out + channel, mask=query_mask[:, None], other=0.0).to(tl.float32)
        mean_grad = tl.sum(grad_row * out_row, 1)
    image_offset = batch * num_tokens * (HEADS * HEAD_SIZE)
    start = 0
    for level in tl.range(LEVELS, num_stages=1):
        height, width = _size(shapes, level, LEVELS)
        rows = height.to(tl.int32)
        columns = width.to(tl.int32)
        left, top, right_part, lower_part, inside = _locations(
            point_rows, reference_rows, query_mask, level, height, width,
            POINTS, POINTS_PADDED, BLOCK_QUERIES, SAMPLED,
        )  # fmt: skip
        weight = _weights(score_rows, shift, query_mask, level, POINTS, POINTS_PADDED, SAMPLED)
        grad_score, grad_x, grad_y = _corner_gradients(
            value, grad_value, grad_row, weight, left, top, right_part, lower_part, inside, image_offset, start,
            rows, columns, head, HEADS, HEAD_SIZE,
        )  # fmt: skip
        if SAMPLED:
            grad_x *= width
            grad_y *= height
        else:
            grad_score = weight * (grad_score - mean_grad[:, None])
        # Every point belongs to one program, so its own gradients need no atomics.
        pairs = tl.reshape(tl.join(weight * grad_x, weight * grad_y), [BLOCK_QUERIES, 2 * POINTS_PADDED])
        _store_points(
            grad_scores, head_row, level * POINTS, grad_score, query_mask, LEVELS * POINTS, POINTS, POINTS_PADDED
        )
        _store_points(
            grad_points, head_row, level * (2 * POINTS), pairs, query_mask,
            2 * LEVELS * POINTS, 2 * POINTS, 2 * POINTS_PADDED,
        )  # fmt: skip
        start += rows * columns
