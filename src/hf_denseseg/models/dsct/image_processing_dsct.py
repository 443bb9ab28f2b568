"""Image processors of DSCT: the shared ones under the names that the Auto classes look for."""

from hf_denseseg.models.image_processing import SegmentationImageProcessor, SegmentationImageProcessorPil


class DsctImageProcessor(SegmentationImageProcessor):
    """Torchvision image processor of DSCT."""


class DsctImageProcessorPil(SegmentationImageProcessorPil):
    """PIL image processor of DSCT."""


__all__ = ["DsctImageProcessor", "DsctImageProcessorPil"]
