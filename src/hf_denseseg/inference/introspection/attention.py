"""Attention of picked points, traced back to the patches of the image (IJCV 2024, Figures 11, 13 and 14)."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from hf_denseseg.errors import InputError

EXTRA_TOKENS = 2  # largest number of tokens besides the patches: class token, distillation token

Size = tuple[int, int]


@dataclass
class LayerAttention:
    """How picked points attend in one layer.

    Args:
        heads: `(points, heads, h, w)` attention weight that each head gives to each patch.
        rollout: `(points, h, w)` attention traced back from this layer to the patches of the image.
    """

    heads: torch.Tensor
    rollout: torch.Tensor


def attention_rollout(attentions: Iterable[torch.Tensor]) -> torch.Tensor:
    """Trace attention back through all layers: the product of 0.5 A + 0.5 I, rows summing to 1 (Abnar, Zuidema 2020).

    Args:
        attentions: `(N, N)` or `(heads, N, N)` of each layer, first layer first; heads are averaged.

    Returns:
        `(N, N)`: how much of each token of the image (column) is in each token of the last layer (row).
    """
    rollout = None
    for attention in attentions:
        rollout = _roll(rollout, attention)
    if rollout is None:
        raise InputError("Rollout needs the attention of at least one layer.")
    return rollout


def _roll(rollout: torch.Tensor | None, attention: torch.Tensor) -> torch.Tensor:
    """Trace back one more layer; half of a token comes past the attention, on the residual path."""
    # (heads, N, N) -> (N, N)
    mean = attention.float().flatten(0, -3).mean(0) if attention.ndim > 2 else attention.float()
    mixed = mean / 2 + torch.eye(len(mean), device=mean.device) / 2
    mixed = mixed / mixed.sum(-1, keepdim=True)
    return mixed if rollout is None else mixed @ rollout


def token_grid(length: int, size: Size) -> Size | None:
    """Grid (h, w) of a sequence of tokens: all tokens but extra leading ones, in the aspect ratio of the image.

    Args:
        length: number of tokens.
        size: (height, width) of the image, multiples of the patch.

    Returns:
        None if no grid fits. Two never do, except for a handful of tokens.
    """
    common = math.gcd(*size)
    height, width = size[0] // common, size[1] // common
    for patches in range(length, max(length - EXTRA_TOKENS, 1) - 1, -1):
        factor = math.isqrt(patches // (height * width))
        if factor and factor**2 * height * width == patches:
            return factor * height, factor * width
    return None


class AttentionReader:
    """Forward hook that reads the attention of picked points where a module gives `(tokens, weights)`.

    Only the rows of the points are kept, so that no more than one layer's weights are in memory. `uniform` turns false
    when some attention does not go from all tokens to all tokens of one grid (windows, reduced keys, several grids).
    """

    def __init__(self, size: Size, points: Sequence[tuple[float, float]]) -> None:
        self.size = size
        self.points = points
        self.layers: list[LayerAttention] = []
        self.uniform = True
        self._seen: torch.Tensor | None = None
        self._rollout: torch.Tensor | None = None

    def __call__(self, module: nn.Module, args: tuple, output: object) -> None:
        """Called by torch after the `forward` of each module."""
        if not isinstance(output, tuple) or len(output) < 2:
            return
        tokens, weights = output[:2]
        if not isinstance(tokens, torch.Tensor) or not isinstance(weights, torch.Tensor):
            return
        # Convolution blocks give pairs too, but of maps. A module may hand on the weights of the one inside it.
        if tokens.ndim != 3 or weights.ndim != 4 or weights is self._seen:
            return
        self._seen = weights
        length = weights.shape[-1]
        grid = token_grid(length, self.size)
        known = self._rollout is None or len(self._rollout) == length
        if grid is None or weights.shape[0] != 1 or weights.shape[-2] != length or not known:
            self.uniform = False
        if self.uniform and grid is not None:
            self._keep(weights[0], grid)

    def _keep(self, weights: torch.Tensor, grid: Size) -> None:
        self._rollout = _roll(self._rollout, weights)
        # Tokens are row by row, behind the extra ones; a token's row of `weights` is how it attends to all others.
        extra = weights.shape[-1] - grid[0] * grid[1]
        rows = [extra + int(y * grid[0]) * grid[1] + int(x * grid[1]) for x, y in self.points]
        heads = weights[:, rows, extra:].transpose(0, 1)  # (heads, points, h*w) -> (points, heads, h*w)
        rollout = self._rollout[rows, extra:]
        self.layers.append(LayerAttention(heads.float().cpu().unflatten(-1, grid), rollout.cpu().unflatten(-1, grid)))


def spread_layers(count: int, shown: int = 4) -> tuple[int, ...]:
    """Numbers of at most `shown` layers from the first to the last (1, 9, 17, 24 of 24, as in Figure 7)."""
    shown = min(shown, count)
    return tuple(1 + -(-index * (count - 1) // max(shown - 1, 1)) for index in range(shown))


def relative_points(points: Sequence[tuple[float, float]], size: Size, name: str) -> list[tuple[float, float]]:
    """Turn picked points into fractions of the image's sides; without points it is the center.

    Args:
        points: (x, y) in pixels.
        size: (height, width) of the image.
        name: how messages call the image.

    Raises:
        InputError: a point lies outside.
    """
    height, width = size
    for x, y in points:
        if not (0 <= x < width and 0 <= y < height):
            raise InputError(
                f"Point {x:g} {y:g} lies outside {name}, which is {width} wide and {height} high. "
                f"Give x from 0 to {width - 1} and y from 0 to {height - 1}."
            )
    return [(x / width, y / height) for x, y in points] or [(0.5, 0.5)]
