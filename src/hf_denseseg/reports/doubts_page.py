"""The outputs of `denseseg data doubt`: a CSV table, and one self-contained page of the most doubtful regions."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from hf_denseseg.data.labels import LabelSpec
from hf_denseseg.evaluation.label_doubt import Region
from hf_denseseg.files import write_atomic
from hf_denseseg.reports.rendering import csv_text, image_uri, render

HEADS = ("rank", "image", "label", "predicted", "top", "left", "height", "width", "pixels", "doubt")


class Outlined(NamedTuple):
    """A region shown on the page: id of its image, and the image with the region outlined."""

    image: str
    region: Region
    figure: Image.Image


def doubts_table(spec: LabelSpec, found: Iterable[Sequence]) -> str:
    """`doubts.csv`: one row per region, the most doubtful first.

    Args:
        spec: names of the classes.
        found: (id of the image, region) of each.
    """
    rows = []
    for rank, (image, region) in enumerate(found, 1):
        names = (spec.classes[region.label], spec.classes[region.predicted])
        box = (region.top, region.left, region.height, region.width)
        probabilities = (f"{each:.6f}" for each in (region.label_probability, region.predicted_probability))
        rows.append((rank, image, *names, *box, region.pixels, f"{region.doubt:.6f}", *probabilities))
    return csv_text((*HEADS, "label_probability", "predicted_probability"), rows)


def write_doubts_page(output: Path, spec: LabelSpec, images: int, regions: int, shown: Sequence[Outlined]) -> None:
    """Write `index.html`.

    Args:
        output: folder.
        spec: names and colors of the classes.
        images: their number.
        regions: number of rows in `doubts.csv`.
        shown: the most doubtful regions, in their order.
    """
    page = render(
        "doubts_page.html",
        title=f"Doubtful labels of {spec.name}",
        numbers=[("images", f"{images:,}"), ("doubtful regions", f"{regions:,}")],
        classes=spec.classes,
        colors=spec.palette,
        shown=[(each.image, each.region, image_uri(each.figure, "jpeg")) for each in shown],
    )
    write_atomic(output / "index.html", page)
