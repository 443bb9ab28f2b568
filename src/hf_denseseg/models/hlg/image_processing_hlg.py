"""Image processors of HLG: the shared ones under the names that the Auto classes look for."""

from hf_denseseg.image_processing import SegmentationImageProcessor, SegmentationImageProcessorPil


class HlgImageProcessor(SegmentationImageProcessor):
    """Torchvision image processor of HLG."""


class HlgImageProcessorPil(SegmentationImageProcessorPil):
    """PIL image processor of HLG."""


__all__ = ["HlgImageProcessor", "HlgImageProcessorPil"]
