"""Rare class sampling against its equation, copy-paste against plain loops."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from hf_denseseg.data.augmentation.rare_classes import RareClasses, count_pixels
from hf_denseseg.data.augmentation.segmentation import TrainAugmentation, TrainDataset
from hf_denseseg.data.labels import LabelSpec, SegmentationData
from hf_denseseg.errors import InputError

SIZE = 24
SPEC = LabelSpec("three", ("road", "car", "sign"))
CROPS = TrainAugmentation((16, 16), cat_max_ratio=1)


def data_of(count: int = 10) -> SegmentationData:
    """Images of one gray each; road everywhere, cars in every second image, a sign and ignored pixels in the last."""
    rows = []
    for number in range(count):
        label = np.zeros((SIZE, SIZE), np.uint8)
        label[:2, :6] = number % 2
        if number == count - 1:
            label[-6:, -6:], label[4:6] = 2, 255
        image = np.random.default_rng(number).integers(0, 255, (SIZE, SIZE, 3), dtype=np.uint8)
        rows.append({"image": Image.fromarray(image), "label": label, "id": str(number)})
    return SegmentationData(rows, SPEC)


def plain_counts(data):
    counts = [[0] * 3 for _ in data.dataset]
    for row, own in zip(data.dataset, counts, strict=True):
        for value in row["label"].reshape(-1).tolist():
            if value != 255:
                own[value] += 1
    return counts


def rare(data, temperature=0.01):
    return RareClasses(np.array(plain_counts(data)), temperature)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_processes_count_the_pixels_of_their_images(workers):
    data = data_of()
    parts = [count_pixels(data, first, 3, workers, progress=False) for first in range(3)]
    for number, expected in enumerate(plain_counts(data)):
        assert parts[number % 3][number // 3].tolist() == expected
    assert count_pixels(data, 10, 11, progress=False).shape == (0, 3)


def test_images_are_drawn_as_often_as_the_equation_says():
    data, temperature = data_of(), 0.5
    counts = plain_counts(data)
    total = sum(map(sum, counts))
    weights = [math.exp((1 - sum(row[c] for row in counts) / total) / temperature) for c in range(3)]
    shown = [sum(row[c] > 0 for row in counts) for c in range(3)]
    expected = [sum(weights[c] / sum(weights) / shown[c] for c in range(3) if own[c]) for own in counts]
    dataset = TrainDataset(data, CROPS, seed=1, rare_classes=rare(data, temperature), balanced=True)
    drawn = [dataset.row_of(epoch, index) for epoch in range(400) for index in range(10)]
    for number, probability in enumerate(expected):
        deviation = math.sqrt(probability * (1 - probability) / len(drawn))
        assert abs(drawn.count(number) / len(drawn) - probability) < 4 * deviation


def test_classes_that_no_image_shows_are_never_drawn():
    counts = np.array([[90, 0, 5], [100, 0, 0]])
    drawn = [RareClasses(counts).draw(np.random.default_rng(seed)) for seed in range(50)]
    assert set(drawn) == {(2, 0)}  # at the temperature of the paper the common class is hardly ever drawn
    with pytest.raises(InputError, match="all pixels of the training images are ignored"):
        RareClasses(np.zeros((2, 3), int))


def test_without_the_switches_the_samples_stay_as_they_were():
    data = data_of()
    plain, never = TrainDataset(data, CROPS, 5), TrainDataset(data, CROPS, 5, rare_classes=rare(data))
    assert [never.row_of(3, index) for index in range(10)] == list(range(10))
    for index in range(4):
        assert torch.equal(plain[3, index]["pixel_values"], never[3, index]["pixel_values"])


def test_the_pixels_of_one_rare_class_are_pasted():
    """Against plain loops: the pixels of the drawn class replace those of the plain sample."""
    data = data_of()
    plain = TrainDataset(data, CROPS, seed=5)
    pasting = TrainDataset(data, CROPS, seed=5, rare_classes=rare(data), copy_paste=1.0)
    changed = 0
    for index in range(8):
        before, after = plain[2, index], pasting[2, index]
        rng = np.random.default_rng((5, 2, index, 2))
        rng.random()
        drawn, number = pasting.rare_classes.draw(rng)
        for _ in range(10):
            pixels, labels = CROPS(data.dataset[number]["image"], data.dataset[number]["label"], rng)
            if any(value == drawn for line in labels.tolist() for value in line):
                break
        for y in range(16):
            for x in range(16):
                source = (pixels, labels) if labels[y, x] == drawn else (before["pixel_values"], before["labels"])
                assert after["pixel_values"][:, y, x].tolist() == source[0][:, y, x].tolist()
                assert after["labels"][y, x] == source[1][y, x]
        changed += not torch.equal(before["labels"], after["labels"])
        assert torch.equal(pasting[2, index]["pixel_values"], after["pixel_values"])  # again
    assert changed >= 4


def test_half_of_the_samples_are_pasted_into():
    data = data_of()
    plain = TrainDataset(data, CROPS, seed=5)
    pasting = TrainDataset(data, CROPS, seed=5, rare_classes=rare(data), copy_paste=0.5)
    keys = [(epoch, index) for epoch in range(20) for index in range(10)]
    changed = sum(not torch.equal(plain[key]["pixel_values"], pasting[key]["pixel_values"]) for key in keys)
    assert 60 < changed <= 125
    seen = []
    targets = TrainDataset(
        data, CROPS, 5, lambda label: seen.append(label.copy()) or {}, rare_classes=rare(data), copy_paste=1.0
    )
    assert torch.equal(targets[0, 1]["labels"], torch.from_numpy(seen[0]))  # further targets see what was pasted
