"""Image processors of SETR: the shared ones under the names that the Auto classes resolve."""

from hf_denseseg.models.image_processing import SegmentationImageProcessor, SegmentationImageProcessorPil


class SetrImageProcessor(SegmentationImageProcessor):
    """Torchvision image processor of SETR."""


class SetrImageProcessorPil(SegmentationImageProcessorPil):
    """PIL image processor of SETR."""


__all__ = ["SetrImageProcessor", "SetrImageProcessorPil"]
