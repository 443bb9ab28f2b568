"""One reader: a file gives the same pixels in training, evaluation, prediction, image processors and pipelines."""

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
from hf_denseseg.data.reading.pixels import RGB_BYTES, PixelFormat, as_tensor
from hf_denseseg.data.segmentation import load_segmentation
from hf_denseseg.errors import InputError
from hf_denseseg.inference import SlidingWindowSegmentationPipeline
from hf_denseseg.inference.predict.inputs import Source, items_of
from hf_denseseg.inference.preprocessing import Preprocessing
from raster_files import write_bands, write_deep_png
from tiny_models import TINY_SETR

SIZE = (12, 20)
GRAY = np.arange(240, dtype=np.uint8).reshape(SIZE)
COLORS = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
BANDS = np.random.default_rng(1).integers(0, 4096, (*SIZE, 6), dtype=np.uint16)  # 12 bits


def as_rgb(gray):
    """Gray `(H, W)` -> `(H, W, 3)`."""
    return gray[..., None].repeat(3, axis=2)


def write_exif(path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees, clockwise
    Image.fromarray(COLORS).save(path, exif=exif)


def write_palette(path, **options):
    image = Image.new("P", SIZE[::-1])
    image.putpalette([channel for value in range(256) for channel in (value, 255 - value, value // 2)])
    image.putdata(GRAY.ravel().tolist())
    image.save(path, **options)


def gray_file(values):
    return lambda path: Image.fromarray(values).save(path)


def scaled(values, low, high):
    """Stored values -> 0 (black) to 1 (white), as the equation of `pixel_range` says."""
    return (np.clip(values.astype(np.float64), low, high) - low) / (high - low)


PALETTE = np.stack([GRAY, 255 - GRAY, GRAY // 2], axis=2)
DEEP, FLOAT = GRAY.astype(np.uint16), GRAY.astype(np.float32)
UNSIGNED, TWELVE = PixelFormat(3, "uint16"), (0, 4095)
# File name -> function that writes it, declared format, and the expected values, black is 0 and white 1.
FILES = {
    "gray.png": (gray_file(GRAY), RGB_BYTES, as_rgb(GRAY) / 255),
    "one_channel.png": (gray_file(GRAY), PixelFormat(1), GRAY[..., None] / 255),
    "rgba.png": (gray_file(np.dstack([COLORS, GRAY])), RGB_BYTES, COLORS / 255),
    "rgba_of_four.png": (gray_file(np.dstack([COLORS, GRAY])), PixelFormat(4), np.dstack([COLORS, GRAY]) / 255),
    "palette.png": (write_palette, RGB_BYTES, PALETTE / 255),
    "palette_transparent.png": (
        lambda path: write_palette(path, transparency=bytes(range(256))),
        RGB_BYTES,
        PALETTE / 255,
    ),
    "exif.png": (write_exif, RGB_BYTES, np.rot90(COLORS, -1) / 255),
    "16bit_with_8bit_values.png": (gray_file(DEEP), RGB_BYTES, as_rgb(GRAY) / 255),
    "16bit.png": (gray_file(DEEP * 257), UNSIGNED, as_rgb(GRAY) / 255),
    "16bit_dark.png": (gray_file(DEEP), UNSIGNED, as_rgb(GRAY) / 65535),
    "16bit_color.png": (lambda path: write_deep_png(path, BANDS[..., :3]), UNSIGNED, BANDS[..., :3] / 65535),
    "12bit.png": (gray_file(BANDS[..., 0]), PixelFormat(1, TWELVE), scaled(BANDS[..., :1], *TWELVE)),
    "12bit_rgb.tif": (
        lambda path: write_bands(path, BANDS[..., :3]),
        PixelFormat(3, TWELVE),
        scaled(BANDS[..., :3], *TWELVE),
    ),
    "float.tif": (gray_file(FLOAT / 255), PixelFormat(3, (0, 1)), as_rgb(GRAY) / 255),
    "float_with_8bit_values.tif": (gray_file(FLOAT), RGB_BYTES, as_rgb(GRAY) / 255),
    "window.tif": (gray_file(FLOAT - 100), PixelFormat(1, (-40, 90)), scaled(FLOAT[..., None] - 100, -40, 90)),
    "four_bands.tif": (
        lambda path: write_bands(path, (BANDS[..., :4] >> 4).astype(np.uint8)),
        PixelFormat(4),
        (BANDS[..., :4] >> 4) / 255,
    ),
    "six_bands.tif": (lambda path: write_bands(path, BANDS), PixelFormat(6, TWELVE), scaled(BANDS, *TWELVE)),
    "planar.tif": (
        lambda path: write_bands(path, BANDS, interleave="band", compress="lzw"),
        PixelFormat(6, TWELVE),
        scaled(BANDS, *TWELVE),
    ),
    "six_bands.npy": (lambda path: np.save(path, BANDS), PixelFormat(6, TWELVE), scaled(BANDS, *TWELVE)),
}
EVERY_FILE = pytest.mark.parametrize("name", FILES)
RAW = {"do_resize": False, "do_rescale": False, "do_normalize": False}


def options_of(pixel_format):
    """Options of an image processor for a format."""
    count = pixel_format.num_channels
    return {"pixel_range": pixel_format.pixel_range, "image_mean": [0.0] * count, "image_std": [1.0] * count}


@pytest.fixture
def image_file(name, tmp_path):
    path = tmp_path / name
    FILES[name][0](path)
    return path


def is_same(pixels, name):
    """Whether `(C, H, W)` pixels, white 255 (floating), or the largest number of their type, are as expected."""
    values = pixels if isinstance(pixels, torch.Tensor) else as_tensor(pixels)
    white = 255 if values.is_floating_point() else torch.iinfo(values.dtype).max
    expected = FILES[name][2].transpose(2, 0, 1)
    step = 255 if FILES[name][1].pixel_range == "uint8" else 65535  # what is stored is rounded to one of these
    return values.shape == expected.shape and np.abs(values.double().numpy() / white - expected).max() < 0.6 / step


@EVERY_FILE
def test_reader_gives_the_expected_pixels(name, image_file):
    assert is_same(read_image(image_file, pixel_format=FILES[name][1]), name)


@pytest.mark.parametrize("name", [name for name in FILES if not name.endswith("npy")])
def test_training_and_evaluation_data_see_them(name, image_file, tmp_path):
    _, pixel_format, expected = FILES[name]
    for folder in ("images", "labels"):
        (tmp_path / "pairs" / "train" / folder).mkdir(parents=True)
    image_file.rename(tmp_path / "pairs" / "train" / "images" / name)
    label = np.arange(expected.shape[0] * expected.shape[1], dtype=np.uint8).reshape(expected.shape[:2]) % 2
    Image.fromarray(label).save(tmp_path / "pairs" / "train" / "labels" / f"{name.partition('.')[0]}.png")
    (tmp_path / "pairs" / "classes.json").write_text(json.dumps(["a", "b"]))
    data = load_segmentation(tmp_path / "pairs", "train", pixel_format=pixel_format)
    assert is_same(EvalDataset(data)[0]["image"], name)
    unchanged = TrainAugmentation(
        expected.shape[:2],
        scale_range=(1.0, 1.0),
        flip=False,
        photometric=False,
        pad_color=[0] * pixel_format.num_channels,
    )
    assert is_same(TrainDataset(data, unchanged)[0]["pixel_values"], name)


@pytest.mark.parametrize("name", [name for name in FILES if not name.endswith("npy")])
def test_classification_data_see_them(name, image_file, tmp_path):
    for each in ("a", "b"):
        (tmp_path / "classes" / "train" / each).mkdir(parents=True)
        (tmp_path / "classes" / "train" / each / name).write_bytes(image_file.read_bytes())
    row = load_classification(tmp_path / "classes", "train", pixel_format=FILES[name][1]).dataset[0]
    assert is_same(row["image"], name)


@EVERY_FILE
def test_prediction_sees_them(name, image_file):
    (item,) = items_of(Source("x", str(image_file)), pixel_format=FILES[name][1])
    assert is_same(item.read(), name)


@EVERY_FILE
@pytest.mark.parametrize("backend", [SetrImageProcessor, SetrImageProcessorPil])
def test_image_processors_see_open_images_and_arrays(name, image_file, backend):
    processor = backend(**RAW, **options_of(FILES[name][1]))
    if FILES[name][1].num_channels in (1, 3) and "color" not in name and "rgb" not in name:
        with Image.open(image_file) as image:
            assert is_same(processor(image, return_tensors="pt")["pixel_values"][0], name)
    if name.endswith(("tif", "npy")) and FILES[name][1] != RGB_BYTES:
        low, high = FILES[name][1].bounds
        stored = FILES[name][2] * (high - low) + low
        for each in (stored, stored.transpose(2, 0, 1), torch.from_numpy(stored)):
            assert is_same(processor(each, return_tensors="pt")["pixel_values"][0], name)
        batch = processor([stored, stored], return_tensors="pt")["pixel_values"]
        assert len(batch) == 2 and is_same(batch[1], name)


@pytest.fixture(scope="module")
def models():
    made = {}

    def of_channels(count):
        if count not in made:
            config = SetrConfig(**TINY_SETR, auxiliary_layers=[1, 3], mla_layers=[0, 1, 2, 3], num_channels=count)
            made[count] = SetrForSemanticSegmentation(config).eval()
        return made[count]

    return of_channels


@EVERY_FILE
@pytest.mark.parametrize("pipeline_class", [None, SlidingWindowSegmentationPipeline])
def test_pipelines_see_them(name, image_file, models, pipeline_class):
    _, pixel_format, expected = FILES[name]
    segment = pipeline(
        "image-segmentation",
        model=models(pixel_format.num_channels),
        image_processor=SetrImageProcessor(**RAW, **options_of(pixel_format)),
        pipeline_class=pipeline_class,
        device="cpu",
    )
    inputs = [str(image_file)]
    if pixel_format.num_channels == 3 and "color" not in name and "rgb" not in name:
        inputs.append(Image.open(image_file))
    for given in inputs:
        found = segment.preprocess(given)
        found = found["items"][0] if "items" in found else found
        assert is_same(found["pixel_values"][0], name)
        assert tuple(int(side) for side in found["target_size"][0]) == expected.shape[:2]


@EVERY_FILE
def test_a_saved_processor_keeps_the_format(name, tmp_path):
    SetrImageProcessor(**options_of(FILES[name][1])).save_pretrained(tmp_path)
    for backend in (SetrImageProcessor, SetrImageProcessorPil):
        processor = backend.from_pretrained(tmp_path)
        assert PixelFormat.of_processor(processor) == FILES[name][1]
        assert Preprocessing.from_image_processor(processor).pixel_format == FILES[name][1]


# File, declared format, and what the message names: the value or number found, and what to declare.
CONTRADICTIONS = {
    "more than 8 bits": (DEEP * 257, RGB_BYTES, ("61423", "uint8", "uint16")),
    "12 bits in a color image": (BANDS[..., :3], RGB_BYTES, ("4095", "uint8", "uint16")),
    "floats from 0 to 1": (FLOAT / 255, RGB_BYTES, ("0.937255", "uint8", "[0, 1]")),
    "floats in a 16-bit range": (FLOAT / 255, PixelFormat(3, "uint16"), ("0.937255", "uint16", "[0, 1]")),
    "negative": (FLOAT - 100, RGB_BYTES, ("-100", "uint8", "[-100, 139]")),
    "8 bits declared as 16": (GRAY, PixelFormat(3, "uint16"), ("8 bits", "uint16", "uint8")),
    "four channels for three": ((BANDS[..., :4] >> 4).astype(np.uint8), RGB_BYTES, ("4, but", "is 3")),
    "six channels for four": (BANDS, PixelFormat(4, "uint16"), ("6, but", "is 4")),
    "color for one": (COLORS, PixelFormat(1), ("3, but", "is 1")),
    "gray for four": (GRAY, PixelFormat(4), ("1, but", "is 4")),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_what_contradicts_the_declared_format_is_refused(case, tmp_path):
    values, pixel_format, named = CONTRADICTIONS[case]
    write_bands(tmp_path / "image.tif", values if values.ndim == 3 else values[..., None])
    with pytest.raises(InputError) as raised:
        read_image(tmp_path / "image.tif", pixel_format=pixel_format)
    assert all(each in str(raised.value) for each in (*named, "image.tif"))
    processor = SetrImageProcessor(**options_of(pixel_format))
    if pixel_format != RGB_BYTES:
        with pytest.raises(InputError):
            processor(values, return_tensors="pt", input_data_format="channels_last")


@pytest.mark.parametrize("given", ["uint32", [5], [3, 3], [4, 1], [0, float("nan")], "0 255"])
def test_a_range_that_is_none_is_refused(given):
    with pytest.raises(InputError, match="pixel_range"):
        PixelFormat(3, given)


def test_a_range_maps_values_linearly_and_clips_beyond_it():
    values = np.array([[-1000.0, -160.0, 40.0, 240.0, 3000.0, np.nan]])[..., None]
    read = PixelFormat(1, (-160, 240)).read(values, "x")
    assert read[..., 0].tolist() == [[0, 0, 32768, 65535, 65535, 0]]
