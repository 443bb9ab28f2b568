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

"""Configuration of DSCT and the sizes of its published variants."""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers.backbone_utils import BackboneConfigMixin
from transformers.configuration_utils import PreTrainedConfig

from hf_denseseg.models.configuration import CheckedFields


@strict
class DsctConfig(CheckedFields, BackboneConfigMixin, PreTrainedConfig):
    """Configuration of the dual-stream network DSCT; the defaults are DSCT-Base with the SAC head.

    Args:
        num_channels: channels of the input image.
        stem_channels: channels after the 7x7 stem convolution.
        spatial_hidden_sizes: channels of the convolution stream in stages 1, 2, and 3 to 4.
        hidden_size: channels of the tokens of the context stream.
        num_hidden_layers: blocks per stream D, a multiple of 3; stages end after D/3, 2D/3, D-1 and D blocks.
        num_attention_heads: attention heads of each context block.
        mlp_ratio: hidden width of the context MLP as a multiple of `hidden_size`.
        qkv_bias: whether queries, keys and values have a bias.
        output_stride: input pixels per pixel of the last spatial map: 8 (segmentation) or 32 (ImageNet pre-training).
        dilated: whether stride 8 keeps the receptive field of stride 32 by dilation 2 in the last third of the blocks.
        drop_path_rate: stochastic depth of the last context block; rises linearly from 0 at the first.
        initializer_range: standard deviation of the truncated normal that initializes linear layers and class token.
        context_final_norm: whether the context map passes the last LayerNorm before the decode head.
        decode_head: `"sac"` (Stream Aggregation with Concatenation) or `"sapp"` (... with Progressive uPsampling).
        decoder_hidden_size: width at which the head fuses the two streams.
        sapp_hidden_size: width of the three 3x3 convolutions of SAPP.
        classifier_dropout_prob: dropout before the last convolution of the head.
        auxiliary_hidden_size: channels of the auxiliary heads, which run with labels only.
        auxiliary_loss_weight: weight of the loss of each of them; 0, as in the paper: the model has none.
        align_corners: how the head and the loss resize; true for sizes 2n-1 such as 769.
        semantic_loss_ignore_index: train id that the loss leaves out; 255 means 65535 beyond 254 classes.
    """

    model_type = "dsct"

    num_channels: int = 3
    stem_channels: int = 64
    spatial_hidden_sizes: list[int] | tuple[int, ...] = (384, 768, 1536)
    hidden_size: int = 576
    num_hidden_layers: int = 12
    num_attention_heads: int = 9
    mlp_ratio: float | int = 4
    qkv_bias: bool = True
    output_stride: Literal[8, 32] = 8
    dilated: bool = True
    drop_path_rate: float | int = 0.1
    initializer_range: float = 0.02
    context_final_norm: bool = True
    decode_head: Literal["sac", "sapp"] = "sac"
    decoder_hidden_size: int = 768
    sapp_hidden_size: int = 256
    classifier_dropout_prob: float | int = 0.1
    auxiliary_hidden_size: int = 64
    auxiliary_loss_weight: float | int = 0.0
    align_corners: bool = False
    semantic_loss_ignore_index: int = 255
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Name the maps that the backbone can return: stem, four spatial stages, and the context map."""
        self.check_fields(kwargs)
        names = ["stem", "stage1", "stage2", "stage3", "stage4", "context"]
        self.name_maps(names, kwargs, default=["stage4", "context"])
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Check the sizes against each other.

        Raises:
            ValueError: (wrapped by the strict dataclass) sizes that do not fit; the message names the field to change.
        """
        sizes = tuple(self.spatial_hidden_sizes)
        if len(sizes) != 3:
            raise ValueError(f"`spatial_hidden_sizes` has {len(sizes)} entries {sizes}; stages 1, 2 and 3-4 need 3.")
        for i, size in enumerate(sizes):
            if size < 4 or size % 4:
                raise ValueError(
                    f"`spatial_hidden_sizes[{i}]` is {size}, but its bottleneck has a quarter. Use a multiple of 4."
                )
        if self.num_hidden_layers < 6 or self.num_hidden_layers % 3:
            raise ValueError(
                f"`num_hidden_layers` is {self.num_hidden_layers}; the four stages need a multiple of 3, at least 6."
            )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"{self.num_attention_heads} heads do not divide hidden size {self.hidden_size}. "
                "Change `hidden_size` or `num_attention_heads`."
            )
        for name in ("drop_path_rate", "classifier_dropout_prob"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}; a probability in [0, 1) is needed.")
        if self.auxiliary_loss_weight < 0:
            raise ValueError(f"`auxiliary_loss_weight` is {self.auxiliary_loss_weight}; use 0 (no heads) or more.")


_SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"spatial_hidden_sizes": [64, 128, 256], "hidden_size": 384, "num_attention_heads": 6},
    "small": {"spatial_hidden_sizes": [256, 512, 1024], "hidden_size": 384, "num_attention_heads": 6},
    "base": {"spatial_hidden_sizes": [384, 768, 1536], "hidden_size": 576, "num_attention_heads": 9},
}

VARIANTS: dict[str, dict[str, Any]] = {
    **{
        f"dsct-{size}-{head}": {"architectures": ["DsctForSemanticSegmentation"], **fields, "decode_head": head}
        for size, fields in _SIZES.items()
        for head in ("sac", "sapp")
    },
    **{
        f"dsct-{size}": {"architectures": ["DsctForImageClassification"], **fields, "output_stride": 32}
        for size, fields in _SIZES.items()
    },
}
"""Published variants (Table 2; Sec. 4.2: the encoder in pre-training): name -> task class and configuration fields."""

__all__ = ["VARIANTS", "DsctConfig"]
