"""Figures show the colors they should, where they should."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from hf_denseseg.data.labels import LabelSpec
from hf_denseseg.errors import InputError
from hf_denseseg.visualization.label_maps import colorize, legend, overlay, prediction_grid
from hf_denseseg.visualization.learning_curve import save_learning_curve

SPEC = LabelSpec("toy", ("road", "tree", "sky"), palette=((255, 0, 0), (0, 255, 0), (0, 0, 255)))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_colorize_paints_each_class_and_leaves_ignored_pixels_black(dtype):
    ids = torch.tensor([[0, 1, 2], [255, 3, 0]], dtype=dtype)
    colors = np.asarray(colorize(ids, SPEC.palette))
    expected = [[(255, 0, 0), (0, 255, 0), (0, 0, 255)], [(0, 0, 0), (0, 0, 0), (255, 0, 0)]]
    np.testing.assert_array_equal(colors, expected)


def test_label_maps_read_by_pillow_are_painted_without_a_warning(recwarn):
    """Their arrays are read-only."""
    ids = np.asarray(Image.fromarray(np.array([[0, 1]], dtype=np.uint8)))
    assert not ids.flags.writeable
    overlay(Image.new("RGB", (2, 1)), ids, SPEC.palette)
    assert not recwarn.list


def test_colorize_accepts_ids_below_zero_and_more_than_256_classes():
    palette = [(k % 256, k // 256, 7) for k in range(300)]
    colors = np.asarray(colorize(np.array([[299, -1, 5000]]), palette))
    np.testing.assert_array_equal(colors, [[palette[299], (0, 0, 0), (0, 0, 0)]])


def test_overlay_mixes_colors_and_leaves_ignored_pixels_untouched():
    image = torch.full((3, 2, 3), 100, dtype=torch.uint8)
    ids = np.array([[0, 1, 255], [2, 2, 255]], dtype=np.uint8)
    mixed = np.asarray(overlay(image, ids, SPEC.palette, opacity=0.5)).astype(int)
    np.testing.assert_allclose(mixed[0, 0], [177, 50, 50], atol=1)
    np.testing.assert_allclose(mixed[1, 1], [50, 50, 177], atol=1)
    np.testing.assert_array_equal(mixed[:, 2], 100)
    np.testing.assert_array_equal(np.asarray(overlay(image, ids, SPEC.palette, opacity=0.0)), 100)


def test_overlay_refuses_another_size_and_an_impossible_opacity():
    image = Image.new("L", (4, 2))
    with pytest.raises(InputError, match="label map is 2x3, the image 2x4"):
        overlay(image, np.zeros((2, 3), dtype=np.uint8), SPEC.palette)
    with pytest.raises(InputError, match="opacity is 2"):
        overlay(image, np.zeros((2, 4), dtype=np.uint8), SPEC.palette, opacity=2)


def test_legend_shows_every_color_at_any_width():
    for width in (10, 200, 2000):
        colors = {color for _, color in legend(SPEC, width).getcolors(10**6)}
        assert set(SPEC.palette) <= colors


def test_grid_places_image_ground_truth_and_prediction_side_by_side():
    """The image is gray, the ground truth all road, the prediction all sky; sizes differ from row to row."""
    rows = [
        (torch.full((3, h, w), 90, dtype=torch.uint8), np.zeros((h, w), np.uint8), torch.full((h, w), 2))
        for h, w in [(30, 60), (50, 40)]
    ]
    grid = np.asarray(prediction_grid(rows, SPEC, cell_width=60))
    for y in (20 + 15, 20 + 30 + 6 + 30):  # the middle of both rows
        assert tuple(grid[y, 6 + 30]) == (90, 90, 90)
        assert tuple(grid[y, 6 + 66 + 30]) == (255, 0, 0)
        assert tuple(grid[y, 6 + 132 + 30]) == (0, 0, 255)


def test_grid_without_a_prediction_has_two_columns():
    row = (Image.new("RGB", (40, 20)), np.full((20, 40), 1, np.uint8))
    assert prediction_grid([row], SPEC, cell_width=40).width == 2 * 46 + 6


def test_learning_curve_is_written_completely(tmp_path):
    pytest.importorskip("matplotlib")
    history = [{"step": k, "loss": 1 / (k + 1)} for k in range(5)] + [{"step": 4, "eval_mean_iou": 0.5}]
    save_learning_curve(history, tmp_path / "curve.png")
    with_scores = Image.open(tmp_path / "curve.png")
    assert min(with_scores.size) > 300
    save_learning_curve([], tmp_path / "empty.png")
    assert np.asarray(with_scores).tolist() != np.asarray(Image.open(tmp_path / "empty.png")).tolist()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curve.png", "empty.png"]


def test_without_matplotlib_the_curve_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match=r"pip install 'hf-denseseg\[train\]'"):
        save_learning_curve([], tmp_path / "curve.png")
