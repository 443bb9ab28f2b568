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

"""Configuration of SETR and the sizes of its published variants."""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers.backbone_utils import BackboneConfigMixin
from transformers.configuration_utils import PreTrainedConfig

from hf_denseseg.models.configuration import CheckedFields


@strict
class SetrConfig(CheckedFields, BackboneConfigMixin, PreTrainedConfig):
    """Configuration of SETR; the defaults are SETR-PUP on ViT-Large.

    Args:
        num_channels: channels of the input image.
        image_size: training crop in pixels, one number or (height, width); the position table is stored for its grid
            of patches. Images of other sizes get an interpolated table.
        patch_size: side of a patch in pixels; a multiple of 8.
        encoder: `"vit"` (plain ViT, as DeiT is too) or `"beit"` (transformers' BEiT: relative positions, layer scale).
        hidden_size: channels of the tokens.
        num_hidden_layers: Transformer layers.
        num_attention_heads: attention heads of each layer.
        mlp_ratio: hidden width of the MLPs as a multiple of `hidden_size`.
        layer_norm_eps: of every LayerNorm, in the encoder and in the heads.
        drop_path_rate: stochastic depth of the last layer, rising linearly from 0 at the first; 0 in every release.
        layer_scale_init_value: BEiT's initial layer scale; `"vit"` has none.
        initializer_range: standard deviation of the truncated normal that initializes linear layers, class token and
            positions.
        decode_head: `"naive"`, `"pup"` (Progressive UPsampling) or `"mla"` (Multi-Level feature Aggregation).
        decoder_hidden_size: channels of the decoder's convolutions.
        pup_upsampling: factor of each upsampling step of PUP: 2 (four convolutions) or 4 (two, "PUP-2step").
        mla_layers: layers that MLA aggregates, counted from 0, shallowest first.
        mla_hidden_size: channels of each of MLA's four streams before they are joined.
        use_auxiliary_head: whether there are auxiliary heads, which run with labels only.
        auxiliary_layers: layers that carry an auxiliary head, counted from 0; MLA puts them on its four maps instead.
        auxiliary_loss_weight: weight of each auxiliary loss.
        loss_normalization: `"all"` divides the loss by all pixels, ignored ones included (official code), `"valid"` by
            the valid ones.
        semantic_loss_ignore_index: train id that the loss ignores; 255 means 65535 beyond 254 classes.
    """

    model_type = "setr"

    num_channels: int = 3
    image_size: int | list[int] | tuple[int, ...] = 512
    patch_size: int = 16
    encoder: Literal["vit", "beit"] = "vit"
    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    mlp_ratio: float | int = 4
    layer_norm_eps: float = 1e-6
    drop_path_rate: float | int = 0.0
    layer_scale_init_value: float = 1e-5
    initializer_range: float = 0.02
    decode_head: Literal["naive", "pup", "mla"] = "pup"
    decoder_hidden_size: int = 256
    pup_upsampling: Literal[2, 4] = 2
    mla_layers: list[int] | tuple[int, ...] = (5, 11, 17, 23)
    mla_hidden_size: int = 128
    use_auxiliary_head: bool = True
    auxiliary_layers: list[int] | tuple[int, ...] = (9, 14, 19, 23)
    auxiliary_loss_weight: float | int = 0.4
    loss_normalization: Literal["all", "valid"] = "all"
    semantic_loss_ignore_index: int = 255
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Name the maps that the backbone can return: the embeddings, and the tokens after each layer."""
        self.check_fields(kwargs)
        self.name_maps(["stem", *(f"stage{layer + 1}" for layer in range(self.num_hidden_layers))], kwargs)
        super().__post_init__(**kwargs)

    @property
    def grid(self) -> tuple[int, int]:
        """Patches (down, across) of the training crop."""
        height, width = (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size
        return height // self.patch_size, width // self.patch_size

    def validate_architecture(self) -> None:
        """Check the sizes against each other.

        Raises:
            ValueError: (wrapped by the strict dataclass) sizes that do not fit; the message names the field to change.
        """
        sides = (self.image_size,) if isinstance(self.image_size, int) else tuple(self.image_size)
        if len(sides) > 2 or any(side < self.patch_size or side % self.patch_size for side in sides):
            raise ValueError(
                f"`patch_size` {self.patch_size} does not divide `image_size` {self.image_size}. Give one number or "
                f"(height, width), multiples of {self.patch_size}."
            )
        if self.patch_size % 8:
            raise ValueError(f"`patch_size` is {self.patch_size}; the decoders upsample by 8: use a multiple of 8.")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"{self.num_attention_heads} heads do not divide hidden size {self.hidden_size}. "
                "Change `hidden_size` or `num_attention_heads`."
            )
        if not 0 <= self.drop_path_rate < 1:
            raise ValueError(f"`drop_path_rate` is {self.drop_path_rate}; a probability in [0, 1) is needed.")
        used = "mla_layers" if self.decode_head == "mla" else "auxiliary_layers"
        layers = list(getattr(self, used)) if used == "mla_layers" or self.use_auxiliary_head else []
        if layers != sorted(set(layers)) or any(not 0 <= layer < self.num_hidden_layers for layer in layers):
            raise ValueError(
                f"`{used}` are {layers}; rising numbers from 0 to {self.num_hidden_layers - 1} are needed, one per "
                f"layer of the {self.num_hidden_layers}."
            )
        if self.decode_head == "mla" and len(layers) != 4:
            raise ValueError(f"`mla_layers` has {len(layers)} entries {layers}; MLA aggregates 4 layers.")


_ENCODERS: dict[str, dict[str, Any]] = {
    "vit-large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
    "vit-base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
    "deit-base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
    "beit-large": {"encoder": "beit", "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
}
# `auxiliary_head` of the released configurations: number of Transformer layers -> layers read, counted from 0.
_HEADS: dict[str, dict[int, dict[str, Any]]] = {
    "naive": {24: {"auxiliary_layers": [9, 14, 19]}, 12: {"auxiliary_layers": [2, 5, 8]}},
    "pup": {24: {"auxiliary_layers": [9, 14, 19, 23]}, 12: {"auxiliary_layers": [4, 7, 9, 11]}},
    "mla": {24: {"mla_layers": [5, 11, 17, 23]}, 12: {"mla_layers": [2, 5, 8, 11]}},
}

VARIANTS: dict[str, dict[str, Any]] = {
    f"setr-{head}-{name}": {
        "architectures": ["SetrForSemanticSegmentation"],
        **sizes,
        "decode_head": head,
        **_HEADS[head][sizes["num_hidden_layers"]],
    }
    for name, sizes in _ENCODERS.items()
    for head in _HEADS
    if (head, name) != ("naive", "beit-large")  # not in the paper
}
"""Published variants (Tables 2 to 5 of the paper): name -> task class and configuration fields."""

__all__ = ["VARIANTS", "SetrConfig"]
