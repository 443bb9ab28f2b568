"""Image processors of DSCT: the shared ones under the names that the Auto classes look for."""

from hf_denseseg.models.image_processing import (
    SegmentationImageProcessor,
    SegmentationImageProcessorKwargs,
    SegmentationImageProcessorPil,
)


class DsctImageProcessorKwargs(SegmentationImageProcessorKwargs, total=False):
    """Options of both backends."""


class DsctImageProcessor(SegmentationImageProcessor):
    """Torchvision image processor of DSCT."""

    valid_kwargs = DsctImageProcessorKwargs


class DsctImageProcessorPil(SegmentationImageProcessorPil):
    """PIL image processor of DSCT."""

    valid_kwargs = DsctImageProcessorKwargs


__all__ = ["DsctImageProcessor", "DsctImageProcessorKwargs", "DsctImageProcessorPil"]
