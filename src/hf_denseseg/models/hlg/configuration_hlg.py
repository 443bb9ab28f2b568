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

"""Configuration of HLG."""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers.backbone_utils import BackboneConfigMixin
from transformers.configuration_utils import PreTrainedConfig

from hf_denseseg.models.configuration import CheckedFields
from hf_denseseg.models.hlg.variants_hlg import VARIANTS


@strict
class HlgConfig(CheckedFields, BackboneConfigMixin, PreTrainedConfig):
    """Configuration of HLG, for all of its tasks; the defaults are HLG-Tiny for dense prediction.

    Args:
        num_channels: channels of the input image.
        hidden_sizes: channels of the four stages; each a multiple of the one before.
        depths: layers of the four stages.
        num_attention_heads: attention heads of the four stages.
        stem_kernel_sizes: kernels of the stem's two convolutions: (3, 1) in Table 1, (3, 3) in the released code.
        window_size: side of a local window in tokens.
        dilated_window_size: the same of a dilated window, which spans the map: its rate is the map's side divided by
            it ("plain+dila 7", 5 and 8 in Table 13).
        local_attention: within plain and dilated windows in turn (`"dilated"`), within plain ones only (`"plain"`,
            Tables 13 and 14), or not at all (`"none"`, Table 14).
        mlp_type: `"depthwise"` (DWMLP), or `"plain"` with strided patch embeddings (baseline of Table 14).
        window_embedding: how a window becomes one token (Table 12): `"mean"`, `"max"` or `"convolution"` (depthwise).
        global_bias: where the keys of the global attention are taken to lie: `"window"` (center of each window; ours),
            `"flat"` (released classification code) or `"tuple4"` (released dense code). See the family's README.
        mask_padding: whether tokens that pad the map to complete windows are masked in attention and means and left
            out of smoothing; the released code lets them take part.
        mlp_ratio: hidden width of the MLPs as a multiple of their input width.
        layer_norm_eps: of every LayerNorm of the layers.
        drop_path_rate: stochastic depth of the last layer, rising linearly from 0 at the first.
        initializer_range: standard deviation of the truncated normal that initializes linear layers.
        normalize_stages: whether a LayerNorm follows each of stages 1 to 3 (its output is what the next stage reads):
            True for dense prediction, False for classification.
        decode_head: of semantic segmentation: `"pup"` (SETR-PUP with a local-global pair) or `"upernet"`.
        decoder_hidden_size: channels of the decoder.
        decoder_interval: dilation rate of the decoder's dilated layer.
        decoder_dropout: channel-wise dropout (`Dropout2d`) before the classifiers of both heads.
        use_auxiliary_head: whether there is an auxiliary head on stage 3, which runs with labels only.
        auxiliary_hidden_size: its channels.
        auxiliary_loss_weight: weight of its loss.
        pyramid_hidden_size: channels of the detectors' feature pyramid and of the heads that rate its anchors.
        region_hidden_sizes: channels of Mask R-CNN's box layers and of its mask layers.
        loss_normalization: `"all"` divides the loss by all pixels, ignored ones included (released code), `"valid"` by
            the valid ones.
        semantic_loss_ignore_index: train id that the loss ignores; 255 means 65535 beyond 254 classes.
    """

    model_type = "hlg"
    keys_to_ignore_at_inference = ["loss_dict"]

    num_channels: int = 3
    hidden_sizes: list[int] | tuple[int, ...] = (64, 128, 256, 512)
    depths: list[int] | tuple[int, ...] = (2, 2, 6, 2)
    num_attention_heads: list[int] | tuple[int, ...] = (2, 4, 8, 16)
    stem_kernel_sizes: list[int] | tuple[int, ...] = (3, 1)
    window_size: int = 7
    dilated_window_size: int = 7
    local_attention: Literal["dilated", "plain", "none"] = "dilated"
    mlp_type: Literal["depthwise", "plain"] = "depthwise"
    window_embedding: Literal["mean", "max", "convolution"] = "mean"
    global_bias: Literal["window", "flat", "tuple4"] = "window"
    mask_padding: bool = True
    mlp_ratio: float | int = 4
    layer_norm_eps: float = 1e-6
    drop_path_rate: float | int = 0.1
    initializer_range: float = 0.02
    normalize_stages: bool = True
    decode_head: Literal["pup", "upernet"] = "pup"
    decoder_hidden_size: int = 512
    decoder_interval: int = 8
    decoder_dropout: float | int = 0.1
    use_auxiliary_head: bool = True
    auxiliary_hidden_size: int = 256
    auxiliary_loss_weight: float | int = 0.4
    pyramid_hidden_size: int = 256
    region_hidden_sizes: list[int] | tuple[int, ...] = (1024, 256)
    loss_normalization: Literal["all", "valid"] = "all"
    semantic_loss_ignore_index: int = 255
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Name the maps that the backbone can return: the stem's, and those of the four stages."""
        self.check_fields(kwargs)
        self.name_maps(["stem", "stage1", "stage2", "stage3", "stage4"], kwargs)
        super().__post_init__(**kwargs)

    @property
    def hidden_size(self) -> int:
        """Channels of the last stage."""
        return self.hidden_sizes[-1]

    @property
    def num_hidden_layers(self) -> int:
        """Layers of all stages."""
        return sum(self.depths)

    def validate_architecture(self) -> None:
        """Check the sizes against each other.

        Raises:
            ValueError: (wrapped by the strict dataclass) sizes that do not fit; the message names the field to change.
        """
        for name in ("hidden_sizes", "depths", "num_attention_heads", "stem_kernel_sizes", "region_hidden_sizes"):
            values, count = list(getattr(self, name)), 2 if name in ("stem_kernel_sizes", "region_hidden_sizes") else 4
            if len(values) != count or min(values) < 1:
                raise ValueError(f"`{name}` is {values}; {count} positive numbers are needed.")
        widths = list(self.hidden_sizes)
        for stage, (before, width, heads) in enumerate(
            zip([widths[0], *widths], widths, self.num_attention_heads, strict=False)
        ):
            if width % before:
                raise ValueError(
                    f"Stage {stage + 1}: its grouped shortcut needs a multiple of the {before} channels before it, "
                    f"but `hidden_sizes[{stage}]` is {width}."
                )
            if width % heads or width < 16:
                raise ValueError(
                    f"Stage {stage + 1}: {heads} heads do not divide hidden size {width}, or it is below 16. Change "
                    f"`hidden_sizes[{stage}]` or `num_attention_heads[{stage}]`."
                )
        if any(size % 2 == 0 for size in self.stem_kernel_sizes):
            raise ValueError(f"`stem_kernel_sizes` is {list(self.stem_kernel_sizes)}; odd numbers are needed.")
        if self.local_attention == "none" and self.window_embedding != "mean":
            raise ValueError(
                f"`local_attention` 'none' needs `window_embedding` 'mean', not {self.window_embedding!r}."
            )
        if not 0 <= self.drop_path_rate < 1:
            raise ValueError(f"`drop_path_rate` is {self.drop_path_rate}; a probability in [0, 1) is needed.")
        if self.decode_head == "pup" and self.decoder_hidden_size % 32:
            raise ValueError(f"`decoder_hidden_size` is {self.decoder_hidden_size}; a multiple of 32 is needed.")


__all__ = ["VARIANTS", "HlgConfig"]
