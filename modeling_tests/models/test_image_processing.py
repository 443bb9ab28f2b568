"""What the shared image processors do differently from Segformer's, whose code they run."""

import numpy as np
import pytest
import torch

from hf_denseseg.models.image_processing import SegmentationImageProcessor, SegmentationImageProcessorPil


@pytest.mark.parametrize("backend", [SegmentationImageProcessor, SegmentationImageProcessorPil])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "int32", "int64"])
def test_label_maps_of_every_integer_type_are_reduced_and_left_as_they_were(backend, dtype):
    raw = np.array([[0, 1, 150, 254, 255]] * 2, dtype=dtype)
    given = raw.copy()
    image = np.zeros((2, 5, 3), dtype=np.uint8)
    processor = backend(do_resize=False, do_reduce_labels=True)
    labels = processor(image, segmentation_maps=given, return_tensors="pt")["labels"]
    assert labels.dtype == torch.int64 and labels.tolist() == [[[255, 0, 149, 253, 255]] * 2]
    assert np.array_equal(given, raw)
