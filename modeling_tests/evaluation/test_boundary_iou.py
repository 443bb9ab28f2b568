"""Boundary IoU against plain loops over the pixels."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_denseseg.evaluation.boundary_iou import boundary_counts, boundary_iou, boundary_region, boundary_width

IGNORE_INDEX = 255


def blocky(rng, shape, classes, ignored=False):
    """A map of blocks, so that there are interiors as well as edges."""
    side = int(rng.integers(1, 7))
    coarse = rng.integers(0, classes, (shape[0] // side + 1, shape[1] // side + 1)).astype(np.uint8)
    ids = coarse.repeat(side, 0).repeat(side, 1)[: shape[0], : shape[1]].copy()
    if ignored:
        ids[rng.random(shape) < 0.05] = IGNORE_INDEX
    return ids


def loop_region(mask, width):
    """The definition: mask pixels at most `width` away from one outside the mask, or outside the image."""
    rows, columns = mask.shape
    region = np.zeros_like(mask)
    for y, x in zip(*np.nonzero(mask), strict=True):
        around = [(y + dy, x + dx) for dy in range(-width, width + 1) for dx in range(-width, width + 1)]
        region[y, x] = any(not (0 <= v < rows and 0 <= u < columns and mask[v, u]) for v, u in around)
    return region


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), height=st.integers(1, 17), width=st.integers(1, 19), reach=st.integers(1, 5))
def test_region_is_near_another_class_or_the_edge(seed, height, width, reach):
    ids = blocky(np.random.default_rng(seed), (height, width), 3)
    expected = sum(loop_region(ids == k, reach) for k in range(3)).astype(bool)
    np.testing.assert_array_equal(boundary_region(torch.from_numpy(ids), reach).numpy(), expected)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), height=st.integers(1, 30), width=st.integers(1, 90))
def test_counts_and_score_equal_the_definition_for_each_class(seed, height, width):
    rng = np.random.default_rng(seed)
    label, prediction = blocky(rng, (height, width), 3, ignored=True), blocky(rng, (height, width), 4)
    reach = boundary_width((height, width))
    counts = boundary_counts(torch.from_numpy(prediction).long(), torch.from_numpy(label), 5)
    expected = []
    for k in range(5):
        # Ignored pixels are in no mask: what is predicted there is removed from the prediction's.
        true, predicted = (
            loop_region(label == k, reach),
            loop_region((prediction == k) & (label != IGNORE_INDEX), reach),
        )
        assert counts[:, k].tolist() == [(true & predicted).sum(), predicted.sum(), true.sum()]
        union = (true | predicted).sum()
        expected.append((true & predicted).sum() / union if union else None)
    assert boundary_iou(counts) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("size", "width"), [((1024, 2048), 46), ((480, 640), 16), ((20, 30), 1), ((1, 1), 1)])
def test_width_is_two_hundredths_of_the_diagonal(size, width):
    """1024x2048: the diagonal is 2289.7 pixels."""
    assert boundary_width(size) == width


def test_a_shifted_square_loses_more_of_its_boundary_than_of_its_area():
    """A 60x60 square in 100x100 (width 3), one pixel to the right: 59/61 of the area, less of the frame."""
    label = torch.zeros(100, 100, dtype=torch.uint8)
    label[20:80, 20:80] = 1
    prediction = label.roll(1, 1)
    counts = boundary_counts(prediction, label, 2)
    # Frame: 60^2 - 54^2 = 684. Both frames hold 59 x 60 of the overlap without the interiors' union of 55 x 54.
    assert counts[:, 1].tolist() == [59 * 60 - 55 * 54, 684, 684]
    assert boundary_iou(counts)[1] == pytest.approx(570 / 798) and 570 / 798 < 59 / 61


def test_a_perfect_prediction_scores_one_whatever_it_predicts_at_ignored_pixels():
    label = torch.from_numpy(blocky(np.random.default_rng(0), (40, 50), 3, ignored=True))
    prediction = torch.where(label == IGNORE_INDEX, 1, label)
    assert boundary_iou(boundary_counts(prediction, label, 4)) == [1.0, 1.0, 1.0, None]
