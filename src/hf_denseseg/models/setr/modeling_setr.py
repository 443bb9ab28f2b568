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

"""SETR: a plain Transformer encodes the image as a sequence of patches, a light decoder turns it into a label map.

"Vision Transformers: From Semantic Segmentation to Dense Prediction", IJCV 2024 (SETR: CVPR 2021). Figure 1: the
encoder keeps the resolution of one token per 16 x 16 patch through all layers (a); the decoders are Naive (one step),
PUP (Progressive UPsampling, b) and MLA (Multi-Level feature Aggregation, c). Where the released code and the paper's
text differ, the code is followed.

Layers are numbered in two ways. Configurations and `SetrModel` count Transformer layers from 0, as the released
configurations do (`auxiliary_layers`, `mla_layers`). Encoders and `SetrBackbone` count stages, as backbones of
transformers do: stage 0 (`stem`) is the embeddings, stage k (`stageK`) the output of layer k - 1.
"""

import functools
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import BeitConfig, BeitModel
from transformers import initialization as init
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BackboneOutput, SemanticSegmenterOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from hf_denseseg.models.inputs import check_images, ignored_id, segmentation_labels
from hf_denseseg.models.losses import segmentation_loss
from hf_denseseg.models.one_logit import name_two_classes
from hf_denseseg.models.setr.configuration_setr import SetrConfig


@dataclass
class SetrModelOutput(ModelOutput):
    """Output of the encoder.

    Args:
        last_hidden_state: `(B, 1 + h*w, hidden_size)` tokens after the last layer, class token first; no LayerNorm
            follows (each head has its own). With MLA on a plain ViT `(B, h*w, hidden_size)`, without a class token.
        feature_maps: `(B, hidden_size, h, w)` for each requested layer, h = ceil(H / patch_size); None without.
        hidden_states: tokens before the first and after each layer, on request.
        attentions: `(B, heads, tokens, tokens)` per layer, on request (eager attention only).
    """

    last_hidden_state: torch.Tensor | None = None
    feature_maps: tuple[torch.Tensor, ...] | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class SetrSegmenterOutput(SemanticSegmenterOutput):
    """Segmentation output; `auxiliary_logits`, shallowest layer first, are computed only with labels."""

    auxiliary_logits: tuple[torch.Tensor, ...] | None = None


def resize_position_embeddings(table: torch.Tensor, grid: tuple[int, int], target: tuple[int, int]) -> torch.Tensor:
    """Interpolate a position table to another grid of patches (Sec. 4.1, "2D interpolation"; a no-op on its own grid).

    Args:
        table: `(1, extra + h*w, C)`; the first entry belongs to the class token; any further extra entry (the
            distillation token of DeiT) is left out.
        grid: (h, w) of the table.
        target: (h, w) to interpolate to.

    Returns:
        `(1, 1 + h*w, C)`; bilinear without aligned corners and without antialiasing, as in the official code.
    """
    patches = table[:, -grid[0] * grid[1] :].transpose(1, 2).unflatten(2, grid)  # (1, h*w, C) -> (1, C, h, w)
    patches = F.interpolate(patches, size=target, mode="bilinear", align_corners=False)
    return torch.cat((table[:, :1], patches.flatten(2).transpose(1, 2)), dim=1)


def fit_to_patches(pixel_values: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Resize images up to the next multiple of the patch size; sizes that are multiples stay unchanged.

    The released code accepts its training size only. Resizing, unlike padding, keeps logits and image aligned without
    cropping either.
    """
    height, width = pixel_values.shape[-2:]
    check_images(pixel_values, patch_size, f"a token covers {patch_size} pixels, so ")
    size = tuple((side + patch_size - 1) // patch_size * patch_size for side in (height, width))
    return F.interpolate(pixel_values, size=size, mode="bilinear", align_corners=False)


class SetrEmbeddings(nn.Module):
    """Project patches linearly, prepend the class token and add the positions: `(B, 3, H, W)` -> `(B, 1 + h*w, C)`.

    MLA drops the class token right after the positions are added, so that it takes no part in attention (official
    `VIT_MLA`); Naive and PUP keep it through all layers and drop it in front of the decoder.
    """

    def __init__(self, config: SetrConfig) -> None:
        super().__init__()
        self.grid = config.grid
        self.projection = nn.Conv2d(
            config.num_channels, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )
        self.with_class_token = config.decode_head != "mla"
        # MLA's official checkpoints hold the unused token too, so it stays a parameter; without `requires_grad`, DDP
        # does not wait for a gradient that never comes.
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size), requires_grad=self.with_class_token)
        length = 1 + self.grid[0] * self.grid[1]
        self.position_embeddings = nn.Parameter(torch.zeros(1, length, config.hidden_size))

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        patches = self.projection(pixel_values.to(self.projection.weight.dtype))  # (B, C, h, w)
        grid = (patches.shape[-2], patches.shape[-1])
        positions = resize_position_embeddings(self.position_embeddings, self.grid, grid)
        tokens = patches.flatten(2).transpose(1, 2) + positions[:, 1:]  # (B, C, h, w) -> (B, h*w, C)
        if self.with_class_token:
            token = (self.cls_token + positions[:, :1]).expand(tokens.shape[0], -1, -1)
            tokens = torch.cat((token, tokens), dim=1)  # (B, 1 + h*w, C)
        return tokens, grid


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


class SetrAttention(nn.Module):
    """Multi-head self-attention over all tokens (Eq. 1-2)."""

    def __init__(self, config: SetrConfig) -> None:
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        batch, length, _ = hidden_states.shape
        shape = (batch, length, -1, self.head_dim)
        query = self.q_proj(hidden_states).view(shape).transpose(1, 2)  # (B, N, C) -> (B, heads, N, d)
        key = self.k_proj(hidden_states).view(shape).transpose(1, 2)
        value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        # Eq. 2 per head, (B, N, heads, d); then the heads side by side through W_O.
        attended, weights = attend(self, query, key, value, None, scaling=self.scaling, dropout=0.0, **kwargs)
        return self.o_proj(attended.reshape(batch, length, -1)), weights


# Same as DsctMLP in modeling_dsct
class SetrMLP(nn.Module):
    """Two linear layers with an exact GELU between them (MLP in Eq. 3)."""

    def __init__(self, config: SetrConfig) -> None:
        super().__init__()
        width = int(config.hidden_size * config.mlp_ratio)
        self.fc1 = nn.Linear(config.hidden_size, width)
        self.fc2 = nn.Linear(width, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(hidden_states)))


# Same as DsctDropPath in modeling_dsct
class SetrDropPath(nn.Module):
    """Stochastic depth: in training, drop a residual branch per sample with probability `rate` and scale the rest."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.rate == 0.0 or not self.training:
            return hidden_states
        kept = hidden_states.new_empty(hidden_states.shape[0], 1, 1).bernoulli_(1 - self.rate)
        return hidden_states * (kept / (1 - self.rate))


class SetrLayer(GradientCheckpointingLayer):
    """Pre-norm Transformer layer (Eq. 3): `(B, N, C)` -> `(B, N, C)`."""

    def __init__(self, config: SetrConfig, drop_path_rate: float) -> None:
        super().__init__()
        self.layernorm_before = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = SetrAttention(config)
        self.layernorm_after = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = SetrMLP(config)
        self.drop_path = SetrDropPath(drop_path_rate)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> torch.Tensor:
        attended, _ = self.attention(self.layernorm_before(hidden_states), **kwargs)
        hidden_states = hidden_states + self.drop_path(attended)
        return hidden_states + self.drop_path(self.mlp(self.layernorm_after(hidden_states)))


def tokens_to_map(tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Arrange patch tokens as a map, without the class token: `(B, [1 +] h*w, C)` -> `(B, C, h, w)`.

    The released code drops the class token only if the number of tokens is no multiple of 48, and fails on the grids
    where it is one; here it is always dropped.
    """
    return tokens[:, tokens.shape[1] - grid[0] * grid[1] :].transpose(1, 2).unflatten(2, grid)


class SetrEncoder(nn.Module):
    """Plain ViT (Figure 1a, Sec. 3.2): patches, positions, layers; no LayerNorm follows, as each head has its own."""

    def __init__(self, config: SetrConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.embeddings = SetrEmbeddings(config)
        last = max(config.num_hidden_layers - 1, 1)
        self.layers = nn.ModuleList(
            SetrLayer(config, config.drop_path_rate * index / last) for index in range(config.num_hidden_layers)
        )

    def forward(
        self, pixel_values: torch.Tensor, stages: Collection[int], **kwargs: Unpack[TransformersKwargs]
    ) -> tuple[dict[int, torch.Tensor], torch.Tensor]:
        """Encode images, keeping the maps of the requested stages only.

        Args:
            pixel_values: `(B, 3, H, W)`.
            stages: 0 for the embeddings, k for the output of layer k - 1.

        Returns:
            Stage -> `(B, C, h, w)` map, and the tokens after the last layer `(B, [1 +] h*w, C)`.
        """
        tokens, grid = self.embeddings(fit_to_patches(pixel_values, self.patch_size))
        maps = {0: tokens_to_map(tokens, grid)} if 0 in stages else {}
        for stage, layer in enumerate(self.layers, start=1):
            tokens = layer(tokens, **kwargs)
            if stage in stages:
                maps[stage] = tokens_to_map(tokens, grid)
        return maps, tokens


class SetrBeitEncoder(nn.Module):
    """transformers' BEiT: relative position bias in every layer, layer scale, no position table (Tables 3 to 5)."""

    def __init__(self, config: SetrConfig) -> None:
        super().__init__()
        beit = BeitConfig(
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            intermediate_size=int(config.hidden_size * config.mlp_ratio),
            layer_norm_eps=config.layer_norm_eps,
            image_size=[side * config.patch_size for side in config.grid],
            patch_size=config.patch_size,
            num_channels=config.num_channels,
            use_relative_position_bias=True,
            layer_scale_init_value=config.layer_scale_init_value,
            drop_path_rate=config.drop_path_rate,
            initializer_range=config.initializer_range,
            use_mean_pooling=True,  # builds the model without its last LayerNorm, which nothing here reads
        )
        beit._attn_implementation = config._attn_implementation
        self.patch_size = config.patch_size
        self.beit = BeitModel(beit, add_pooling_layer=False)

    def forward(
        self, pixel_values: torch.Tensor, stages: Collection[int], **kwargs: Unpack[TransformersKwargs]
    ) -> tuple[dict[int, torch.Tensor], torch.Tensor]:
        """As `SetrEncoder.forward`; `BeitModel.forward` would keep the output of every layer in memory."""
        weight = self.beit.embeddings.patch_embeddings.projection.weight
        pixel_values = fit_to_patches(pixel_values, self.patch_size).to(weight.dtype)
        resolution = (pixel_values.shape[-2], pixel_values.shape[-1])
        grid = (resolution[0] // self.patch_size, resolution[1] // self.patch_size)
        tokens = self.beit.embeddings(pixel_values)
        maps = {0: tokens_to_map(tokens, grid)} if 0 in stages else {}
        for stage, layer in enumerate(self.beit.layers, start=1):
            tokens = layer(tokens, resolution=resolution, **kwargs)
            if stage in stages:
                maps[stage] = tokens_to_map(tokens, grid)
        return maps, tokens


class SetrPreTrainedModel(PreTrainedModel):
    """Initialization and capabilities common to all SETR classes."""

    config: SetrConfig
    base_model_prefix = "setr"
    main_input_name = "pixel_values"
    input_modalities = ("image",)  # type: ignore[assignment]
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # the loss is a mean; Trainer must not rescale it by the number of items
    # `post_init` collects the names of direct children only, and transformers' BEiT lies one deeper.
    _no_split_modules = ["SetrEmbeddings", "SetrLayer", "BeitLayer"]  # trf-ignore: TRF022
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": SetrLayer, "attentions": SetrAttention}
    _no_weight_decay = ("cls_token", "position_embeddings", "relative_position_bias_table")
    # A part of the backbone in the official code, hence not trained with the heads' tenfold learning rate.
    _encoder_rate_modules = ("aggregation",)

    def get_input_embeddings(self) -> nn.Module:
        """Return the first layer, the patch projection."""
        return next(each for name, each in self.named_modules() if name.endswith("projection"))

    def parameter_depth(self, name: str) -> tuple[int, int]:
        """Return the depth of an encoder parameter (0 = embeddings, k = layer k - 1), and the depth after the last."""
        parts = name.split(".")
        layer = int(parts[parts.index("layers") + 1]) + 1 if "layers" in parts else 0
        return layer, self.config.num_hidden_layers + 1

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialize as the official code does: linear layers and tables normal, convolutions by
        torch's default."""
        if isinstance(module, nn.Conv2d):
            init.kaiming_uniform_(module.weight, a=5**0.5)
            if module.bias is not None:
                bound = module.weight[0].numel() ** -0.5
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=self.config.initializer_range)
            init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):  # transformers goes by class names and would miss `SetrMapNorm`
            init.ones_(module.weight)
            init.zeros_(module.bias)
        else:
            super()._init_weights(module)
        if isinstance(module, SetrEmbeddings):
            init.trunc_normal_(module.cls_token, std=self.config.initializer_range)
            init.trunc_normal_(module.position_embeddings, std=self.config.initializer_range)


def build_encoder(config: SetrConfig) -> SetrEncoder | SetrBeitEncoder:
    """Build the encoder that the configuration names: plain ViT or BEiT."""
    # CODEPATH: setr-*-{vit,deit}-* and setr-{pup,mla}-beit-large (Tables 3 to 5).
    return SetrEncoder(config) if config.encoder == "vit" else SetrBeitEncoder(config)


class SetrModel(SetrPreTrainedModel):
    """The encoder without a decoder."""

    def __init__(self, config: SetrConfig) -> None:
        super().__init__(config)
        self.encoder = build_encoder(config)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor,
        layers: Collection[int] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SetrModelOutput:
        """Encode `(B, 3, H, W)` images of any size from one patch up.

        Args:
            pixel_values: images, normalized.
            layers: layers whose maps are returned as `feature_maps`, counted from 0; no other output is kept.
        """
        stages = [layer + 1 for layer in layers or ()]
        maps, tokens = self.encoder(pixel_values, stages, **kwargs)
        chosen = tuple(maps[stage] for stage in stages)
        return SetrModelOutput(last_hidden_state=tokens, feature_maps=chosen or None)


class SetrBackbone(BackboneMixin, SetrPreTrainedModel):
    """The encoder as a backbone: maps `stem` (embeddings) and `stage1` to `stageN`, one per layer, all at 1/16."""

    def __init__(self, config: SetrConfig) -> None:
        super().__init__(config)
        self.num_features = [config.hidden_size] * (config.num_hidden_layers + 1)
        self.encoder = build_encoder(config)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> BackboneOutput:
        """Return the maps named in `config.out_features`, each `(B, hidden_size, h, w)`."""
        stages = [self.stage_names.index(name) for name in self.out_features]
        maps, _ = self.encoder(pixel_values, stages, **kwargs)
        return BackboneOutput(feature_maps=tuple(maps[stage] for stage in stages))


def upsample(features: torch.Tensor, factor: int, align_corners: bool = False) -> torch.Tensor:
    """Bilinear upsampling by an integer factor: `(B, C, h, w)` -> `(B, C, factor * h, factor * w)`."""
    height, width = features.shape[-2:]
    size = (height * factor, width * factor)
    return F.interpolate(features, size=size, mode="bilinear", align_corners=align_corners)


class SetrMapNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map: `(B, C, h, w)` -> `(B, C, h, w)`."""

    def __init__(self, config: SetrConfig) -> None:
        super().__init__(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return super().forward(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class SetrConvNormRelu(nn.Module):
    """Convolution that keeps the size, BatchNorm, ReLU."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, bias: bool) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=bias)
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return F.relu(self.norm(self.convolution(features)), inplace=True)


class SetrNaiveHead(nn.Module):
    """Naive decoder, also used as its auxiliary head (Sec. 3.4 (1)): two 1x1 convolutions, upsampling in one step.

    That step, from 1/16 to the image's size, is left to the loss and to post-processing.
    """

    def __init__(self, config: SetrConfig) -> None:
        super().__init__()
        self.norm = SetrMapNorm(config)
        self.convolution = SetrConvNormRelu(config.hidden_size, config.decoder_hidden_size, kernel_size=1, bias=True)
        self.classifier = nn.Conv2d(config.decoder_hidden_size, int(config.num_labels or 0), kernel_size=1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.convolution(self.norm(features)))


class SetrPupHead(nn.Module):
    """Progressive UPsampling (Sec. 3.4 (2), Figure 1b); its auxiliary head is one convolution with factor 4.

    3x3 convolutions and upsampling alternate. The last upsampling, to the image's size, is left to the loss and to
    post-processing. The released code classifies before it, the paper's FLOPs count the classifier after it; both are
    the same function, since bilinear weights sum to one.
    """

    def __init__(self, config: SetrConfig, num_convolutions: int, factor: int) -> None:
        super().__init__()
        self.factor = factor
        # Upsampling steps before the last one: 1/16 -> 1/8 -> 1/4 -> 1/2 with factor 2, 1/16 -> 1/4 with factor 4.
        self.steps = {2: 3, 4: 1}[factor]
        width = config.decoder_hidden_size
        self.norm = SetrMapNorm(config)
        self.convolutions = nn.ModuleList(
            SetrConvNormRelu(width if index else config.hidden_size, width, kernel_size=3, bias=True)
            for index in range(num_convolutions)
        )
        self.classifier = nn.Conv2d(width, int(config.num_labels or 0), kernel_size=1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        features = self.norm(features)
        for index, convolution in enumerate(self.convolutions):
            features = convolution(features)
            if index < self.steps:
                features = upsample(features, self.factor)
        return self.classifier(features)


class SetrAggregation(nn.Module):
    """Top-down aggregation of four layers (Sec. 3.4 (3), Figure 1c): LayerNorm, 1x1, sums, 3x3, all at 1/16.

    The text has a 1x1 and two 3x3 convolutions per stream; the released code has a 1x1 and a 3x3 here and two more
    3x3 in the head.
    """

    def __init__(self, config: SetrConfig) -> None:
        super().__init__()
        width, levels = config.decoder_hidden_size, len(config.mla_layers)
        self.norms = nn.ModuleList(SetrMapNorm(config) for _ in range(levels))
        self.lateral = nn.ModuleList(
            SetrConvNormRelu(config.hidden_size, width, kernel_size=1, bias=False) for _ in range(levels)
        )
        self.output = nn.ModuleList(SetrConvNormRelu(width, width, kernel_size=3, bias=False) for _ in range(levels))

    def forward(self, feature_maps: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        """`(B, hidden_size, h, w)` per layer -> `(B, decoder_hidden_size, h, w)` per layer, shallowest first."""
        maps = [
            lateral(norm(each)) for lateral, norm, each in zip(self.lateral, self.norms, feature_maps, strict=True)
        ]
        for level in reversed(range(len(maps) - 1)):  # from the deepest layer down to the shallowest
            maps[level] = maps[level] + maps[level + 1]
        return [output(each) for output, each in zip(self.output, maps, strict=True)]


class SetrMlaHead(nn.Module):
    """The four streams of MLA (Figure 1c): two 3x3 convolutions and 4x upsampling each, then one classifier at 1/4.

    As in the released code, this is the only upsampling with aligned corners.
    """

    def __init__(self, config: SetrConfig) -> None:
        super().__init__()
        width, levels = config.mla_hidden_size, len(config.mla_layers)
        self.streams = nn.ModuleList(
            nn.Sequential(  # trf-ignore: TRF036 - converted and saved weights name the two by index
                SetrConvNormRelu(config.decoder_hidden_size, width, kernel_size=3, bias=False),
                SetrConvNormRelu(width, width, kernel_size=3, bias=False),
            )
            for _ in range(levels)
        )
        self.classifier = nn.Conv2d(levels * width, int(config.num_labels or 0), kernel_size=3, padding=1)

    def forward(self, feature_maps: list[torch.Tensor]) -> torch.Tensor:
        maps = [
            upsample(stream(each), 4, align_corners=True)
            for stream, each in zip(self.streams, feature_maps, strict=True)
        ]
        return self.classifier(torch.cat(maps, dim=1))  # (B, 4 * mla_hidden_size, 4h, 4w) -> (B, num_labels, 4h, 4w)


def build_heads(config: SetrConfig) -> tuple[nn.Module, list[nn.Module]]:
    """Build the decoder of a configuration and its auxiliary heads, shallowest layer first."""
    if config.decode_head == "mla":  # CODEPATH: setr-mla-* (Tables 2 to 5)
        # One 1x1 convolution without bias each (the text has two layers, the released code one).
        width, num_labels = config.decoder_hidden_size, int(config.num_labels or 0)
        return SetrMlaHead(config), [nn.Conv2d(width, num_labels, 1, bias=False) for _ in config.mla_layers]
    if config.decode_head == "pup":  # CODEPATH: setr-pup-*; below setr-naive-*
        head = SetrPupHead(config, num_convolutions={2: 4, 4: 2}[config.pup_upsampling], factor=config.pup_upsampling)
        return head, [SetrPupHead(config, num_convolutions=1, factor=4) for _ in config.auxiliary_layers]
    return SetrNaiveHead(config), [SetrNaiveHead(config) for _ in config.auxiliary_layers]


class SetrForSemanticSegmentation(SetrPreTrainedModel):
    """SETR with one of its three decoders (Figure 1)."""

    def __init__(self, config: SetrConfig) -> None:
        name_two_classes(config)
        super().__init__(config)
        self.setr = SetrModel(config)
        # CODEPATH: setr-mla-*, not setr-naive-* and setr-pup-*.
        self.aggregation = SetrAggregation(config) if config.decode_head == "mla" else None
        self.decode_head, auxiliary = build_heads(config)
        # CODEPATH: every published name has auxiliary heads; setr-naive-vit-large without: "w.o.aux" of Table 3.
        self.auxiliary_head = nn.ModuleList(auxiliary if config.use_auxiliary_head else [])
        self.loss_function = functools.partial(segmentation_loss, normalization=config.loss_normalization)
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> SetrSegmenterOutput:
        """Segment images.

        Args:
            pixel_values: `(B, 3, H, W)`, normalized; any size from one patch up.
            labels: `(B, H, W)` train ids of any integer dtype; `ignored_id` (255) and -100 are ignored.

        Returns:
            `logits` `(B, num_labels, h, w)` at 1/16 (Naive), 1/2 (PUP) or 1/4 (MLA) of the image resized to whole
            patches; with labels also `loss` and `auxiliary_logits`.
        """
        labels = segmentation_labels(labels, pixel_values, self.config)
        auxiliary_layers = list(self.config.auxiliary_layers) if self.auxiliary_head and labels is not None else []
        last = self.config.num_hidden_layers - 1
        # MLA's auxiliary heads read the same four maps as its decoder; the others read layers of their own.
        layers = list(self.config.mla_layers) if self.aggregation else [*auxiliary_layers, last]
        outputs = self.setr(pixel_values, layers=layers, return_dict=True, **kwargs)
        if self.aggregation:
            maps = self.aggregation(outputs.feature_maps)
            logits = self.decode_head(maps)
        else:
            *maps, top = outputs.feature_maps
            logits = self.decode_head(top)
        loss, auxiliary_logits = None, None
        if labels is not None:
            auxiliary_logits = tuple(head(each) for head, each in zip(self.auxiliary_head, maps, strict=False))
            losses = [self._loss(each, labels) for each in (logits, *auxiliary_logits)]
            loss = losses[0] + self.config.auxiliary_loss_weight * sum(losses[1:])
        return SetrSegmenterOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            auxiliary_logits=auxiliary_logits,
        )

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.loss_function(logits=logits, labels=labels, ignore_index=ignored_id(self.config))


__all__ = [
    "SetrBackbone",
    "SetrForSemanticSegmentation",
    "SetrModel",
    "SetrPreTrainedModel",
]
