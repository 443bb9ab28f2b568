"""What is left of an evaluation of segmentation: tables for programs (CSV) and one self-contained page for people."""

import csv
import html
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from hf_denseseg.data.labels import LabelSpec
from hf_denseseg.evaluation.segmentation_scores import Confusion, ImageScore, confusions
from hf_denseseg.evaluation.size_recall import SIZES
from hf_denseseg.files import write_atomic
from hf_denseseg.reports.html import class_name, color_style, embedded, number_boxes, percent, whole_page
from hf_denseseg.visualization.evaluation import confusion_picture

SHOWN_CONFUSIONS = 15
HEADLINES = {
    "mean_iou": "mIoU",
    "pixel_accuracy": "pixel accuracy",
    "mean_accuracy": "mean accuracy",
    "frequency_weighted_iou": "frequency-weighted IoU",
    "boundary_iou": "boundary IoU",
    "category_iou": "category IoU",
    "mean_image_iou": "mIoU, mean of pictures",
}
CLASS_COLUMNS = {
    "iou": "IoU",
    "boundary_iou": "boundary IoU",
    "accuracy": "accuracy",
    "recall_small": "small",
    "recall_medium": "medium",
    "recall_large": "large",
}
# Sorts a table by the column whose head is clicked: numbers from high to low, then the other way round.
SORTING = """<script>
for (const head of document.querySelectorAll("table.sortable th")) head.addEventListener("click", () => {
  const table = head.closest("table"), place = [...head.parentNode.children].indexOf(head);
  const down = head.dataset.order !== "down"; head.dataset.order = down ? "down" : "up";
  const rows = [...table.querySelectorAll("tr")].slice(1);
  const of = (row) => row.children[place].textContent.replaceAll(",", "");
  const number = (row) => parseFloat(of(row));
  rows.sort((a, b) => isNaN(number(a)) || isNaN(number(b)) ? isNaN(number(a)) - isNaN(number(b)) ||
    of(a).localeCompare(of(b)) : number(b) - number(a));
  if (!down) rows.reverse();
  rows.forEach((row) => row.parentNode.append(row));
});
</script>"""
PAGE_STYLE = """<style>
table.sortable th { cursor: pointer } td.number, th.number { text-align: right; font-variant-numeric: tabular-nums }
td.wide { width: 24% } td.wide div { height: .9rem; border-radius: .2rem; min-width: 1px }
figure { margin: 1rem 0 } figcaption { color: #444 } .half { max-width: 40rem }
</style>"""


class Drawn(NamedTuple):
    """A picture shown on the page."""

    name: str
    score: ImageScore
    strip: Image.Image


def write_tables(output: Path, scores: dict[str, Any], pictures: Iterable[tuple[str, ImageScore]]) -> None:
    """Write `classes.csv`, `images.csv` and `confusion.csv`; fractions, empty where a figure does not exist.

    Args:
        output: folder.
        scores: what `Evaluation.scores` gave.
        pictures: name and score of each picture, in the order of the data set.
    """
    rows = scores["per_class"]
    category = {name: row["category"] for row in scores.get("per_category", ()) for name in row["classes"]}
    keys = ["iou", "accuracy", "boundary_iou", *(f"recall_{size}" for size in SIZES), "pixels"]
    write_atomic(
        output / "classes.csv",
        _csv(
            ["class", "category", *keys],
            [[row["class"], category.get(row["class"]), *(row[key] for key in keys)] for row in rows],
        ),
    )
    names = [row["class"] for row in rows]
    write_atomic(
        output / "images.csv",
        _csv(
            ["id", "mean_iou", "pixel_accuracy", "pixels", "confused", "with", "share_of_pixels"],
            [
                [name, *score[:3], *((names[score.confusion[0]], names[score.confusion[1]], score.confusion[2])
                                     if score.confusion else (None, None, None))]
                for name, score in pictures
            ],
        ),
    )  # fmt: skip
    write_atomic(
        output / "confusion.csv",
        _csv(["truth", "predicted", "pixels", "share_of_truth"], confusions(scores)),
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
        spec: colours of the classes.
        protocol: the test protocol in words.
        chance: sentence on what an answer without looking would score.
        worst: pictures with the lowest scores, worst first.
        best: pictures with the highest, best first.
    """
    scores = results["scores"]
    colors = dict(zip(spec.classes, spec.palette, strict=True))
    numbers = [
        (label, f"{100 * scores[key]:.1f} %") for key, label in HEADLINES.items() if scores.get(key) is not None
    ]
    body = f"""{PAGE_STYLE}<p class="note">{results["images"]} pictures of {html.escape(results["split"])}, at the
labels' own resolution; {html.escape(protocol)}. {html.escape(chance)}</p>
{number_boxes(numbers)}
<h2>Classes</h2><p class="note">In percent. Small, medium and large: recall of the pixels of connected segments of that
size. Click a heading to sort.</p>{_class_table(scores, colors)}
{_category_table(scores)}
<h2>Sizes</h2><p class="note">Segments are pixels of one class that touch by their sides. Small is below
{100 * scores["size_limits"][0]:.2f} % of the picture, large from {100 * scores["size_limits"][1]:.2f} % on (32x32 and
96x96 pixels of 480x640, COCO's limits).</p>{_size_table(scores)}
<h2>Confusions</h2>{_confusion_table(confusions(scores)[:SHOWN_CONFUSIONS], colors)}
<p>{_png(confusion_picture(torch.tensor(scores["confusion_matrix"]), spec.classes), "confusion matrix")}</p>
<h2>Worst pictures</h2><p class="note">By the mean IoU of the classes in the picture. Mistakes are red, void is
black.</p>{_figures(worst, spec.classes)}
<h2>Best pictures</h2>{_figures(best, spec.classes)}
<h2>How this was measured</h2>{_method(results)}{SORTING}
"""
    name = "/".join(Path(results["model"]).parts[-2:])  # a run's folder and `model`, or a hub id
    write_atomic(output / "index.html", whole_page(f"{name} on {results['dataset']}", body))


def _class_table(scores: dict[str, Any], colors: dict[str, Any]) -> str:
    heads = '<th>class<th class="number">IoU<th>' + "".join(
        f'<th class="number">{label}' for key, label in CLASS_COLUMNS.items() if key != "iou"
    )
    rows = []
    for row in scores["per_class"]:
        color = colors[row["class"]]
        bar = f'<div style="{color_style(color)}; width: {100 * (row["iou"] or 0):.1f}%"></div>'
        cells = "".join(f'<td class="number">{percent(row[key])}' for key in CLASS_COLUMNS if key != "iou")
        rows.append(
            f'<tr><td>{class_name(row["class"], color)}<td class="number">{percent(row["iou"])}<td class="wide">{bar}'
            f'{cells}<td class="number">{row["pixels"]:,}</tr>'
        )
    return f'<table class="sortable"><tr>{heads}<th class="number">pixels</tr>{"".join(rows)}</table>'


def _category_table(scores: dict[str, Any]) -> str:
    if "per_category" not in scores:
        return ""
    rows = [
        f'<tr><td>{html.escape(row["category"])}<td class="number">{percent(row["iou"])}'
        f'<td class="number">{percent(row["accuracy"])}<td>{html.escape(", ".join(row["classes"]))}</tr>'
        for row in scores["per_category"]
    ]
    heads = '<th>category<th class="number">IoU<th class="number">accuracy<th>classes'
    return f"<h2>Categories</h2><table><tr>{heads}</tr>{''.join(rows)}</table>"


def _size_table(scores: dict[str, Any]) -> str:
    rows = [
        f'<tr><td>{size}<td class="number">{row["segments"]:,}<td class="number">{row["pixels"]:,}'
        f'<td class="number">{percent(row["recall"])}</tr>'
        for size, row in scores["size_recall"].items()
    ]
    heads = '<th>size<th class="number">segments<th class="number">pixels<th class="number">recall %'
    return f'<table class="half"><tr>{heads}</tr>{"".join(rows)}</table>'


def _confusion_table(pairs: Sequence[Confusion], colors: dict[str, Any]) -> str:
    rows = [
        f"<tr><td>{class_name(pair.truth, colors[pair.truth])}<td>{class_name(pair.predicted, colors[pair.predicted])}"
        f'<td class="number">{percent(pair.share)}<td class="number">{pair.pixels:,}</tr>'
        for pair in pairs
    ]
    heads = '<th>truth<th>taken for<th class="number">% of the truth<th class="number">pixels'
    return f"<table><tr>{heads}</tr>{''.join(rows)}</table>"


def _figures(drawn: Sequence[Drawn], classes: Sequence[str]) -> str:
    figures = []
    for name, score, strip in drawn:
        caption = f"{name}: mIoU {percent(score.mean_iou)} %, pixel accuracy {percent(score.pixel_accuracy)} %"
        if score.confusion:
            truth, predicted, share = score.confusion
            caption += f"; mostly {classes[truth]} taken for {classes[predicted]} ({percent(share)} % of the pixels)"
        data = io.BytesIO()
        strip.save(data, "JPEG", quality=85)
        picture = embedded(data.getvalue(), "jpeg", name)
        figures.append(f"<figure>{picture}<figcaption>{html.escape(caption)}</figcaption></figure>")
    return "".join(figures)


def _method(results: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    scores = results["scores"]
    return f"""<p>Counts are exact integers, summed over all pictures; IoU is taken of the sums, then averaged over the
classes. A class that is only predicted counts as 0 ("{scores["absent"]}"), as in mmsegmentation. Boundary IoU: Cheng
et al. 2021, {100 * scores["boundary_width"]:.0f} % of the diagonal; void belongs to no mask.
{html.escape(versions)}.</p>
<pre>{html.escape(results["command"])}</pre><pre>{html.escape(json.dumps(results["protocol"], indent=1))}</pre>"""


def _png(picture: Image.Image, description: str) -> str:
    data = io.BytesIO()
    picture.quantize(256).save(data, "PNG", optimize=True)
    return embedded(data.getvalue(), "png", description)


def _csv(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(heads)
    writer.writerows(rows)
    return text.getvalue()
