"""UN-EPT's boundary and direction targets: what they mean, where they are ignored, and how they reach the model."""

import functools

import numpy as np
import pytest
import torch

from closeness import assert_same_outputs
from hf_denseseg import UneptConfig, UneptForSemanticSegmentation
from hf_denseseg.data.augmentation.segmentation import TrainAugmentation, TrainDataset, collate_train
from hf_denseseg.data.segmentation import load_segmentation
from hf_denseseg.models.unept.refinement_unept import DIRECTIONS
from hf_denseseg.models.unept.targets_unept import FAR, batched_targets, boundary_targets, distance_fields
from test_modeling_unept import TINY

FLIPPED = np.array([4, 3, 2, 1, 0, 7, 6, 5], np.uint8)  # left and right swapped


def scene(seed=0, size=(60, 80)):
    """Boxes on a background, some ignored."""
    rng = np.random.default_rng(seed)
    labels = np.zeros(size, np.uint8)
    for number in (1, 2, 3, 4, 255):
        y, x = rng.integers(0, size[0] - 24), rng.integers(0, size[1] - 24)
        labels[y : y + rng.integers(8, 24), x : x + rng.integers(8, 24)] = number
    return labels


def test_distance_is_to_the_nearest_pixel_of_another_class():
    """In plain loops; the border of the image is no edge, that of an ignored region is."""
    labels = scene(size=(34, 40))
    distance, gradient, counted = distance_fields(labels, min_class_pixels=1)
    places = np.argwhere(np.ones_like(labels))
    for y, x in places[::7]:
        if labels[y, x] == 255:
            assert distance[y, x] == 0 and not counted[y, x]
            continue
        others = np.argwhere(labels != labels[y, x])
        expected = np.sqrt(((others - (y, x)) ** 2).sum(1)).min()
        assert distance[y, x] == pytest.approx(expected, rel=1e-6)
        total = np.zeros(2)
        for a in range(-2, 3):
            for e in range(-2, 3):
                row, column = y + a, x + e
                inside = 0 <= row < 34 and 0 <= column < 40 and labels[row, column] == labels[y, x]
                if (a or e) and inside:
                    total += np.array((a, e)) / (a * a + e * e) * distance[row, column]
        np.testing.assert_allclose(gradient[y, x], total, atol=1e-4)


def test_directions_lead_away_from_the_edge():
    labels = np.zeros((40, 40), np.uint8)
    labels[:, 20:] = 1
    made = boundary_targets(labels)
    boundary, direction = made["boundary_labels"], made["direction_labels"]
    assert (boundary[:, 15:25] == 1).all() and (boundary[:, :14] == 0).all() and (boundary[:, 26:] == 0).all()
    assert DIRECTIONS[direction[20, 18]] == (0, -1) and DIRECTIONS[direction[20, 21]] == (0, 1)
    turned = boundary_targets(labels.T)["direction_labels"]
    assert DIRECTIONS[turned[18, 20]] == (-1, 0) and DIRECTIONS[turned[21, 20]] == (1, 0)


@pytest.mark.parametrize("seed", range(4))
def test_targets_of_a_flipped_crop_are_the_flipped_targets(seed):
    """The released code flips the map of angles without flipping the angles."""
    labels = scene(seed)
    plain, flipped = boundary_targets(labels), boundary_targets(np.ascontiguousarray(labels[:, ::-1]))
    np.testing.assert_array_equal(flipped["boundary_labels"], plain["boundary_labels"][:, ::-1])
    direction = plain["direction_labels"]
    expected = np.where(direction == 255, 255, FLIPPED[direction % 8])[:, ::-1]
    # Bins own one of their two edges, and near a ridge the sign of a rounding error decides.
    _, gradient, _ = distance_fields(labels)
    angle = np.degrees(np.arctan2(gradient[..., 0], gradient[..., 1]))
    to_edge = np.abs((angle + 22.5 + 22.5) % 45 - 22.5)
    clear = ((to_edge > 2.5) & (np.hypot(*np.moveaxis(gradient, -1, 0)) > 0.01))[:, ::-1]
    assert clear.mean() > 0.5
    np.testing.assert_array_equal(flipped["direction_labels"][clear], expected[clear])


@pytest.mark.parametrize("name, boundary", [(3, 0), (255, 255)])
def test_crop_of_one_class_has_no_boundary_and_no_direction(name, boundary):
    labels = np.full((50, 60), name, np.uint8)
    made = boundary_targets(labels)
    assert (made["boundary_labels"] == boundary).all() and (made["direction_labels"] == 255).all()
    official = boundary_targets(labels, official=True)
    assert (official["boundary_labels"] == (0 if name == 3 else 1)).all()
    if name == 3:
        assert (distance_fields(labels)[0] == FAR).all()


def test_ignored_and_small_classes_are_left_out_or_boundary_as_released():
    labels = scene()
    labels[50:54, 70:74] = 7  # 16 pixels
    made, kept = boundary_targets(labels), boundary_targets(labels, ignore_small_classes=False)
    official = boundary_targets(labels, ignore_small_classes=False, official=True)
    ignored, small = labels == 255, labels == 7
    for each in made.values():
        assert (each[ignored] == 255).all() and (each[small] == 255).all()
    assert (kept["boundary_labels"][ignored] == 255).all() and (kept["boundary_labels"][small] == 1).all()
    assert (official["boundary_labels"][ignored | small] == 1).all()
    assert (official["direction_labels"][ignored | small] == 4).all()
    large = boundary_targets(labels, min_class_pixels=16)
    assert (large["boundary_labels"][small] == 1).all()


def test_workers_make_the_targets_of_the_augmented_crop():
    model = UneptForSemanticSegmentation(UneptConfig(**TINY, num_labels=12))
    data = load_segmentation("synthetic@64x96", "train", limit=2)
    dataset = TrainDataset(data, TrainAugmentation((48, 64)), seed=3, targets=model.training_targets)
    loader = torch.utils.data.DataLoader(dataset, batch_size=2, num_workers=1, collate_fn=collate_train)
    batch = next(iter(loader))
    for row, labels in enumerate(batch["labels"]):
        expected = boundary_targets(labels.numpy(), min_class_pixels=1)
        for name in ("boundary_labels", "direction_labels"):
            np.testing.assert_array_equal(batch[name][row], expected[name])
    assert isinstance(model.training_targets, functools.partial)


@torch.no_grad()
def test_model_makes_the_same_targets_where_none_are_given():
    torch.manual_seed(0)
    model = UneptForSemanticSegmentation(UneptConfig(**TINY, num_labels=5)).eval()
    labels = torch.from_numpy(np.stack([scene(1), scene(2)]))
    pixel_values = torch.randn(2, 3, 60, 80)
    given = [model.training_targets(label) for label in labels.numpy()]
    targets = {name: torch.from_numpy(np.stack([each[name] for each in given])) for name in given[0]}
    expected = model(pixel_values, labels, **targets).loss
    assert_same_outputs(model(pixel_values, labels).loss, expected)
    with_other_index = torch.where(labels == 255, -100, labels.long())
    assert_same_outputs(model(pixel_values, with_other_index).loss, expected)


def test_targets_are_one_operator_for_the_compiler():
    labels = torch.from_numpy(np.stack([scene(1), scene(2)])).long()
    torch.library.opcheck(
        torch.ops.hf_denseseg.unept_boundary_targets.default,
        (labels, 100, True, False, 255),
        test_utils=("test_schema", "test_faketensor"),
    )
    assert batched_targets(labels, 100, True, False, 255)[0].dtype == torch.uint8
