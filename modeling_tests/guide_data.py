"""What the readers of a guide bring: exports of annotation tools, a video, a raster, other kinds of images."""

from fractions import Fraction

import numpy as np
from PIL import Image

import export_writers as writers
from export_writers import Thing, box
from hf_denseseg.inference.predict.video import write_video
from raster_files import write_bands

# Images with objects that stand elsewhere in each.
SCENES = {
    f"street {k}": [
        Thing("car", [box(4 + 2 * k, 8, 24 + 2 * k, 24)]),
        Thing("tree", [[(30, 2 + k), (50, 6 + k), (36, 20 + k)]]),
        Thing("зебра", [box(0, 30, 20, 40)]),
    ]
    for k in range(8)
}
TOOLS = {
    "cvat": writers.cvat,
    "roboflow": writers.roboflow_masks,
    "labelme": writers.labelme,
    "label_studio": writers.label_studio_brushes,
    "supervisely": writers.supervisely_polygons,
    "coco": writers.coco_official,
    "yolo": writers.yolo,
    "voc": writers.cvat_palette,
}


def write_exports(folder):
    """One folder per annotation tool."""
    for tool, write in TOOLS.items():
        (folder / "exports" / tool).mkdir(parents=True)
        write(folder / "exports" / tool, SCENES)


def write_video_and_raster(folder):
    """drive.mp4 of 10 frames, and map.tif at a place on the earth."""
    import rasterio

    write_video(sorted((folder / "streets/train/images").iterdir())[:10], folder / "drive.mp4", Fraction(5))
    place = rasterio.Affine(0.5, 0.0, 440_000.0, 0.0, -0.5, 5_000_000.0)
    values = np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8)
    write_bands(folder / "map.tif", values, transform=place, crs="EPSG:32633")


def write_tiles_and_lesions(folder):
    """Images of four channels and 12 bits with label maps, and black-and-white masks."""
    random = np.random.default_rng(0)
    for name in ("tiles", "lesions"):
        for part in ("images", "masks"):
            (folder / name / part).mkdir(parents=True)
    for k in range(8):
        ids = np.zeros((40, 56), np.uint8)
        ids[8 : 20 + k, 10:30] = 1
        values = random.integers(0, 4096, (40, 56, 4), dtype=np.uint16)
        np.save(folder / f"tiles/images/{k}.npy", values)
        Image.fromarray(ids).save(folder / f"tiles/masks/{k}.png")
        Image.fromarray(values[..., :3].astype(np.uint8)).save(folder / f"lesions/images/{k}.png")
        Image.fromarray(ids * 255).save(folder / f"lesions/masks/{k}.png")
    (folder / "tiles/classes.json").write_text('["ground", "field"]')


# Page -> function that writes what its reader has, into a folder.
BROUGHT = {
    "docs/data.md": write_tiles_and_lesions,
    "docs/own_data.md": write_exports,
    "docs/prediction.md": write_video_and_raster,
}
