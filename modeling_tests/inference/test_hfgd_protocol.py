"""HFGD's test protocol, written down a second time in plain loops over scales and flips, and as a table."""

import json
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from byte_resize import resize_image
from hf_denseseg.inference.preprocessing import Preprocessing, view_size
from hf_denseseg.inference.segmentation import class_probabilities, segment, segment_with_confidence
from hf_denseseg.inference.settings import InferenceSettings
from hf_denseseg.training.recipe import load_recipe
from hf_denseseg.training.tasks.segmentation import inference_settings

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PREPROCESSING = Preprocessing(MEAN, STD)
MEAN_COLOR = (124, 116, 104)  # the mean in bytes
RATIOS = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)

# Worked out by hand: the even part of the side times the ratio, cut to a whole number; one more if the side is odd.
SIDES = {
    513: (257, 385, 513, 641, 769, 897),
    1025: (513, 769, 1025, 1281, 1537, 1793),
    2049: (1025, 1537, 2049, 2561, 3073, 3585),
    640: (320, 480, 640, 800, 960, 1120),
    427: (214, 320, 427, 533, 640, 746),  # the rule as it is written: half of 426 is odd, so one more is even
    333: (167, 250, 333, 416, 499, 582),
    3: (2, 2, 3, 3, 4, 4),
    1: (1, 1, 1, 1, 1, 1),
}


@pytest.mark.parametrize("height, width", [(513, 640), (1025, 2049), (427, 333), (1, 3)])
def test_sides_of_the_six_views_are_those_worked_out_by_hand(height, width):
    settings = InferenceSettings(scales=RATIOS, flip=True, keep_odd=True)
    assert settings.views == 12
    found = [view_size((height, width), ratio, settings) for ratio in RATIOS]
    assert found == list(zip(SIDES[height], SIDES[width], strict=True))


def test_with_a_box_the_fitted_image_is_what_is_scaled():
    settings = InferenceSettings(scales=RATIOS, base_size=(513, 513), keep_odd=True)
    assert view_size((1026, 500), 1.0, settings) == (513, 250)
    assert view_size((1026, 500), 0.5, settings) == (257, 125)
    rounded = InferenceSettings(scales=RATIOS, base_size=(513, 513))
    assert view_size((1026, 500), 0.5, rounded) == (256, 125)


class Model(nn.Module):
    """Strided convolution with padding: borders matter, and so does what lies beyond the image."""

    def __init__(self, align_corners=True):
        super().__init__()
        torch.manual_seed(0)
        self.projection = nn.Conv2d(3, 4, kernel_size=5, stride=4, padding=2)
        self.config = types.SimpleNamespace(align_corners=align_corners)
        self.seen = []

    def forward(self, pixel_values):
        self.seen.append(tuple(pixel_values.shape[-2:]))
        return types.SimpleNamespace(logits=3 * self.projection(pixel_values))


def resize_logits(logits, size):
    """(K, h, w) -> (K, height, width), the corners of both grids at the same places."""
    for axis, length in ((1, size[0]), (2, size[1])):
        values = np.moveaxis(logits, axis, 0)
        place = np.arange(length) * (len(values) - 1) / max(length - 1, 1)
        below = np.floor(place).astype(int).clip(0, len(values) - 1)
        above = np.minimum(below + 1, len(values) - 1)
        fraction = (place - below).reshape(-1, 1, 1)
        logits = np.moveaxis(values[below] * (1 - fraction) + values[above] * fraction, 0, axis)
    return logits


def logits_of(model, pixels):
    """(h, w, 3) normalized -> (K, ., .) at the resolution of the model."""
    batch = torch.tensor(pixels.transpose(2, 0, 1)[None].copy(), dtype=torch.float32)
    with torch.no_grad():
        return model(batch).logits[0].double().numpy()


def plain_probabilities(model, image, window, ratios, flips):
    """The authors' order: pad the image, scale it, flip it; average logits at its padded size; cut; softmax."""
    height, width = image.shape[:2]
    padded = np.empty((max(height, window[0]), max(width, window[1]), 3), np.uint8)
    padded[:] = MEAN_COLOR
    padded[:height, :width] = image
    total, views = 0, 0
    for flip in flips:
        for ratio in ratios:
            size = tuple(int(ratio * (side - side % 2)) + side % 2 for side in padded.shape[:2])
            pixels = (resize_image(padded, size) / 255 - np.array(MEAN)) / np.array(STD)
            logits = logits_of(model, pixels[:, ::-1] if flip else pixels)
            logits = resize_logits(logits, padded.shape[:2])
            total = total + (logits[:, :, ::-1] if flip else logits)
            views += 1
    mean = (total / views)[:, :height, :width]
    powers = np.exp(mean - mean.max(0))
    return powers / powers.sum(0)


def blotted_image(height, width):
    blots = np.random.default_rng(height * width).integers(0, 256, (height // 6 + 2, width // 6 + 2, 3))
    return blots.repeat(6, axis=0).repeat(6, axis=1)[:height, :width].astype(np.uint8)


def settings_of(window, ratios=RATIOS, **options):
    values = {"flip": len(ratios) > 1, "keep_odd": True, "pad_to_window": True, "average": "logits"} | options
    return InferenceSettings("whole", window, scales=ratios, **values)


# Smaller than the window on both sides, on one, larger on both; odd and even.
CASES = [((33, 33), (21, 30)), ((33, 33), (47, 20)), ((33, 33), (39, 45)), ((33, 65), (32, 64)), ((17, 19), (17, 19))]


@pytest.mark.parametrize("ratios", [RATIOS, (1.0,)], ids=["12 views", "1 view"])
@pytest.mark.parametrize("window, size", CASES, ids=str)
def test_protocol_equals_the_plain_loop(window, size, ratios):
    model, image, settings = Model(), blotted_image(*size), settings_of(window, ratios)
    pixels = torch.from_numpy(image.transpose(2, 0, 1).copy())
    expected = plain_probabilities(model, image, window, ratios, (False, True)[: 1 + settings.flip])
    model.seen.clear()
    found = class_probabilities(model, pixels, settings, PREPROCESSING).numpy()
    assert len(model.seen) == settings.views
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)
    ids, confidence = segment_with_confidence(model, pixels, settings, PREPROCESSING)
    np.testing.assert_allclose(confidence.numpy(), expected.max(0), atol=1e-5, rtol=0)
    first, second = np.sort(expected, axis=0)[[-1, -2]]
    sure = first - second > 1e-3
    assert sure.mean() > 0.9
    for labels in (ids, segment(model, pixels, settings, PREPROCESSING)):
        assert (labels.numpy() == expected.argmax(0))[sure].all()


def test_every_part_of_the_protocol_can_be_told_from_its_absence():
    model, pixels = Model(), torch.from_numpy(blotted_image(21, 45).transpose(2, 0, 1).copy())
    full = class_probabilities(model, pixels, settings_of((33, 33)), PREPROCESSING)
    for part in ({"keep_odd": False}, {"pad_to_window": False}, {"average": "probabilities"}, {"flip": False}):
        other = class_probabilities(model, pixels, settings_of((33, 33), **part), PREPROCESSING)
        assert (full - other).abs().max() > 0.01, part


def test_a_result_of_another_size_leaves_out_the_padding_too():
    """A label map of twice the size shows the same image, not the beginning of the padded one."""
    model, image = Model(align_corners=False), blotted_image(21, 30)
    pixels = torch.from_numpy(image.transpose(2, 0, 1).copy())
    settings = settings_of((33, 33), (1.0,))
    small = class_probabilities(model, pixels, settings, PREPROCESSING)
    large = class_probabilities(model, pixels, settings, PREPROCESSING, size=(42, 60))
    assert large.shape == (4, 42, 60)
    assert segment(model, pixels, settings, PREPROCESSING, size=(42, 60)).shape == (42, 60)
    averaged = F.avg_pool2d(large[None], 2)[0]
    assert (averaged - small)[:, 2:-2, 2:-2].abs().max() < 0.1


def test_recipe_keys_lead_to_the_protocol_and_it_is_saved_with_the_checkpoint(tmp_path):
    words = "--test_crop_size 513 513 --test_pad_to_window --test_keep_odd --test_average logits --test_flip"
    settings = inference_settings(load_recipe(None, [*words.split(), "--test_scales", *map(str, RATIOS)]).data)
    assert settings == settings_of((513, 513))
    settings.save(tmp_path)
    assert json.loads((tmp_path / "inference_settings.json").read_text())["keep_odd"] is True
    assert InferenceSettings.load(tmp_path) == settings
