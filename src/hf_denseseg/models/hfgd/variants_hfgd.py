"""The published variants of HFGD: three backbones, two output strides."""

from typing import Any

LEVELS = ("stage1", "stage2", "stage3", "stage4")
"""The maps C2 to C5 that a backbone has to return."""

_BACKBONES: dict[str, dict[str, Any]] = {
    "resnet50": {"model_type": "resnet"},
    "swin-large": {
        "model_type": "swin",
        "image_size": 384,
        "embed_dim": 192,
        "depths": [2, 2, 18, 2],
        "num_heads": [6, 12, 24, 48],
        "window_size": 12,
        "drop_path_rate": 0.3,
    },
    "convnext-large": {
        "model_type": "convnext",
        "hidden_sizes": [192, 384, 768, 1536],
        "depths": [3, 3, 27, 3],
        "drop_path_rate": 0.3,
    },
}

VARIANTS: dict[str, dict[str, Any]] = {
    f"hfgd-{backbone}{ending}": {
        "architectures": ["HfgdForSemanticSegmentation"],
        "backbone_config": {**sizes, "out_features": list(LEVELS)},
        "output_stride": stride,
        "batch_norm_momentum": 0.0003,
    }
    for backbone, sizes in _BACKBONES.items()
    for ending, stride in (("", 4), ("-os2", 2))
    if (backbone, stride) != ("swin-large", 2)  # not in the paper
}
"""Published variants (Tables 6, 9 to 16 of the paper): name -> task class and configuration fields."""

__all__ = ["LEVELS", "VARIANTS"]
