"""Rasters of map data: the place on the earth goes from the image to the mask, and only windows are read."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from hf_denseseg import SetrConfig, SetrForSemanticSegmentation, SetrImageProcessor
from hf_denseseg.cli import main
from hf_denseseg.data.reading.georeferenced import Raster, is_georeferenced
from hf_denseseg.data.reading.images import read_image
from hf_denseseg.data.reading.pixels import RGB_BYTES, PixelFormat
from hf_denseseg.errors import InputError
from hf_denseseg.inference import large_images
from hf_denseseg.models.channels import channel_statistics
from raster_files import write_bands
from tiny_models import TINY_SETR

rasterio = pytest.importorskip("rasterio", reason="rasterio (extra `geo`) is not installed")
PLACE = rasterio.Affine(0.5, 0.0, 440_000.0, 0.0, -0.5, 5_000_000.0)  # pixels of half a meter
CRS = "EPSG:32633"
BANDS = PixelFormat(4, "uint16")
SLIDE = ["--test_crop_size", "64", "64", "--test_stride", "48", "48"]


def scene(height, width):
    rng = np.random.default_rng(0)
    ramp = np.indices((height, width)).sum(0)[..., None] * 300 % 60000
    return (ramp + rng.integers(0, 5000, (height, width, 4))).astype(np.uint16)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = SetrConfig(**TINY_SETR, auxiliary_layers=[1, 3], mla_layers=[0, 1, 2, 3], num_channels=4)
    SetrForSemanticSegmentation(config).save_pretrained(folder)
    SetrImageProcessor(do_resize=False, pixel_range="uint16", **channel_statistics(4)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def maps(tmp_path_factory):
    """The same scene with and without a place on the earth."""
    folder = tmp_path_factory.mktemp("maps")
    write_bands(folder / "plain.tif", scene(150, 220))
    write_bands(folder / "placed.tif", scene(150, 220), transform=PLACE, crs=CRS)
    return folder


def predict(checkpoint, image, output, *words):
    assert main(["predict", str(checkpoint), str(image), "--output_dir", str(output), *SLIDE, *words]) == 0
    (record,) = json.loads((output / "results.json").read_text())["images"]
    return record


@pytest.mark.parametrize("tiled", [False, True])
def test_the_mask_lies_where_its_image_lies_and_holds_the_same_ids(checkpoint, maps, tmp_path, tiled, monkeypatch):
    words = ["--tile_above_pixels", "10000"] if tiled else []
    plain = predict(checkpoint, maps / "plain.tif", tmp_path / "plain", *words)
    if tiled:  # whole rasters are not read
        monkeypatch.setattr(large_images, "BLOCK_COLUMNS", 100)
        monkeypatch.setattr(Raster, "load", lambda self: pytest.fail("read at once"))
    placed = predict(checkpoint, maps / "placed.tif", tmp_path / "placed", *words)
    assert plain["mask"] == "masks/plain.png" and placed["mask"] == "masks/placed.tif"
    assert "georeference" not in plain
    assert placed["georeference"] == {"crs": CRS, "transform": list(PLACE)[:6]}
    with rasterio.open(tmp_path / "placed" / placed["mask"]) as mask:
        assert mask.crs.to_string() == CRS and mask.transform == PLACE
        ids = mask.read(1)
        assert len({mask.colormap(1)[number] for number in range(3)}) == 3
    assert len(np.unique(ids)) > 1
    np.testing.assert_array_equal(ids, np.asarray(Image.open(tmp_path / "plain" / plain["mask"])))
    assert placed["classes"] == plain["classes"]
    files = (tmp_path / "placed" / placed["overlay"], tmp_path / "plain" / plain["overlay"])
    first, second = (np.asarray(Image.open(file), dtype=int) for file in files)
    assert first.shape == second.shape == (150, 220, 3) and np.abs(first - second).mean() < 3  # JPEG


def test_blocks_of_columns_are_not_resized_into_a_box_that_the_raster_fills(checkpoint, maps, tmp_path, monkeypatch):
    monkeypatch.setattr(large_images, "BLOCK_COLUMNS", 100)
    found = []
    for name, box in (("without", []), ("within", ["--test_base_size", "150", "220"])):
        record = predict(checkpoint, maps / "placed.tif", tmp_path / name, "--tile_above_pixels", "10000", *box)
        with rasterio.open(tmp_path / name / record["mask"]) as mask:
            found.append(mask.read(1))
    np.testing.assert_array_equal(*found)


def test_overlays_of_windowed_rasters_are_reduced(checkpoint, maps, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_denseseg.inference.predict.segmentation.REDUCED_SIDE", 110)
    record = predict(checkpoint, maps / "placed.tif", tmp_path, "--tile_above_pixels", "10000")
    with Image.open(tmp_path / record["overlay"]) as overlay:
        assert overlay.size == (110, 75)
    with rasterio.open(tmp_path / record["mask"]) as mask:
        assert mask.shape == (150, 220)


def test_windows_are_parts_of_the_whole_image(maps):
    raster = Raster.open(str(maps / "placed.tif"), BANDS)
    whole = read_image(maps / "placed.tif", pixel_format=BANDS)
    np.testing.assert_array_equal(raster.load(), whole)
    np.testing.assert_array_equal(raster.window(20, 30, 70, 130), whole[20:70, 30:130])
    assert raster.reduced(110).shape == (75, 110, 4)


def test_an_opaque_band_is_left_out_and_another_one_is_not(tmp_path):
    colors = (scene(40, 60)[..., :3] >> 8).astype(np.uint8)
    for name, opacity in (("opaque", 255), ("holes", np.arange(60) % 256)):
        values = np.dstack([colors, np.broadcast_to(np.uint8(opacity), (40, 60))])
        write_bands(tmp_path / f"{name}.tif", values, transform=PLACE, crs=CRS)
    assert Raster.open(str(tmp_path / "opaque.tif"), RGB_BYTES).load().mode == "RGB"
    with pytest.raises(InputError, match="4, but num_channels is 3"):
        Raster.open(str(tmp_path / "holes.tif"), RGB_BYTES).load()


def test_damaged_rasters_are_left_out_with_a_reason(checkpoint, maps, tmp_path, capsys):
    content = (maps / "placed.tif").read_bytes()
    (tmp_path / "cut.tif").write_bytes(content[: len(content) // 2])
    assert is_georeferenced(str(maps / "placed.tif")) and not is_georeferenced(str(maps / "plain.tif"))
    command = ["predict", str(checkpoint), str(tmp_path / "cut.tif"), "--output_dir", str(tmp_path / "out"), *SLIDE]
    assert main(command) == 1
    assert "cut.tif" in capsys.readouterr().err


def test_larger_rasters_than_allowed_are_refused_before_they_are_read(checkpoint, maps, tmp_path, capsys):
    command = ["predict", str(checkpoint), str(maps / "placed.tif"), "--output_dir", str(tmp_path / "out")]
    assert main([*command, "--max_pixels", "1000"]) == 1
    assert "150x220" in capsys.readouterr().err
