"""What each paper published, table by table, and what was measured here, for the pages of the families."""

import json
from pathlib import Path
from typing import Any

import yaml

from experiments import finished, mean_and_spread
from hf_denseseg.evaluation.score_names import SCORE_NAMES

ROOT = Path(__file__).resolve().parents[1]
LEADERBOARD = ROOT / "scripts" / "results" / "leaderboard" / "camvid.json"
LABELS = {key: label for names in SCORE_NAMES.values() for key, label in names.metrics.items()}


def published(family: str) -> str:
    """A row for each table of the paper, then the runs of the family's recipes that `scripts/results` holds."""
    file = f"modeling_tests/published/{family}.yaml"
    tables = yaml.safe_load((ROOT / file).read_text())
    measured = [
        f"`{path.parent.name}` {score_of(path)}"
        for path in sorted((ROOT / "scripts" / "results").glob(f"{family}_*/results.json"))
        if (ROOT / "scripts" / "recipes" / family / f"{path.parent.name}.yaml").exists()
    ]
    lines = [
        "",
        "| where | data | figures in % | rows |",
        "|---|---|---|---|",
        *map(row_of, tables),
        "",
        f"Each row has a recipe in `scripts/recipes/{family}`, or its reason for having none stands in `{file}`.",
        "The [cards](../../../../model_cards) name the recipes beside what was measured. The rows of the paper need",
        "GPUs and the benchmarks: not measured.",
        *([f"Measured with a recipe that is not in the paper: {', '.join(measured)}."] if measured else []),
        *at_equal_budget(family),
        "",
    ]
    return "\n".join(lines)


def at_equal_budget(family: str) -> list[str]:
    """A line on the family's small models in the leaderboard, if it has any."""
    results = json.loads(LEADERBOARD.read_text())
    scores = [
        f"{name} {mean_and_spread(scores)} % mIoU"
        for name, row in results["rows"].items()
        if row["recipe"]["model"].split("-")[0] == family and (scores := [*finished(row).values()])
    ]
    line = (
        f"Small models after {results['budget_cpu_seconds']:g} CPU seconds on {results['dataset']}: "
        f"{', '.join(scores)}; "
        "[the other families and their peers](../../../../docs/experiments.md#a-leaderboard-at-equal-budgets)."
    )
    return [line] if scores else []


def row_of(table: dict[str, Any]) -> str:
    """One table of the paper as one row."""
    figures = " / ".join(label_of(key) for key in table["scores"])
    rows = "; ".join(f"{name}: {values[0]}" for name, values in table["rows"].items())
    return f"| {table['table']} | {table['dataset']} | {figures} | {rows} |"


def label_of(key: str) -> str:
    """`mean_iou_multi_scale` -> mIoU, multi-scale."""
    plain = key.removesuffix("_multi_scale")
    return LABELS[plain] + (", multi-scale" if plain != key else "")


def score_of(path: Path) -> str:
    """The mIoU of a run and its data."""
    run = json.loads(path.read_text())
    return f"{100 * run['scores']['mean_iou']:.1f} % mIoU on {run['dataset']} {run['split']}"
