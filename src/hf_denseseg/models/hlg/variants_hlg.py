"""The published variants of HLG: sizes of the encoder, and the heads of its tasks."""

from typing import Any

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
_DENSE_DROP_PATH = {"tiny": 0.1, "small": 0.1, "medium": 0.3, "large": 0.3}  # released configurations


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

__all__ = ["VARIANTS"]
