"""Configuration of HLG and the sizes of its published variants."""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers.backbone_utils import BackboneConfigMixin
from transformers.configuration_utils import PreTrainedConfig

from hf_denseseg.models.configuration import CheckedFields


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
        semantic_loss_ignore_index: train id that the loss ignores.
    """

    model_type = "hlg"
    keys_to_ignore_at_inference = ["loss_dict"]

    num_channels: int = 3
    hidden_sizes: list[int] | tuple[int, ...] = (64, 128, 256, 512)
    depths: list[int] | tuple[int, ...] = (2, 2, 6, 2)
    num_attention_heads: list[int] | tuple[int, ...] = (2, 4, 8, 16)
    stem_kernel_sizes: list[int] | tuple[int, ...] = (3, 1)
    window_size: int = 7
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
        self.stage_names = ["stem", "stage1", "stage2", "stage3", "stage4"]
        out_features, out_indices = kwargs.pop("out_features", None), kwargs.pop("out_indices", None)
        self.set_output_features_output_indices(out_features=out_features, out_indices=out_indices)
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
        if not 0 <= self.drop_path_rate < 1:
            raise ValueError(f"`drop_path_rate` is {self.drop_path_rate}; a probability in [0, 1) is needed.")
        if self.decode_head == "pup" and self.decoder_hidden_size % 32:
            raise ValueError(f"`decoder_hidden_size` is {self.decoder_hidden_size}; its heads have 32 channels each.")


_SIZES: dict[str, dict[str, Any]] = {
    "mobile": {"hidden_sizes": [48, 96, 192, 384], "depths": [2, 2, 2, 2], "num_attention_heads": [2, 4, 8, 16]},
    "tiny": {"hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 6, 2], "num_attention_heads": [2, 4, 8, 16]},
    "small": {"hidden_sizes": [96, 192, 384, 768], "depths": [2, 2, 6, 2], "num_attention_heads": [3, 6, 12, 24]},
    "medium": {"hidden_sizes": [96, 192, 384, 768], "depths": [2, 2, 18, 2], "num_attention_heads": [3, 6, 12, 24]},
    "large": {"hidden_sizes": [128, 256, 512, 1024], "depths": [2, 2, 18, 2], "num_attention_heads": [4, 8, 16, 32]},
}
# The networks of the released classification code: 14 layers in stage 3 of Medium and Large, as in Table 1 (the
# paper's parameter counts need 18), and other widths of Mobile than Table 1.
_RELEASED: dict[str, dict[str, Any]] = {
    "mobile": {"hidden_sizes": [32, 64, 192, 384], "num_attention_heads": [2, 4, 6, 12]},
    "medium": {"depths": [2, 2, 14, 2]},
    "large": {"depths": [2, 2, 14, 2]},
}
_DENSE_DROP_PATH = {"tiny": 0.1, "small": 0.1, "medium": 0.3, "large": 0.3}  # Sec. 4.2 and the configurations


def _classifier(name: str, **differences: Any) -> dict[str, Any]:
    rate = 0.3 if name == "large" else 0.1  # Sec. 4.2
    task = {"architectures": ["HlgForImageClassification"], "normalize_stages": False, "drop_path_rate": rate}
    return task | _SIZES[name] | differences


def _dense(task: str, name: str, **differences: Any) -> dict[str, Any]:
    return {"architectures": [task], **_SIZES[name], "drop_path_rate": _DENSE_DROP_PATH[name], **differences}


VARIANTS: dict[str, dict[str, Any]] = {
    **{f"hlg-{name}": _classifier(name) for name in _SIZES},
    **{
        f"hlg-{name}-release": _classifier(name, stem_kernel_sizes=[3, 3], **_RELEASED.get(name, {}))
        for name in _SIZES
    },
    **{
        f"hlg-{head}-{name}": _dense("HlgForSemanticSegmentation", name, decode_head=head)
        for head in ("pup", "upernet")
        for name in ("small", "medium", "large")
    },
    **{f"hlg-retinanet-{name}": _dense("HlgForObjectDetection", name) for name in _DENSE_DROP_PATH},
    **{f"hlg-maskrcnn-{name}": _dense("HlgForInstanceSegmentation", name) for name in _DENSE_DROP_PATH},
}
"""Published variants (Table 1, with the depths that the paper's counts have): name -> task class and fields."""

__all__ = ["VARIANTS", "HlgConfig"]
