"""Tiny segmentation models of transformers, which people bring along."""

from pathlib import Path

import torch
from transformers import (
    BeitConfig,
    BeitForSemanticSegmentation,
    BeitImageProcessor,
    ConvNextConfig,
    Data2VecVisionConfig,
    Data2VecVisionForSemanticSegmentation,
    DPTConfig,
    DPTForSemanticSegmentation,
    DPTImageProcessor,
    MobileNetV2Config,
    MobileNetV2ForSemanticSegmentation,
    MobileNetV2ImageProcessor,
    MobileViTConfig,
    MobileViTForSemanticSegmentation,
    MobileViTImageProcessor,
    MobileViTV2Config,
    MobileViTV2ForSemanticSegmentation,
    PreTrainedModel,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SegformerImageProcessor,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

STAGES = ["stage1", "stage2", "stage3", "stage4"]
VIT = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 64}
MODELS = {
    "segformer": lambda labels: SegformerForSemanticSegmentation(
        SegformerConfig(
            hidden_sizes=[8] * 4, depths=[1] * 4, num_attention_heads=[1] * 4, decoder_hidden_size=16, **labels
        )
    ),
    "upernet": lambda labels: UperNetForSemanticSegmentation(
        UperNetConfig(
            backbone_config=ConvNextConfig(hidden_sizes=[8, 12, 16, 24], depths=[1] * 4, out_features=STAGES),
            hidden_size=16,
            auxiliary_in_channels=16,
            auxiliary_channels=8,
            **labels,
        )
    ),
    "mobilenet_v2": lambda labels: MobileNetV2ForSemanticSegmentation(
        MobileNetV2Config(depth_multiplier=0.25, output_stride=16, **labels)
    ),
    "dpt": lambda labels: DPTForSemanticSegmentation(
        DPTConfig(
            backbone_out_indices=[0, 1, 2, 3],
            neck_hidden_sizes=[8, 8, 16, 16],
            fusion_hidden_size=16,
            **VIT,
            **labels,
        )
    ),
    "beit": lambda labels: BeitForSemanticSegmentation(
        BeitConfig(out_indices=[1, 2, 3, 4], auxiliary_channels=8, use_relative_position_bias=True, **VIT, **labels)
    ),
    "data2vec": lambda labels: Data2VecVisionForSemanticSegmentation(
        Data2VecVisionConfig(
            out_indices=[1, 2, 3, 4], auxiliary_channels=8, use_relative_position_bias=True, **VIT, **labels
        )
    ),
    "mobilevit": lambda labels: MobileViTForSemanticSegmentation(
        MobileViTConfig(
            hidden_sizes=[16, 24, 32], neck_hidden_sizes=[8, 8, 16, 16, 16, 16, 32], aspp_out_channels=16, **labels
        )
    ),
    "mobilevitv2": lambda labels: MobileViTV2ForSemanticSegmentation(
        MobileViTV2Config(
            width_multiplier=0.25,
            base_attn_unit_dims=[32, 48, 64],
            n_attn_blocks=[1, 1, 1],
            aspp_out_channels=16,
            **labels,
        )
    ),
}
PROCESSORS = {
    "mobilenet_v2": MobileNetV2ImageProcessor,
    "dpt": DPTImageProcessor,
    "beit": BeitImageProcessor,
    "data2vec": BeitImageProcessor,
    "mobilevit": MobileViTImageProcessor,
    "mobilevitv2": MobileViTImageProcessor,
}


def build(name: str, num_labels: int = 3) -> PreTrainedModel:
    torch.manual_seed(0)
    return MODELS[name]({"num_labels": num_labels}).eval()


def save(name: str, folder: Path) -> Path:
    """A checkpoint with a processor that squeezes images into a square and reduces labels, as those of ADE20K do."""
    build(name).save_pretrained(folder)
    processor = PROCESSORS.get(name, SegformerImageProcessor)(size={"height": 64, "width": 64})
    processor.do_reduce_labels = name in ("segformer", "beit", "data2vec")
    processor.save_pretrained(folder)
    return folder
