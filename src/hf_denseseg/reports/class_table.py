"""The per-class table, built once for the terminal, the pages and the model card, and its one number format."""

from dataclasses import dataclass
from typing import Any

from hf_denseseg.evaluation.score_names import SCORE_NAMES


@dataclass(frozen=True)
class ClassTable:
    """Per-class scores as text, in the order of the label ids.

    Args:
        heads: one per column: the class, fractions in percent, and last how many things were counted.
        rows: one per class, as long as `heads`.
        bars: the first fraction of each row, 0 where it does not exist; pages draw it as a bar.
    """

    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    bars: tuple[float, ...]

    def as_text(self) -> str:
        """Aligned columns for a terminal: class names on the left, numbers on the right."""
        lines = [self.heads, *self.rows]
        widths = [max(map(len, column)) + 2 for column in zip(*lines, strict=True)]
        return "\n".join(
            f"{name:<{widths[0]}}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True))
            for name, *cells in lines
        )

    def as_markdown(self) -> str:
        """A Markdown table of the fractions, without the counts."""
        lines = [[cell.replace("|", "\\|") for cell in cells[:-1]] for cells in (self.heads, *self.rows)]
        head, *rows = (f"| {' | '.join(cells)} |" for cells in lines)
        return "\n".join([head, "|" + "---|" * (len(self.heads) - 1), *rows])


def class_table(task: str, scores: dict[str, Any], more: dict[str, str] | None = None) -> ClassTable:
    """Build the table.

    Args:
        task: key of `SCORE_NAMES`, which names the columns.
        scores: `scores` of a `results.json`.
        more: further columns: key in a row of `per_class` -> label of a fraction.
    """
    names = SCORE_NAMES[task]
    columns = names.columns_of(scores) | (more or {})
    count, things = names.counted
    first = next(iter(columns))
    return ClassTable(
        heads=("class", *(f"{label} %" for label in columns.values()), things),
        rows=tuple(
            (row["class"], *(percent(row[key]) for key in columns), f"{row[count]:,}") for row in scores["per_class"]
        ),
        bars=tuple(row[first] or 0.0 for row in scores["per_class"]),
    )


def percent(value: float | None) -> str:
    """A fraction in percent with two decimals; a dash for None."""
    return "–" if value is None else f"{100 * value:.2f}"
