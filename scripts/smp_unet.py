"""`denseseg`, which also knows the U-Net with a ResNet-18 of segmentation_models_pytorch: a peer of the leaderboard.

python scripts/smp_unet.py create runs/smp-unet 0     # a folder with random weights of seed 0, for 11 classes
python scripts/smp_unet.py train RECIPE --model runs/smp-unet

Needs `pip install segmentation-models-pytorch`.
"""

import sys
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSemanticSegmentation,
    PreTrainedConfig,
    PreTrainedModel,
    SegformerImageProcessor,
    set_seed,
)
from transformers.modeling_outputs import SemanticSegmenterOutput

from hf_denseseg import cli

MULTIPLE = 32  # of both sides, which the U-Net needs


class SmpUnetConfig(PreTrainedConfig):
    """Configuration of `SmpUnet`; the number of classes is its only field."""

    model_type = "smp_unet"


class SmpUnet(PreTrainedModel):
    """The U-Net, with images padded at the bottom and right to sides that it takes."""

    config_class = SmpUnetConfig
    main_input_name = "pixel_values"

    def __init__(self, config: SmpUnetConfig) -> None:
        super().__init__(config)
        from segmentation_models_pytorch import Unet

        self.unet = Unet("resnet18", encoder_weights=None, classes=config.num_labels)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: the package has drawn the weights."""

    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> SemanticSegmenterOutput:
        """Logits `(B, num_labels, H, W)` of images `(B, 3, H, W)`."""
        height, width = pixel_values.shape[-2:]
        padded = nn.functional.pad(pixel_values, (0, -width % MULTIPLE, 0, -height % MULTIPLE))
        return SemanticSegmenterOutput(logits=self.unet(padded)[..., :height, :width])


AutoConfig.register("smp_unet", SmpUnetConfig)
AutoModelForSemanticSegmentation.register(SmpUnetConfig, SmpUnet)


def create(folder: str, seed: int = 0, num_labels: int = 11) -> None:
    """Save a U-Net with random weights and an image processor."""
    set_seed(seed)
    SmpUnet(SmpUnetConfig(num_labels=num_labels)).save_pretrained(folder)
    SegformerImageProcessor(do_reduce_labels=False).save_pretrained(folder)


if __name__ == "__main__":
    if sys.argv[1:2] == ["create"]:
        create(sys.argv[2], int(sys.argv[3]))
    else:
        sys.exit(cli.main())
