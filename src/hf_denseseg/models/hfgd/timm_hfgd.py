"""transformers' wrapper of timm networks with its initialization fixed; a separate module, because it imports timm."""

from typing import Any

import torch
from torch import nn
from transformers import TimmBackbone, TimmBackboneConfig
from transformers.modeling_utils import PreTrainedModel


class HfgdTimmBackbone(TimmBackbone):
    """Backbone of timm that initializes weights missing in a checkpoint; the wrapper leaves them uninitialized."""

    _constructed = False

    def __init__(self, config: TimmBackboneConfig, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        self._constructed = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if self._constructed:  # in the constructor, timm has initialized everything
            PreTrainedModel._init_weights(self, module)
        super()._init_weights(module)


__all__ = ["HfgdTimmBackbone"]
