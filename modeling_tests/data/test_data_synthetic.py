"""The embedded street scenes."""

import numpy as np
import pytest

from hf_denseseg.data.segmentation import load_segmentation
from hf_denseseg.data.synthetic.scenes import SIZES, SYNTHETIC_SPEC, parse_name, render_scene
from hf_denseseg.errors import InputError

SCENES = [render_scene("train", index) for index in range(24)]


def test_a_scene_depends_on_split_and_index_only():
    image, label = render_scene("train", 3)
    assert image.tobytes() == SCENES[3][0].tobytes()
    assert (label == SCENES[3][1]).all()


def test_scenes_differ_across_splits():
    scenes = [image.tobytes() for image, _ in SCENES[:12]]
    scenes += [render_scene(split, index)[0].tobytes() for split in ("validation", "test") for index in range(12)]
    assert len(set(scenes)) == 36


def test_every_class_and_ignored_pixels_occur_and_none_dominates():
    counts = sum(np.bincount(label.ravel(), minlength=256) for _, label in SCENES)
    assert set(np.flatnonzero(counts)) == {*range(SYNTHETIC_SPEC.num_labels), 255}
    assert SYNTHETIC_SPEC.num_labels >= 8
    assert counts.max() / counts.sum() < 0.5
    assert 0.002 < counts[255] / counts.sum() < 0.1


def test_thin_structures_are_thin():
    """Poles are a few pixels wide: eroding them by one pixel on each side removes most of them."""
    pole = SYNTHETIC_SPEC.classes.index("pole")
    masks = [label == pole for _, label in SCENES]
    inner = sum((mask[:, 1:-1] & mask[:, :-2] & mask[:, 2:]).sum() for mask in masks)
    assert inner < 0.5 * sum(mask.sum() for mask in masks)


def test_usual_sizes_and_a_requested_one():
    assert {label.shape for _, label in SCENES} == set(SIZES)
    image, label = render_scene("test", 0, (64, 96))
    assert (image.height, image.width) == label.shape == (64, 96)


def test_the_ground_is_below_the_sky():
    for _, label in SCENES:
        sky = np.flatnonzero((label == SYNTHETIC_SPEC.classes.index("sky")).any(1))
        road = np.flatnonzero((label == SYNTHETIC_SPEC.classes.index("road")).any(1))
        assert sky.size == 0 or sky.mean() < road.mean()


def test_names_give_counts_and_size():
    assert parse_name("synthetic").counts == {"train": 200, "validation": 40, "test": 40}
    assert parse_name("synthetic:30@64x96") == ({"train": 30, "validation": 6, "test": 6}, (64, 96))
    data = load_segmentation("synthetic:30@64x96", "val", limit=4)
    assert len(data.dataset) == 4 and data.dataset[3]["label"].shape == (64, 96)
    joined = load_segmentation("synthetic:10@32x48", "train+val").dataset
    assert [joined[number]["id"] for number in (0, 9, 10)] == ["train-00000", "train-00009", "validation-00000"]
    assert len(joined) == 12
    for name in ("synthetic:0", "synthetic@8x8", "synthetic:x"):
        with pytest.raises(InputError, match="synthetic:COUNT"):
            load_segmentation(name, "train")
