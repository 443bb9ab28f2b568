"""What the shared image processors do differently from Segformer's, whose code they run."""

import numpy as np
import pytest
import torch
from PIL import Image

from hf_denseseg.errors import InputError
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


BACKENDS = pytest.mark.parametrize("backend", [SegmentationImageProcessor, SegmentationImageProcessorPil])


@BACKENDS
def test_three_equal_channels_of_a_label_map_count_as_one(backend):
    ids = np.arange(72, dtype=np.uint8).reshape(8, 9)
    image, processor = np.zeros((8, 9, 3), dtype=np.uint8), backend(do_resize=False)
    colored = Image.fromarray(ids).convert("RGB")
    forms = [colored, colored.convert("RGBA"), np.stack([ids] * 3, 2), np.stack([ids] * 3), ids[None], ids[..., None]]
    for given in [*forms, torch.from_numpy(np.stack([ids] * 3))]:
        labels = processor(image, segmentation_maps=given, return_tensors="pt")["labels"]
        assert labels.tolist() == [ids.tolist()]
        labels = processor([image, image], segmentation_maps=[given, given], return_tensors="pt")["labels"]
        assert labels.tolist() == [ids.tolist()] * 2


@BACKENDS
def test_colored_label_maps_are_refused_instead_of_read_by_their_red_channel(backend):
    """(10, 0, 0) and (10, 20, 0) are two classes with one red value."""
    colors = np.zeros((8, 9, 3), dtype=np.uint8)
    colors[..., 0], colors[:, 2:, 1] = 10, 20
    image, processor = np.zeros((8, 9, 3), dtype=np.uint8), backend(do_resize=False)
    for given in (Image.fromarray(colors), colors, colors.transpose(2, 0, 1), [Image.fromarray(colors)]):
        images = [image] if isinstance(given, list) else image
        with pytest.raises(InputError, match="3 channels that differ.*LabelSpec"):
            processor(images, segmentation_maps=given, return_tensors="pt")


@BACKENDS
def test_batches_of_maps_stay_batches(backend):
    maps = np.random.default_rng(0).integers(0, 7, (3, 8, 9), dtype=np.uint8)
    processor = backend(do_resize=False)
    images = np.zeros((3, 8, 9, 3), dtype=np.uint8)
    assert processor(images, segmentation_maps=maps, return_tensors="pt")["labels"].tolist() == maps.tolist()


@BACKENDS
def test_images_that_are_scaled_already_are_warned_of(backend, caplog):
    image = np.random.default_rng(0).random((8, 9, 3), dtype=np.float32)
    processor = backend(do_resize=False)
    for given in (image, torch.from_numpy(image).permute(2, 0, 1), [image]):
        caplog.clear()
        processor(given, return_tensors="pt")
        assert "divided by 255 once more. Give bytes, or do_rescale=False" in caplog.text
    caplog.clear()
    plain = processor(image, do_rescale=False, return_tensors="pt")["pixel_values"]
    as_bytes = processor((image * 255).astype(np.uint8), return_tensors="pt")["pixel_values"]
    assert not caplog.text and (plain - as_bytes).abs().max() < 0.03
