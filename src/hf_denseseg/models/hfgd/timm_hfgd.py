"""The wrapper of transformers around networks of timm, mended; a module of its own, because it imports timm."""

from typing import Any

import torch
from torch import nn
from transformers import TimmBackbone, TimmBackboneConfig
from transformers.modeling_utils import PreTrainedModel


class HfgdTimmBackbone(TimmBackbone):
    """Backbone of timm whose weights, where a checkpoint brings none, are initialised and not left as they lay."""

    _constructed = False

    def __init__(self, config: TimmBackboneConfig, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        self._constructed = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if self._constructed:  # before, timm has done it
            PreTrainedModel._init_weights(self, module)
        super()._init_weights(module)


__all__ = ["HfgdTimmBackbone"]
