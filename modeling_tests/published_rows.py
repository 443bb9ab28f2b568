"""The rows of the papers' tables: `modeling_tests/published/<family>.yaml`, transcribed table by table.

Each table holds `table`, `dataset` and `scores` (the keys of its figures), and `rows`: name -> figures in percent as
they are printed, steps, recipe. A row without a recipe ends with `out: REASON`, and one whose figures differ from
those in the recipe with `differs: WHERE THOSE STAND`.
"""

from typing import Any, NamedTuple

import yaml

from reference import REPOSITORY

FOLDER = REPOSITORY / "modeling_tests" / "published"


class PaperRow(NamedTuple):
    """One row; `figures` are texts in percent, "–" where the paper has none."""

    place: str
    dataset: str
    figures: dict[str, str]
    steps: int | None
    recipe: str | None
    out: str | None
    differs: str | None


def paper_rows(family: str) -> list[PaperRow]:
    """Every row of the family's own networks in its paper."""
    rows = []
    for table in yaml.safe_load((FOLDER / f"{family}.yaml").read_text()):
        for name, (figures, steps, recipe, *more) in table["rows"].items():
            extra: dict[str, Any] = more[0] if more else {}
            found = dict(zip(table["scores"], figures.split(" / "), strict=True))
            place = f"{table['table']}, {name}"
            rows.append(
                PaperRow(place, table["dataset"], found, steps, recipe, extra.get("out"), extra.get("differs"))
            )
    return rows


def agrees(published: dict[str, Any], row: PaperRow) -> bool:
    """Whether an entry of a recipe's `published` (fractions) rounds to the figures of a row, and is of its dataset."""
    if published["dataset"] != row.dataset:
        return False
    for key, printed in row.figures.items():
        value = published.get(key)
        if (value is None) != (printed == "–"):
            return False
        half = 0.5 * 10 ** -len(printed.partition(".")[2])
        if value is not None and abs(100 * value - float(printed)) > half + 1e-9:
            return False
    return True
