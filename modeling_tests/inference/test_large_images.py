"""Predictions strip by strip against those of the image as a whole."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image
from test_inference import PREPROCESSING, ToyModel, loop_slide, normalized, random_image

from closeness import assert_highest
from hf_denseseg.errors import InputError
from hf_denseseg.inference import large_images
from hf_denseseg.inference.large_images import segment_in_strips
from hf_denseseg.inference.segmentation import class_probabilities, segment_with_confidence
from hf_denseseg.inference.settings import InferenceSettings
from hf_denseseg.inference.sliding_window import slide_logits, slide_rows


def in_strips(model, image, settings):
    """Ids and confidence of all strips, which must follow each other without a gap."""
    opened = Image.fromarray(image.permute(1, 2, 0).numpy())
    strips = list(segment_in_strips(model, opened, settings, PREPROCESSING))
    tops = [0, *np.cumsum([len(strip.ids) for strip in strips])]
    assert [strip.top for strip in strips] == tops[:-1] and tops[-1] == image.shape[1]
    return torch.cat([strip.ids for strip in strips]), torch.cat([strip.confidence for strip in strips])


@hypothesis_settings(max_examples=8, deadline=None)
@given(
    size=st.tuples(st.integers(5, 90), st.integers(5, 40)),
    crop=st.tuples(st.integers(8, 24), st.integers(8, 24)),
    step=st.tuples(st.floats(0.3, 1.0), st.floats(0.3, 1.0)),
    window_batch_size=st.integers(1, 7),
    pad=st.booleans(),
)
def test_ids_at_the_images_own_size_are_those_of_summed_windows_bit_for_bit(size, crop, step, window_batch_size, pad):
    stride = tuple(max(int(length * fraction), 1) for length, fraction in zip(crop, step, strict=True))
    model, image = ToyModel(), random_image(*size)
    settings = InferenceSettings("slide", crop, stride, window_batch_size=window_batch_size, pad_to_window=pad)
    ids, confidence = in_strips(model, image, settings)
    padding = [max(c - s, 0) if pad else 0 for c, s in zip(crop, size, strict=True)]
    values = F.pad(normalized(image), (0, padding[1], 0, padding[0]))
    logits, _ = loop_slide(model, values, crop, stride)
    logits = logits[0, :, : size[0], : size[1]]
    if pad or size[0] > crop[0] or size[1] > crop[1]:
        summed = slide_logits(model, values, settings)[0, :, : size[0], : size[1]]
        assert ids.equal(summed.argmax(0))
    torch.testing.assert_close(confidence, logits.softmax(0).amax(0), atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(logits.gather(0, ids[None])[0], logits.amax(0), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(
    "values",
    [
        {"flip": True, "average": "logits"},
        {"flip": True},
        {"scales": (0.5, 1.0, 1.75), "flip": True},
        {"base_size": (32, 64)},
        {"base_size": (60, 200), "flip": True},
        {"mode": "whole"},
        {"mode": "whole", "base_size": (32, 64), "flip": True, "scales": (0.5, 1.0)},
        {"mode": "whole", "pad_to_window": True, "crop_size": (80, 50)},
        {"scales": (0.4,), "pad_to_window": True},
    ],
    ids=str,
)
def test_scales_flip_and_resizing_agree_with_the_whole_image(values, align_corners):
    model, image = ToyModel(align_corners=align_corners), random_image(70, 41)
    settings = InferenceSettings(
        **{"mode": "slide", "crop_size": (24, 24), "stride": (16, 16), "window_batch_size": 9, **values}
    )
    ids, confidence = in_strips(model, image, settings)
    expected_ids, expected = segment_with_confidence(model, image, settings, PREPROCESSING)
    torch.testing.assert_close(confidence, expected, atol=2e-5, rtol=1e-4)
    differ = ids != expected_ids  # only where two classes are equally probable
    assert differ.float().mean() < 1e-3
    torch.testing.assert_close(confidence[differ], expected[differ])


def test_flip_at_the_images_own_size_gives_the_same_ids():
    model, image = ToyModel(), random_image(131, 41)
    settings = InferenceSettings("slide", (24, 24), (16, 16), flip=True)
    assert_highest(in_strips(model, image, settings)[0], class_probabilities(model, image, settings, PREPROCESSING))


def test_rows_are_handed_on_when_the_last_window_over_them_is_done():
    """Window 8, step 4, height 20: rows 0-3 are finished when the second row of windows begins, and so on."""
    model, values, seen = ToyModel(), normalized(random_image(20, 8)), []

    def window_at(y, x, size):
        seen.append(y)
        return values[:, :, y : y + size[0], x : x + size[1]]

    settings = InferenceSettings("slide", (8, 8), (4, 4), window_batch_size=1)
    steps = [(rows.shape[2], list(seen)) for rows in slide_rows(model, window_at, (20, 8), settings)]
    assert steps == [(4, [0]), (4, [0, 4]), (4, [0, 4, 8]), (8, [0, 4, 8, 12])]


def test_memory_does_not_grow_with_the_height():
    """Largest single allocation at 96 and at 384 rows."""
    largest = []
    for height in (96, 384):
        opened = Image.fromarray(random_image(height, 64).permute(1, 2, 0).numpy())
        settings = InferenceSettings("slide", (32, 32), (16, 16))
        with torch.profiler.profile(profile_memory=True) as profile:
            for _ in segment_in_strips(ToyModel(), opened, settings, PREPROCESSING):
                pass
        largest.append(max(event.self_cpu_memory_usage for event in profile.events()))
    assert largest[0] == largest[1] < 96 * 64 * 5 * 4


def test_an_image_too_large_to_be_run_on_at_once_is_refused_with_the_fix(monkeypatch):
    monkeypatch.setattr(large_images, "LARGEST_VIEW", 100)
    with pytest.raises(InputError, match="--test_crop_size 512 512"):
        in_strips(ToyModel(), random_image(11, 10), InferenceSettings())
    in_strips(ToyModel(), random_image(10, 10), InferenceSettings())
    in_strips(ToyModel(), random_image(11, 10), InferenceSettings("slide", (8, 8)))
