"""Recall by the size of the segments against a flood fill in plain loops."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("scipy", reason="recall by size needs scipy, of the extra `train`")

from hf_denseseg.errors import InputError
from hf_denseseg.evaluation.size_recall import SIZE_LIMITS, check_installed, segments_of, size_counts, size_recall

IGNORE_INDEX = 255


def flood(label):
    """Segments as lists of pixels, one id each, joined by their sides."""
    height, width = label.shape
    left = {(y, x) for y in range(height) for x in range(width)}
    segments = []
    while left:
        segment, border = [], [left.pop()]
        while border:
            y, x = border.pop()
            segment.append((y, x))
            for near in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
                if near in left and label[near] == label[y, x]:
                    left.remove(near)
                    border.append(near)
        segments.append(segment)
    return segments


def random_label(rng, shape):
    label = rng.integers(0, 3, shape, dtype=np.uint8)
    label[rng.random(shape) < 0.5] = 1  # merges some, so that there are segments of all shapes
    label[rng.random(shape) < 0.1] = IGNORE_INDEX
    return label


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), height=st.integers(1, 14), width=st.integers(1, 14))
def test_segments_equal_a_flood_fill(seed, height, width):
    label = random_label(np.random.default_rng(seed), (height, width))
    starts, segment = segments_of(label)
    of_pixel = segment.repeat(np.diff(starts, append=label.size)).reshape(label.shape)
    found = {frozenset(zip(*np.nonzero(of_pixel == number), strict=True)) for number in np.unique(segment)}
    assert found == {frozenset(pixels) for pixels in flood(label)}


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), height=st.integers(8, 20), width=st.integers(8, 20))
def test_counts_equal_a_loop_over_the_segments(seed, height, width):
    rng = np.random.default_rng(seed)
    label = random_label(rng, (height, width))
    prediction = np.where(rng.random(label.shape) < 0.5, label, 0)
    expected = np.zeros((3, 3, 4), dtype=np.int64)
    for pixels in flood(label):
        k = label[pixels[0]]
        if k == IGNORE_INDEX:
            continue
        size = sum(len(pixels) / label.size >= limit for limit in SIZE_LIMITS)
        expected[size, :, k] += [1, len(pixels), sum(prediction[pixel] == k for pixel in pixels)]
    np.testing.assert_array_equal(size_counts(prediction, label, 4), expected)


def test_limits_are_those_of_coco_on_its_usual_image():
    """480x640: small is below 32x32 pixels, large at least 96x96; recall counts pixels, not segments."""
    label = np.zeros((480, 640), dtype=np.uint8)
    label[10:42, 10:42] = 1  # 32x32: medium
    label[100:131, 100:133] = 1  # 31x33 = 1023: small
    label[200:296, 200:296] = 2  # 96x96: large
    label[300:395, 300:397] = 2  # 95x97 = 9215: medium
    label[:, 600:] = IGNORE_INDEX
    prediction = np.where(label == 1, 0, label)
    prediction[100:110, 100:133] = 1
    recall = size_recall(size_counts(prediction, label, 3))
    assert [recall[size]["segments"] for size in ("small", "medium", "large")] == [1, 2, 2]
    assert recall["small"]["recall"] == 330 / 1023
    assert recall["small"]["per_class"] == [None, 330 / 1023, None]
    assert recall["medium"]["per_class"] == [None, 0.0, 1.0]
    assert recall["medium"]["recall"] == 9215 / (9215 + 1024)


def test_missing_scipy_is_reported_before_any_work(monkeypatch):
    check_installed()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'hf-denseseg\[train\]'"):
        check_installed()
