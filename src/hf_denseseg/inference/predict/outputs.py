"""Output of `denseseg predict`: label maps, class statistics, one table, videos."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hf_denseseg.data.reading.georeferenced import Georeference, save_geotiff
from hf_denseseg.errors import InputError
from hf_denseseg.files import atomic_path
from hf_denseseg.inference.predict.video import require_av, write_video

# Value of --write -> kind of file written for each image.
KINDS = {"masks": "mask", "overlays": "overlay", "probabilities": "probabilities", "confidence": "confidence"}
NEEDS = {"parquet": "masks", "video": "overlays"}  # one file for all images -> the files that it is made of
TILE_ABOVE_PIXELS = 2**22
_ROWS_HELD = 64  # rows of the table in memory at a time, with their masks


@dataclass(frozen=True)
class OutputSettings:
    """What is written.

    Args:
        write: keys of `KINDS` and `NEEDS`.
        raw_ids: label maps hold the ids of the dataset instead of 0..num_labels-1.
        tile_above_pixels: an image with more pixels is segmented in strips of rows, unless its probabilities are
            written.
        frame_stride: every N-th frame of a video is predicted; the frame rate of overlay videos is divided by it.

    Raises:
        InputError: a table without masks, a video without overlays, or a package that they need is not installed.
    """

    write: tuple[str, ...] = ("masks", "overlays")
    raw_ids: bool = False
    tile_above_pixels: int = TILE_ABOVE_PIXELS
    frame_stride: int = 1

    def __post_init__(self) -> None:
        for word, needed in NEEDS.items():
            if word in self.write and needed not in self.write:
                raise InputError(f"--write {word} is made of the {needed}. Add {needed} to --write.")
        if self.raw_ids and "masks" not in self.write:
            raise InputError("--raw_ids changes nothing without masks. Add masks to --write, or leave it out.")
        if "video" in self.write:
            require_av()
        if "parquet" in self.write:
            _require_datasets()


class PixelTally:
    """Counts the pixels of each class and sums their probabilities, a strip of rows at a time."""

    def __init__(self, num_labels: int) -> None:
        self.pixels, self.sums = np.zeros(num_labels, np.int64), np.zeros(num_labels)  # (C,) each

    def add(self, ids: np.ndarray, confidence: np.ndarray) -> None:
        """Add rows of class ids and of the probabilities of these classes, both `(rows, width)`."""
        flat = ids.ravel()
        self.pixels += np.bincount(flat, minlength=len(self.pixels))
        self.sums += np.bincount(flat, weights=confidence.ravel(), minlength=len(self.pixels))

    def rows(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """`{"class", "fraction", "score"}` of each class present: fraction of the pixels, mean probability."""
        total = max(int(self.pixels.sum()), 1)
        return [
            {
                "class": names[k],
                "fraction": float(self.pixels[k] / total),
                "score": float(self.sums[k] / self.pixels[k]),
            }
            for k in np.flatnonzero(self.pixels).tolist()
        ]


def id_map(ids: np.ndarray, palette: tuple[tuple[int, int, int], ...], raw: np.ndarray | None = None) -> Image.Image:
    """Label map as an image: one byte per pixel with the colors as palette, or 16 bits without colors.

    Args:
        ids: `(H, W)` uint8 or uint16, as they are written.
        palette: one color per class.
        raw: train id -> id in `ids`; None if `ids` holds train ids.
    """
    image = Image.fromarray(ids)
    if ids.dtype == np.uint8:
        colors = np.zeros((256, 3), np.uint8)
        colors[np.arange(len(palette)) if raw is None else raw[: len(palette)]] = palette  # row = id in the file
        last = len(palette) if raw is None else 256
        image.putpalette(colors[:last].ravel().tolist())
    return image


def save_ids(
    path: Path,
    ids: np.ndarray,
    palette: tuple[tuple[int, int, int], ...],
    raw: np.ndarray | None,
    place: Georeference | None,
) -> None:
    """Write a label map: as PNG, or as GeoTIFF where its image has a place on the earth; arguments of `id_map`."""
    if place is None:
        id_map(ids, palette, raw).save(path)
        return
    numbers = range(len(palette)) if raw is None else raw[: len(palette)].tolist()
    save_geotiff(path, ids, place, dict(zip(numbers, palette, strict=True)))


def nearest_pixels(shown: int, stored: int) -> np.ndarray:
    """Number of the stored pixel in the middle of each of the `shown` pixels of an edge, ascending."""
    return ((np.arange(shown) + 0.5) * stored / shown).astype(np.int64)


def write_table(records: list[dict[str, Any]], output: Path) -> str:
    """Write `results.parquet`: one row per image with its mask, for `datasets.Dataset.from_parquet`.

    Args:
        records: one per image, with the path of its mask.
        output: folder of the results.

    Returns:
        Name of the file.
    """
    import pyarrow
    import pyarrow.parquet

    datasets = _require_datasets()
    number, text = datasets.Value("float64"), datasets.Value("string")
    schema = datasets.Features(
        {
            "id": text,
            "source": text,
            "frame": datasets.Value("int64"),
            "seconds": number,
            "height": datasets.Value("int32"),
            "width": datasets.Value("int32"),
            "classes": datasets.List({"class": text, "fraction": number, "score": number}),
            "mask": datasets.Image(),
        }
    ).arrow_schema
    name = "results.parquet"
    with atomic_path(output / name) as aside, pyarrow.parquet.ParquetWriter(aside, schema) as writer:
        for start in range(0, len(records), _ROWS_HELD):
            rows = [
                {
                    **{key: record.get(key) for key in ("id", "source", "frame", "seconds", "classes")},
                    "height": record["size"][0],
                    "width": record["size"][1],
                    "mask": {"bytes": (output / record["mask"]).read_bytes(), "path": record["mask"]},
                }
                for record in records[start : start + _ROWS_HELD]
            ]
            writer.write_table(pyarrow.Table.from_pylist(rows, schema=schema))
    return name


def write_overlay_videos(records: list[dict[str, Any]], output: Path, frame_stride: int) -> list[str]:
    """Make a video of the overlays of each video's frames, at its frame rate divided by `frame_stride`.

    Returns:
        Paths of the videos below the folder: `overlays/NAME.mp4`.
    """
    frames = [record for record in records if "frame" in record]
    places = []
    for name, group in groupby(frames, key=lambda record: record["id"].rpartition("/")[0]):
        of_one = list(group)
        places.append(f"overlays/{name}.mp4")
        rate = Fraction(of_one[0]["frame_rate"]) / frame_stride
        write_video((output / record["overlay"] for record in of_one), output / places[-1], rate)
    return places


def _require_datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise InputError("--write parquet needs datasets. Install it: pip install 'hf-denseseg[train]'.") from error
    return datasets
