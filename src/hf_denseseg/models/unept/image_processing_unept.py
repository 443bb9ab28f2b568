"""Image processors of UN-EPT: the shared ones under the names that the Auto classes look for."""

from hf_denseseg.models.image_processing import SegmentationImageProcessor, SegmentationImageProcessorPil


class UneptImageProcessor(SegmentationImageProcessor):
    """Torchvision image processor of UN-EPT."""


class UneptImageProcessorPil(SegmentationImageProcessorPil):
    """PIL image processor of UN-EPT."""


__all__ = ["UneptImageProcessor", "UneptImageProcessorPil"]
