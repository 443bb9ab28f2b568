"""Image processors of SETR: the shared ones under the names that the Auto classes resolve."""

from hf_denseseg.models.image_processing import (
    SegmentationImageProcessor,
    SegmentationImageProcessorKwargs,
    SegmentationImageProcessorPil,
)


class SetrImageProcessorKwargs(SegmentationImageProcessorKwargs, total=False):
    """Options of both backends."""


class SetrImageProcessor(SegmentationImageProcessor):
    """Torchvision image processor of SETR."""

    valid_kwargs = SetrImageProcessorKwargs


class SetrImageProcessorPil(SegmentationImageProcessorPil):
    """PIL image processor of SETR."""

    valid_kwargs = SetrImageProcessorKwargs


__all__ = ["SetrImageProcessor", "SetrImageProcessorKwargs", "SetrImageProcessorPil"]
