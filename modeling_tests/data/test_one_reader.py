"""Shared image reading: a file gives the same pixels in training, evaluation, image processors and pipelines."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline

from hf_denseseg import SetrConfig, SetrForSemanticSegmentation, SetrImageProcessor, SetrImageProcessorPil
from hf_denseseg.data.augmentation.segmentation import EvalDataset, TrainAugmentation, TrainDataset
from hf_denseseg.data.classification import load_classification
from hf_denseseg.data.reading.images import read_image
from hf_denseseg.data.segmentation import load_segmentation
from hf_denseseg.inference import SlidingWindowSegmentationPipeline
from tiny_models import TINY_SETR

GRAY = np.arange(240, dtype=np.uint8).reshape(12, 20)
COLORS = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)


def as_rgb(gray):
    """Gray `(H, W)` -> `(H, W, 3)`."""
    return gray[..., None].repeat(3, axis=2)


def write_exif(path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees, clockwise
    Image.fromarray(COLORS).save(path, exif=exif)


def write_palette(path, **options):
    image = Image.new("P", (20, 12))
    image.putpalette([channel for value in range(256) for channel in (value, 255 - value, value // 2)])
    image.putdata(GRAY.ravel().tolist())
    image.save(path, **options)


PALETTE = np.stack([GRAY, 255 - GRAY, GRAY // 2], axis=2)
DEEP = GRAY.astype(np.uint16)
# File name -> function that writes it, and the expected pixels.
FILES = {
    "gray.png": (lambda path: Image.fromarray(GRAY).save(path), as_rgb(GRAY)),
    "rgba.png": (
        lambda path: Image.fromarray(np.dstack([COLORS, GRAY])).save(path),
        COLORS,
    ),
    "palette.png": (write_palette, PALETTE),
    "palette_transparent.png": (lambda path: write_palette(path, transparency=bytes(range(256))), PALETTE),
    "exif.png": (write_exif, np.rot90(COLORS, -1)),
    "16bit_with_8bit_values.png": (lambda path: Image.fromarray(DEEP).save(path), as_rgb(GRAY)),
    "16bit.png": (lambda path: Image.fromarray(DEEP * 257).save(path), as_rgb(GRAY)),
    "float.tif": (lambda path: Image.fromarray(GRAY * np.float32(257)).save(path), as_rgb(GRAY)),
    "float_with_8bit_values.tif": (lambda path: Image.fromarray(GRAY.astype(np.float32)).save(path), as_rgb(GRAY)),
}
CLIPPED_BY_TRANSFORMERS = ("16bit.png", "float.tif")
EVERY_FILE = pytest.mark.parametrize("name", FILES)
RAW = {"do_resize": False, "do_rescale": False, "do_normalize": False}


@pytest.fixture
def image_file(name, tmp_path):
    path = tmp_path / name
    FILES[name][0](path)
    return path


def as_pixels(pixel_values):
    """`(3, H, W)` of any type -> `(H, W, 3)` uint8."""
    assert torch.equal(pixel_values, pixel_values.round())
    return pixel_values.to(torch.uint8).permute(1, 2, 0).numpy()


@EVERY_FILE
def test_reader_gives_the_expected_pixels(name, image_file):
    assert np.array_equal(np.asarray(read_image(image_file)), FILES[name][1])


@EVERY_FILE
def test_training_and_evaluation_data_see_them(name, image_file, tmp_path):
    expected = FILES[name][1]
    for folder in ("images", "labels"):
        (tmp_path / "pairs" / "train" / folder).mkdir(parents=True)
    image_file.rename(tmp_path / "pairs" / "train" / "images" / name)
    label = np.arange(expected.shape[0] * expected.shape[1], dtype=np.uint8).reshape(expected.shape[:2]) % 2
    Image.fromarray(label).save(tmp_path / "pairs" / "train" / "labels" / f"{name.partition('.')[0]}.png")
    (tmp_path / "pairs" / "classes.json").write_text(json.dumps(["a", "b"]))
    data = load_segmentation(tmp_path / "pairs", "train")
    assert np.array_equal(as_pixels(EvalDataset(data)[0]["image"]), expected)
    unchanged = TrainAugmentation(expected.shape[:2], scale_range=(1.0, 1.0), flip=False, photometric=False)
    assert np.array_equal(as_pixels(TrainDataset(data, unchanged)[0]["pixel_values"]), expected)


@EVERY_FILE
def test_classification_data_see_them(name, image_file, tmp_path):
    for each in ("a", "b"):
        (tmp_path / "classes" / "train" / each).mkdir(parents=True)
        (tmp_path / "classes" / "train" / each / name).write_bytes(image_file.read_bytes())
    row = load_classification(tmp_path / "classes", "train").dataset[0]
    assert np.array_equal(np.asarray(row["image"]), FILES[name][1])


@EVERY_FILE
@pytest.mark.parametrize("backend", [SetrImageProcessor, SetrImageProcessorPil])
def test_image_processors_see_them(name, image_file, backend):
    with Image.open(image_file) as image:
        pixel_values = backend(**RAW)(image, return_tensors="pt")["pixel_values"][0]
    assert np.array_equal(as_pixels(pixel_values), FILES[name][1])


@pytest.fixture(scope="module")
def model():
    return SetrForSemanticSegmentation(
        SetrConfig(**TINY_SETR, auxiliary_layers=[1, 3], mla_layers=[0, 1, 2, 3])
    ).eval()


@EVERY_FILE
@pytest.mark.parametrize("pipeline_class", [None, SlidingWindowSegmentationPipeline])
def test_pipelines_see_them(name, image_file, model, pipeline_class):
    segment = pipeline(
        "image-segmentation",
        model=model,
        image_processor=SetrImageProcessor(**RAW),
        pipeline_class=pipeline_class,
        device="cpu",
    )
    expected = FILES[name][1]
    inputs = [read_image(image_file), str(image_file), Image.open(image_file)]
    if pipeline_class is None and name in CLIPPED_BY_TRANSFORMERS:
        inputs = inputs[:1]  # the loader of transformers clips at 255 before the image processor is called
    for given in inputs:
        found = segment.preprocess(given)
        found = found["items"][0] if "items" in found else found
        assert np.array_equal(as_pixels(found["pixel_values"][0]), expected)
        assert tuple(int(side) for side in found["target_size"][0]) == expected.shape[:2]
