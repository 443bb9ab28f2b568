"""Training augmentation against a plain reimplementation of mmsegmentation's pipeline, and the datasets using it."""

import colorsys
import random

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from hf_denseseg.data.augmentation.photometric import (
    distort,
    distort_brightness,
    distort_like_car,
    shift_hue_saturation,
)
from hf_denseseg.data.augmentation.sampler import EpochSampler
from hf_denseseg.data.augmentation.segmentation import (
    EvalDataset,
    TrainAugmentation,
    TrainDataset,
    collate_train,
)
from hf_denseseg.data.labels import LabelSpec, SegmentationData
from hf_denseseg.data.segmentation import load_segmentation
from hf_denseseg.data.synthetic.scenes import render_scene
from hf_denseseg.errors import InputError

HEIGHT, WIDTH, CROP, DRAWS = 60, 80, 48, 250
KS_LIMIT = 1.63 * (2 / DRAWS) ** 0.5  # two samples of the same distribution stay below it in 99 % of cases


def ks_distance(first, second):
    """Largest distance between the two empirical distribution functions."""
    points = np.sort(np.concatenate([first, second]))
    return max(
        abs(
            np.searchsorted(np.sort(first), points, side="right") / len(first)
            - np.searchsorted(np.sort(second), points, side="right") / len(second)
        )
    )


def lopsided_label():
    """Class 1 in one corner: most windows break the 75 % rule."""
    label = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    label[:30, :30] = 1
    label[:4] = 255
    return label


def plain_draw(label, rand):
    """Ratio, top, left and fraction of the largest class as mmsegmentation draws them, in plain loops."""
    ratio = rand.random() * 1.5 + 0.5
    factor = min(int(WIDTH * ratio) / WIDTH, int(HEIGHT * ratio) / HEIGHT)
    height, width = int(HEIGHT * factor + 0.5), int(WIDTH * factor + 0.5)
    for _ in range(11):
        top, left = rand.randint(0, max(height - CROP, 0)), rand.randint(0, max(width - CROP, 0))
        counts: dict[int, int] = {}
        for y in range(top, min(top + CROP, height)):
            for x in range(left, min(left + CROP, width)):
                value = label[int((y + 0.5) * HEIGHT / height)][int((x + 0.5) * WIDTH / width)]
                if value != 255:
                    counts[value] = counts.get(value, 0) + 1
        fraction = max(counts.values()) / sum(counts.values()) if counts else 1.0
        if len(counts) > 1 and fraction < 0.75:
            break
    return ratio, top, left, fraction


def test_scale_position_and_class_fraction_match_the_plain_reimplementation():
    """The image is a ramp along each axis, so a line through the result reveals the ratio and the position."""
    label = lopsided_label()
    ramp = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    ramp[..., 0] = np.arange(WIDTH) * 3
    ramp[..., 1] = (np.arange(HEIGHT) * 4)[:, None]
    image = Image.fromarray(ramp)
    augmentation = TrainAugmentation((CROP, CROP), flip=False, photometric=False)
    ours = []
    for draw in range(DRAWS):
        pixels, labels = augmentation(image, label, np.random.default_rng(draw))
        inside = (pixels[2] == 0).numpy()  # padding is not 0 there
        columns, rows = inside[0].sum() - 6, inside[:, 0].sum() - 6
        x_step = (float(pixels[0, 5, 2 + columns]) - float(pixels[0, 5, 2])) / columns / 3
        ratio = 1 / x_step
        left = (float(pixels[0, 5, 2]) / 3 + 0.5) * ratio - 2.5
        top = (float(pixels[1, 2, 5]) / 4 + 0.5) * ratio - 2.5
        valid = labels[labels != 255]
        ours.append((ratio, top, left, valid.bincount().max().item() / len(valid) if len(valid) else 1.0))
        assert rows > 0
    rand = random.Random(0)
    plain = np.array([plain_draw(label.tolist(), rand) for _ in range(DRAWS)])
    ours = np.array(ours)
    # Positions are read from 8-bit colors, to about a pixel: both are binned to 4 pixels.
    for column, bin_size in ((0, 0.1), (1, 4), (2, 4), (3, 0.05)):
        first, second = np.round(ours[:, column] / bin_size), np.round(plain[:, column] / bin_size)
        assert ks_distance(first, second) < KS_LIMIT, ("ratio", "top", "left", "fraction")[column]
    assert 0.45 < ours[:, 0].min() < 0.55 and 1.9 < ours[:, 0].max() < 2.1


def test_the_class_rule_can_be_disabled():
    label, image = lopsided_label(), Image.new("RGB", (WIDTH, HEIGHT))

    def largest(ratio):
        augmentation = TrainAugmentation((24, 24), cat_max_ratio=ratio, photometric=False)
        fractions = []
        for draw in range(200):
            valid = augmentation(image, label, np.random.default_rng(draw))[1]
            valid = valid[valid != 255]
            fractions.append(valid.bincount().max().item() / max(len(valid), 1))
        return np.mean(np.array(fractions) >= 0.75)

    always = largest(1.0)
    # A window that breaks the rule is kept only if the ten tries before it broke the rule as well.
    assert 0.5 < always < 0.95 and largest(0.75) < 0.75 * always, (largest(0.75), always)


def test_half_of_the_samples_are_flipped():
    image = Image.fromarray(np.tile(np.arange(40, dtype=np.uint8), (30, 1))).convert("RGB")
    augmentation = TrainAugmentation((30, 40), scale_range=(1, 1), photometric=False)
    label = np.tile(np.arange(40, dtype=np.uint8), (30, 1))
    flipped = 0
    for draw in range(400):
        pixels, labels = augmentation(image, label, np.random.default_rng(draw))
        assert (pixels[0] == labels).all()
        flipped += bool(labels[0, 0] == 39)
    assert 160 < flipped < 240


@pytest.mark.parametrize(("photometric", "base_size"), [(False, None), (True, None), (True, (120, 90))])
def test_label_and_image_stay_aligned_under_every_operation(photometric, base_size):
    """An irregular checkerboard, black where the label is 0 and white where it is 1."""
    board = np.add.outer(np.arange(HEIGHT) // 9, np.arange(WIDTH) // 7) % 2
    board[20:40, 50:] = 1
    label = board.astype(np.uint8)
    image = Image.fromarray(label * 255).convert("RGB")
    augmentation = TrainAugmentation((CROP, CROP), base_size=base_size, photometric=photometric)
    compared = 0
    for draw in range(60):
        pixels, labels = augmentation(image, label, np.random.default_rng(draw))
        known = labels != 255
        light = pixels.float().mean(0)
        # Only pixels beside an edge may differ, where bilinear and nearest disagree.
        edge = torch.ones_like(known)  # the border too: what lies beyond it is not visible
        edge[1:-1, 1:-1] = False
        edge[:, 1:] |= labels[:, 1:] != labels[:, :-1]
        edge[1:] |= labels[1:] != labels[:-1]
        edge[:, :-1] |= edge[:, 1:].clone()
        edge[:-1] |= edge[1:].clone()
        black, white = (light[known & ~edge & (labels == value)] for value in (0, 1))
        assert not black.numel() or not white.numel() or black.max() < white.min()
        compared += bool(black.numel() and white.numel())
    assert compared > 40


def test_padding_is_ignored_and_mean_color_not_distorted():
    image, label = Image.new("RGB", (20, 10), (200, 10, 90)), np.zeros((10, 20), dtype=np.uint8)
    for draw in range(20):
        augmentation = TrainAugmentation((16, 24), scale_range=(1, 1))
        pixels, labels = augmentation(image, label, np.random.default_rng(draw))
        assert pixels.dtype == labels.dtype == torch.uint8
        assert pixels.shape == (3, 16, 24) and labels.shape == (16, 24)
        padded = torch.ones(16, 24, dtype=torch.bool)
        padded[:10, :20] = False
        assert (labels[padded] == 255).all() and (labels[~padded] == 0).all()
        assert pixels[:, padded].unique(dim=1).squeeze().tolist() == [124, 116, 104]


def test_resizing_only_the_window_equals_resizing_the_full_image():
    image, label = render_scene("train", 0, (100, 140))
    full = TrainAugmentation((300, 300), scale_range=(1.73, 1.73), flip=False, photometric=False)
    part = TrainAugmentation((80, 90), scale_range=(1.73, 1.73), flip=False, photometric=False, cat_max_ratio=1)
    pixels, labels = full(image, label, np.random.default_rng(0))
    rng = np.random.default_rng(5)
    cut, cut_labels = part(image, label, np.random.default_rng(5))
    rng.random()
    top, left = rng.integers(173 - 80 + 1), rng.integers(242 - 90 + 1)
    window = slice(top, top + 80), slice(left, left + 90)
    assert (pixels[:, *window].int() - cut.int()).abs().max() <= 2
    assert (labels[window] == cut_labels).float().mean() > 0.999


@pytest.mark.parametrize(
    ("base", "size", "expected"),
    [
        ((512, 2048), (512, 683), (512, 683)),  # the short edge decides
        ((512, 2048), (300, 1500), (410, 2048)),  # the long edge decides
        ((2048, 512), (683, 512), (683, 512)),  # either order, upright image
        ((1025, 2049), (1024, 2048), (1025, 2049)),
        (None, (17, 31), (17, 31)),
    ],
)
def test_base_size_fits_the_image_as_mmcv_rescales(base, size, expected):
    augmentation = TrainAugmentation((8, 8), base_size=base, scale_range=(1, 1))
    assert augmentation.scaled_size(*size, np.random.default_rng(0)) == expected


def test_stepped_ratios_are_equally_frequent():
    augmentation, rng = TrainAugmentation((8, 8), scale_step=0.1), np.random.default_rng(0)
    heights = [augmentation.scaled_size(100, 60, rng)[0] for _ in range(1600)]
    sizes, counts = np.unique(heights, return_counts=True)
    assert sizes.tolist() == list(range(50, 201, 10))
    assert counts.min() > 60 and counts.max() < 140  # 100 each; four standard deviations
    for step in (0.4, 0.0, -0.1):
        with pytest.raises(InputError, match="scale_step"):
            TrainAugmentation((8, 8), scale_step=step)


@pytest.mark.parametrize("arguments", [{"crop_size": (0, 4)}, {"crop_size": (4, 4), "scale_range": (1.0,)}])
def test_wrong_sizes_are_refused(arguments):
    with pytest.raises(InputError, match="two positive numbers"):
        TrainAugmentation(**arguments)


def plain_distort(color, rand):
    """mmsegmentation's PhotoMetricDistortion on one color, with `colorsys`."""

    def convert(values, factor=1.0, offset=0.0):
        return [int(min(max(value * factor + offset, 0), 255)) for value in values]

    if rand.random() < 0.5:
        color = convert(color, offset=rand.uniform(-32, 32))
    first = rand.random() < 0.5
    if first and rand.random() < 0.5:
        color = convert(color, rand.uniform(0.5, 1.5))
    hue, saturation, value = colorsys.rgb_to_hsv(*(channel / 255 for channel in color))
    if rand.random() < 0.5:
        saturation = min(saturation * rand.uniform(0.5, 1.5), 1.0)
    if rand.random() < 0.5:
        hue = (hue + rand.randint(-18, 17) / 180) % 1
    color = [channel * 255 for channel in colorsys.hsv_to_rgb(hue, saturation, value)]
    if not first and rand.random() < 0.5:
        color = convert(color, rand.uniform(0.5, 1.5))
    return color


@pytest.mark.parametrize("color", [(180, 90, 40), (30, 200, 120), (90, 90, 90), (20, 10, 250)])
def test_photometric_distortion_matches_the_plain_reimplementation(color):
    image, draws = Image.new("RGB", (1, 1), color), 800
    rng, rand = np.random.default_rng(1), random.Random(2)
    ours = np.array([[plane[0, 0] for plane in distort(image, rng)] for _ in range(draws)], dtype=float)
    plain = np.array([plain_distort(color, rand) for _ in range(draws)])
    for channel in range(3):
        distance = ks_distance(np.round(ours[:, channel] / 4), np.round(plain[:, channel] / 4))
        assert distance < 1.63 * (2 / draws) ** 0.5 + 0.03, "channel"  # 0.03: one gray level across a bin's border


class Drawn:
    """Stub of a generator: the given coins in turn, and every range at the same fraction of its width."""

    def __init__(self, coins, fraction):
        self.coins, self.fraction = list(coins), fraction

    def random(self):
        return 0.0 if self.coins.pop(0) else 0.9

    def uniform(self, low, high):
        return low + self.fraction * (high - low)


def plain_distort_like_car(pixels, coins, fraction):
    """Brightness, contrast about each channel's mean, saturation, and always the hue, in floating point."""
    values = pixels.astype(float)
    if coins[0]:
        values = (values + 64 * fraction - 32).clip(0, 255)
    if coins[1]:
        mean = values.mean(axis=(0, 1))
        values = ((values - mean) * (0.75 + 0.5 * fraction) + mean).clip(0, 255)
    result = []
    for color in values.reshape(-1, 3):
        hue, saturation, value = colorsys.rgb_to_hsv(*(color / 255))
        saturation = min(saturation * (0.75 + 0.5 * fraction if coins[2] else 1), 1)
        result.append(colorsys.hsv_to_rgb((hue - 0.1 + 0.2 * fraction) % 1, saturation, value))
    return 255 * np.array(result).reshape(pixels.shape)


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("coins", [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1)], ids=str)
def test_narrow_distortion_matches_the_plain_reimplementation(coins, fraction):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    pixels[..., 0] //= 3  # so that the channels have different means
    ours = np.stack(distort_like_car(Image.fromarray(pixels), Drawn(coins, fraction)), axis=-1)
    assert (
        np.abs(plain_distort_like_car(pixels, coins, fraction) - ours).max() < 5
    )  # ours rounds to bytes between the steps


@pytest.mark.parametrize("coin", [0, 1])
def test_brightness_alone_shifts_all_channels_equally(coin):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    ours = np.stack(distort_brightness(Image.fromarray(pixels), Drawn([coin], 0.75)), axis=-1)
    assert (ours == (pixels.astype(int) + 16 * coin).clip(0, 255)).all()


def test_the_styles_of_distortion_differ():
    image, label = render_scene("train", 0, (40, 56))
    drawn = {
        style: TrainAugmentation((40, 56), photometric_style=style)(image, label, np.random.default_rng(3))[0]
        for style in ("mmsegmentation", "car", "brightness")
    }
    assert not drawn["mmsegmentation"].equal(drawn["car"]) and not drawn["brightness"].equal(drawn["car"])
    with pytest.raises(InputError, match="photometric_style is 'bright'"):
        TrainAugmentation((4, 4), photometric_style="bright")


@pytest.mark.parametrize("degrees", [-36, 0, 2, 34])
@pytest.mark.parametrize("saturation", [0.5, 1.0, 1.5])
def test_hue_and_saturation_equal_a_conversion_to_hsv(degrees, saturation):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 25, 3), dtype=np.uint8)
    pixels[0] = pixels[0, :, :1]  # grays
    pixels[1, :, 1] = pixels[1, :, 0]  # two equal channels
    pixels[2] = pixels[2] // 200 * 255  # pure colors
    result = np.stack(shift_hue_saturation([pixels[..., k] for k in range(3)], degrees, saturation), axis=-1)
    for source, ours in zip(pixels.reshape(-1, 3), result.reshape(-1, 3), strict=True):
        hue, own, value = colorsys.rgb_to_hsv(*(source / 255))
        expected = np.array(colorsys.hsv_to_rgb((hue + degrees / 360) % 1, min(own * saturation, 1), value)) * 255
        assert np.abs(expected - ours).max() < 3


@pytest.fixture(scope="module")
def data():
    return load_segmentation("synthetic:12@40x56", "train")


def test_a_sample_is_a_function_of_seed_epoch_and_index(data):
    augmentation = TrainAugmentation((32, 32))
    samples = TrainDataset(data, augmentation, seed=7)
    again = TrainDataset(data, augmentation, seed=7)
    assert torch.equal(samples[2, 5]["pixel_values"], again[2, 5]["pixel_values"])
    assert torch.equal(samples[5]["labels"], samples[0, 5]["labels"])
    for other in (samples[3, 5], samples[2, 4], TrainDataset(data, augmentation, seed=8)[2, 5]):
        assert not torch.equal(samples[2, 5]["pixel_values"], other["pixel_values"])


@pytest.mark.parametrize("workers", [2])
def test_workers_do_not_change_the_samples(data, workers):
    dataset = TrainDataset(data, TrainAugmentation((32, 32)), seed=3)

    def batches(count):
        sampler = EpochSampler(len(dataset), seed=3)
        sampler.set_epoch(4)
        return list(DataLoader(dataset, 4, sampler=sampler, num_workers=count, collate_fn=collate_train))

    for single, parallel in zip(batches(0), batches(workers), strict=True):
        assert single["pixel_values"].shape == (4, 3, 32, 32) and single["pixel_values"].dtype == torch.uint8
        assert torch.equal(single["pixel_values"], parallel["pixel_values"])
        assert torch.equal(single["labels"], parallel["labels"])


def test_the_sampler_yields_every_index_once_in_a_new_order_each_epoch():
    sampler = EpochSampler(50, seed=1)
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert {epoch for epoch, _ in first} == {0} and {epoch for epoch, _ in second} == {1}
    assert sorted(index for _, index in first) == sorted(index for _, index in second) == list(range(50))
    assert [index for _, index in first] != [index for _, index in second]
    assert second == list(sampler) and len(sampler) == 50
    assert list(EpochSampler(3, shuffle=False)) == [(0, 0), (0, 1), (0, 2)]


def test_evaluation_gives_pairs_at_their_original_size():
    rows = [
        {"image": Image.new("RGB", (6, 4), (1, 2, 3)), "label": np.zeros((4, 6), np.uint8), "id": "a"},
        {"image": Image.new("RGB", (3, 5), (9, 9, 9)), "label": np.full((5, 3), 255, np.uint8), "id": "b"},
    ]
    dataset = EvalDataset(SegmentationData(rows, LabelSpec("s", ("x",))))
    samples = [dataset[0], dataset[1]]
    assert [sample["index"] for sample in samples] == [0, 1] and [sample["id"] for sample in samples] == ["a", "b"]
    assert [tuple(sample["image"].shape) for sample in samples] == [(3, 4, 6), (3, 5, 3)]
    assert samples[0]["image"][:, 2, 2].tolist() == [1, 2, 3]
    assert samples[1]["label"].dtype == torch.uint8 and (samples[1]["label"] == 255).all()
