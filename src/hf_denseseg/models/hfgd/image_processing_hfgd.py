"""Image processors of HFGD: the shared ones under the names that the Auto classes look for."""

from hf_denseseg.models.image_processing import (
    SegmentationImageProcessor,
    SegmentationImageProcessorKwargs,
    SegmentationImageProcessorPil,
)


class HfgdImageProcessorKwargs(SegmentationImageProcessorKwargs, total=False):
    """Options of both backends."""


class HfgdImageProcessor(SegmentationImageProcessor):
    """Torchvision image processor of HFGD."""

    valid_kwargs = HfgdImageProcessorKwargs


class HfgdImageProcessorPil(SegmentationImageProcessorPil):
    """PIL image processor of HFGD."""

    valid_kwargs = HfgdImageProcessorKwargs


__all__ = ["HfgdImageProcessor", "HfgdImageProcessorKwargs", "HfgdImageProcessorPil"]
