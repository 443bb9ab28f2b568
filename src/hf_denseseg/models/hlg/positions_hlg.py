"""How HLG divides maps into groups of tokens, where the groups lie, and the attention's relative position bias.

"Vision Transformers: From Semantic Segmentation to Dense Prediction", IJCV 2024, Sec. 3.3: plain and dilated windows
(Figure 4), and the position terms B_W of Eq. 5 and B_G of Eq. 7. The text does not say how these are computed; the
released code does, by a dynamic position bias.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.utils.generic import maybe_autocast


@dataclass(frozen=True)
class HlgGrouping:
    """How a map is divided into groups that attend within themselves; each group becomes a key of global attention.

    Plain groups are windows: group (i, j) holds rows i * t to i * t + t - 1, t being `tokens[0]`. Dilated groups span
    the map: group (i, j) holds rows i, i + g, i + 2g, ..., so that the dilation rate g is `groups[0]`. Columns alike.

    Args:
        groups: number of groups (down, across).
        tokens: tokens of each group (down, across).
        dilated: whether groups are dilated.
    """

    groups: tuple[int, int]
    tokens: tuple[int, int]
    dilated: bool

    @classmethod
    def windows(cls, size: tuple[int, int], side: int, dilated: bool) -> "HlgGrouping":
        """Divide a map into groups of `side` x `side` tokens: the backbone's, and the decoder's plain ones."""
        return cls(((size[0] + side - 1) // side, (size[1] + side - 1) // side), (side, side), dilated)

    @classmethod
    def phases(cls, size: tuple[int, int], rate: int) -> "HlgGrouping":
        """Divide a map into dilated groups of a fixed rate: the decoder's."""
        return cls((rate, rate), ((size[0] + rate - 1) // rate, (size[1] + rate - 1) // rate), True)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the map padded to complete groups."""
        return self.groups[0] * self.tokens[0], self.groups[1] * self.tokens[1]

    def unfold(self, tokens: torch.Tensor, value: float = 0.0) -> torch.Tensor:
        """Regroup a map, padded with `value` to complete groups: `(B, H, W, C)` -> `(B * groups, tokens, C)`."""
        batch, height, width, channels = tokens.shape
        (g, v), (t, u) = self.groups, self.tokens
        if (height, width) != self.size:
            tokens = F.pad(tokens, (0, 0, 0, self.size[1] - width, 0, self.size[0] - height), value=value)
        # A row is (token, group) if dilated, so that neighbors lie in different groups, else (group, token).
        shape = (t, g, u, v) if self.dilated else (g, t, v, u)
        order = (0, 2, 4, 1, 3, 5) if self.dilated else (0, 1, 3, 2, 4, 5)
        return tokens.reshape(batch, *shape, channels).permute(order).reshape(batch * g * v, t * u, channels)

    def fold(self, groups: torch.Tensor, batch: int, size: tuple[int, int]) -> torch.Tensor:
        """Invert `unfold` for a map of `size`: `(B * groups, tokens, C)` -> `(B, H, W, C)`."""
        (g, v), (t, u), channels = self.groups, self.tokens, groups.shape[2]
        order = (0, 3, 1, 4, 2, 5) if self.dilated else (0, 1, 3, 2, 4, 5)
        tokens = groups.reshape(batch, g, v, t, u, channels).permute(order).reshape(batch, *self.size, channels)
        return tokens[:, : size[0], : size[1]]

    def keys(self, groups: torch.Tensor, batch: int) -> torch.Tensor:
        """Return the groups of each image, which global attention attends to: `(B * groups, C)` -> `(B, M, C)`."""
        return groups.view(batch, self.groups[0] * self.groups[1], groups.shape[1])

    def traced(self, tokens: torch.Tensor) -> "HlgGrouping":
        """Return the grouping that an exporter needs for maps such as `tokens`, `(B, H, W, C)`: else this one."""
        return HlgTracedGrouping.of(self, tokens) if torch.compiler.is_exporting() else self

    def key_lines(self, axis: int) -> tuple[int, int]:
        """Mean positions of the groups along an axis, as (first, step)."""
        # Plain: the middle of each window. Dilated: group i has the mean of i, i + g, ..., i + (t - 1) * g.
        groups, tokens = self.groups[axis], self.tokens[axis]
        return (groups * (tokens - 1) // 2, 1) if self.dilated else ((tokens - 1) // 2, tokens)


@dataclass(frozen=True)
class HlgTracedGrouping(HlgGrouping):
    """The same for exported programs, which take maps of one group and of many, with and without padding.

    Exporters tell a size of 1 from others. So no size is the number of groups alone: tokens are read by their places
    in `(B, H, W)`, and a spare key that nothing may attend to follows the groups, see `HlgPlaces`.

    Args:
        place: `(B * groups * tokens,)`, place of each token, group by group.
        real: of the same shape, False for padding, which has no place.
    """

    place: torch.Tensor
    real: torch.Tensor

    @classmethod
    def of(cls, grouping: HlgGrouping, tokens: torch.Tensor) -> "HlgTracedGrouping":
        """Find the places of all tokens of a map `(B, H, W, C)`."""
        (g, v), (t, u), (batch, height, width) = grouping.groups, grouping.tokens, tokens.shape[:3]
        group, token = _divide(torch.arange(batch * g * v * t * u, device=tokens.device), t * u)
        image, group = _divide(group, g * v)
        (i, j), (row, column) = _divide(group, v), _divide(token, u)
        y, x = (row * g + i, column * v + j) if grouping.dilated else (i * t + row, j * u + column)
        place, real = (image * height + y) * width + x, (y < height) & (x < width)
        return cls(grouping.groups, grouping.tokens, grouping.dilated, place, real)

    def unfold(self, tokens: torch.Tensor, value: float = 0.0) -> torch.Tensor:
        """As `HlgGrouping.unfold`."""
        (g, v), (t, u), (batch, _, _, channels) = self.groups, self.tokens, tokens.shape
        groups = tokens.flatten(0, 2).index_select(0, self.place.where(self.real, 0))
        return groups.where(self.real[:, None], value).view(batch * g * v, t * u, channels)

    def fold(self, groups: torch.Tensor, batch: int, size: tuple[int, int]) -> torch.Tensor:
        """As `HlgGrouping.fold`."""
        count = batch * size[0] * size[1]
        number = torch.arange(self.place.shape[0], device=groups.device)
        number = number.new_zeros(count + 1).scatter(0, self.place.where(self.real, count), number)[:-1]
        return groups.flatten(0, 1).index_select(0, number).view(batch, *size, groups.shape[2])

    def keys(self, groups: torch.Tensor, batch: int) -> torch.Tensor:
        """As `HlgGrouping.keys`, and a spare one, a copy of the last."""
        count = self.groups[0] * self.groups[1]
        image, key = _divide(torch.arange(batch * (count + 1), device=groups.device), count + 1)
        key = image * count + key.clamp(max=count - 1)
        return groups.index_select(0, key).view(batch, count + 1, groups.shape[1])


class HlgOffsets(NamedTuple):
    """The distinct offsets between queries and keys; the pair (n, m) has `offsets[query[n] + key[m]]`.

    Args:
        offsets: `(R, 2)` (dy, dx), float32.
        query: `(N,)` int64, the query's part of the index into `offsets`.
        key: `(M,)` int64, the key's part.
    """

    offsets: torch.Tensor
    query: torch.Tensor
    key: torch.Tensor


class HlgPlaces(NamedTuple):
    """Where the position bias takes the keys of an attention to lie, in tokens of the queries' map.

    Args:
        size: (height, width) of the queries' map.
        keys: number of keys (down, across).
        first: position of the first key, (y, x).
        step: distance of neighboring keys, (y, x).
        row: 0 for keys on a grid; else key m lies at (m div row, m mod row) (rule `"flat"`).
        scrambled: whether keys and table are indexed with different row lengths (rule `"tuple4"`).
        spare: whether one more key follows, which no query may attend to; see `HlgTracedGrouping`.
    """

    size: tuple[int, int]
    keys: tuple[int, int]
    first: tuple[int, int] = (0, 0)
    step: tuple[int, int] = (1, 1)
    row: int = 0
    scrambled: bool = False
    spare: bool = False

    @classmethod
    def of(cls, rule: str, size: tuple[int, int], grouping: HlgGrouping) -> "HlgPlaces":
        """Positions of the window embeddings of a grouping, by the configuration's `global_bias`."""
        spare = torch.compiler.is_exporting()
        if rule == "flat":
            return cls(size, grouping.groups, row=size[1], spare=spare)
        if rule == "tuple4":
            return cls(size, grouping.groups, scrambled=True, spare=spare)
        (y, step_y), (x, step_x) = grouping.key_lines(0), grouping.key_lines(1)
        return cls(size, grouping.groups, (y, x), (step_y, step_x), spare=spare)

    def offsets(self, device: torch.device) -> HlgOffsets:
        """Compute all offsets that occur, and the indices by which queries and keys find theirs."""
        (height, width), (down, across) = self.size, self.keys
        number = torch.arange(down * across + int(self.spare), device=device).clamp(max=down * across - 1)
        key_y, key_x = _divide(number, across)
        if self.scrambled:
            # The released rule, with h x w keys for H x W queries: key m lies at (m div w, m mod w), and the index
            # (y_n - y_m + h - 1) * (2w - 1) + x_n - x_m + w - 1 reads a table whose rows have 2W - 1 entries. Only
            # the entries that this can reach are computed.
            stride, length = 2 * across - 1, 2 * width - 1
            query = _grid(height, width, stride, device) + (down - 1) * stride + across - 1
            key = -(key_y * stride + key_x)
            entry = torch.arange((height + down - 2) * stride + width + across - 1, device=device)
            row, column = _divide(entry, length)
            table = torch.stack((row - (height - 1), column - (width - 1)), dim=1)
            return HlgOffsets(table.float(), query, key)
        # Offsets (y_n - y_m, x_n - x_m), row by row: y_n * stride + x_n for queries, the same negated for keys, and
        # the keys' constant that makes the smallest offset entry 0.
        if self.row:
            lowest, highest = (0, 0), ((down * across - 1) // self.row, self.row - 1)
        else:
            lowest = self.first
            highest = (self.first[0] + self.step[0] * (down - 1), self.first[1] + self.step[1] * (across - 1))
        rows = torch.arange(-highest[0], height - lowest[0], device=device)
        columns = torch.arange(-highest[1], width - lowest[1], device=device)
        stride = width + highest[1] - lowest[1]
        if self.row:
            key_y, key_x = _divide(number, self.row)
            key = -(key_y * stride + key_x)
        else:
            key = -((self.first[0] + self.step[0] * key_y) * stride + self.first[1] + self.step[1] * key_x)
        key = key + highest[0] * stride + highest[1]
        return HlgOffsets(torch.cartesian_prod(rows, columns).float(), _grid(height, width, stride, device), key)


def _divide(number: torch.Tensor, divisor: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return quotient and remainder; ONNX has no remainder by a size."""
    quotient = number // divisor
    return quotient, number - quotient * divisor


def _grid(height: int, width: int, stride: int, device: torch.device) -> torch.Tensor:
    """Return y * stride + x for each position of a map, row by row: `(height * width,)`."""
    lines = torch.arange(height, device=device)[:, None] * stride + torch.arange(width, device=device)
    return lines.flatten()


class HlgExactLinear(nn.Linear):
    """Linear layer that computes in the type of its input, as 16 bits cannot hold large offsets."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        if self.weight.dtype == features.dtype:
            return super().forward(features)
        return F.linear(features, self.weight.to(features.dtype), self.bias.to(features.dtype))


class HlgExactLayerNorm(nn.LayerNorm):
    """LayerNorm that computes in the type of its input."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        if self.weight.dtype == features.dtype:
            return super().forward(features)
        weight, bias = self.weight.to(features.dtype), self.bias.to(features.dtype)
        return F.layer_norm(features, self.normalized_shape, weight, bias, self.eps)


class HlgPositionBias(nn.Module):
    """Dynamic position bias: a small network maps an offset (dy, dx) to one number per head (B_W, B_G in Sec. 3.3).

    It runs once per distinct offset.
    """

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        width = channels // 16
        self.num_heads = num_heads
        self.projection = HlgExactLinear(2, width)
        self.norms: Any = nn.ModuleList(HlgExactLayerNorm(width) for _ in range(3))
        self.layers: Any = nn.ModuleList(HlgExactLinear(width, out) for out in (width, width, num_heads))

    def table(self, offsets: torch.Tensor) -> torch.Tensor:
        """Bias of each offset, `(R, 2)` -> `(heads, R)`, at least in float32."""
        with maybe_autocast(offsets.device.type, enabled=False):
            hidden = self.projection(offsets.to(torch.promote_types(self.projection.weight.dtype, torch.float32)))
            for norm, layer in zip(self.norms, self.layers, strict=True):
                hidden = layer(F.relu(norm(hidden)))
        return hidden.T

    def look_up(self, places: HlgPlaces, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the table `(heads, R)` of all offsets, and the indices `(N,)` and `(M,)` whose sums point into it.

        `like` gives dtype and device.
        """
        found = places.offsets(like.device)
        return self.table(found.offsets).to(like.dtype).contiguous(), found.query, found.key

    def forward(self, places: HlgPlaces, like: torch.Tensor) -> torch.Tensor:
        """Return the bias of all pairs, `(1, heads, N, M)`, in the dtype and on the device of `like`."""
        bias = gather_bias(*self.look_up(places, like))
        if not places.spare:
            return bias
        number = torch.arange(bias.shape[3], device=bias.device)
        return bias.masked_fill(number == bias.shape[3] - 1, -torch.inf)


def gather_bias(table: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Gather the bias of every pair of query and key: `(heads, R)` -> `(1, heads, N, M)`."""
    index = (query[:, None] + key).flatten()
    return table.index_select(1, index).view(1, table.shape[0], query.shape[0], key.shape[0])


__all__ = ["HlgGrouping", "HlgOffsets", "HlgPlaces", "HlgPositionBias", "HlgTracedGrouping", "gather_bias"]
