"""Image processors of UN-EPT: the shared ones under the names that the Auto classes look for."""

from hf_denseseg.models.image_processing import (
    SegmentationImageProcessor,
    SegmentationImageProcessorKwargs,
    SegmentationImageProcessorPil,
)


class UneptImageProcessorKwargs(SegmentationImageProcessorKwargs, total=False):
    """Options of both backends."""


class UneptImageProcessor(SegmentationImageProcessor):
    """Torchvision image processor of UN-EPT."""

    valid_kwargs = UneptImageProcessorKwargs


class UneptImageProcessorPil(SegmentationImageProcessorPil):
    """PIL image processor of UN-EPT."""

    valid_kwargs = UneptImageProcessorKwargs


__all__ = ["UneptImageProcessor", "UneptImageProcessorKwargs", "UneptImageProcessorPil"]
