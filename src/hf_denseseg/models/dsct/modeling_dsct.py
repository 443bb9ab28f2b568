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

"""DSCT, the Dual-Stream Convolution-Transformer network.

"Rethinking Local and Global Feature Representation for Semantic Segmentation", BMVC 2021. Figure 1: a spatial stream
(convolutions) and a context stream (Transformer) run side by side and exchange features in every block (Figure 2); one
of two decoders, SAC or SAPP, fuses their maps. The encoder is Conformer with the last stages kept at stride 8.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BackboneOutput, ImageClassifierOutput, SemanticSegmenterOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from hf_denseseg.models.dsct.configuration_dsct import DsctConfig
from hf_denseseg.models.inputs import check_images, ignored_id, segmentation_labels
from hf_denseseg.models.losses import classification_loss, segmentation_loss
from hf_denseseg.models.one_logit import name_two_classes
from hf_denseseg.models.plain_layers import are_plain

BLOCK_EPS = 1e-6  # of every norm inside a block; stem, final norm and heads keep the framework's 1e-5 (Conformer code)
STEM_STRIDE = 4  # input pixels per pixel of the stem map
PATCH_STRIDE = 4  # stem pixels per token side
TOKEN_STRIDE = STEM_STRIDE * PATCH_STRIDE


@dataclass
class DsctModelOutput(ModelOutput):
    """Output of the encoder.

    Args:
        last_hidden_state: `(B, 1 + h*w, hidden_size)` tokens after the last block (and LayerNorm), class token first.
        spatial_map: `(B, spatial_hidden_sizes[-1], H/8, W/8)` (H/32 for `output_stride` 32).
        context_map: `(B, hidden_size, h, w)` patch tokens as a map, h = H/16.
        hidden_states: `(B, 1 + h*w, hidden_size)` before the first and after each context block, on request.
        attentions: `(B, heads, 1 + h*w, 1 + h*w)` per context block, on request (eager attention only).
    """

    last_hidden_state: torch.Tensor | None = None
    spatial_map: torch.Tensor | None = None
    context_map: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class DsctImageClassifierOutput(ImageClassifierOutput):
    """Classification output: `logits` is the sum of the two streams' logits, each `(B, num_labels)`."""

    spatial_logits: torch.Tensor | None = None
    context_logits: torch.Tensor | None = None


@dataclass
class DsctSegmenterOutput(SemanticSegmenterOutput):
    """Segmentation output; `auxiliary_logits`, of both streams, are computed only with labels."""

    auxiliary_logits: tuple[torch.Tensor, ...] | None = None


class DsctStem(nn.Module):
    """7x7 convolution and max pooling shared by both streams: `(B, 3, H, W)` -> `(B, 64, ceil(H/4), ceil(W/4))`."""

    def __init__(self, config: DsctConfig) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(
            config.num_channels, config.stem_channels, kernel_size=7, stride=2, padding=3, bias=False
        )
        self.norm = nn.BatchNorm2d(config.stem_channels)
        self.pool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        pixel_values = pixel_values.to(self.convolution.weight.dtype)
        return self.pool(F.relu(self.norm(self.convolution(pixel_values)), inplace=True))


class DsctPatchEmbeddings(nn.Module):
    """Cut the stem map in 4x4 patches and prepend the class token: `(B, 64, H/4, W/4)` -> `(B, 1 + h*w, C)`."""

    def __init__(self, config: DsctConfig) -> None:
        super().__init__()
        self.projection = nn.Conv2d(
            config.stem_channels, config.hidden_size, kernel_size=PATCH_STRIDE, stride=PATCH_STRIDE
        )
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        patches = self.projection(features)
        tokens = patches.flatten(2).transpose(1, 2)  # (B, C, h, w) -> (B, h*w, C)
        tokens = torch.cat((self.cls_token.expand(tokens.shape[0], -1, -1), tokens), dim=1)  # (B, 1 + h*w, C)
        return tokens, (patches.shape[-2], patches.shape[-1])


class DsctConvBlock(nn.Module):
    """Bottleneck of the spatial stream (Eq. 1-2): 1x1, 3x3, 1x1 convolution and residual.

    Returns the block's output `(B, C_out, H, W)` and its intermediate X' `(B, C_out / 4, H, W)` (after the 3x3
    convolution), which the context stream reads.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        dilation: int = 1,
        residual_convolution: bool = False,
    ) -> None:
        super().__init__()
        width = out_channels // 4
        self.conv1 = nn.Conv2d(in_channels, width, kernel_size=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width, eps=BLOCK_EPS)
        self.conv2 = nn.Conv2d(
            width, width, kernel_size=3, stride=stride, padding=dilation, dilation=dilation, bias=False
        )
        self.norm2 = nn.BatchNorm2d(width, eps=BLOCK_EPS)
        self.conv3 = nn.Conv2d(width, out_channels, kernel_size=1, bias=False)
        self.norm3 = nn.BatchNorm2d(out_channels, eps=BLOCK_EPS)
        self.residual: nn.Module = nn.Identity()
        if residual_convolution:
            # trf-ignore: TRF036 - converted and saved weights name the two by index
            self.residual = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False),
                nn.BatchNorm2d(out_channels, eps=BLOCK_EPS),
            )

    def forward(
        self, features: torch.Tensor, context: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        middle = F.relu(self.norm1(self.conv1(features)), inplace=True)  # (B, C_in, H, W) -> (B, C_out / 4, H, W)
        if context is not None:
            middle = middle + context  # F_T2C in Eq. 3
        middle = F.relu(self.norm2(self.conv2(middle)), inplace=True)
        # The paper puts a ReLU after each convolution; the code adds the residual before the last one, as ResNet does.
        return F.relu(self.norm3(self.conv3(middle)) + self.residual(features), inplace=True), middle


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


class DsctAttention(nn.Module):
    """Multi-head self-attention over all tokens (MHSA in Eq. 5)."""

    def __init__(self, config: DsctConfig) -> None:
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
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
        attended, weights = attend(self, query, key, value, None, scaling=self.scaling, dropout=0.0, **kwargs)
        return self.o_proj(attended.reshape(batch, length, -1)), weights


class DsctMLP(nn.Module):
    """Two linear layers with an exact GELU between them (MLP in Eq. 6)."""

    def __init__(self, config: DsctConfig) -> None:
        super().__init__()
        width = int(config.hidden_size * config.mlp_ratio)
        self.fc1 = nn.Linear(config.hidden_size, width)
        self.fc2 = nn.Linear(width, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(hidden_states)))


class DsctDropPath(nn.Module):
    """Stochastic depth: in training, drop a residual branch per sample with probability `rate` and scale the rest."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.rate == 0.0 or not self.training:
            return hidden_states
        kept = hidden_states.new_empty(hidden_states.shape[0], 1, 1).bernoulli_(1 - self.rate)
        return hidden_states * (kept / (1 - self.rate))


class DsctLayer(GradientCheckpointingLayer):
    """Pre-norm Transformer block of the context stream (Eq. 5-6): `(B, N, C)` -> `(B, N, C)`."""

    def __init__(self, config: DsctConfig, drop_path_rate: float) -> None:
        super().__init__()
        self.layernorm_before = nn.LayerNorm(config.hidden_size, eps=BLOCK_EPS)
        self.attention = DsctAttention(config)
        self.layernorm_after = nn.LayerNorm(config.hidden_size, eps=BLOCK_EPS)
        self.mlp = DsctMLP(config)
        self.drop_path = DsctDropPath(drop_path_rate)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> torch.Tensor:
        attended, _ = self.attention(self.layernorm_before(hidden_states), **kwargs)
        hidden_states = hidden_states + self.drop_path(attended)
        return hidden_states + self.drop_path(self.mlp(self.layernorm_after(hidden_states)))


class DsctSpatialToContext(nn.Module):
    """Bring convolution features onto the token grid (Sec. 3.1 "Feature fusion"; F_C2T in Eq. 4).

    1x1 convolution, average pooling, LayerNorm, GELU: `(B, C_conv, H, W)` -> `(B, h*w, C)`. The paper does not mention
    the GELU; the code has it. Pooling comes first here: averaging commutes with the 1x1 convolution, which then
    sees fewer pixels.
    """

    def __init__(self, conv_channels: int, token_channels: int, pool_size: int) -> None:
        super().__init__()
        self.pool_size = pool_size
        self.projection = nn.Conv2d(conv_channels, token_channels, kernel_size=1)
        self.layernorm = nn.LayerNorm(token_channels, eps=BLOCK_EPS)

    def forward(self, features: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        pooled = F.avg_pool2d(features, self.pool_size) if self.pool_size > 1 else features
        # The token grid is floored at stride 16: odd sizes may pool to one row or column more than there are tokens.
        tokens = self.projection(crop_map(pooled, grid)).flatten(2).transpose(1, 2)  # (B, C, h, w) -> (B, h*w, C)
        return F.gelu(self.layernorm(tokens))


class DsctContextToSpatial(nn.Module):
    """Bring patch tokens onto the convolution map (Sec. 3.1 "Feature fusion"; F_T2C in Eq. 3).

    1x1 convolution, BatchNorm, ReLU, nearest upsampling: `(B, h*w, C)` -> `(B, C_conv, H, W)`. The paper lists the
    upsampling first; with nearest neighbors the order changes only the cost, and its FLOPs column fits this one.
    """

    def __init__(self, token_channels: int, conv_channels: int) -> None:
        super().__init__()
        self.projection = nn.Conv2d(token_channels, conv_channels, kernel_size=1)
        self.norm = nn.BatchNorm2d(conv_channels, eps=BLOCK_EPS)

    def forward(self, patches: torch.Tensor, grid: tuple[int, int], size: tuple[int, int]) -> torch.Tensor:
        context = F.relu(self.norm(self.projection(tokens_to_map(patches, grid))), inplace=True)
        return F.interpolate(context, size=size, mode="nearest")


def crop_map(features: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Crop a map `(B, C, H, W)` to its upper left `size` (height, width)."""
    if not torch.compiler.is_exporting():
        return features[:, :, : size[0], : size[1]]
    # A slice would make the exporter decide, for all sizes at once, whether it cuts anything off; indices do not.
    rows, columns = (torch.arange(side, device=features.device) for side in size)
    return features.index_select(2, rows).index_select(3, columns)


def tokens_to_map(patches: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Arrange patch tokens row by row as a map: `(B, h*w, C)` -> `(B, C, h, w)`."""
    return patches.transpose(1, 2).unflatten(2, grid)


class DsctCoupledBlock(nn.Module):
    """One block of both streams with the two connections between them (Figure 2, Eq. 1-6)."""

    def __init__(self, config: DsctConfig, index: int) -> None:
        super().__init__()
        # Blocks are counted from 1; block 1 is not coupled (`DsctEncoder`). A stage starts behind each third.
        first, last = index % (config.num_hidden_layers // 3) == 1, index == config.num_hidden_layers
        third = (index - 1) // (config.num_hidden_layers // 3)  # 0, 1, 2: which third of the blocks
        channels = config.spatial_hidden_sizes[third]
        in_channels = config.spatial_hidden_sizes[third - 1] if first else channels
        reduced = config.output_stride == 32 or third < 2  # else stages 3 and 4 stay at stride 8
        # CODEPATH: every published name dilates, on which the paper is silent (README, "Dilation in the last third");
        # official sizes whose `dilation_from_block` is null do not.
        dilation = 2 if config.dilated and not reduced else 1
        # The convolution that lost its stride keeps dilation 1: its input still has the spacing of pre-training. Those
        # behind it get dilation 2, which restores the spacing that they were trained at.
        self.spatial = DsctConvBlock(
            in_channels,
            channels,
            stride=2 if first and reduced else 1,
            dilation=1 if first else dilation,
            residual_convolution=first,
        )
        middle_stride = (4, 8, 16 if reduced else 8)[third]  # input pixels per pixel of X', which is pooled to tokens
        self.spatial_to_context = DsctSpatialToContext(
            channels // 4, config.hidden_size, pool_size=TOKEN_STRIDE // middle_stride
        )
        self.context = DsctLayer(config, config.drop_path_rate * (index - 1) / (config.num_hidden_layers - 1))
        self.context_to_spatial = DsctContextToSpatial(config.hidden_size, channels // 4)
        self.fusion = DsctConvBlock(
            channels,
            channels,
            stride=2 if last and reduced else 1,
            dilation=dilation,
            residual_convolution=last,
        )

    def forward(
        self,
        features: torch.Tensor,
        tokens: torch.Tensor,
        grid: tuple[int, int],
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        features, middle = self.spatial(features)  # Eq. 2: (B, C, H, W); Eq. 1: X' (B, C / 4, H, W)
        fused = tokens[:, 1:] + self.spatial_to_context(middle, grid)  # Eq. 4, (B, h*w, C_token)
        # The Conformer code passes the class token around C2T and adds it to itself: it doubles in every block.
        tokens = self.context(torch.cat((2 * tokens[:, :1], fused), dim=1), **kwargs)  # Eq. 5-6
        context = self.context_to_spatial(tokens[:, 1:], grid, (middle.shape[-2], middle.shape[-1]))  # like X'
        features, _ = self.fusion(features, context)  # Eq. 3
        return features, tokens


class DsctEncoder(nn.Module):
    """Stem, first block of each stream, then the coupled blocks (Figure 1, left)."""

    def __init__(self, config: DsctConfig) -> None:
        super().__init__()
        self.stem = DsctStem(config)
        self.embeddings = DsctPatchEmbeddings(config)
        self.spatial = DsctConvBlock(config.stem_channels, config.spatial_hidden_sizes[0], residual_convolution=True)
        self.context = DsctLayer(config, drop_path_rate=0.0)
        self.blocks = nn.ModuleList(DsctCoupledBlock(config, i) for i in range(2, config.num_hidden_layers + 1))
        # CODEPATH: every published name has the norm; without: the other reading of the paper, which does not say
        # (README, "Last LayerNorm on the context map").
        self.layernorm = nn.LayerNorm(config.hidden_size) if config.context_final_norm else nn.Identity()
        third = config.num_hidden_layers // 3
        self.stage_ends = {third: "stage1", 2 * third: "stage2", 3 * third - 1: "stage3", 3 * third: "stage4"}

    def forward(
        self, pixel_values: torch.Tensor, kept: tuple[str, ...] = ("stage4",), **kwargs: Unpack[TransformersKwargs]
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Return the spatial maps named in `kept` together with the context map, and the tokens of the last block."""
        check_images(pixel_values, 13, "a token covers 16 pixels, so ")
        stem = self.stem(pixel_values)  # (B, 64, H/4, W/4)
        tokens, grid = self.embeddings(stem)  # (B, 1 + h*w, C); grid (h, w) at stride 16
        features, _ = self.spatial(stem)  # block 1 of each stream, not coupled
        tokens = self.context(tokens, **kwargs)
        maps = {"stem": stem} if "stem" in kept else {}
        for index, block in enumerate(self.blocks, start=2):
            features, tokens = block(features, tokens, grid, **kwargs)
            stage = self.stage_ends.get(index)
            if stage in kept:
                maps[stage] = features
        tokens = self.layernorm(tokens)
        maps["context"] = tokens_to_map(tokens[:, 1:], grid)
        return maps, tokens


class DsctPreTrainedModel(PreTrainedModel):
    """Initialization and capabilities common to all DSCT classes."""

    config: DsctConfig
    base_model_prefix = "dsct"
    main_input_name = "pixel_values"
    input_modalities = ("image",)  # type: ignore[assignment]
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # the loss is a mean; Trainer must not rescale it by the number of items
    _no_split_modules = ["DsctStem", "DsctPatchEmbeddings", "DsctConvBlock", "DsctLayer", "DsctCoupledBlock"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": DsctLayer, "attentions": DsctAttention}
    _no_weight_decay = ("cls_token",)

    def get_input_embeddings(self) -> nn.Module:
        """Return the first layer, the stem convolution."""
        return next(module for module in self.modules() if isinstance(module, DsctStem)).convolution

    def spatial_stages(self) -> dict[str, nn.Module]:
        """Blocks that return the spatial stream's maps of Figure 4 first: the last one of each of stages 2 to 4."""
        encoder = next(module for module in self.modules() if isinstance(module, DsctEncoder))
        return {name: encoder.blocks[index - 2] for index, name in encoder.stage_ends.items() if name != "stage1"}

    def parameter_depth(self, name: str) -> tuple[int, int]:
        """Return the block of an encoder parameter (0 = stem and embeddings) and the number after the last block."""
        deepest = self.config.num_hidden_layers + 1
        parts = name.partition("encoder.")[2].split(".")
        depths = {"stem": 0, "embeddings": 0, "spatial": 1, "context": 1, "layernorm": deepest}
        return int(parts[1]) + 2 if parts[0] == "blocks" else depths[parts[0]], deepest

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialize as the Conformer code does; the classifier of a decode head as mmsegmentation does."""
        if isinstance(module, DsctClassifier):
            init.normal_(module.weight, std=0.01)
            init.zeros_(module.bias)  # type: ignore[arg-type]
        elif isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                bound = module.weight[0].numel() ** -0.5
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                init.zeros_(module.bias)
        else:
            super()._init_weights(module)
        if isinstance(module, DsctPatchEmbeddings):
            init.trunc_normal_(module.cls_token, std=self.config.initializer_range)


class DsctModel(DsctPreTrainedModel):
    """The dual-stream encoder without a head."""

    def __init__(self, config: DsctConfig) -> None:
        super().__init__(config)
        self.encoder = DsctEncoder(config)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> DsctModelOutput:
        """Encode `(B, 3, H, W)` images of any size from 13 pixels up."""
        maps, tokens = self.encoder(pixel_values, **kwargs)
        return DsctModelOutput(last_hidden_state=tokens, spatial_map=maps["stage4"], context_map=maps["context"])


class DsctBackbone(BackboneMixin, DsctPreTrainedModel):
    """The encoder as a backbone: maps `stem`, `stage1` to `stage4` of the spatial stream, and `context`."""

    def __init__(self, config: DsctConfig) -> None:
        super().__init__(config)
        sizes = list(config.spatial_hidden_sizes)
        self.num_features = [config.stem_channels, *sizes, sizes[-1], config.hidden_size]
        self.encoder = DsctEncoder(config)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> BackboneOutput:
        """Return the maps named in `config.out_features`, each `(B, C, H/s, W/s)`."""
        maps, _ = self.encoder(pixel_values, kept=tuple(self.out_features), **kwargs)
        return BackboneOutput(feature_maps=tuple(maps[name] for name in self.out_features))


class DsctClassifier(nn.Conv2d):
    """Last 1x1 convolution of a decode head, a class of its own because it is initialized differently.

    For models from outside its tree, transformers calls `_init_weights` only for modules with weights of their own, so
    the head around this layer cannot initialize it.
    """


class DsctSacHead(nn.Module):
    """Stream Aggregation with Concatenation (Sec. 3.2): both maps at 1/4, concat, 1x1 conv + BN + ReLU, classifier.

    The bias-free 1x1 convolution commutes with bilinear upsampling, so its spatial and its context half are applied at
    1/8 and 1/16, upsampled and added: the same function without the concatenated map at 1/4. With hooks, offloading or
    adapters on `fuse` the map is concatenated.
    """

    output_stride = 4

    def __init__(self, config: DsctConfig) -> None:
        super().__init__()
        self.align_corners = config.align_corners
        self.spatial_channels = config.spatial_hidden_sizes[-1]
        self.fuse = nn.Conv2d(
            self.spatial_channels + config.hidden_size, config.decoder_hidden_size, kernel_size=1, bias=False
        )
        self.norm = nn.BatchNorm2d(config.decoder_hidden_size)
        self.dropout = nn.Dropout(config.classifier_dropout_prob)
        self.classifier = DsctClassifier(config.decoder_hidden_size, int(config.num_labels or 0), kernel_size=1)

    def upsample(self, features: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """Bilinear resize to `size`."""
        return F.interpolate(features, size=size, mode="bilinear", align_corners=self.align_corners)

    def forward(
        self, spatial_map: torch.Tensor, context_map: torch.Tensor, image_size: tuple[int, int]
    ) -> torch.Tensor:
        size = ((image_size[0] + 3) // 4, (image_size[1] + 3) // 4)
        if are_plain(self.fuse):
            weight = self.fuse.weight  # (width, C_spatial + C_context, 1, 1)
            spatial = F.conv2d(spatial_map, weight[:, : self.spatial_channels])
            context = F.conv2d(context_map, weight[:, self.spatial_channels :])
            fused = self.upsample(spatial, size) + self.upsample(context, size)  # (B, width, H/4, W/4)
        else:
            fused = self.fuse(torch.cat([self.upsample(each, size) for each in (spatial_map, context_map)], dim=1))
        return self.classifier(self.dropout(F.relu(self.norm(fused), inplace=True)))


class DsctSappHead(nn.Module):
    """Stream Aggregation with Progressive uPsampling (Sec. 3.2): unify, sum, three times convolution + upsampling.

    Returns logits at 1/2; the third upsampling, to the image, is done by the loss and by post-processing. Each step
    resizes to an explicit size (97 -> 193 -> 385 for 769): only that gives the FLOPs column of the paper.
    """

    output_stride = 2

    def __init__(self, config: DsctConfig) -> None:
        super().__init__()
        self.align_corners = config.align_corners
        width = config.sapp_hidden_size
        self.unify_spatial = nn.Conv2d(config.spatial_hidden_sizes[-1], config.decoder_hidden_size, kernel_size=1)
        self.unify_context = nn.Conv2d(config.hidden_size, config.decoder_hidden_size, kernel_size=1)
        in_channels = (config.decoder_hidden_size, width, width)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(channels, width, kernel_size=3, padding=1, bias=False) for channels in in_channels
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in in_channels)
        self.dropout = nn.Dropout(config.classifier_dropout_prob)
        self.classifier = DsctClassifier(width, int(config.num_labels or 0), kernel_size=1)

    def upsample(self, features: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """Bilinear resize to `size`."""
        return F.interpolate(features, size=size, mode="bilinear", align_corners=self.align_corners)

    def forward(
        self, spatial_map: torch.Tensor, context_map: torch.Tensor, image_size: tuple[int, int]
    ) -> torch.Tensor:
        spatial = self.unify_spatial(spatial_map)
        context = self.upsample(self.unify_context(context_map), (spatial.shape[-2], spatial.shape[-1]))
        features = spatial + context  # (B, width, H/8, W/8)
        for step, (convolution, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            if step > 0:
                stride = (8, 4, 2)[step]
                size = ((image_size[0] + stride - 1) // stride, (image_size[1] + stride - 1) // stride)
                features = self.upsample(features, size)
            features = F.relu(norm(convolution(features)), inplace=True)
        return self.classifier(self.dropout(features))


class DsctAuxiliaryHead(nn.Sequential):
    """FCN head on one stream, at its resolution; not in the paper, only for the loss in training."""

    def __init__(self, config: DsctConfig, channels: int) -> None:
        width = config.auxiliary_hidden_size
        super().__init__(
            nn.Conv2d(channels, width, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Dropout(config.classifier_dropout_prob),
            DsctClassifier(width, int(config.num_labels or 0), kernel_size=1),
        )


class DsctForSemanticSegmentation(DsctPreTrainedModel):
    """DSCT with one of its two decoders (Figure 1)."""

    def __init__(self, config: DsctConfig) -> None:
        name_two_classes(config)
        super().__init__(config)
        self.dsct = DsctModel(config)
        # CODEPATH: dsct-*-sac and dsct-*-sapp (Table 2).
        self.decode_head = DsctSacHead(config) if config.decode_head == "sac" else DsctSappHead(config)
        self.auxiliary_heads: nn.ModuleList | None = None
        # CODEPATH: no published name has them; own runs with a weight above 0 do.
        if config.auxiliary_loss_weight:
            channels = (config.spatial_hidden_sizes[-1], config.hidden_size)
            self.auxiliary_heads = nn.ModuleList(DsctAuxiliaryHead(config, each) for each in channels)
        self.loss_function = segmentation_loss
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> DsctSegmenterOutput:
        """Segment images.

        Args:
            pixel_values: `(B, 3, H, W)`, normalized; any size from 13 pixels up.
            labels: `(B, H, W)` train ids of any integer dtype; `ignored_id` (255) and -100 are ignored.

        Returns:
            `logits` `(B, num_labels, H/4, W/4)` with the SAC head, `(B, num_labels, H/2, W/2)` with SAPP; `loss` if
            labels are given, and `auxiliary_logits` of both streams if the model has heads for them.
        """
        labels = segmentation_labels(labels, pixel_values, self.config)
        outputs = self.dsct(pixel_values, return_dict=True, **kwargs)
        logits = self.decode_head(
            outputs.spatial_map, outputs.context_map, (pixel_values.shape[-2], pixel_values.shape[-1])
        )
        loss, auxiliary_logits = None, None
        if labels is not None:
            loss = self._loss(logits, labels)
            if self.auxiliary_heads is not None:
                maps = (outputs.spatial_map, outputs.context_map)  # (B, C, H/8, W/8), (B, C, H/16, W/16)
                auxiliary_logits = tuple(head(each) for head, each in zip(self.auxiliary_heads, maps, strict=True))
                for each in auxiliary_logits:
                    loss = loss + self.config.auxiliary_loss_weight * self._loss(each, labels)
        return DsctSegmenterOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            auxiliary_logits=auxiliary_logits,
        )

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.loss_function(
            logits=logits,
            labels=labels,
            ignore_index=ignored_id(self.config),
            align_corners=self.config.align_corners,
        )


class DsctForImageClassification(DsctPreTrainedModel):
    """The encoder with Conformer's two classifiers, for ImageNet pre-training (use `output_stride=32`)."""

    def __init__(self, config: DsctConfig) -> None:
        super().__init__(config)
        self.dsct = DsctModel(config)
        self.spatial_classifier = nn.Linear(config.spatial_hidden_sizes[-1], config.num_labels)  # type: ignore[arg-type]
        self.context_classifier = nn.Linear(config.hidden_size, config.num_labels)  # type: ignore[arg-type]
        self.loss_function = classification_loss
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> DsctImageClassifierOutput:
        """Classify images; the loss is the mean of both classifiers' `classification_loss` with `labels`.

        Args:
            pixel_values: `(B, 3, H, W)`, normalized.
            labels: `(B,)` class ids, or `(B, num_labels)` class probabilities; others with `config.problem_type`.

        Returns:
            `logits` `(B, num_labels)`, the sum of both classifiers' logits, which it holds too; `loss` if labels are
            given.
        """
        outputs = self.dsct(pixel_values, return_dict=True, **kwargs)
        spatial_logits = self.spatial_classifier(outputs.spatial_map.mean(dim=(2, 3)))
        context_logits = self.context_classifier(outputs.last_hidden_state[:, 0])
        loss = None
        if labels is not None:
            losses = [self.loss_function(labels, each, self.config) for each in (spatial_logits, context_logits)]
            loss = sum(losses) / 2
        return DsctImageClassifierOutput(
            loss=loss,
            logits=spatial_logits + context_logits,
            spatial_logits=spatial_logits,
            context_logits=context_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


__all__ = [
    "DsctBackbone",
    "DsctForImageClassification",
    "DsctForSemanticSegmentation",
    "DsctModel",
    "DsctPreTrainedModel",
]
