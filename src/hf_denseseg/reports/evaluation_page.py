"""The outputs of a segmentation evaluation: CSV tables for programs and one self-contained page for people."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from hf_denseseg.data.labels import LabelSpec
from hf_denseseg.evaluation.segmentation_scores import ImageScore, confusions
from hf_denseseg.evaluation.size_recall import SIZES
from hf_denseseg.files import write_atomic
from hf_denseseg.reports.calibration import calibration_of
from hf_denseseg.reports.class_table import class_table, percent
from hf_denseseg.reports.rendering import csv_text, environment_of, image_uri, render
from hf_denseseg.visualization.evaluation import confusion_figure

SHOWN_CONFUSIONS = 15
HEADLINES = {
    "mean_iou": "mIoU",
    "pixel_accuracy": "pixel accuracy",
    "mean_accuracy": "mean accuracy",
    "frequency_weighted_iou": "frequency-weighted IoU",
    "boundary_iou": "boundary IoU",
    "category_iou": "category IoU",
    "mean_image_iou": "mIoU, mean over images",
}
RECALLS = {f"recall_{size}": size for size in SIZES}  # further columns of the per-class table


class Drawn(NamedTuple):
    """An image shown on the page.

    Args:
        name: id in the dataset.
        score: how well it was predicted.
        figure: image, ground truth, prediction and mistakes side by side.
    """

    name: str
    score: ImageScore
    figure: Image.Image


def write_tables(output: Path, scores: dict[str, Any], images: Iterable[tuple[str, ImageScore]]) -> None:
    """Write `classes.csv`, `images.csv` and `confusion.csv`; scores are fractions, empty where undefined.

    Args:
        output: folder.
        scores: what `Evaluation.scores` gave.
        images: name and score of each image, in the order of the dataset.
    """
    rows = scores["per_class"]
    category = {name: row["category"] for row in scores.get("per_category", ()) for name in row["classes"]}
    keys = ["iou", "accuracy", "boundary_iou", *(f"recall_{size}" for size in SIZES), "pixels"]
    write_atomic(
        output / "classes.csv",
        csv_text(
            ["class", "category", *keys],
            [[row["class"], category.get(row["class"]), *(row[key] for key in keys)] for row in rows],
        ),
    )
    names = [row["class"] for row in rows]
    write_atomic(
        output / "images.csv",
        csv_text(
            ["id", "mean_iou", "pixel_accuracy", "pixels", "confused", "with", "fraction_of_pixels"],
            [
                [name, *score[:3], *((names[score.confusion[0]], names[score.confusion[1]], score.confusion[2])
                                     if score.confusion else (None, None, None))]
                for name, score in images
            ],
        ),
    )  # fmt: skip
    write_atomic(
        output / "confusion.csv",
        csv_text(["ground_truth", "predicted", "pixels", "fraction_of_ground_truth"], confusions(scores)),
    )


def write_page(
    output: Path,
    results: dict[str, Any],
    spec: LabelSpec,
    *,
    protocol: str,
    chance: str,
    worst: Sequence[Drawn],
    best: Sequence[Drawn],
) -> None:
    """Write `index.html`.

    Args:
        output: folder.
        results: what `results.json` holds.
        spec: colors of the classes.
        protocol: the test protocol in words.
        chance: a sentence on what a constant prediction would score.
        worst: images with the lowest scores, worst first.
        best: images with the highest scores, best first.
    """
    scores = results["scores"]
    name = "/".join(Path(results["model"]).parts[-2:])  # a run's folder and `model`, or a hub id
    matrix = confusion_figure(torch.tensor(scores["confusion_matrix"]), spec.classes)
    page = render(
        "evaluation_page.html",
        title=f"{name} on {results['dataset']}",
        results=results,
        scores=scores,
        protocol=protocol,
        chance=chance,
        numbers=[
            *((label, f"{percent(scores[key])} %") for key, label in HEADLINES.items() if scores.get(key) is not None),
            *calibration_of(scores),
        ],
        table=class_table("semantic-segmentation", scores, RECALLS),
        colors=spec.palette,
        color_of=dict(zip(spec.classes, spec.palette, strict=True)),
        confusions=confusions(scores)[:SHOWN_CONFUSIONS],
        confusion_matrix=image_uri(matrix.quantize(256), "png"),
        worst=_figures(worst, spec.classes),
        best=_figures(best, spec.classes),
        environment=environment_of(results),
        protocol_json=json.dumps(results["protocol"], indent=1),
    )
    write_atomic(output / "index.html", page)


def _figures(drawn: Sequence[Drawn], classes: Sequence[str]) -> list[dict[str, str]]:
    """Name, caption and embedded image of each, as the template reads them."""
    figures = []
    for name, score, figure in drawn:
        caption = f"{name}: mIoU {percent(score.mean_iou)} %, pixel accuracy {percent(score.pixel_accuracy)} %"
        if score.confusion:
            actual, predicted, fraction = score.confusion
            mistake = f"{classes[actual]} taken for {classes[predicted]} ({percent(fraction)} % of the pixels)"
            caption += f"; mostly {mistake}"
        figures.append({"name": name, "caption": caption, "image": image_uri(figure, "jpeg")})
    return figures
