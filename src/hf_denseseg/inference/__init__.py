"""From images to predictions: preprocessing, sliding windows, large images, the pipeline."""

from typing import Any

__all__ = ["SlidingWindowSegmentationPipeline"]


def __getattr__(name: str) -> Any:
    # The pipeline loads much of transformers: only who asks for it pays for it.
    if name in __all__:
        from hf_denseseg.inference.pipeline import SlidingWindowSegmentationPipeline

        return SlidingWindowSegmentationPipeline
    raise AttributeError(f"module 'hf_denseseg.inference' has no attribute {name!r}")
