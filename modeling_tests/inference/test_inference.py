"""Inference against plain loops: windows, scales, flip, chunked argmax, the pipeline."""

import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torchvision.transforms.v2.functional import resize
from transformers import SegformerConfig, SegformerForSemanticSegmentation, SegformerImageProcessor, pipeline

from closeness import assert_highest, assert_same_outputs
from hf_denseseg.errors import InputError
from hf_denseseg.inference.pipeline import SlidingWindowSegmentationPipeline
from hf_denseseg.inference.preprocessing import Preprocessing, view_size
from hf_denseseg.inference.segmentation import (
    SMALL_MAP,
    class_probabilities,
    predict_logits,
    resize_argmax,
    resize_confidence,
    segment,
    segment_with_confidence,
)
from hf_denseseg.inference.settings import InferenceSettings
from hf_denseseg.inference.sliding_window import slide_logits

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
PREPROCESSING = Preprocessing(MEAN, STD)


class ToyModel(nn.Module):
    """Strided convolution with padding: the border of a window matters, as in real models."""

    def __init__(self, num_labels=5, stride=4, align_corners=False, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.projection = nn.Conv2d(3, num_labels, kernel_size=5, stride=stride, padding=2)
        self.config = types.SimpleNamespace(align_corners=align_corners)
        self.batch_sizes = []

    def forward(self, pixel_values):
        self.batch_sizes.append(len(pixel_values))
        return types.SimpleNamespace(logits=3 * self.projection(pixel_values))


class PixelModel(ToyModel):
    """1x1 convolution: commutes with the flip exactly."""

    def __init__(self, num_labels=5):
        super().__init__(num_labels)
        self.projection = nn.Conv2d(3, num_labels, kernel_size=1)


class ConstantModel(ToyModel):
    def forward(self, pixel_values):
        batch, _, height, width = pixel_values.shape
        logits = torch.arange(4.0).view(1, 4, 1, 1).expand(batch, 4, height // 4 + 1, width // 4 + 1)
        return types.SimpleNamespace(logits=logits)


def random_image(height, width, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (3, height, width), dtype=np.uint8))


def normalized(image):
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    return ((image / 255 - mean) / std)[None]


def upsample(logits, size, align_corners=False):
    return F.interpolate(logits.float(), size=size, mode="bilinear", align_corners=align_corners)


@torch.no_grad()
def loop_slide(model, pixel_values, crop, stride):
    """Sliding windows row by row, one window per call, with a count map."""
    _, _, height, width = pixel_values.shape
    total, count = 0, torch.zeros(height, width)
    y = 0
    while True:
        top = min(y, max(height - crop[0], 0))
        x = 0
        while True:
            left = min(x, max(width - crop[1], 0))
            window = pixel_values[:, :, top : top + crop[0], left : left + crop[1]]
            logits = upsample(model(window).logits, window.shape[-2:], model.config.align_corners)
            below, right = height - top - window.shape[-2], width - left - window.shape[-1]
            total = total + F.pad(logits, (left, right, top, below))
            count[top : top + window.shape[-2], left : left + window.shape[-1]] += 1
            if x + crop[1] >= width:
                break
            x += stride[1]
        if y + crop[0] >= height:
            break
        y += stride[0]
    return total / count, count


@pytest.mark.parametrize("align_corners", [False, True])
@hypothesis_settings(max_examples=15, deadline=None)
@given(
    size=st.tuples(st.integers(9, 40), st.integers(9, 40)),
    crop=st.tuples(st.integers(8, 24), st.integers(8, 24)),
    step=st.tuples(st.floats(0.3, 1.0), st.floats(0.3, 1.0)),
    window_batch_size=st.integers(1, 5),
    batch=st.integers(1, 2),
)
def test_sliding_window_equals_the_plain_loop(align_corners, size, crop, step, window_batch_size, batch):
    stride = tuple(max(int(length * fraction), 1) for length, fraction in zip(crop, step, strict=True))
    model = ToyModel(align_corners=align_corners)
    pixel_values = torch.cat([normalized(random_image(*size, seed)) for seed in range(batch)])
    settings = InferenceSettings("slide", crop, stride, window_batch_size=window_batch_size)
    expected, count = loop_slide(model, pixel_values, crop, stride)
    assert count.min() >= 1
    model.batch_sizes.clear()
    logits = slide_logits(model, pixel_values, settings)
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-5)
    assert max(model.batch_sizes) <= window_batch_size * batch


def test_windows_are_counted_as_by_hand():
    """Width 10, window 4, stride 3: columns 0-3, 3-6, 6-9; height 5: rows 0-3 and, shifted inside, 1-4."""

    class WindowIndex(ToyModel):
        calls = 0

        def forward(self, pixel_values):
            logits = torch.zeros(len(pixel_values), 6, 4, 4)
            for window in logits:
                window[self.calls] = 1.0
                self.calls += 1
            return types.SimpleNamespace(logits=logits)

    logits = slide_logits(WindowIndex(), torch.zeros(1, 3, 5, 10), InferenceSettings("slide", (4, 4), (3, 3)))
    columns = torch.tensor([1, 1, 1, 2, 1, 1, 2, 1, 1, 1])
    rows = torch.tensor([1, 2, 2, 2, 1])
    visits = (rows[:, None] * columns).float()
    first_window = torch.zeros(5, 10)
    first_window[:4, :4] = 1
    last_window = torch.zeros(5, 10)
    last_window[1:, 6:] = 1
    torch.testing.assert_close(logits[0, 0], first_window / visits)
    torch.testing.assert_close(logits[0, 5], last_window / visits)
    torch.testing.assert_close(logits.sum(1)[0], torch.ones(5, 10))


def test_constant_logits_stay_constant():
    logits = slide_logits(ConstantModel(), torch.zeros(1, 3, 37, 29), InferenceSettings("slide", (16, 16), (7, 11)))
    torch.testing.assert_close(logits, torch.arange(4.0).view(1, 4, 1, 1).expand(1, 4, 37, 29))


@pytest.mark.parametrize("crop", [(20, 31), (21, 40), (512, 512)])
def test_a_window_that_covers_the_image_is_the_whole_image_bit_for_bit(crop):
    model, image = ToyModel(), random_image(20, 31)
    whole, slide = InferenceSettings(), InferenceSettings("slide", crop)
    pixel_values = normalized(image)
    assert predict_logits(model, pixel_values, slide).equal(predict_logits(model, pixel_values, whole))
    upsampled = upsample(model(pixel_values).logits, (20, 31))
    assert slide_logits(model, pixel_values, slide).equal(upsampled)
    for scales in [(1.0,), (0.5, 1.0)]:
        both = [InferenceSettings(mode, crop, scales=scales, flip=True) for mode in ("whole", "slide")]
        first, second = (class_probabilities(model, image, each, PREPROCESSING) for each in both)
        assert first.equal(second)


@pytest.mark.parametrize("average", ["probabilities", "logits"])
@pytest.mark.parametrize("mode", ["whole", "slide"])
def test_scales_and_flip_equal_the_plain_loop(mode, average):
    model, image, scales = ToyModel(), random_image(30, 41), (0.5, 1.0, 1.75)
    settings = InferenceSettings(mode, (24, 24), (16, 16), scales, True, base_size=(32, 64), average=average)
    parts = []
    for scale in scales:
        factor = min(int(32 * scale) / 30, int(64 * scale) / 41)
        size = [int(30 * factor + 0.5), int(41 * factor + 0.5)]
        for flip in (False, True):
            pixel_values = normalized(resize(image, size, antialias=True))
            pixel_values = pixel_values.flip(-1) if flip else pixel_values
            with torch.no_grad():
                # A window that covers the view is the whole view, and its logits are resized once.
                if mode == "slide" and max(size) > 24:
                    logits, _ = loop_slide(model, pixel_values, (24, 24), (16, 16))
                else:
                    logits = model(pixel_values).logits
            logits = upsample(logits.flip(-1) if flip else logits, (30, 41))
            parts.append(logits.softmax(1) if average == "probabilities" else logits)
    expected = torch.stack(parts).mean(0)[0]
    expected = expected if average == "probabilities" else expected.softmax(0)
    probabilities = class_probabilities(model, image, settings, PREPROCESSING)
    torch.testing.assert_close(probabilities, expected, atol=1e-5, rtol=1e-5)
    assert_highest(segment(model, image, settings, PREPROCESSING), probabilities)
    ids, confidence = segment_with_confidence(model, image, settings, PREPROCESSING)
    assert_highest(ids, probabilities)
    assert_same_outputs(confidence, probabilities.amax(0))


def test_flip_changes_nothing_for_a_model_that_commutes_with_it():
    model, image = PixelModel(), random_image(13, 22)
    plain = class_probabilities(model, image, InferenceSettings(), PREPROCESSING)
    flipped = class_probabilities(model, image, InferenceSettings(flip=True), PREPROCESSING)
    torch.testing.assert_close(plain, flipped)


def test_flip_changes_the_result_of_a_model_that_does_not():
    model, image = ToyModel(), random_image(13, 22)
    plain = class_probabilities(model, image, InferenceSettings(), PREPROCESSING)
    flipped = class_probabilities(model, image, InferenceSettings(flip=True), PREPROCESSING)
    assert (plain - flipped).abs().max() > 1e-3


def test_the_result_has_the_images_own_size_or_the_one_asked_for():
    model, image = ToyModel(), random_image(33, 50)
    for flip in (False, True):
        settings = InferenceSettings(base_size=(16, 32), flip=flip)
        assert segment(model, image, settings, PREPROCESSING).shape == (33, 50)
        assert segment(model, image, settings, PREPROCESSING, size=(70, 20)).shape == (70, 20)


def test_one_view_equals_resizing_all_logits_then_argmax():
    model, image = ToyModel(num_labels=19), random_image(33, 50)
    with torch.no_grad():
        expected = upsample(model(normalized(image)).logits, (33, 50))
    ids, confidence = segment_with_confidence(model, image, InferenceSettings(), PREPROCESSING)
    assert_highest(ids, expected[0])
    assert ids.dtype == torch.int64
    torch.testing.assert_close(confidence, expected.softmax(1)[0].amax(0))


def test_scores_can_be_gathered_on_another_device():
    settings = InferenceSettings("slide", (16, 16), accumulation_device="meta")
    assert slide_logits(ToyModel(), normalized(random_image(20, 31)), settings).device.type == "meta"


@pytest.mark.parametrize(
    ("size", "scale", "base", "expected"),
    [
        ((1024, 2048), 1.0, (1025, 2049), (1025, 2049)),  # mmsegmentation's 769 Cityscapes base
        ((512, 683), 1.0, (512, 2048), (512, 683)),
        ((683, 512), 0.5, (2048, 512), (342, 256)),  # int(683 * 0.5 + 0.5)
        ((100, 900), 1.0, (512, 2048), (228, 2048)),  # the long limit decides
        ((60, 90), 0.5, None, (30, 45)),
    ],
)
def test_view_size_is_that_of_the_published_protocols(size, scale, base, expected):
    """SETR's own rule for the short side: `test_setr_protocol`."""
    for scales in [(scale,), (0.5, scale)]:
        assert view_size(size, scale, InferenceSettings(base_size=base, scales=scales)) == expected


@pytest.mark.parametrize(
    ("shape", "size", "chunk", "align_corners", "memory"),
    [
        ((1, 19, 64, 128), (480, 500), 8, False, "contiguous"),  # more than 16 MiB of logits: really in chunks
        ((1, 19, 64, 128), (480, 500), 8, False, "channels_last"),
        ((1, 19, 64, 128), (480, 500), 8, False, "bfloat16"),
        ((1, 19, 64, 128), (480, 500), 8, False, "ties"),
        ((1, 150, 33, 50), (153, 197), 8, True, "ties"),
        ((2, 21, 97, 31), (769, 141), 5, False, "contiguous"),
        ((1, 11, 7, 300), (60, 7001), 1, True, "channels_last"),
    ],
)
def test_chunked_argmax_is_identical_to_the_plain_one(shape, size, chunk, align_corners, memory):
    assert shape[0] * shape[1] * size[0] * size[1] > SMALL_MAP
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    if memory == "channels_last":
        logits = logits.to(memory_format=torch.channels_last)
    elif memory == "bfloat16":
        logits = logits.bfloat16()
    elif memory == "ties":
        logits = logits.round()
    plain = upsample(logits.contiguous(), size, align_corners).argmax(1)
    assert resize_argmax(logits, size, align_corners, chunk).equal(plain)


@hypothesis_settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 40), st.integers(1, 12), st.integers(1, 12)),
    size=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    chunk=st.integers(1, 9),
    align_corners=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_argmax_and_confidence_of_small_maps_equal_the_plain_ones(shape, size, chunk, align_corners, seed):
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).round(decimals=1)
    plain = upsample(logits, size, align_corners)
    assert resize_argmax(logits, size, align_corners, chunk).equal(plain.argmax(1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_denseseg.inference.segmentation.SMALL_MAP", 0)
        # Without a resize there is no rounding, so the chunks must agree on every tie at any size.
        assert resize_argmax(logits, shape[-2:], align_corners, chunk).equal(logits.argmax(1))
        ids, confidence = resize_confidence(logits, size, align_corners, chunk)
    torch.testing.assert_close(confidence, plain.softmax(1).amax(1))
    torch.testing.assert_close(plain.gather(1, ids[:, None])[:, 0], plain.amax(1))


def test_chunked_argmax_never_holds_all_classes():
    """Largest allocation at full resolution: a chunk of 8 classes, not 64."""
    logits = torch.randn(1, 64, 16, 16)
    with torch.profiler.profile(profile_memory=True) as profile:
        resize_argmax(logits, (300, 300), chunk_classes=8)
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert largest <= 8 * 300 * 300 * 4


def test_settings_survive_yaml_values_and_a_round_trip(tmp_path):
    settings = InferenceSettings.from_dict(
        {"mode": "slide", "crop_size": [769, 769], "scales": [1, 1.25], "flip": True}
    )
    assert settings.window() == ((769, 769), (513, 513))
    assert InferenceSettings(crop_size=512).window() == ((512, 512), (341, 341))
    assert settings.views == 4
    assert InferenceSettings.from_dict(settings.to_dict()) == settings
    settings.save(tmp_path)
    assert InferenceSettings.load(tmp_path) == settings
    (tmp_path / "inference_settings.json").write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        InferenceSettings.load(tmp_path)
    (tmp_path / "inference_settings.json").unlink()
    assert InferenceSettings.load(tmp_path) == InferenceSettings()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"crop_sise": [4, 4]}, "Did you mean 'crop_size'"),
        ({"mode": "window"}, "mode is 'window'"),
        ({"mode": "slide"}, "need `crop_size`"),
        ({"stride": [4, 4]}, "need `crop_size`"),
        ({"raise_short_side": True}, "need `crop_size`"),
        ({"crop_size": [4, 4], "stride": [5, 4]}, "leaves pixels"),
        ({"pad_to_window": True}, "need `crop_size`"),
        ({"crop_size": [4, 4], "raise_short_side": True, "keep_odd": True}, "contradict each other"),
        ({"keep_odd": "yes"}, "keep_odd is"),
        ({"crop_size": [4, 0]}, "crop_size is"),
        ({"crop_size": [4, 4, 4]}, "crop_size is"),
        ({"crop_size": "512"}, "crop_size is"),
        ({"base_size": [4.5, 4]}, "base_size is"),
        ({"scales": []}, "scales is"),
        ({"scales": [0.5, -1]}, "scales is"),
        ({"scales": "1.0"}, "scales is"),
        ({"flip": "yes"}, "flip is"),
        ({"average": "votes"}, "average is"),
        ({"window_batch_size": 0}, "window_batch_size is"),
        ({"chunk_classes": 1.5}, "chunk_classes is"),
        ({"accumulation_device": "gpu7"}, "no device"),
    ],
)
def test_wrong_settings_are_refused_with_the_fix(values, message):
    with pytest.raises(InputError, match=message):
        InferenceSettings.from_dict(values)


def test_preprocessing_reads_what_the_image_processor_does():
    processor = SegformerImageProcessor(size={"height": 24, "width": 32}, image_mean=MEAN, image_std=STD)
    preprocessing = Preprocessing.from_image_processor(processor)
    assert preprocessing == Preprocessing(MEAN, STD, (24, 96))
    image = random_image(24, 32)
    expected = processor(image, return_tensors="pt", do_resize=False)["pixel_values"][0]
    torch.testing.assert_close(preprocessing.normalize(image), expected)
    assert preprocessing.normalize(image).equal(normalized(image)[0])
    assert preprocessing.normalize(image[None].expand(2, -1, -1, -1)).equal(normalized(image).expand(2, -1, -1, -1))
    assert preprocessing.normalize(image, torch.bfloat16).equal(normalized(image)[0].bfloat16())
    raw = SegformerImageProcessor(do_rescale=False, do_resize=False, image_mean=[100.0] * 3, image_std=[50.0] * 3)
    preprocessing = Preprocessing.from_image_processor(raw)
    assert preprocessing.base_size is None
    expected = (image.float() - 100) / 50
    torch.testing.assert_close(preprocessing.normalize(image), expected)


@pytest.fixture(scope="module")
def segformer():
    torch.manual_seed(0)
    config = SegformerConfig(
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[8, 16],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=16,
        num_labels=4,
    )
    model = SegformerForSemanticSegmentation(config).eval()
    nn.init.normal_(model.decode_head.classifier.weight, std=2.0)
    return model, SegformerImageProcessor(do_resize=False)


def test_pipeline_slides_over_images_of_mixed_sizes_and_scores_the_masks(segformer):
    model, processor = segformer
    images = [
        Image.fromarray(random_image(h, w, h).permute(1, 2, 0).numpy()) for h, w in [(40, 60), (33, 33), (20, 70)]
    ]
    settings = InferenceSettings("slide", (32, 32), (20, 20))
    segmenter = pipeline(
        "image-segmentation",
        model=model,
        image_processor=processor,
        pipeline_class=SlidingWindowSegmentationPipeline,
        crop_size=(32, 32),
        stride=(20, 20),
        batch_size=2,
        device="cpu",
    )
    results = segmenter(images)
    assert len(results) == 3
    for image, result in zip(images, results, strict=True):
        pixel_values = processor(image, return_tensors="pt")["pixel_values"]
        probabilities = slide_logits(model, pixel_values, settings)[0].softmax(0)
        assert all(row["mask"].size == image.size and row["mask"].mode == "L" for row in result)
        labels = [model.config.label2id[row["label"]] for row in result]
        masks = np.stack([np.asarray(row["mask"]) == 255 for row in result])
        assert labels == sorted(set(labels)) and (masks.sum(0) == 1).all() and masks.any((1, 2)).all()
        assert_highest(np.array(labels)[masks.argmax(0)], probabilities)
        for row, label, mask in zip(result, labels, masks, strict=True):
            assert row["score"] == pytest.approx(float(probabilities[label].numpy()[mask].mean()), abs=1e-5)


def test_pipeline_without_a_window_equals_the_plain_pipeline(segformer):
    model, processor = segformer
    image = Image.fromarray(random_image(40, 60).permute(1, 2, 0).numpy())
    ours = pipeline(
        "image-segmentation",
        model=model,
        image_processor=processor,
        pipeline_class=SlidingWindowSegmentationPipeline,
        device="cpu",
    )
    plain = pipeline("image-segmentation", model=model, image_processor=processor, device="cpu")
    for first, second in zip(ours(image), plain(image), strict=True):
        assert first["label"] == second["label"]
        # Ours resizes a few classes at a time: a pixel whose two best classes are equal but for rounding may differ.
        assert (np.asarray(first["mask"]) != np.asarray(second["mask"])).mean() < 1e-3
    with pytest.raises(ValueError, match="Use 'semantic'"):
        ours(image, subtask="instance")
