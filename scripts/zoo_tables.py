"""The tables of docs/zoo.md, from recipes, measured runs, and what `scripts/benchmark.py zoo` wrote."""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from hf_denseseg.reports.class_table import percent
from hf_denseseg.reports.model_card import NOT_MEASURED, published_rows

ROOT = Path(__file__).resolve().parents[1]
FILE, RESULTS = ROOT / "scripts" / "benchmarks" / "results" / "zoo.json", ROOT / "scripts" / "results"
SEGMENTATION = dict.fromkeys(("ADE20K", "Cityscapes", "Pascal Context"), ("mean_iou", "mean_iou_multi_scale"))
# Heading, tasks, what the scores are, and dataset -> keys of its published figures, one column each.
TABLES: tuple[tuple[str, tuple[str, ...], str, dict[str, tuple[str, ...]]], ...] = (
    (
        "Semantic segmentation",
        ("semantic-segmentation",),
        "Scores: mIoU in percent, single scale / multi-scale with flip.",
        {f"{name} val": keys for name, keys in SEGMENTATION.items()},
    ),
    (
        "Image classification",
        ("image-classification",),
        "Scores: top-1 accuracy in percent on central crops.",
        {"ImageNet-1K val": ("top1",), "ImageNet-V2 matched frequency": ("top1",)},
    ),
    (
        "Object detection and instance segmentation",
        ("object-detection", "instance-segmentation"),
        "Scores: AP in percent of boxes / of masks.",
        {"COCO val2017": ("box_ap", "mask_ap")},
    ),
)


class Row(NamedTuple):
    """One published row of a variant: the recipe that trains it, its steps and its figures."""

    recipe: Path
    steps: int
    published: dict[str, Any]


def recipe_rows() -> Iterator[tuple[str, Row]]:
    """Variant and row of every row that a recipe names, ablations left out."""
    for path in sorted((ROOT / "scripts" / "recipes").rglob("*.yaml")):
        recipe = yaml.safe_load(path.read_text())
        for published in published_rows(recipe.get("published")) if "_ablation_" not in path.name else ():
            yield published.get("variant", recipe["model"]), Row(path, recipe["max_steps"], dict(published))


def best_row(rows: list[Row], dataset: str, keys: tuple[str, ...]) -> Row | None:
    """The longest schedule of a dataset, with a figure and without a note where there is one."""
    found = [row for row in rows if row.published["dataset"] == dataset]
    return max(
        found,
        key=lambda row: (bool(row.published.keys() & set(keys)), "note" not in row.published, row.steps),
        default=None,
    )


def figures(scores: Mapping[str, Any], keys: tuple[str, ...]) -> str:
    """Scores in percent; of a detector without masks only that of the boxes."""
    kept = [key for key in keys if key in scores or key != "mask_ap"]
    return " / ".join(percent(scores.get(key)) for key in kept)


def measured(row: Row, keys: tuple[str, ...]) -> str | None:
    """Scores of a finished run of the row's recipe."""
    file = RESULTS / row.recipe.stem / "results.json"
    if not file.exists():
        return None
    run = json.loads(file.read_text())
    return f"{figures(run['scores'], keys)} ({run['dataset']} {run['split']})"


def milliseconds(variant: Mapping[str, Any], kind: str) -> str:
    if f"{kind}_milliseconds" in variant:
        return f"{variant[f'{kind}_milliseconds']:,.0f}"
    return "not possible" if kind == "onnx" and "onnx_reason" in variant else NOT_MEASURED


def line(name: str, variant: Mapping[str, Any], rows: list[Row], columns: Mapping[str, tuple[str, ...]]) -> str:
    """One variant."""
    chosen = {dataset: best_row(rows, dataset, keys) for dataset, keys in columns.items()}
    runs = [measured(row, columns[dataset]) for dataset, row in chosen.items() if row]
    start, card = name.replace("-", "_") + "_", ROOT / "model_cards" / f"{name}.md"
    recipes = {row.recipe: row.recipe.stem.removeprefix(start) for row in chosen.values() if row}
    cells = [
        f"`{name}`",
        f"{variant['parameters'] / 1e6:.1f}",
        f"{variant['multiply_adds'] / 1e9:.1f}",
        "{}x{}".format(*variant["counted_size"]),
        milliseconds(variant, "eager"),
        milliseconds(variant, "onnx"),
        *(figures(row.published, columns[dataset]) if row else "–" for dataset, row in chosen.items()),
        ", ".join(filter(None, runs)) or NOT_MEASURED,
        ", ".join(f"[{text}](../{path.relative_to(ROOT)})" for path, text in recipes.items()) or "–",
        f"[card](../{card.relative_to(ROOT)})" if card.exists() else "–",
    ]
    return f"| {' | '.join(cells)} |"


def table(heads: Sequence[str], lines: Sequence[str]) -> list[str]:
    """A Markdown table that docs/sortable.js makes sortable on the site."""
    head = f"| {' | '.join(heads)} |"
    return ['<div class="sortable" markdown="1">', "", head, "|---" * len(heads) + "|", *lines, "", "</div>", ""]


def smaller_models() -> list[str]:
    """The runs of recipes with a configuration of their own, which belong to no variant."""
    lines = []
    for file in sorted(RESULTS.glob("*/results.json")):
        run = json.loads(file.read_text())
        recipe = file.parent.name
        path = f"../scripts/recipes/{run['model_type']}/{recipe}.yaml"
        lines.append(
            f"| [`{recipe}`]({path}) | {run['parameters'] / 1e6:.1f} | {run['dataset']} {run['split']} | "
            f"{percent(run['scores']['mean_iou'])} |"
        )
    return table(("recipe", "parameters M", "data", "measured mIoU %"), lines)


def zoo() -> str:
    """All tables, with what each column holds."""
    result = json.loads(FILE.read_text())
    variants, rows = result["figures"]["variants"], defaultdict(list)
    for name, row in recipe_rows():
        rows[name].append(row)
    lines = [""]
    for title, tasks, scores, columns in TABLES:
        own = {name: each for name, each in variants.items() if each["task"] in tasks}
        heads = ("model", "parameters M", "multiply-adds G", "at", "ms eager", "ms ONNX Runtime")
        published = [f"{dataset}, published" for dataset in columns]
        lines += [f"## {title}", "", scores, ""]
        lines += table(
            (*heads, *published, "measured", "recipes", "card"),
            [line(name, each, rows[name], columns) for name, each in own.items()],
        )
    lines += ["## Smaller models, trained on a CPU", ""]
    lines += ["Recipes with a configuration of their own; [Measured](measured.md) has their cost and more seeds.", ""]
    lines += smaller_models()
    return "\n".join([*lines, how_it_was_timed(result), ""])


def how_it_was_timed(result: Mapping[str, Any]) -> str:
    """Command, processor and load, which tells how quiet the machine was."""
    variants = result["figures"]["variants"].values()
    loads = sorted(each["load_average"] for each in variants if "load_average" in each)
    if not loads:
        return "Milliseconds: no variant has been measured yet; `python scripts/benchmark.py zoo` does it."
    return (
        f"Milliseconds: {len(loads)} of {len(variants)} variants measured by `python scripts/benchmark.py zoo`, CPU "
        f"time on {result['threads']} thread of {result['processor']}, torch {result['torch']}; {loads[0]:.1f} to "
        f"{loads[-1]:.1f} processes wanted its {result['cores']} cores meanwhile."
    )
