"""SETR's test protocol, written down a second time in plain loops over scales, flips and windows, and as tables."""

import math

import numpy as np
import pytest
import torch

import hf_denseseg
from byte_resize import resize_image
from hf_denseseg.inference.preprocessing import Preprocessing, view_size
from hf_denseseg.inference.segmentation import class_probabilities, segment
from hf_denseseg.inference.settings import InferenceSettings

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PREPROCESSING = Preprocessing(MEAN, STD)
RATIOS = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
TOLERANCE = 1e-5

# Dataset -> box, window, stride: the published numbers, and about a sixteenth of them for the tiny model.
PUBLISHED = {
    "cityscapes": ((2049, 1025), 768, 512),
    "ade20k": ((2048, 512), 512, 341),
    "pascal_context": ((520, 520), 480, 320),
}
TINY = {
    "cityscapes": ((129, 65), 48, 32),
    "ade20k": ((128, 32), 32, 21),
    "pascal_context": ((33, 33), 30, 20),
}

# Worked out by hand: the short side is max(window, int(short limit * ratio)), the long side follows the image.
SHORT_SIDES = {
    "cityscapes": (768, 768, 1025, 1281, 1537, 1793),
    "ade20k": (512, 512, 512, 640, 768, 896),
    "pascal_context": (480, 480, 520, 650, 780, 910),
}
LONG_SIDES = {
    ("cityscapes", (1024, 2048)): (1536, 1536, 2050, 2562, 3074, 3586),
    ("ade20k", (683, 512)): (683, 683, 683, 854, 1025, 1195),
    ("ade20k", (512, 683)): (683, 683, 683, 854, 1025, 1195),
    ("ade20k", (256, 1300)): (2600, 2600, 2600, 3250, 3900, 4550),
    ("pascal_context", (375, 500)): (640, 640, 693, 867, 1040, 1213),
    ("pascal_context", (500, 333)): (721, 721, 781, 976, 1171, 1366),
}
# One scale: fitted into the box; what would come out below the window is raised to it.
SINGLE = {
    ("cityscapes", (1024, 2048)): (1025, 2049),
    ("ade20k", (683, 512)): (683, 512),
    ("ade20k", (512, 683)): (512, 683),
    ("ade20k", (256, 1300)): (512, 2600),  # the box gives 403 x 2048
    ("pascal_context", (375, 500)): (480, 640),  # the box gives 390 x 520
    ("pascal_context", (500, 333)): (721, 480),  # the box gives 520 x 346
}


def settings_of(protocol, scales=RATIOS, **options):
    box, window, stride = protocol
    return InferenceSettings(
        "slide", (window, window), (stride, stride), scales, base_size=box, raise_short_side=True, **options
    )


@pytest.mark.parametrize("data, size", LONG_SIDES)
def test_view_sizes_of_the_six_scales_are_those_worked_out_by_hand(data, size):
    settings = settings_of(PUBLISHED[data], flip=True)
    assert settings.views == 12
    for ratio, short, long in zip(RATIOS, SHORT_SIDES[data], LONG_SIDES[data, size], strict=True):
        expected = (short, long) if size[0] < size[1] else (long, short)
        assert view_size(size, ratio, settings) == expected


@pytest.mark.parametrize("data, size", SINGLE)
def test_view_size_of_a_single_scale_is_fitted_into_the_box(data, size):
    assert view_size(size, 1.0, settings_of(PUBLISHED[data], (1.0,))) == SINGLE[data, size]


def resize_logits(logits, size):
    """(K, h, w) -> (K, height, width), always between two neighbors: bilinear without antialiasing."""
    for axis, length in ((1, size[0]), (2, size[1])):
        values = np.moveaxis(logits, axis, 0)
        place = (np.arange(length) + 0.5) * len(values) / length - 0.5
        place = place.clip(0, len(values) - 1)
        below = np.floor(place).astype(int)
        above = np.minimum(below + 1, len(values) - 1)
        fraction = (place - below).reshape(-1, 1, 1)
        logits = np.moveaxis(values[below] * (1 - fraction) + values[above] * fraction, 0, axis)
    return logits


def softmax(logits):
    powers = np.exp(logits - logits.max(0))
    return powers / powers.sum(0)


def corners(length, window, stride):
    """Anchored at 0; the last one is shifted inside."""
    found, corner = [], 0
    while corner + window < length:
        found.append(corner)
        corner += stride
    return [*found, max(length - window, 0)]


def logits_of(model, pixels):
    """(h, w, 3) normalized -> (K, ., .) at the resolution of the model."""
    batch = torch.tensor(pixels.transpose(2, 0, 1)[None].copy(), dtype=torch.float32)
    with torch.no_grad():
        return model(batch).logits[0].double().numpy()


def slide(model, pixels, window, stride):
    height, width, _ = pixels.shape
    if height <= window and width <= window:
        return logits_of(model, pixels)  # ours: one window is resized once, straight to the image
    total, visits = np.zeros((model.config.num_labels, height, width)), np.zeros((height, width))
    for top in corners(height, window, stride):
        for left in corners(width, window, stride):
            part = pixels[top : top + window, left : left + window]
            bottom, right = top + part.shape[0], left + part.shape[1]
            total[:, top:bottom, left:right] += resize_logits(logits_of(model, part), part.shape[:2])
            visits[top:bottom, left:right] += 1
    return total / visits


def plain_probabilities(model, image, protocol, ratios, flips, raised=True):
    """The protocol in the words of the official code; `image` is (H, W, 3) bytes."""
    (first, second), window, stride = protocol
    height, width = image.shape[:2]
    parts = []
    for ratio in ratios:
        limits = (int(first * ratio), int(second * ratio))
        factor = min(min(limits) / min(height, width), max(limits) / max(height, width))
        if len(ratios) > 1:
            factor = max(min(limits), window) / min(height, width)
        elif raised and min(height, width) * factor < window:
            factor = window / min(height, width)
        size = (math.floor(height * factor + 0.5), math.floor(width * factor + 0.5))
        pixels = (resize_image(image, size) / 255 - np.array(MEAN)) / np.array(STD)
        for flip in flips:
            logits = slide(model, pixels[:, ::-1] if flip else pixels, window, stride)
            part = softmax(resize_logits(logits, (height, width)))
            parts.append(part[:, :, ::-1] if flip else part)
    assert len(parts) == len(ratios) * len(flips)
    return sum(parts) / len(parts)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = hf_denseseg.create_model(
        "setr-mla-vit-base",
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        mla_layers=[0, 1, 2, 3],
        decoder_hidden_size=8,
        mla_hidden_size=8,
        image_size=48,
        num_labels=4,
    )
    with torch.no_grad():  # random weights that tell images, places and neighbors apart
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=1.5 / parameter[0].numel() ** 0.5)
    return model.eval()


def blotted_image(height, width):
    """Blots of some pixels: what is smaller would be averaged away."""
    blots = np.random.default_rng(height * width).integers(0, 256, (height // 6 + 2, width // 6 + 2, 3))
    return blots.repeat(6, axis=0).repeat(6, axis=1)[:height, :width].astype(np.uint8)


def compare(model, image, settings, expected):
    pixels = torch.from_numpy(image.transpose(2, 0, 1).copy())
    found = class_probabilities(model, pixels, settings, PREPROCESSING).numpy()
    np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=0)
    first, second = np.sort(expected, axis=0)[[-1, -2]]
    sure = first - second > 1e-3
    labels = segment(model, pixels, settings, PREPROCESSING).numpy()
    assert sure.mean() > 0.9 and (labels == expected.argmax(0))[sure].all()


# Odd sides, upright, elongated, smaller than the window on both sides or on one, square.
IMAGES = [
    *[("cityscapes", size) for size in ((61, 83), (17, 25), (64, 19))],
    *[("ade20k", size) for size in ((75, 51), (21, 17), (23, 97), (45, 45))],
    *[("pascal_context", size) for size in ((31, 47), (29, 17), (17, 65))],
]


@pytest.mark.parametrize("data, size", IMAGES)
def test_multi_scale_test_equals_the_plain_loop(model, data, size):
    image, settings = blotted_image(*size), settings_of(TINY[data], flip=True)
    expected = plain_probabilities(model, image, TINY[data], RATIOS, (False, True))
    compare(model, image, settings, expected)
    single = plain_probabilities(model, image, TINY[data], (1.0,), (False,))
    assert np.abs(single - expected).max() > 0.1  # so the comparison can tell protocols apart


@pytest.mark.parametrize("data, size", IMAGES)
def test_single_scale_test_equals_the_plain_loop(model, data, size):
    image, settings = blotted_image(*size), settings_of(TINY[data], (1.0,))
    compare(model, image, settings, plain_probabilities(model, image, TINY[data], (1.0,), (False,)))


@pytest.mark.parametrize("size", [(70, 212), (212, 70)], ids=str)
def test_a_view_below_the_window_is_seen_through_smaller_windows_unless_raised(model, size):
    """The box gives 43 pixels on the short side, the window has 48: the official windows are cut to 43 x 48."""
    image, protocol = blotted_image(*size), TINY["cityscapes"]
    settings = InferenceSettings("slide", (48, 48), (32, 32), base_size=protocol[0])
    assert sorted(view_size(size, 1.0, settings)) == [43, 129]
    compare(model, image, settings, plain_probabilities(model, image, protocol, (1.0,), (False,), raised=False))
