"""Image processors of HFGD: the shared ones under the names that the Auto classes look for."""

from hf_denseseg.models.image_processing import SegmentationImageProcessor, SegmentationImageProcessorPil


class HfgdImageProcessor(SegmentationImageProcessor):
    """Torchvision image processor of HFGD."""


class HfgdImageProcessorPil(SegmentationImageProcessorPil):
    """PIL image processor of HFGD."""


__all__ = ["HfgdImageProcessor", "HfgdImageProcessorPil"]
