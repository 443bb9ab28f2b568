"""The backbone of HFGD: four raw maps of a network of transformers or timm, for images of any size."""

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoBackbone, TimmBackboneConfig
from transformers.modeling_outputs import BackboneOutput
from transformers.modeling_utils import PreTrainedModel

from hf_denseseg.errors import InputError
from hf_denseseg.models.hfgd.configuration_hfgd import LEVELS, HfgdConfig

PROBE_SIDE = 128  # of the blank image that `check_levels` runs a backbone on, in pixels


class HfgdPatchConvolution(nn.Conv2d):
    """Convolution of non-overlapping patches; the map is padded at the right and bottom to whole patches.

    ConvNeXt of transformers and timm would drop the last row of 513 pixels, and of every odd map after it.
    """

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        height, width = features.shape[-2:]
        return super().forward(F.pad(features, (0, -width % int(self.stride[1]), 0, -height % int(self.stride[0]))))


def build_backbone(config: HfgdConfig) -> PreTrainedModel:
    """Build the backbone with random weights, without the norms that transformers adds to its maps."""
    inner: Any = config.backbone_config
    if isinstance(inner, TimmBackboneConfig):
        from hf_denseseg.models.hfgd.timm_hfgd import HfgdTimmBackbone  # here, so that importing the package is quick

        backbone: PreTrainedModel = HfgdTimmBackbone(inner)
    else:
        if not getattr(AutoBackbone._model_mapping[type(inner)], "has_attentions", True):
            inner._attn_implementation = None  # a ResNet would refuse what was chosen for the complete model
        backbone = AutoBackbone.from_config(inner)
    norms = getattr(backbone, "hidden_states_norms", None)  # of Swin, ConvNeXt and similar backbones
    if norms is not None and not config.normalize_features:
        for name in norms:
            norms[name] = nn.Identity()
    inner_model = getattr(backbone, "swin", None)
    if inner_model is not None and hasattr(inner_model, "layernorm"):
        inner_model.layernorm = nn.Identity()  # acts on the last hidden state, which no map is taken from
    for module in backbone.modules():
        strided = type(module) is nn.Conv2d and module.kernel_size == module.stride != (1, 1)
        if strided and module.padding == (0, 0) and module.dilation == (1, 1):
            module.__class__ = HfgdPatchConvolution
    return backbone


def feature_maps(backbone: nn.Module, pixel_values: torch.Tensor, **wanted: bool | None) -> BackboneOutput:
    """Run a backbone in the dtype of its weights; `wanted` are outputs to request where it supports them."""
    dtype = next(backbone.parameters()).dtype
    # Convolutions are faster in this layout on CPUs and tensor cores, and their outputs keep it.
    pixel_values = pixel_values.to(dtype).contiguous(memory_format=torch.channels_last)
    forward = cast(Callable[..., BackboneOutput], backbone.forward_with_filtered_kwargs)
    return forward(pixel_values, **{name: True for name, on in wanted.items() if on})


@torch.no_grad()
def check_levels(backbone: nn.Module) -> list[int]:
    """Run the backbone on a blank image, check the strides of its maps and return their channels.

    Raises:
        InputError: not four maps, or not one at stride 4 followed by maps of the same or twice the stride.
    """
    training = backbone.training
    weight = next(backbone.parameters())
    blank = weight.new_zeros(1, getattr(backbone.config, "num_channels", 3), PROBE_SIDE, PROBE_SIDE)
    maps = tuple(feature_maps(backbone.eval(), blank).feature_maps or ())
    backbone.train(training)
    name = type(backbone).__name__
    if len(maps) != len(LEVELS):
        raise InputError(
            f"{name} returns {len(maps)} maps, HFGD needs 4. Set `out_features` of `backbone_config` to "
            f"{list(LEVELS)} (`out_indices=[1, 2, 3, 4]` for a ResNet of timm, [0, 1, 2, 3] for its other networks)."
        )
    strides = [PROBE_SIDE / each.shape[-1] for each in maps]
    steps = [after / before for before, after in zip(strides, strides[1:], strict=False)]
    if strides[0] != 4 or not set(steps) <= {1, 2}:
        listed = ", ".join(f"{stride:g}" for stride in strides)
        raise InputError(
            f"The maps of {name} have strides {listed}; 4, 8, 16, 32 are needed (8 may be repeated in a dilated "
            "network). Choose other `out_features` or `out_indices`, or a backbone whose first map is at stride 4."
        )
    return [each.shape[1] for each in maps]


__all__ = ["build_backbone", "check_levels", "feature_maps"]
