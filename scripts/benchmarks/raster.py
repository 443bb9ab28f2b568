"""`denseseg predict` on one huge GeoTIFF: peak memory of the process, and whether the mask lies where the image lies.

The raster is smooth noise, written in tiles. The model is a SETR of four narrow layers with random weights: what is
measured is the memory beside the model. Windows of 512x512 do not overlap.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from predict import predict

from hf_denseseg.models.auto.registration import create_image_processor
from hf_denseseg.models.setr.configuration_setr import SetrConfig
from hf_denseseg.models.setr.modeling_setr import SetrForSemanticSegmentation

CLASSES, WINDOW, TILE, TARGET_MIB = 19, 512, 512, 2048
MODEL = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2, "decoder_hidden_size": 16}
CRS, PLACE = "EPSG:32633", (0.5, 0.0, 440_000.0, 0.0, -0.5, 5_000_000.0)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--side", type=int, default=20_000, help="side of the raster in pixels (default 20000)")


def save_model(folder: Path) -> None:
    torch.manual_seed(0)
    config = SetrConfig(**MODEL, image_size=WINDOW, num_labels=CLASSES, auxiliary_layers=[1], mla_layers=[0, 1, 2, 3])
    SetrForSemanticSegmentation(config).save_pretrained(folder)
    create_image_processor(config, do_resize=False).save_pretrained(folder)


def save_raster(path: Path, side: int) -> None:
    """Three bands of bytes, one row of tiles at a time."""
    import rasterio
    from rasterio.windows import Window

    rng = np.random.default_rng(0)
    options = {"tiled": True, "blockxsize": TILE, "blockysize": TILE, "compress": "deflate", "photometric": "rgb"}
    with rasterio.open(
        path,
        "w",
        driver="GTiff",
        count=3,
        height=side,
        width=side,
        dtype="uint8",
        crs=CRS,
        transform=rasterio.Affine(*PLACE),
        **options,
    ) as raster:
        for top in range(0, side, TILE):
            rows = min(TILE, side - top)
            coarse = rng.integers(0, 256, (3, -(-rows // 16), -(-side // 16)), dtype=np.uint8)
            band = coarse.repeat(16, axis=1).repeat(16, axis=2)[:, :rows, :side]
            raster.write(band, window=Window(0, top, side, rows))


def run(args: argparse.Namespace) -> dict:
    import rasterio

    with tempfile.TemporaryDirectory() as folder:
        at, size = Path(folder), str(WINDOW)
        save_model(at / "model")
        save_raster(at / "map.tif", args.side)
        words = [
            str(at / "model"),
            str(at / "map.tif"),
            "--output_dir",
            str(at / "out"),
            "--write",
            "masks",
            "overlays",
        ]
        words += ["--test_crop_size", size, size, "--test_stride", size, size, "--max_pixels", str(args.side**2)]
        measured = predict(words, 1)
        (record,) = json.loads((at / "out" / "results.json").read_text())["images"]
        with rasterio.open(at / "out" / record["mask"]) as mask:
            kept = mask.crs.to_string() == CRS and tuple(mask.transform)[:6] == PLACE
            shape = list(mask.shape)
        return {
            "size": [args.side] * 2,
            "classes": CLASSES,
            "window": [WINDOW] * 2,
            **measured,
            "mask_size": shape,
            "georeference_kept": kept,
            "target_peak_mib": TARGET_MIB,
        }


def readme_rows(result: dict) -> list[tuple[str, str, str]]:
    """(what, ours, peer) for the table of measurements."""
    figures = result["figures"]
    side = figures["size"][0]
    what = f"`denseseg predict`, GeoTIFF of {side}x{side}, 19 classes, georeference kept, CPU"
    return [(what, f"{figures['peak_mib']:.0f} MiB peak of the process", "–")]
