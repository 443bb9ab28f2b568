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

"""UN-EPT: sparse sampled attention over a pyramid for context, a spatial branch for queries and boundaries.

"A Unified Efficient Pyramid Transformer for Semantic Segmentation", ICCV 2021 workshop. Figure 2, from left to right:
a backbone returns three maps; the context branch (encoder, decoder) predicts the coarse label map from them; the
spatial branch provides the decoder's queries and, with two heads, predicts boundaries and the direction into the
region, by which the coarse map is refined. Where released code and text differ, the code is followed.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BackboneOutput, SemanticSegmenterOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, logging
from transformers.utils.generic import can_return_tuple, maybe_autocast, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from hf_denseseg.errors import InputError
from hf_denseseg.models.inputs import check_images, ignored_id, label_maps, segmentation_labels
from hf_denseseg.models.losses import segmentation_loss
from hf_denseseg.models.one_logit import name_two_classes
from hf_denseseg.models.unept.configuration_unept import UneptConfig
from hf_denseseg.models.unept.refinement_unept import balanced_loss, boundary_offsets, refine, refinement_sources
from hf_denseseg.models.unept.targets_unept import IGNORE_INDEX, NUM_DIRECTIONS, batched_targets, boundary_targets
from hf_denseseg.models.unept.variants_unept import OUTPUT_STRIDE, weights_of
from hf_denseseg.ops.ms_deform_attn import ms_deform_attn

# CODEPATH: without spatial branch: the rows of Table 5 without spatial path (unept_ablation_no_spatial_*,
# unept_ablation_no_pyramid_no_spatial_*); every other published network has it.
# CODEPATH: `logits` are coarse in every published name (released test code), refined in the paper's Figure 4.
# trf-ignore: TRF041 config.use_spatial_branch, config.use_boundary_refinement

Shapes = Sequence[tuple[int, int]]

LEVELS = 3  # maps that a backbone returns; the pyramid takes the last `num_levels` of them

logger = logging.get_logger("transformers.hf_denseseg")


@dataclass
class UneptModelOutput(ModelOutput):
    """Output of context and spatial branch; h = ceil(H / 8), with DeiT of the image padded to whole patches.

    Args:
        last_hidden_state: `(B, h*w, hidden_size)` output of the context decoder, row by row.
        spatial_features: `(B, hidden_size, h, w)` output of the spatial branch, if there is one.
        feature_maps: the three maps `(B, hidden_size, h_l, w_l)` of the pyramid before the encoder, all at 1/8
            (ResNet) or 1/16 (DeiT). On request: pipelines would split a tuple by position.
        encoder_last_hidden_state: `(B, S, hidden_size)` output of the context encoder, one level after the other;
            S = sum of h_l * w_l.
        hidden_states: encoder tokens before the first and after each layer, on request.
        attentions: `(B, S, heads, levels, points)` attention weights of each encoder layer, on request.
    """

    last_hidden_state: torch.Tensor | None = None
    spatial_features: torch.Tensor | None = None
    feature_maps: tuple[torch.Tensor, ...] | None = None
    encoder_last_hidden_state: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class UneptSegmenterOutput(SemanticSegmenterOutput):
    """Segmentation output.

    Args:
        boundary_logits: `(B, 2, h, w)`: no boundary, boundary.
        direction_logits: `(B, 8, h, w)`: direction into the region, see `DIRECTIONS` in `refinement_unept`.
        coarse_logits: `(B, num_labels, H, W)` of the context branch.
        refined_logits: the same, boundary pixels replaced along their direction; on request, or if they are `logits`.
        refinement_offsets: `(B, 2, H, W)` the (row, column) steps of the refinement, 0 away from boundaries.
        loss_dict: every loss before its weight: `coarse`, `refined`, `boundary`, `direction`.
    """

    boundary_logits: torch.Tensor | None = None
    direction_logits: torch.Tensor | None = None
    coarse_logits: torch.Tensor | None = None
    refined_logits: torch.Tensor | None = None
    refinement_offsets: torch.Tensor | None = None
    loss_dict: dict[str, torch.Tensor] | None = None


# --- sizes, positions


def pad_to_unit(pixel_values: torch.Tensor, unit: int) -> torch.Tensor:
    """Pad a normalized image at the right and bottom with zeros to whole queries (ResNet) or patches (DeiT).

    The released code takes its training size only; padding there keeps the position of every pixel.
    """
    height, width = pixel_values.shape[-2:]
    check_images(pixel_values, unit)
    return F.pad(pixel_values, (0, -width % unit, 0, -height % unit))


def resize_table(table: torch.Tensor, grid: tuple[int, int], target: tuple[int, int], mode: str) -> torch.Tensor:
    """Interpolate a position table `(h*w, C)` on another grid: `(h'*w', C)` (exact identity on its own grid).

    Bilinear for the queries (the released code has one size only), bicubic for DeiT (its fine-tuning code).
    """
    grid_first = table.transpose(0, 1).reshape(1, -1, *grid)  # (h*w, C) -> (1, C, h, w)
    resized = F.interpolate(grid_first, size=target, mode=mode, align_corners=False)
    return resized.flatten(2)[0].transpose(0, 1)


def sine_positions(height: int, width: int, channels: int, device: torch.device) -> torch.Tensor:
    """Sine and cosine of row and column: `(height * width, channels)` float32, rows in the first half (Sec. 3.1.1).

    Positions count from 1 and span up to 2 pi; sine and cosine channels alternate.
    """
    feature = torch.arange(channels // 2, device=device)
    frequency = 10_000 ** (2 * (feature // 2) / (channels // 2))
    axes = []
    for length in (height, width):
        position = torch.arange(1, length + 1, device=device, dtype=torch.float32)
        angle = position[:, None] / (length + 1e-6) * 2 * math.pi / frequency  # (length, C/2)
        # Interleave: channels 0, 2, ... are sines, channels 1, 3, ... cosines of the same frequencies.
        axes.append(torch.stack((angle[:, 0::2].sin(), angle[:, 1::2].cos()), dim=2).flatten(1))  # (length, C/2)
    rows = axes[0][:, None].expand(-1, width, -1)
    columns = axes[1][None].expand(height, -1, -1)
    return torch.cat((rows, columns), dim=2).flatten(0, 1)


def cell_centers(height: int, width: int, device: torch.device) -> torch.Tensor:
    """Centers (x, y) of the cells of a grid, row by row, in 0..1: `(height * width, 2)`."""
    y = (torch.arange(height, device=device, dtype=torch.float32) + 0.5) / height
    x = (torch.arange(width, device=device, dtype=torch.float32) + 0.5) / width
    return torch.stack((x[None].expand(height, -1), y[:, None].expand(-1, width)), dim=2).flatten(0, 1)


def to_tokens(features: torch.Tensor) -> torch.Tensor:
    """`(B, C, h, w)` -> `(B, h*w, C)`."""
    return features.flatten(2).transpose(1, 2)


# --- backbones (Sec. 4.2)


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


class UneptDeitAttention(nn.Module):
    """Multi-head self-attention over all patches of the backbone."""

    def __init__(self, config: UneptConfig) -> None:
        super().__init__()
        self.config = config
        width = config.backbone_hidden_size
        self.head_dim = width // config.backbone_num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.o_proj = nn.Linear(width, width)

    def forward(
        self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        batch, length, _ = hidden_states.shape
        query, key, value = (
            projection(hidden_states).view(batch, length, -1, self.head_dim).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )  # (B, N, C) -> three times (B, heads, N, d)
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attended, weights = attend(self, query, key, value, None, scaling=self.scaling, dropout=0.0, **kwargs)
        return self.o_proj(attended.reshape(batch, length, -1)), weights


class UneptDeitLayer(GradientCheckpointingLayer):
    """Pre-norm Transformer layer of the backbone: `(B, N, C)` -> `(B, N, C)`."""

    def __init__(self, config: UneptConfig) -> None:
        super().__init__()
        width, eps = config.backbone_hidden_size, config.backbone_layer_norm_eps
        self.layernorm_before = nn.LayerNorm(width, eps=eps)
        self.attention = UneptDeitAttention(config)
        self.layernorm_after = nn.LayerNorm(width, eps=eps)
        self.fc1 = nn.Linear(width, int(width * config.backbone_mlp_ratio))
        self.fc2 = nn.Linear(int(width * config.backbone_mlp_ratio), width)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> torch.Tensor:
        hidden_states = hidden_states + self.attention(self.layernorm_before(hidden_states), **kwargs)[0]
        return hidden_states + self.fc2(F.gelu(self.fc1(self.layernorm_after(hidden_states))))


class UneptDeit(nn.Module):
    """Distilled DeiT without its last norm: maps `(B, C, H/16, W/16)` after the chosen layers (Figure 2, left)."""

    def __init__(self, config: UneptConfig) -> None:
        super().__init__()
        width, patch = config.backbone_hidden_size, config.patch_size
        self.out_layers = tuple(config.out_layers)
        self.grid = (config.image_sides[0] // patch, config.image_sides[1] // patch)
        self.channels = [width] * LEVELS
        self.projection = nn.Conv2d(config.num_channels, width, kernel_size=patch, stride=patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.distillation_token = nn.Parameter(torch.zeros(1, 1, width))
        self.position_embeddings = nn.Parameter(torch.zeros(1, 2 + self.grid[0] * self.grid[1], width))
        self.layers = nn.ModuleList(UneptDeitLayer(config) for _ in range(self.out_layers[-1]))

    def forward(self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> list[torch.Tensor]:
        patches = self.projection(pixel_values)
        grid = (patches.shape[-2], patches.shape[-1])
        special, table = self.position_embeddings[:, :2], self.position_embeddings[0, 2:]
        tokens = to_tokens(patches) + resize_table(table, self.grid, grid, mode="bicubic")
        extra = torch.cat((self.cls_token, self.distillation_token), dim=1) + special
        tokens = torch.cat((extra.expand(tokens.shape[0], -1, -1), tokens), dim=1)  # (B, 2 + h*w, C)
        maps = []
        for number, layer in enumerate(self.layers, start=1):
            tokens = layer(tokens, **kwargs)
            if number in self.out_layers:
                maps.append(tokens[:, 2:].transpose(1, 2).unflatten(2, grid))  # (B, C, h, w)
        return maps


class UneptResNet(nn.Module):
    """timm's `resnet50c` at stride 8, dilated: maps `(B, C, H/8, W/8)` after stages 2, 3 and 4."""

    def __init__(self, config: UneptConfig) -> None:
        super().__init__()
        import timm  # here, so that importing the package stays quick

        widths = [config.base_channels * 2**stage for stage in range(4)]
        self.channels = [4 * width for width in widths[1:]]
        self.resnet = timm.create_model(
            "resnet50c",
            features_only=True,
            output_stride=OUTPUT_STRIDE,
            out_indices=(2, 3, 4),
            in_chans=config.num_channels,
            layers=tuple(config.depths),
            channels=tuple(widths),
            stem_width=config.stem_channels // 2,
        )

    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> list[torch.Tensor]:
        return self.resnet(pixel_values)


# --- spatial branch (Sec. 3.2)


class UneptSpatialBranch(nn.Sequential):
    """Three strided 3x3 convolutions with BatchNorm on the image itself: `(B, 3, H, W)` -> `(B, C, H/8, W/8)`.

    No ReLU after the last one (released code; the text has one after each).
    """

    def __init__(self, config: UneptConfig) -> None:
        channels = [config.num_channels, *config.spatial_channels, config.hidden_size]
        parts: list[nn.Module] = []
        for before, after in zip(channels, channels[1:], strict=False):
            parts += [nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        super().__init__(*parts[:-1])


class UneptHead(nn.Sequential):
    """Boundary or direction head (Sec. 3.2): 1x1 convolution, BatchNorm, ReLU, 1x1 convolution without bias."""

    def __init__(self, config: UneptConfig, num_classes: int) -> None:
        super().__init__(
            nn.Conv2d(config.hidden_size, config.head_channels, kernel_size=1, bias=False),
            nn.BatchNorm2d(config.head_channels),
            nn.ReLU(),
            nn.Conv2d(config.head_channels, num_classes, kernel_size=1, bias=False),
        )


# --- context branch (Sec. 3.1)


class UneptSampling(nn.Module):
    """Softmax over all points of a query and head, then the weighted sum of the values there (Eq. 6)."""

    def forward(
        self,
        value: torch.Tensor,
        offsets: torch.Tensor,
        logits: torch.Tensor,
        reference_points: torch.Tensor,
        spatial_shapes: Shapes,
    ) -> torch.Tensor:
        return ms_deform_attn(value, offsets, logits, reference_points, spatial_shapes)


class UneptPointPredictor(nn.Linear):
    """Predicts one weight or one offset (x, y) per head, level and point from the query (Eq. 3).

    Initially the prediction is the same for all queries: equal weights, and offsets that spread over a square around
    the query: head m samples along the angle 2 pi m / M, point n in the (n + 1)-th ring of pixels.
    """

    def __init__(self, config: UneptConfig, numbers: int) -> None:
        self.points = (config.num_attention_heads, config.num_levels, config.num_points, numbers)
        super().__init__(config.hidden_size, math.prod(self.points))

    def initial_bias(self) -> torch.Tensor:
        """Bias `(heads * levels * points * numbers,)` of that initialization."""
        heads, levels, points, numbers = self.points
        if numbers == 1:
            return torch.zeros_like(self.bias)
        angle = torch.arange(heads, device=self.bias.device) * (2 * math.pi / heads)
        ray = torch.stack((angle.cos(), angle.sin()), dim=1)  # (heads, 2)
        ray = ray / ray.abs().amax(1, keepdim=True)  # from the unit circle to the unit square
        reach = torch.arange(1, points + 1, device=self.bias.device)
        # (heads, 1, 1, 2) * (points, 1) -> (heads, levels, points, 2), flat
        return (ray[:, None, None] * reach[:, None]).expand(-1, levels, -1, -1).flatten()


class UneptOffsetPredictor(UneptPointPredictor):
    """Predicts offsets in at least float32: 16-bit offsets misplace points by up to half a pixel."""

    def forward(self, query: torch.Tensor) -> torch.Tensor:
        dtype = torch.promote_types(query.dtype, torch.float32)
        with maybe_autocast(query.device.type, enabled=False):
            return F.linear(query.to(dtype), self.weight.to(dtype), self.bias.to(dtype))


class UneptDeformableAttention(nn.Module):
    """Attention to a few sampled points of each level, offsets and weights read from the query (Eq. 3 and 6)."""

    def __init__(self, config: UneptConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads, self.num_points = config.num_attention_heads, config.num_points
        self.sampling_offsets = UneptOffsetPredictor(config, numbers=2)
        self.attention_weights = UneptPointPredictor(config, numbers=1)
        self.value_proj = nn.Linear(width, width)
        self.output_proj = nn.Linear(width, width)
        self.sampling = UneptSampling()

    def forward(
        self,
        query: torch.Tensor,
        source: torch.Tensor,
        reference_points: torch.Tensor,
        spatial_shapes: Shapes,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Sample the levels around each reference point and sum the values by weight.

        Args:
            query: `(B, Q, C)`.
            source: `(B, S, C)` tokens of all levels, one level after the other.
            reference_points: `(1 or B, Q, levels, 2)` as (x, y) in 0..1.
            spatial_shapes: (height, width) of each level.
            kwargs: with `output_attentions` the weights are returned too.

        Returns:
            `(B, Q, C)`, and the weights `(B, Q, heads, levels, points)` on request.
        """
        points = (self.num_heads, len(spatial_shapes), self.num_points)
        value = self.value_proj(source).unflatten(2, (self.num_heads, -1))  # (B, S, heads, d)
        offsets = self.sampling_offsets(query).unflatten(2, (*points, 2))  # in pixels of the level
        logits = self.attention_weights(query).unflatten(2, points)  # (B, Q, heads, levels, points)
        output = self.output_proj(self.sampling(value, offsets, logits, reference_points, spatial_shapes))
        weights = logits.flatten(3).softmax(-1).view(logits.shape) if kwargs.get("output_attentions") else None
        return output, weights


def drop(features: torch.Tensor, dropout: nn.Dropout) -> torch.Tensor:
    """Dropout that saves a boolean mask for the backward pass instead of a float tensor; applied before the ReLU.

    Dropout and ReLU commute. Together with the mask this saves the widened features of a layer once, not three times.
    """
    return torch.native_dropout(features, dropout.p, True)[0] if dropout.training and dropout.p else features


class UneptEncoderLayer(GradientCheckpointingLayer):
    """Deformable self-attention and feed-forward network, each followed by a LayerNorm."""

    def __init__(self, config: UneptConfig) -> None:
        super().__init__()
        self.self_attn = UneptDeformableAttention(config)
        self.self_attn_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.ffn_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        positions: torch.Tensor,
        reference_points: torch.Tensor,
        spatial_shapes: Shapes,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """`(B, S, C)` -> `(B, S, C)`; `positions` `(1, S, C)` are added to the queries only."""
        attended, _ = self.self_attn(
            hidden_states + positions, hidden_states, reference_points, spatial_shapes, **kwargs
        )
        hidden_states = self.self_attn_norm(hidden_states + self.dropout(attended))
        widened = F.relu(drop(self.fc1(hidden_states), self.dropout))
        return self.ffn_norm(hidden_states + self.dropout(self.fc2(widened)))


class UneptEncoder(nn.Module):
    """Context encoder over all levels at once (Sec. 3.1.2)."""

    def __init__(self, config: UneptConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(UneptEncoderLayer(config) for _ in range(config.num_hidden_layers))

    def forward(
        self,
        hidden_states: torch.Tensor,
        positions: torch.Tensor,
        spatial_shapes: Shapes,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        places = [cell_centers(height, width, hidden_states.device) for height, width in spatial_shapes]
        # Every token samples all levels around its own position.
        levels = len(spatial_shapes)
        reference_points = torch.cat(places)[None, :, None].expand(-1, -1, levels, -1)  # (1, S, levels, 2)
        for layer in self.layers:
            hidden_states = layer(hidden_states, positions, reference_points, spatial_shapes, **kwargs)
        return hidden_states


class UneptSelfAttention(nn.Module):
    """Self-attention of the queries, over the axis that the configuration names.

    The text has sparse attention here. The released code attends over the images of a batch, for each position on its
    own, because it swaps the axes twice. On one image a query then attends only to itself, with weight 1: this is
    `"pointwise"`, in which query and key projection get zero gradients, as they do there.
    """

    def __init__(self, config: UneptConfig) -> None:
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.dropout = nn.Dropout(config.dropout)  # on the weights
        self.axis = config.decoder_self_attention
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.axis == "batch":
            hidden_states = hidden_states.transpose(0, 1)  # (B, Q, C) -> (Q, B, C)
        query, key, value = (
            projection(hidden_states).unflatten(2, (-1, self.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )  # three times (B, Q, heads, d)
        if self.axis == "pointwise":
            weights = ((query * key).sum(-1, keepdim=True) * self.scaling).softmax(-1)  # over one key: 1
            attended = self.dropout(weights) * value
        else:
            attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
                self.config._attn_implementation, eager_attention_forward
            )
            heads_first = (each.transpose(1, 2) for each in (query, key, value))
            dropout = self.dropout.p if self.dropout.training else 0.0
            attended, _ = attend(self, *heads_first, None, scaling=self.scaling, dropout=dropout)
        output = self.o_proj(attended.flatten(2))  # (B, Q, heads, d) -> (B, Q, C)
        return output.transpose(0, 1) if self.axis == "batch" else output


class UneptDecoderLayer(GradientCheckpointingLayer):
    """Self-attention, deformable attention to the encoder's output, feed-forward network; a LayerNorm after each."""

    def __init__(self, config: UneptConfig) -> None:
        super().__init__()
        self.self_attn = UneptSelfAttention(config)
        self.self_attn_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.cross_attn = UneptDeformableAttention(config)
        self.cross_attn_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.ffn_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        memory: torch.Tensor,
        reference_points: torch.Tensor,
        spatial_shapes: Shapes,
    ) -> torch.Tensor:
        """`(B, Q, C)` -> `(B, Q, C)`; `memory` is `(B, S, C)`."""
        hidden_states = self.self_attn_norm(hidden_states + self.dropout(self.self_attn(hidden_states)))
        attended, _ = self.cross_attn(hidden_states, memory, reference_points, spatial_shapes)
        hidden_states = self.cross_attn_norm(hidden_states + self.dropout(attended))
        widened = F.relu(drop(self.fc1(hidden_states), self.dropout))
        return self.ffn_norm(hidden_states + self.dropout(self.fc2(widened)))


class UneptDecoder(nn.Module):
    """Context decoder (Eq. 5); its queries already contain their positions."""

    def __init__(self, config: UneptConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(UneptDecoderLayer(config) for _ in range(config.num_hidden_layers))

    def forward(
        self, hidden_states: torch.Tensor, grid: tuple[int, int], memory: torch.Tensor, spatial_shapes: Shapes
    ) -> torch.Tensor:
        levels = len(spatial_shapes)
        reference_points = cell_centers(*grid, hidden_states.device)[None, :, None].expand(-1, -1, levels, -1)
        for layer in self.layers:
            hidden_states = layer(hidden_states, memory, reference_points, spatial_shapes)
        return hidden_states


class UneptContext(nn.Module):
    """Context branch (Figure 2, middle): pyramid and queries -> a feature for each query."""

    def __init__(self, config: UneptConfig) -> None:
        super().__init__()
        self.level_embed = nn.Parameter(torch.zeros(config.num_levels, config.hidden_size))
        self.encoder = UneptEncoder(config)
        self.decoder = UneptDecoder(config)

    def forward(
        self,
        feature_maps: Sequence[torch.Tensor],
        queries: torch.Tensor,
        grid: tuple[int, int],
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode and decode.

        Args:
            feature_maps: `(B, C, h_l, w_l)` of each level.
            queries: `(B, h*w, C)`.
            grid: (h, w) of the queries.
            kwargs: with `output_attentions` the encoder's attention weights are computed, to be recorded.

        Returns:
            `(B, h*w, C)` of the decoder and `(B, S, C)` of the encoder.
        """
        spatial_shapes = [(each.shape[-2], each.shape[-1]) for each in feature_maps]
        tokens = torch.cat([to_tokens(each) for each in feature_maps], dim=1)  # (B, S, C)
        positions = [
            sine_positions(height, width, tokens.shape[2], tokens.device).to(tokens.dtype) + embedding
            for (height, width), embedding in zip(spatial_shapes, self.level_embed, strict=True)
        ]  # of each level (h_l * w_l, C): sine encoding plus what marks the level
        memory = self.encoder(tokens, torch.cat(positions)[None], spatial_shapes, **kwargs)
        return self.decoder(queries, grid, memory, spatial_shapes), memory


# --- models


class UneptPreTrainedModel(PreTrainedModel):
    """Initialization and capabilities common to all UN-EPT classes."""

    config: UneptConfig
    base_model_prefix = "unept"
    main_input_name = "pixel_values"
    input_modalities = ("image",)  # type: ignore[assignment]
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # the loss is a mean; Trainer must not rescale it by the number of items
    _no_split_modules = ["UneptDeit", "UneptDeitLayer", "UneptEncoderLayer", "UneptDecoderLayer"]
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": UneptEncoderLayer,
        "attentions": OutputRecorder(UneptDeformableAttention, index=1),
    }
    _encoder_rate_prefix = "unept.backbone"  # the new parts of the base model learn at the rate of the heads

    def get_input_embeddings(self) -> nn.Module:
        """Return the first convolution of the backbone."""
        return next(each for each in self.modules() if isinstance(each, nn.Conv2d))

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialize linear layers as the released code does, convolutions as the framework."""
        if isinstance(module, nn.Conv2d):
            init.kaiming_uniform_(module.weight, a=5**0.5)
            if module.bias is not None:
                bound = module.weight[0].numel() ** -0.5
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, UneptPointPredictor):
            init.zeros_(module.weight)
            init.copy_(module.bias, module.initial_bias())
        elif isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
            init.zeros_(module.bias)
        else:
            super()._init_weights(module)
        if isinstance(module, UneptContext):
            init.normal_(module.level_embed)
        elif isinstance(module, UneptModel):
            init.normal_(module.query_embed)
        elif isinstance(module, UneptDeit):
            for parameter in (module.cls_token, module.distillation_token, module.position_embeddings):
                init.trunc_normal_(parameter, std=0.02)


class UneptModel(UneptPreTrainedModel):
    """Backbone, spatial branch and context branch, without classifier and boundary heads."""

    def __init__(self, config: UneptConfig) -> None:
        super().__init__(config)
        # CODEPATH: unept-resnet50 and unept-deit-base (Tables 1 to 4).
        self.backbone = UneptResNet(config) if config.backbone_type == "resnet" else UneptDeit(config)
        self.pyramid_proj = nn.ModuleList(
            nn.Conv2d(channels, config.hidden_size, kernel_size=1)
            for channels in self.backbone.channels[-config.num_levels :]
        )
        self.spatial_branch = UneptSpatialBranch(config) if config.use_spatial_branch else None
        self.grid = (config.image_sides[0] // OUTPUT_STRIDE, config.image_sides[1] // OUTPUT_STRIDE)
        self.query_embed = nn.Parameter(torch.zeros(self.grid[0] * self.grid[1], config.hidden_size))
        self.context = UneptContext(config)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor,
        output_feature_maps: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> UneptModelOutput:
        """Encode `(B, 3, H, W)` images of any size from 8 pixels (ResNet) or one patch (DeiT) up."""
        if self.config.decoder_self_attention == "batch" and not (self.training or torch.compiler.is_compiling()):
            logger.warning_once(
                "`decoder_self_attention` is 'batch': in evaluation too every image attends to the others of its "
                "batch, so predictions depend on them. Use batches of one image, or train with 'pointwise'."
            )
        pixel_values = pad_to_unit(pixel_values, self.config.unit).to(self.query_embed.dtype)
        backbone_maps = self.backbone(pixel_values, **kwargs)[-self.config.num_levels :]
        pyramid = tuple(project(each) for project, each in zip(self.pyramid_proj, backbone_maps, strict=True))
        grid = (pixel_values.shape[-2] // OUTPUT_STRIDE, pixel_values.shape[-1] // OUTPUT_STRIDE)
        table = resize_table(self.query_embed, self.grid, grid, mode="bilinear")
        spatial_features, queries = None, table.expand(pixel_values.shape[0], -1, -1)  # (B, h*w, C)
        if self.spatial_branch is not None:
            spatial_features = self.spatial_branch(pixel_values)
            queries = to_tokens(spatial_features) + table  # dynamic queries (Sec. 3.2)
        kwargs.setdefault("output_attentions", self.config.output_attentions)
        context, memory = self.context(pyramid, queries, grid, **kwargs)
        return UneptModelOutput(
            last_hidden_state=context,
            spatial_features=spatial_features,
            feature_maps=pyramid if output_feature_maps else None,
            encoder_last_hidden_state=memory,
        )


class UneptBackbone(BackboneMixin, UneptModel):
    """UN-EPT as a backbone: maps `spatial`, `pyramid1` to `pyramid3` and `context`, all of `hidden_size` channels."""

    def __init__(self, config: UneptConfig) -> None:
        super().__init__(config)
        self.num_features = [config.hidden_size] * len(config.stage_names)

    @can_return_tuple
    def forward(self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> BackboneOutput:
        """Return the maps named in `config.out_features`."""
        outputs = UneptModel.forward(self, pixel_values, output_feature_maps=True, return_dict=True, **kwargs)
        context = to_map(outputs.last_hidden_state, pixel_values, self.config)
        spatial = [] if outputs.spatial_features is None else [outputs.spatial_features]
        maps = dict(zip(self.stage_names, (*spatial, *outputs.feature_maps, context), strict=True))
        return BackboneOutput(
            feature_maps=tuple(maps[name] for name in self.out_features),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class UneptForSemanticSegmentation(UneptPreTrainedModel):
    """UN-EPT (Figure 2)."""

    def __init__(self, config: UneptConfig) -> None:
        name_two_classes(config)
        super().__init__(config)
        self.unept = UneptModel(config)
        self.classifier = nn.Conv2d(config.hidden_size, int(config.num_labels or 0), kernel_size=1)
        self.boundary_head = UneptHead(config, 2) if config.use_spatial_branch else None
        self.direction_head = UneptHead(config, NUM_DIRECTIONS) if config.use_spatial_branch else None
        self.loss_function = functools.partial(segmentation_loss, normalization=config.loss_normalization)
        self.post_init()

    @property
    def training_targets(self) -> Callable | None:
        """Function by which data workers add targets to each augmented label map, see `boundary_targets`."""
        if self.boundary_head is None:
            return None
        return functools.partial(boundary_targets, **self._target_settings())

    def _target_settings(self) -> dict[str, Any]:
        return {
            "min_class_pixels": self.config.min_class_pixels,
            "ignore_small_classes": self.config.ignore_small_classes,
            "official": self.config.official_targets,
            "ignore_index": ignored_id(self.config),
        }

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        boundary_labels: torch.Tensor | None = None,
        direction_labels: torch.Tensor | None = None,
        output_refined_logits: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> UneptSegmenterOutput:
        """Segment images.

        Args:
            pixel_values: `(B, 3, H, W)`, normalized; any size from 8 pixels (ResNet) or one patch (DeiT) up.
            labels: `(B, H, W)` train ids of any integer dtype; `ignored_id` (255) and -100 are ignored.
            boundary_labels: of the size of `labels`, 0 and 1, 255 is ignored; made from `labels` if not given.
            direction_labels: of the size of `labels`, 0 to 7, 255 is ignored; made from `labels` if not given.
            output_refined_logits: whether to return the refined logits beside the coarse ones.

        Returns:
            `logits` `(B, num_labels, H, W)`, coarse, or refined with `use_boundary_refinement`; `boundary_logits` and
            `direction_logits` at 1/8; with labels also `loss` and `loss_dict`.

        Raises:
            InputError: impossible labels, boundaries or directions without labels, or refined logits or boundaries of
                a model without a spatial branch.
        """
        labels = segmentation_labels(labels, pixel_values, self.config)
        has_targets = boundary_labels is not None or direction_labels is not None
        if labels is None and has_targets:
            raise InputError("`boundary_labels` and `direction_labels` need `labels` beside them; give all, or none.")
        outputs = self.unept(pixel_values, return_dict=True, **kwargs)
        size = (pixel_values.shape[-2], pixel_values.shape[-1])
        context = to_map(outputs.last_hidden_state, pixel_values, self.config)
        coarse = enlarge(self.classifier(context), size, align_corners=False)
        if self.boundary_head is None or self.direction_head is None:
            if output_refined_logits or has_targets:
                raise InputError(
                    "Without a spatial branch nothing is refined and no boundary is learned. Leave out "
                    "`output_refined_logits`, `boundary_labels` and `direction_labels`."
                )
            losses = None if labels is None else {"coarse": self._label_loss(coarse, labels)}
            return UneptSegmenterOutput(
                loss=None if losses is None else self._total(losses),
                logits=coarse,
                hidden_states=outputs.hidden_states,
                attentions=outputs.attentions,
                loss_dict=losses,
            )
        spatial = outputs.spatial_features
        boundary, direction = self.boundary_head(spatial), self.direction_head(spatial)
        losses, refined, offsets = None, None, None
        if labels is not None or output_refined_logits or self.config.use_boundary_refinement:
            # Boundaries and directions are judged at full resolution, with aligned corners (released code).
            full_boundary, full_direction = (
                enlarge(each.float(), size, align_corners=True) for each in (boundary, direction)
            )
            offsets = boundary_offsets(full_boundary, full_direction, self.config.boundary_threshold_on)
            offsets = self.config.refine_scale * offsets
            sources = refinement_sources(offsets)
            if output_refined_logits or self.config.use_boundary_refinement:
                refined = refine(coarse, sources)
            if labels is not None:
                judged = (coarse, sources, full_boundary, full_direction)
                if labels.shape[-2:] != size:
                    judged = self._at_size((labels.shape[-2], labels.shape[-1]), coarse, full_boundary, full_direction)
                losses = self._losses(*judged, labels, *self._targets(labels, boundary_labels, direction_labels))
        return UneptSegmenterOutput(
            loss=None if losses is None else self._total(losses),
            logits=refined if self.config.use_boundary_refinement else coarse,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            boundary_logits=boundary,
            direction_logits=direction,
            coarse_logits=coarse,
            refined_logits=refined,
            refinement_offsets=offsets,
            loss_dict=losses,
        )

    def _at_size(
        self, size: tuple[int, int], *full: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Resize coarse, boundary and direction logits to `size` (height, width); with the sources there."""
        coarse, boundary, direction = (F.interpolate(each, size=size, mode="bilinear") for each in full)
        offsets = boundary_offsets(boundary, direction, self.config.boundary_threshold_on)
        return coarse, refinement_sources(self.config.refine_scale * offsets), boundary, direction

    def _targets(
        self, labels: torch.Tensor, boundary: torch.Tensor | None, direction: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the maps that were given, and make the others from the labels; `(B, H, W)` int64."""
        if boundary is None or direction is None:
            made = batched_targets(labels, **self._target_settings())
            boundary = made[0] if boundary is None else boundary
            direction = made[1] if direction is None else direction
        shape = (labels.shape[0], labels.shape[1], labels.shape[2])
        return (
            label_maps(boundary, shape, 2, IGNORE_INDEX, "boundary_labels"),
            label_maps(direction, shape, NUM_DIRECTIONS, IGNORE_INDEX, "direction_labels"),
        )

    def _losses(
        self,
        coarse: torch.Tensor,
        sources: torch.Tensor,
        boundary: torch.Tensor,
        direction: torch.Tensor,
        labels: torch.Tensor,
        boundary_labels: torch.Tensor,
        direction_labels: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """Return the four terms of Eq. 7 without their weights; all maps have the size of the labels.

        Args:
            coarse: `(B, num_labels, H, W)`.
            sources: `(B, H, W)` of `refinement_sources`.
            boundary: `(B, 2, H, W)` logits.
            direction: `(B, 8, H, W)` logits.
            labels: `(B, H, W)`, as the two that follow.
            boundary_labels: 0 and 1, 255 is ignored.
            direction_labels: 0 to 7, 255 is ignored.
        """
        # CODEPATH: every published name, as in the released code; else README, "Where directions are learned".
        if self.config.direction_supervision == "predicted":
            at_boundary = boundary.detach().softmax(1)[:, 1] > 0.5
        else:
            at_boundary = boundary_labels == 1
        # The refined loss judges each pixel by the logits at `sources`, without gathering them. The coarse loss takes
        # the same route, each pixel judged by its own: that keeps less memory than the plain cross-entropy.
        own = torch.arange(sources[0].numel(), device=sources.device).view_as(sources[0]).expand_as(sources)
        return {
            "coarse": self._label_loss(coarse, labels, sources=own),
            "refined": self._label_loss(coarse, labels, sources=sources),
            "boundary": balanced_loss(boundary, boundary_labels),
            "direction": balanced_loss(direction, torch.where(at_boundary, direction_labels, IGNORE_INDEX)),
        }

    def _label_loss(self, logits: torch.Tensor, labels: torch.Tensor, **sources: torch.Tensor) -> torch.Tensor:
        ignore_index = ignored_id(self.config)
        return self.loss_function(logits=logits, labels=labels, ignore_index=ignore_index, **sources)

    def _total(self, losses: dict[str, torch.Tensor]) -> torch.Tensor:
        """Weighted sum (Eq. 7); without a spatial branch there is the first term only."""
        weights = weights_of(self.config.loss_weights)
        return sum(weight * term for weight, term in zip(weights, losses.values(), strict=False))  # type: ignore[return-value]


def to_map(tokens: torch.Tensor, pixel_values: torch.Tensor, config: UneptConfig) -> torch.Tensor:
    """Queries `(B, h*w, C)` of images -> `(B, C, h, w)`."""
    # Sides rounded up, without a negative dividend: ONNX rounds that towards 0.
    padded = [(side + config.unit - 1) // config.unit * config.unit for side in pixel_values.shape[-2:]]
    grid = [side // OUTPUT_STRIDE for side in padded]
    return tokens.transpose(1, 2).unflatten(2, grid)


def enlarge(features: torch.Tensor, size: tuple[int, int], align_corners: bool) -> torch.Tensor:
    """Bilinear upsampling of a map at 1/8 to the padded image, cropped to `size` (height, width)."""
    if not align_corners:
        # As `F.interpolate` by this factor, but only the part that is kept is computed.
        factor = float(OUTPUT_STRIDE)
        return torch.ops.aten.upsample_bilinear2d(features, size, False, factor, factor)
    padded_size = (features.shape[-2] * OUTPUT_STRIDE, features.shape[-1] * OUTPUT_STRIDE)
    features = F.interpolate(features, size=padded_size, mode="bilinear", align_corners=True)
    return features[..., : size[0], : size[1]]


__all__ = [
    "UneptBackbone",
    "UneptForSemanticSegmentation",
    "UneptModel",
    "UneptPreTrainedModel",
]
