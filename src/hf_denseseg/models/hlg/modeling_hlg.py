# Copyright 2026 The hf_denseseg authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""HLG: a pyramid whose layers attend locally in windows, then globally to one token per window.

"Vision Transformers: From Semantic Segmentation to Dense Prediction", IJCV 2024, Sec. 3.3 (Figures 2 and 3). A layer
is an MLP with a depthwise convolution (DWMLP), local attention in plain or dilated windows, and global attention of
every position to all window embeddings; both attentions use the same projections. Where the released code and the
paper's text differ, the code is followed, except where it cannot run; the family's README lists every point.

Shapes: maps are `(B, C, H, W)` with the channels last in memory, tokens the same data as `(B, H, W, C)`; N = H * W
positions attend, M keys (windows) are attended to, d channels per head.
"""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import UperNetConfig
from transformers import initialization as init
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BackboneOutput, ImageClassifierOutput, SemanticSegmenterOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.upernet.modeling_upernet import UperNetFCNHead, UperNetHead
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from hf_denseseg.models.hlg.configuration_hlg import HlgConfig
from hf_denseseg.models.hlg.positions_hlg import HlgGrouping, HlgPlaces, HlgPositionBias, gather_bias
from hf_denseseg.models.inputs import check_images, ignored_id, segmentation_labels
from hf_denseseg.models.losses import classification_loss, segmentation_loss
from hf_denseseg.models.one_logit import name_two_classes
from hf_denseseg.models.plain_layers import are_plain, fold_batch_norm

# CODEPATH: padding is masked in every published name, and takes part in the weights of the release (`convert_hlg`).
# trf-ignore: TRF041 config.mask_padding

STRIDE = 32
"""Input pixels per token of the last stage; images are padded to a multiple of it."""

SMALLEST_SIDE = 4
"""Input pixels per token of the first stage."""

CHUNK_ELEMENTS = 2**24
"""Largest number of attention scores (and of elements of their bias) that global attention keeps in memory at once."""


@dataclass
class HlgModelOutput(ModelOutput):
    """Output of the encoder.

    Args:
        last_hidden_state: `(B, C4, H/32, W/32)`, after the last LayerNorm.
        feature_maps: of the four stages, at 1/4, 1/8, 1/16 and 1/32 of the padded image; the last one is
            `last_hidden_state`. On request: pipelines would split a tuple by position.
        hidden_states: maps before the first and after each layer, on request.
        attentions: `(B, heads, H*W, windows)` of the global attention of each layer, on request (eager attention
            only).
    """

    last_hidden_state: torch.Tensor | None = None
    feature_maps: tuple[torch.Tensor, ...] | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class HlgSegmenterOutput(SemanticSegmenterOutput):
    """Segmentation output; `auxiliary_logits` are computed only with labels."""

    auxiliary_logits: torch.Tensor | None = None


# --- parts of a layer


# Same as eager_attention_forward in modeling_dsct
def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention written out: `(B, heads, N, d)` -> `(B, N, heads, d)` and the weights `(B, heads, N, N)`."""
    weights = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class HlgDropPath(nn.Module):
    """Stochastic depth: in training, drop a residual branch per sample with probability `rate` and scale the rest."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        if self.rate == 0.0 or not self.training:
            return features
        kept = features.new_empty(features.shape[0], 1, 1, 1).bernoulli_(1 - self.rate)
        return features * (kept / (1 - self.rate))


class HlgConvolution(nn.Conv2d):
    """Convolution; a 1x1 kernel runs as a matrix product, which is faster on CPUs."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.convolve(features, self.weight, self.bias)

    def convolve(self, features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Apply this convolution with the given weights."""
        if self.kernel_size == (1, 1):
            return F.linear(features.permute(0, 2, 3, 1), weight[:, :, 0, 0], bias).permute(0, 3, 1, 2)
        return F.conv2d(features, weight, bias, self.stride, self.padding, groups=self.groups)


class HlgConvNorm(nn.Module):
    """Convolution that keeps or halves the size, and BatchNorm; in eval mode both are folded into one convolution."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        groups: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.convolution = HlgConvolution(
            in_channels, out_channels, kernel_size, stride, kernel_size // 2, groups=groups, bias=bias
        )
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        convolution, norm = self.convolution, self.norm
        if norm.training or not are_plain(convolution, norm, own=(HlgConvolution,)):
            return norm(convolution(features))
        return convolution.convolve(features, *fold_batch_norm(convolution, norm))


class HlgMapNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map: `(B, C, h, w)` -> `(B, C, h, w)`."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return super().forward(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class HlgMlp(nn.Module):
    """DWMLP (Sec. 3.3): 1x1, depthwise 3x3, 1x1, and a shortcut; the first one of a stage halves the map.

    The hidden width is `mlp_ratio` times the input width, also where the output is wider. LayerNorm follows the MLP;
    there is none before it. The text names squeeze-and-excitation, which neither code nor counts have.
    """

    def __init__(
        self, config: HlgConfig, in_channels: int, out_channels: int, downsample: bool, drop_path_rate: float
    ) -> None:
        super().__init__()
        width, stride = int(in_channels * config.mlp_ratio), 2 if downsample else 1
        self.shortcut = (
            HlgConvNorm(in_channels, out_channels, kernel_size=3, stride=2, groups=in_channels) if downsample else None
        )
        self.expand = HlgConvNorm(in_channels, width, kernel_size=1)
        self.depthwise = HlgConvNorm(width, width, kernel_size=3, stride=stride, groups=width)
        self.reduce = HlgConvolution(width, out_channels, kernel_size=1)
        self.layernorm = HlgMapNorm(out_channels, eps=config.layer_norm_eps)
        self.drop_path = HlgDropPath(drop_path_rate)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        shortcut = features if self.shortcut is None else F.gelu(self.shortcut(features))
        hidden = F.gelu(self.depthwise(F.gelu(self.expand(features))))
        return shortcut + self.drop_path(self.layernorm(self.reduce(hidden)))


class HlgPlainMlp(nn.Module):
    """MLP without depthwise convolution (baseline of Table 14); a patch embedding halves the map.

    The text names only what DWMLP puts in their place; patch embeddings of 2x2 as in PVT are our reading.
    """

    def __init__(
        self, config: HlgConfig, in_channels: int, out_channels: int, downsample: bool, drop_path_rate: float
    ) -> None:
        super().__init__()
        width = int(in_channels * config.mlp_ratio)
        self.patch_embedding = (
            nn.Conv2d(in_channels, out_channels, kernel_size=2, stride=2) if downsample else nn.Identity()
        )
        self.expand = HlgConvNorm(out_channels, width, kernel_size=1)
        self.reduce = nn.Conv2d(width, out_channels, kernel_size=1)
        self.layernorm = HlgMapNorm(out_channels, eps=config.layer_norm_eps)
        self.drop_path = HlgDropPath(drop_path_rate)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        features = self.patch_embedding(features)
        return features + self.drop_path(self.layernorm(self.reduce(F.gelu(self.expand(features)))))


class HlgSmoothing(nn.Module):
    """Convolutional bottleneck before the windows (in the released code, not in the text): x -> GELU(x + conv(x))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce = HlgConvNorm(channels, channels // 4, kernel_size=1)
        self.convolution = HlgConvNorm(channels // 4, channels // 4, kernel_size=3)
        self.expand = HlgConvNorm(channels // 4, channels, kernel_size=1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return F.gelu(features + self.expand(F.gelu(self.convolution(F.gelu(self.reduce(features))))))


class HlgAttention(GradientCheckpointingLayer):
    """Common to all attentions: heads, choice of the implementation, attention in groups and global attention."""

    def __init__(self, config: HlgConfig, head_width: int) -> None:
        super().__init__()
        self.config = config
        self.head_dim = head_width
        self.scaling = self.head_dim**-0.5
        self.is_causal = False

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: torch.Tensor,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend, `(B, heads, N, d)` and bias `(1 or B, heads, N, M)` -> `(B, N, heads, d)`, and weights if eager."""
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        return attend(self, query, key, value, bias, scaling=self.scaling, dropout=0.0, **kwargs)

    def masked_size(self, size: tuple[int, int], grouping: HlgGrouping) -> tuple[int, int] | None:
        """Return `size` if there is padding that must be masked, else None; exported programs mask at any size."""
        if not self.config.mask_padding:
            return None
        return size if torch.compiler.is_exporting() or grouping.size != size else None

    def split_heads(self, *maps: torch.Tensor) -> Iterator[torch.Tensor]:
        """Split each `(B, H, W, C)` or `(B, M, C)` into heads: `(B, heads, N, d)`."""
        for each in maps:
            heads = each.shape[-1] // self.head_dim
            yield each.reshape(each.shape[0], math.prod(each.shape[1:-1]), heads, self.head_dim).transpose(1, 2)

    def attend_globally(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        position_bias: HlgPositionBias,
        places: HlgPlaces,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Let every position attend to every key: query `(B, H, W, C)`, key and value `(B, M, C)` -> `(B, H, W, C)`.

        On large maps the N x M bias is by far the largest tensor of the model (stage 1 at 768 pixels: 116 MB per head
        and layer). There the queries are processed in chunks, and training recomputes each chunk in the backward pass.
        """
        shape = query.shape
        query, key, value = self.split_heads(query, key, value)
        heads, length, keys = query.shape[1], query.shape[2], key.shape[2]
        if torch.compiler.is_compiling() or heads * length * keys <= CHUNK_ELEMENTS:
            attended, weights = self.attend(query, key, value, position_bias(places, query), **kwargs)
            return attended.reshape(shape), weights

        # bias[head, n, m] = table[head, query_index[n] + key_index[m]]: a chunk of queries gathers its own rows only.
        table, query_index, key_index = position_bias.look_up(places, query)

        def attend_chunk(
            query: torch.Tensor, index: torch.Tensor, key: torch.Tensor, value: torch.Tensor, table: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor | None]:
            return self.attend(query, key, value, gather_bias(table, index, key_index), **kwargs)

        if torch.is_grad_enabled():
            attend_chunk = functools.partial(checkpoint, attend_chunk, use_reentrant=False)
        step = max(CHUNK_ELEMENTS // (heads * keys), 1)
        parts = [
            attend_chunk(chunk, index, key, value, table)
            for chunk, index in zip(query.split(step, dim=2), query_index.split(step), strict=True)
        ]
        kept = [each for _, each in parts if each is not None]
        weights = torch.cat(kept, dim=2) if kept else None
        return torch.cat([each for each, _ in parts], dim=1).reshape(shape), weights

    def attend_in_groups(
        self,
        grouping: HlgGrouping,
        maps: tuple[torch.Tensor, ...],
        position_bias: HlgPositionBias,
        size: tuple[int, int] | None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """Let tokens attend within their group (Eq. 5): query, key and value `(B, H, W, C)` -> `(B, H, W, C)`.

        Args:
            grouping: of the map.
            maps: query, key and value; or query and value, where the query serves as the key too.
            position_bias: of the positions in a group, the same for all groups.
            size: (height, width) of the map, to mask the padding to complete groups as keys; None lets it take part.
        """
        batch, height, width, channels = maps[0].shape
        # Query, key and value are brought into groups together, in one copy of the data; groups are the batch of the
        # attention: (B * G, t, maps * C) -> (maps, B * G, heads, t, d).
        groups = grouping.unfold(torch.cat(maps, dim=3))
        groups = groups.unflatten(2, (len(maps), channels // self.head_dim, self.head_dim)).permute(2, 0, 3, 1, 4)
        query, value, key = groups[0], groups[-1], groups[-2]
        bias = position_bias(HlgPlaces(grouping.tokens, grouping.tokens), query)
        if size is not None:
            mask = grouping.unfold(query.new_zeros(batch, *size, 1), value=-torch.inf)  # minus infinity on the padding
            bias = bias + mask[:, None, None, :, 0]  # (1, heads, t, t) + (B * G, 1, 1, t)
        attended, _ = self.attend(query, key, value, bias, **kwargs)  # (B * G, t, heads, d)
        return grouping.fold(attended.flatten(2), batch, (height, width))


def group_means(tokens: torch.Tensor, grouping: HlgGrouping, size: tuple[int, int] | None) -> torch.Tensor:
    """Mean of each group, `(B, H, W, C)` -> `(B * groups, C)`; with `size` the padding is left out."""
    means = grouping.unfold(tokens).mean(dim=1)
    if size is None:
        return means
    # The padding is zero, so that dividing by the fraction of real tokens turns the mean over all into theirs.
    return means / grouping.unfold(tokens.new_ones(tokens.shape[0], *size, 1)).mean(dim=1)


def crop(maps: torch.Tensor, size: tuple[int, int], axis: int = 1) -> torch.Tensor:
    """Keep the upper left part of maps, (height, width), whose rows lie along `axis` and columns along the next."""
    if not torch.compiler.is_exporting():
        return maps.narrow(axis, 0, size[0]).narrow(axis + 1, 0, size[1])
    # A slice is or is not the complete map, which the exporter would tell apart.
    rows, columns = (torch.arange(side, device=maps.device) for side in size)
    return maps.index_select(axis, rows).index_select(axis + 1, columns)


class HlgWindowConvolution(nn.Conv2d):
    """Depthwise convolution as large as a window: `(windows, 49, C)` -> `(windows, C)`."""

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        embedding = (windows * self.weight.flatten(1).T).sum(dim=1)  # (C, 1, 7, 7) -> (49, C)
        return embedding if self.bias is None else embedding + self.bias


class HlgLocalGlobalAttention(HlgAttention):
    """Local attention in windows, then global attention to the window embeddings (Eq. 4 to 9; stages 1 to 3).

    Both use the same projections W_Q, W_K and W_V (Eq. 8). In the windows the queries serve as keys too (released
    code; Eq. 4 has W_K).
    """

    def __init__(self, config: HlgConfig, stage: int, dilated: bool, drop_path_rate: float) -> None:
        channels, num_heads = config.hidden_sizes[stage], config.num_attention_heads[stage]
        super().__init__(config, channels // num_heads)
        self.dilated = dilated
        self.layernorm_local = nn.LayerNorm(channels, eps=config.layer_norm_eps)
        self.layernorm_embedding = nn.LayerNorm(channels, eps=config.layer_norm_eps)
        self.layernorm_query = nn.LayerNorm(channels, eps=config.layer_norm_eps)
        self.q_proj = nn.Linear(channels, channels)
        self.k_proj = nn.Linear(channels, channels)
        self.v_proj = nn.Linear(channels, channels)
        self.o_proj = nn.Linear(channels, channels)
        self.query_convolution = nn.Conv2d(channels, channels, kernel_size=3, padding=1, groups=channels)
        self.side = side = config.dilated_window_size if dilated else config.window_size
        self.embedding_convolution = (
            # CODEPATH: hlg-tiny and hlg-retinanet-tiny with "DWConv" of Table 12; no published name.
            HlgWindowConvolution(channels, channels, kernel_size=side, stride=side, groups=channels)
            if config.window_embedding == "convolution"
            else None
        )
        self.local_bias = HlgPositionBias(channels, num_heads)
        self.global_bias = HlgPositionBias(channels, num_heads)
        self.drop_path = HlgDropPath(drop_path_rate)

    def forward(
        self, features: torch.Tensor, size: tuple[int, int], **kwargs: Unpack[TransformersKwargs]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend within the windows of a smoothed map, then to the embeddings of all windows.

        Args:
            features: `(B, C, H', W')`; where padding is masked H' x W' is `size`, else it is padded to complete
                windows.
            size: (height, width) of the map without padding.

        Returns:
            `(B, C, *size)`, and with eager attention the weights of the global one.
        """
        tokens = features.permute(0, 2, 3, 1)  # (B, C, H', W') -> (B, H', W', C)
        grouping = HlgGrouping.windows(size, self.side, self.dilated).traced(tokens)
        masked = self.masked_size(size, grouping)
        # Eq. 4 and 5: attention within each window, without an output projection.
        normed = self.layernorm_local(tokens)
        query, value = self.q_proj(normed), self.v_proj(normed)
        local = self.attend_in_groups(grouping, (query, value), self.local_bias, masked, **kwargs)
        tokens = tokens + local
        # Z_G: one embedding per window, (B, M, C).
        embedding = self.layernorm_embedding(grouping.keys(self._embed(tokens, grouping, masked), tokens.shape[0]))
        if not self.config.mask_padding:
            tokens, query, local = (crop(each, size) for each in (tokens, query, local))
        # Eq. 9: queries plus DWConv, here of the normalized local attention (released code; Eq. 9 has it on V).
        normed = self.layernorm_query(local).permute(0, 3, 1, 2)
        query = query + self.query_convolution(normed).permute(0, 2, 3, 1)
        key, value = self.k_proj(embedding), self.v_proj(embedding)
        # Eq. 6 and 7: every position attends to the M window embeddings, with the projections of Eq. 4 (Eq. 8).
        places = HlgPlaces.of(self.config.global_bias, size, grouping)
        attended, weights = self.attend_globally(query, key, value, self.global_bias, places, **kwargs)
        tokens = tokens + self.drop_path(self.o_proj(attended))
        return tokens.permute(0, 3, 1, 2), weights

    def _embed(self, tokens: torch.Tensor, grouping: HlgGrouping, masked: tuple[int, int] | None) -> torch.Tensor:
        """One token per window: `(B, H, W, C)` -> `(B * windows, C)`."""
        # CODEPATH: means in every published name; "convolution" in Table 12; "max" is named in Sec. 3.3 only.
        if self.config.window_embedding == "mean":
            return group_means(tokens, grouping, masked)
        if self.embedding_convolution is not None:
            return self.embedding_convolution(grouping.unfold(tokens))
        return grouping.unfold(tokens, value=-torch.inf).amax(dim=1)


class HlgGlobalAttention(HlgAttention):
    """Global attention to the means of plain windows, without local attention (first rows of Table 14)."""

    def __init__(self, config: HlgConfig, stage: int, drop_path_rate: float) -> None:
        channels, num_heads = config.hidden_sizes[stage], config.num_attention_heads[stage]
        super().__init__(config, channels // num_heads)
        self.side = config.window_size
        self.layernorm_query = nn.LayerNorm(channels, eps=config.layer_norm_eps)
        self.layernorm_embedding = nn.LayerNorm(channels, eps=config.layer_norm_eps)
        self.q_proj = nn.Linear(channels, channels)
        self.k_proj = nn.Linear(channels, channels)
        self.v_proj = nn.Linear(channels, channels)
        self.o_proj = nn.Linear(channels, channels)
        self.global_bias = HlgPositionBias(channels, num_heads)
        self.drop_path = HlgDropPath(drop_path_rate)

    def forward(
        self, features: torch.Tensor, size: tuple[int, int], **kwargs: Unpack[TransformersKwargs]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `HlgLocalGlobalAttention.forward`."""
        tokens = features.permute(0, 2, 3, 1)
        grouping = HlgGrouping.windows(size, self.side, dilated=False).traced(tokens)
        means = group_means(tokens, grouping, self.masked_size(size, grouping))
        embedding = self.layernorm_embedding(grouping.keys(means, tokens.shape[0]))
        tokens = tokens if self.config.mask_padding else crop(tokens, size)
        query, key, value = self.q_proj(self.layernorm_query(tokens)), self.k_proj(embedding), self.v_proj(embedding)
        places = HlgPlaces.of(self.config.global_bias, size, grouping)
        attended, weights = self.attend_globally(query, key, value, self.global_bias, places, **kwargs)
        return (tokens + self.drop_path(self.o_proj(attended))).permute(0, 3, 1, 2), weights


class HlgSelfAttention(HlgAttention):
    """Self-attention over the complete map (stage 4, whose map is small); LayerNorm follows it, none precedes it."""

    def __init__(self, config: HlgConfig, stage: int, drop_path_rate: float) -> None:
        channels, num_heads = config.hidden_sizes[stage], config.num_attention_heads[stage]
        super().__init__(config, channels // num_heads)
        self.q_proj = nn.Linear(channels, channels)
        self.k_proj = nn.Linear(channels, channels)
        self.v_proj = nn.Linear(channels, channels)
        self.o_proj = nn.Linear(channels, channels)
        self.layernorm = nn.LayerNorm(channels, eps=config.layer_norm_eps)
        self.global_bias = HlgPositionBias(channels, num_heads)
        self.drop_path = HlgDropPath(drop_path_rate)

    def forward(
        self, features: torch.Tensor, size: tuple[int, int], **kwargs: Unpack[TransformersKwargs]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        tokens = features.permute(0, 2, 3, 1)
        query, key, value = (layer(tokens) for layer in (self.q_proj, self.k_proj, self.v_proj))
        attended, weights = self.attend_globally(query, key, value, self.global_bias, HlgPlaces(size, size), **kwargs)
        return (tokens + self.drop_path(self.layernorm(self.o_proj(attended)))).permute(0, 3, 1, 2), weights


class HlgLayer(nn.Module):
    """One layer (Figure 3): DWMLP, then attention; even layers of a stage have plain windows, odd ones dilated."""

    def __init__(self, config: HlgConfig, stage: int, index: int, drop_path_rate: float) -> None:
        super().__init__()
        width = config.hidden_sizes[stage]
        before = width if index else config.hidden_sizes[max(stage - 1, 0)]  # the stem is as wide as stage 1
        self.config = config
        # CODEPATH: DWMLP in every published name; plain in the baseline of Table 14 (hlg_ablation_small_baseline_*).
        mlp = HlgMlp if config.mlp_type == "depthwise" else HlgPlainMlp
        self.mlp = mlp(config, before, width, downsample=index == 0, drop_path_rate=drop_path_rate)
        self.smoothing = None if stage == 3 else HlgSmoothing(width)
        dilated = config.local_attention == "dilated" and bool(index % 2)
        self.attention: HlgAttention
        if stage == 3:
            self.attention = HlgSelfAttention(config, stage, drop_path_rate)
        # CODEPATH: the first two rows of Table 14 (hlg_ablation_small_{baseline,dwmlp}_*), and no published name.
        elif config.local_attention == "none":
            self.attention = HlgGlobalAttention(config, stage, drop_path_rate)
        else:
            self.attention = HlgLocalGlobalAttention(config, stage, dilated, drop_path_rate)

    def forward(self, features: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> torch.Tensor:
        features = self.mlp(features)
        size = (features.shape[2], features.shape[3])
        if self.smoothing is not None:
            if not self.config.mask_padding:
                down, right = (-side % cast(int, self.attention.side) for side in size)
                features = F.pad(features, (0, right, 0, down))
            features = self.smoothing(features)
        return self.attention(features, size, **kwargs)[0]


class HlgStem(nn.Sequential):
    """Two convolutions with BatchNorm and GELU (Table 1): `(B, 3, H, W)` -> `(B, C1, H/2, W/2)`."""

    def __init__(self, config: HlgConfig) -> None:
        width, (first, second) = config.hidden_sizes[0], config.stem_kernel_sizes
        super().__init__(
            HlgConvNorm(config.num_channels, width, first, stride=2, bias=False),
            nn.GELU(),
            HlgConvNorm(width, width, second, bias=False),
            nn.GELU(),
        )


class HlgEncoder(nn.Module):
    """Stem and four stages (Figure 2)."""

    def __init__(self, config: HlgConfig) -> None:
        super().__init__()
        self.config = config
        self.stem = HlgStem(config)
        last = max(config.num_hidden_layers - 1, 1)
        firsts = [sum(config.depths[:stage]) for stage in range(4)]
        # Layers checkpoint their attention, not themselves: recomputed BatchNorms would count a batch twice.
        self.stages: Any = nn.ModuleList(  # trf-ignore: TRF034
            nn.ModuleList(
                HlgLayer(config, stage, index, config.drop_path_rate * (firsts[stage] + index) / last)
                for index in range(config.depths[stage])
            )
            for stage in range(4)
        )
        self.layernorms = nn.ModuleList(
            # CODEPATH: hlg-{pup,upernet,retinanet,maskrcnn}-*, and not the classifiers hlg-*, hlg-*-release.
            HlgMapNorm(width, eps=config.layer_norm_eps) if config.normalize_stages or stage == 3 else nn.Identity()
            for stage, width in enumerate(config.hidden_sizes)
        )

    def forward(self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> tuple[torch.Tensor, ...]:
        """Return the maps of the stem (1/2) and of the four stages, of images padded to a multiple of 32."""
        pixel_values = pixel_values.to(next(self.stem.parameters()).dtype)
        # Attention reads tokens, convolutions read maps; with the channels last in memory neither needs a copy.
        features = self.stem(pad_image(pixel_values).contiguous(memory_format=torch.channels_last))
        maps = [features]
        for layers, layernorm in zip(self.stages, self.layernorms, strict=True):
            for layer in layers:
                features = layer(features, **kwargs)
            features = layernorm(features)
            maps.append(features)
        return tuple(maps)


def pad_image(pixel_values: torch.Tensor) -> torch.Tensor:
    """Pad normalized images with zeros at the right and bottom to a multiple of 32, which the five halvings need."""
    check_images(pixel_values, SMALLEST_SIDE, f"a token covers {SMALLEST_SIDE} pixels, so ")
    # A quotient halves five times without a remainder, also where exporters know sizes by their formula only.
    down, right = ((side + STRIDE - 1) // STRIDE * STRIDE - side for side in pixel_values.shape[-2:])
    return F.pad(pixel_values, (0, right, 0, down))


# --- models


class HlgPreTrainedModel(PreTrainedModel):
    """Initialization and capabilities common to all HLG classes."""

    config: HlgConfig
    base_model_prefix = "hlg"
    main_input_name = "pixel_values"
    input_modalities = ("image",)  # type: ignore[assignment]
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # the loss is a mean; Trainer must not rescale it by the number of items
    _no_split_modules = ["HlgStem", "HlgLayer"]
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": HlgLayer, "attentions": OutputRecorder(HlgAttention, index=1)}

    def get_input_embeddings(self) -> nn.Module:
        """Return the first convolution."""
        return next(each for each in self.modules() if isinstance(each, nn.Conv2d))

    def parameter_depth(self, name: str) -> tuple[int, int]:
        """Return the depth of an encoder parameter (0 = stem, k = k-th layer), and the depth after the last."""
        parts = name.partition("encoder.")[2].split(".")
        if parts[0] == "stem":
            return 0, self.config.num_hidden_layers + 1
        stage = int(parts[1])
        layer = int(parts[2]) if parts[0] == "stages" else self.config.depths[stage] - 1
        return sum(self.config.depths[:stage]) + layer + 1, self.config.num_hidden_layers + 1

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialize as the released code does: linear layers normal, convolutions by torch's default."""
        if isinstance(module, nn.Conv2d):
            init.kaiming_uniform_(module.weight, a=5**0.5)
            if module.bias is not None:
                bound = module.weight[0].numel() ** -0.5
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):  # transformers goes by class names and would miss `HlgMapNorm`
            init.ones_(module.weight)
            init.zeros_(module.bias)
        else:
            super()._init_weights(module)


class HlgModel(HlgPreTrainedModel):
    """The encoder without a head."""

    def __init__(self, config: HlgConfig) -> None:
        super().__init__(config)
        self.encoder = HlgEncoder(config)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor,
        output_feature_maps: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> HlgModelOutput:
        """Encode `(B, 3, H, W)` images of any size from 4 pixels up; `feature_maps` come on request."""
        maps = self.encoder(pixel_values, **kwargs)
        return HlgModelOutput(last_hidden_state=maps[-1], feature_maps=maps[1:] if output_feature_maps else None)


class HlgBackbone(BackboneMixin, HlgPreTrainedModel):
    """The encoder as a backbone: maps `stem` (1/2) and `stage1` (1/4) to `stage4` (1/32) of the padded image."""

    def __init__(self, config: HlgConfig) -> None:
        super().__init__(config)
        self.num_features = [config.hidden_sizes[0], *config.hidden_sizes]
        self.encoder = HlgEncoder(config)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> BackboneOutput:
        """Return the maps named in `config.out_features`."""
        maps = dict(zip(self.stage_names, self.encoder(pixel_values, **kwargs), strict=True))
        return BackboneOutput(feature_maps=tuple(maps[name] for name in self.out_features))


class HlgForImageClassification(HlgPreTrainedModel):
    """The encoder, the mean over its last map, and a linear classifier (Sec. 4.2)."""

    def __init__(self, config: HlgConfig) -> None:
        super().__init__(config)
        self.hlg = HlgModel(config)
        self.classifier = nn.Linear(config.hidden_size, int(config.num_labels or 0))
        self.loss_function = classification_loss
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> ImageClassifierOutput:
        """Classify images.

        Args:
            pixel_values: `(B, 3, H, W)`, normalized.
            labels: `(B,)` class ids, or `(B, num_labels)` class probabilities, as mixup and cutmix produce them;
                others with `config.problem_type`, see `classification_loss`.

        Returns:
            `logits` `(B, num_labels)`; `loss` if labels are given.
        """
        outputs = self.hlg(pixel_values, return_dict=True, **kwargs)
        logits = self.classifier(outputs.last_hidden_state.mean(dim=(2, 3)))
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


# --- segmentation


class HlgDecoderAttention(HlgAttention):
    """Attention of the decoder: within groups, then of every position to the groups' means, with shared weights.

    One set of projections and one position bias serve both.
    """

    def __init__(self, config: HlgConfig, dilated: bool) -> None:
        width = config.decoder_hidden_size
        super().__init__(config, head_width=32)
        self.dilated = dilated
        self.layernorm_local = nn.LayerNorm(width)
        self.layernorm_query = nn.LayerNorm(width)
        self.layernorm_embedding = nn.LayerNorm(width)
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width)
        self.position_bias = HlgPositionBias(width, width // 32)

    def grouping(self, size: tuple[int, int]) -> HlgGrouping:
        """Windows of fixed size, or dilated groups of a fixed rate, which grow with the map."""
        if self.dilated:
            return HlgGrouping.phases(size, self.config.decoder_interval)
        return HlgGrouping.windows(size, self.config.window_size, dilated=False)

    def forward(
        self, features: torch.Tensor, size: tuple[int, int], **kwargs: Unpack[TransformersKwargs]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `HlgLocalGlobalAttention.forward`."""
        tokens = features.permute(0, 2, 3, 1)
        grouping = self.grouping(size).traced(tokens)
        masked = self.masked_size(size, grouping)
        # Within the groups; unlike the backbone with keys of its own and an output projection.
        normed = self.layernorm_local(tokens)
        maps = self.q_proj(normed), self.k_proj(normed), self.v_proj(normed)
        tokens = tokens + self.o_proj(self.attend_in_groups(grouping, maps, self.position_bias, masked, **kwargs))
        # Every position to the means of all groups, (B, M, C).
        embedding = self.layernorm_embedding(grouping.keys(group_means(tokens, grouping, masked), tokens.shape[0]))
        tokens = tokens if self.config.mask_padding else crop(tokens, size)
        query = self.q_proj(self.layernorm_query(tokens))
        places = HlgPlaces.of(self.config.global_bias, size, grouping)
        attended, weights = self.attend_globally(
            query, self.k_proj(embedding), self.v_proj(embedding), self.position_bias, places, **kwargs
        )
        return (tokens + self.o_proj(attended)).permute(0, 3, 1, 2), weights


class HlgDecoderLayer(nn.Module):
    """Layer of the decoder (Sec. 3.4): smoothing, attention within the groups and to their means, MLP."""

    def __init__(self, config: HlgConfig, dilated: bool) -> None:
        super().__init__()
        width = config.decoder_hidden_size
        self.config = config
        self.smoothing = HlgSmoothing(width)
        self.attention = HlgDecoderAttention(config, dilated)
        self.layernorm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, features: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> torch.Tensor:
        size = (features.shape[2], features.shape[3])
        if not self.config.mask_padding:
            height, width = self.attention.grouping(size).size
            features = F.pad(features, (0, width - size[1], 0, height - size[0]))
        features, _ = self.attention(self.smoothing(features), size, **kwargs)
        tokens = features.permute(0, 2, 3, 1)
        tokens = tokens + self.fc2(F.gelu(self.fc1(self.layernorm(tokens))))
        return tokens.permute(0, 3, 1, 2)


class HlgPupHead(nn.Module):
    """SETR-PUP decoder for HLG (Sec. 3.4): all stages at 1/4, 3x3 convolution, plain and dilated layer, classifier.

    The 4x upsampling to the image's size is left to the loss and to post-processing. The text has the maps at 1/16 and
    progressive upsampling; the paper's FLOPs fit the released code, which is followed.
    """

    def __init__(self, config: HlgConfig) -> None:
        super().__init__()
        width = config.decoder_hidden_size
        self.fuse = HlgConvNorm(sum(config.hidden_sizes), width, kernel_size=3)
        self.layers = nn.ModuleList(HlgDecoderLayer(config, dilated) for dilated in (False, True))
        self.dropout = nn.Dropout2d(config.decoder_dropout)
        self.classifier = nn.Conv2d(width, int(config.num_labels or 0), kernel_size=1)

    def forward(self, feature_maps: tuple[torch.Tensor, ...], **kwargs: Unpack[TransformersKwargs]) -> torch.Tensor:
        size = feature_maps[0].shape[-2:]
        maps = [F.interpolate(each, size=size, mode="bilinear", align_corners=False) for each in feature_maps]
        features = F.relu(self.fuse(torch.cat(maps, dim=1)))
        for layer in self.layers:
            features = layer(features, **kwargs)
        return self.classifier(self.dropout(features))


class HlgDropoutClassifier(nn.Conv2d):
    """Classifier for a head of transformers' UperNet, preceded by the dropout that mmsegmentation has there."""

    def __init__(self, *args: Any, dropout: float = 0.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)  # those of a convolution: adapters build their own layers of this class
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return super().forward(self.dropout(features))


def build_heads(config: HlgConfig) -> tuple[nn.Module, nn.Module | None]:
    """Build the decode head and, if the configuration has one, the auxiliary head on stage 3 (3x3 convolution).

    UperNet, and the auxiliary head of both decoders, are transformers' own: `UperNetForSemanticSegmentation` on
    `HlgBackbone` computes the same from the same weights.
    """
    upernet = UperNetConfig(hidden_size=config.decoder_hidden_size, auxiliary_channels=config.auxiliary_hidden_size)
    upernet.num_labels = int(config.num_labels or 0)
    sizes = list(config.hidden_sizes)
    if config.decode_head == "pup":  # CODEPATH: hlg-pup-* (Tables 5 and 6), else hlg-upernet-*
        head: Any = HlgPupHead(config)
    else:
        head = UperNetHead(upernet, sizes)
        head.classifier = HlgDropoutClassifier(head.channels, upernet.num_labels, 1, dropout=config.decoder_dropout)
    # CODEPATH: every published name has one; weights of transformers' UperNet may not (its `use_auxiliary_head`).
    if not config.use_auxiliary_head:
        return head, None
    auxiliary = UperNetFCNHead(upernet, sizes)
    auxiliary.classifier = HlgDropoutClassifier(
        auxiliary.channels, upernet.num_labels, 1, dropout=config.decoder_dropout
    )
    return head, auxiliary


class HlgForSemanticSegmentation(HlgPreTrainedModel):
    """HLG with the SETR-PUP decoder (Tables 5 and 6) or UperNet."""

    def __init__(self, config: HlgConfig) -> None:
        name_two_classes(config)
        super().__init__(config)
        self.hlg = HlgModel(config)
        self.decode_head, self.auxiliary_head = build_heads(config)
        self.loss_function = functools.partial(segmentation_loss, normalization=config.loss_normalization)
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> HlgSegmenterOutput:
        """Segment images.

        Args:
            pixel_values: `(B, 3, H, W)`, normalized; any size from 4 pixels up.
            labels: `(B, H, W)` train ids of any integer dtype; `ignored_id` (255) and -100 are ignored.

        Returns:
            `logits` `(B, num_labels, ceil(H/4), ceil(W/4))`; with labels also `loss` and `auxiliary_logits` (1/16).
        """
        labels = segmentation_labels(labels, pixel_values, self.config)
        height, width = pixel_values.shape[-2:]
        outputs = self.hlg(pixel_values, output_feature_maps=True, return_dict=True, **kwargs)
        maps = outputs.feature_maps
        logits = self.decode_head(maps, **(kwargs if isinstance(self.decode_head, HlgPupHead) else {}))
        logits = crop(logits, ((height + 3) // 4, (width + 3) // 4), axis=2)  # without the padding to 32 pixels
        loss, auxiliary_logits = None, None
        if labels is not None:
            loss = self._loss(logits, labels)
            if self.auxiliary_head is not None:
                auxiliary_logits = self.auxiliary_head(maps)[:, :, : (height + 15) // 16, : (width + 15) // 16]
                loss = loss + self.config.auxiliary_loss_weight * self._loss(auxiliary_logits, labels)
        return HlgSegmenterOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            auxiliary_logits=auxiliary_logits,
        )

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.loss_function(logits=logits, labels=labels, ignore_index=ignored_id(self.config))


__all__ = [
    "HlgBackbone",
    "HlgForImageClassification",
    "HlgForSemanticSegmentation",
    "HlgModel",
    "HlgPreTrainedModel",
]
