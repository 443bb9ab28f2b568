"""How HLG cuts maps into groups of tokens, where these lie, and the bias that attention gives to their distance.

"Vision Transformers: From Semantic Segmentation to Dense Prediction", IJCV 2024, Sec. 3.3: windows and dilated groups,
and the dynamic position bias.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.utils.generic import maybe_autocast


class HlgGrouping(NamedTuple):
    """How a map is cut into groups that attend within themselves; a group becomes one key of the global attention.

    Plain groups are windows. Dilated ones take every `groups`-th row and column: their rate is the number of groups,
    and each spans the map.

    Args:
        groups: (down, across), number of groups.
        tokens: (down, across) of each group.
        dilated: whether groups are dilated.
    """

    groups: tuple[int, int]
    tokens: tuple[int, int]
    dilated: bool

    @classmethod
    def windows(cls, size: tuple[int, int], side: int, dilated: bool) -> "HlgGrouping":
        """Groups of `side` x `side` tokens that cover a map: the backbone's, and the decoder's plain ones."""
        return cls(((size[0] + side - 1) // side, (size[1] + side - 1) // side), (side, side), dilated)

    @classmethod
    def phases(cls, size: tuple[int, int], rate: int) -> "HlgGrouping":
        """Dilated groups of a fixed rate: the decoder's."""
        return cls((rate, rate), ((size[0] + rate - 1) // rate, (size[1] + rate - 1) // rate), True)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the map filled up to whole groups."""
        return self.groups[0] * self.tokens[0], self.groups[1] * self.tokens[1]

    def unfold(self, tokens: torch.Tensor, *last: int) -> torch.Tensor:
        """`(B, H, W, C)` -> `(B, groups down, across, tokens down, across, C)`; a view. C may be cut into `last`."""
        (g, v), (t, u) = self.groups, self.tokens
        shape = (t, g, u, v) if self.dilated else (g, t, v, u)
        order = (0, 2, 4, 1, 3) if self.dilated else (0, 1, 3, 2, 4)
        tokens = tokens.reshape(tokens.shape[0], *shape, *(last or tokens.shape[3:]))
        return tokens.permute(*order, *range(5, tokens.ndim))

    def fold(self, groups: torch.Tensor) -> torch.Tensor:
        """Undo `unfold`: `(B, groups down, across, tokens down, across, C)` -> `(B, H, W, C)`."""
        order = (0, 3, 1, 4, 2, 5) if self.dilated else (0, 1, 3, 2, 4, 5)
        return groups.permute(order).reshape(groups.shape[0], *self.size, -1)

    def key_lines(self, axis: int) -> tuple[int, int]:
        """Mean positions of the groups along an axis, as (first, step)."""
        groups, tokens = self.groups[axis], self.tokens[axis]
        return (groups * (tokens - 1) // 2, 1) if self.dilated else ((tokens - 1) // 2, tokens)


class HlgOffsets(NamedTuple):
    """Offsets between queries and keys, each computed once: bias[n, m] = table[query[n] + key[m]].

    Args:
        offsets: `(R, 2)` (dy, dx).
        query: `(N,)` int64.
        key: `(M,)` int64.
    """

    offsets: torch.Tensor
    query: torch.Tensor
    key: torch.Tensor


class HlgPlaces(NamedTuple):
    """Where the keys of an attention lie for the position bias.

    Args:
        size: (height, width) of the queries' map.
        keys: (down, across), number of keys.
        first: position of the first key, (y, x).
        step: distance of neighbouring keys, (y, x).
        row: 0 for keys on a grid; else the keys are numbered through rows of this length (rule `"flat"`).
        scrambled: whether the row lengths of keys and table are mixed up (rule `"tuple4"`).
    """

    size: tuple[int, int]
    keys: tuple[int, int]
    first: tuple[int, int] = (0, 0)
    step: tuple[int, int] = (1, 1)
    row: int = 0
    scrambled: bool = False

    @classmethod
    def of(cls, rule: str, size: tuple[int, int], grouping: HlgGrouping) -> "HlgPlaces":
        """Places of a grouping's window embeddings, by the rule `global_bias` of the configuration."""
        if rule == "flat":
            return cls(size, grouping.groups, row=size[1])
        if rule == "tuple4":
            return cls(size, grouping.groups, scrambled=True)
        (y, step_y), (x, step_x) = grouping.key_lines(0), grouping.key_lines(1)
        return cls(size, grouping.groups, (y, x), (step_y, step_x))

    def offsets(self, device: torch.device) -> HlgOffsets:
        """All offsets that occur, and how queries and keys find theirs."""
        (height, width), (down, across) = self.size, self.keys
        if self.scrambled:
            # The released rule: keys at (m div w, m mod w), rows of 2w - 1 entries in a table with rows of 2W - 1.
            stride, length = 2 * across - 1, 2 * width - 1
            query = _grid(height, width, stride, device) + (down - 1) * stride + across - 1
            key = -_grid(down, across, stride, device)
            entry = torch.arange((height + down - 2) * stride + width + across - 1, device=device)
            table = torch.stack((entry // length - (height - 1), entry % length - (width - 1)), dim=1)
            return HlgOffsets(table.float(), query, key)
        if self.row:
            lowest, highest = (0, 0), ((down * across - 1) // self.row, self.row - 1)
        else:
            lowest = self.first
            highest = (self.first[0] + self.step[0] * (down - 1), self.first[1] + self.step[1] * (across - 1))
        rows = torch.arange(-highest[0], height - lowest[0], device=device)
        columns = torch.arange(-highest[1], width - lowest[1], device=device)
        stride = width + highest[1] - lowest[1]
        if self.row:
            number = torch.arange(down * across, device=device)
            key = -(number // self.row) * stride - number % self.row
        else:
            key_rows = self.first[0] + self.step[0] * torch.arange(down, device=device)
            key_columns = self.first[1] + self.step[1] * torch.arange(across, device=device)
            key = -(key_rows[:, None] * stride + key_columns).flatten()
        key = key + highest[0] * stride + highest[1]
        return HlgOffsets(torch.cartesian_prod(rows, columns).float(), _grid(height, width, stride, device), key)


def _grid(height: int, width: int, stride: int, device: torch.device) -> torch.Tensor:
    """y * stride + x for each position of a map, row by row."""
    lines = torch.arange(height, device=device)[:, None] * stride + torch.arange(width, device=device)
    return lines.flatten()


class HlgPositionBias(nn.Module):
    """Dynamic position bias (Sec. 3.3): a small network turns an offset into one number per head.

    It runs once per offset and, without gradients in eval mode, once per size: the last result is kept until weights,
    size or mode change.
    """

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        width = channels // 16
        self.num_heads = num_heads
        self.projection = nn.Linear(2, width)
        self.norms: Any = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.layers: Any = nn.ModuleList(nn.Linear(width, out) for out in (width, width, num_heads))
        self._kept: tuple[Any, Any] | None = None

    def train(self, mode: bool = True) -> "HlgPositionBias":
        """As in torch; what was kept is dropped."""
        self._kept = None
        return super().train(mode)

    def table(self, offsets: torch.Tensor) -> torch.Tensor:
        """Bias of each offset, `(R, 2)` -> `(heads, R)`, in float32 at least: 16 bits do not hold large offsets."""
        dtype = torch.promote_types(self.projection.weight.dtype, torch.float32)
        with maybe_autocast(offsets.device.type, enabled=False):
            hidden = F.linear(offsets.to(dtype), self.projection.weight.to(dtype), self.projection.bias.to(dtype))
            for norm, layer in zip(self.norms, self.layers, strict=True):
                weight, bias = norm.weight.to(dtype), norm.bias.to(dtype)
                hidden = F.relu(F.layer_norm(hidden, norm.normalized_shape, weight, bias, norm.eps))
                hidden = F.linear(hidden, layer.weight.to(dtype), layer.bias.to(dtype))
        return hidden.T

    def look_up(self, places: HlgPlaces, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Table `(heads, R)` of all offsets, and the indices `(N,)` and `(M,)` whose sums point into it."""
        device = self.projection.weight.device

        def make() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            found = places.offsets(device)
            return self.table(found.offsets).to(dtype).contiguous(), found.query, found.key

        return self._keep(("table", places, dtype), make)

    def forward(self, places: HlgPlaces, dtype: torch.dtype) -> torch.Tensor:
        """Whole bias `(1, heads, N, M)`."""

        def make() -> torch.Tensor:
            found = places.offsets(self.projection.weight.device)
            return spread(self.table(found.offsets).to(dtype).contiguous(), found.query, found.key)

        return self._keep(("whole", places, dtype), make)

    def _keep(self, key: Any, make: Callable[[], Any]) -> Any:
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return make()
        # In-place changes raise the version, new tensors have other addresses.
        weights = tuple((each.data_ptr(), each._version) for each in self.parameters() if not each.is_inference())
        if not weights:
            return make()
        if self._kept is None or self._kept[0] != (key, weights):
            self._kept = ((key, weights), make())
        return self._kept[1]


def spread(table: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Give every pair of query and key its bias: `(heads, R)` -> `(1, heads, N, M)`."""
    index = (query[:, None] + key).flatten()
    return table.index_select(1, index).view(1, table.shape[0], query.shape[0], key.shape[0])


__all__ = ["HlgGrouping", "HlgOffsets", "HlgPlaces", "HlgPositionBias", "spread"]
