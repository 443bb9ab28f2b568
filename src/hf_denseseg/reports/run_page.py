"""What a person looks at after a run: a table for the terminal, and one self-contained HTML page."""

import html
from pathlib import Path
from typing import Any

from hf_denseseg.data.labels import color_wheel
from hf_denseseg.files import write_atomic
from hf_denseseg.reports.html import class_name, color_style, embedded, number_boxes, percent, whole_page
from hf_denseseg.training.tasks import get_task
from hf_denseseg.training.tasks.task import Task


def format_scores(results: dict[str, Any]) -> str:
    """Per-class table and means of what `results.json` holds, in percent, as plain text."""
    task, scores = get_task(results["task"]), results["scores"]
    columns = task.columns_of(scores)
    key, things = task.counted
    width = max(len(row["class"]) for row in scores["per_class"]) + 2
    wide = {name: max(8, len(label) + 4) for name, label in columns.items()}
    heads = "".join(f"{label + ' %':>{wide[name]}}" for name, label in columns.items())
    lines = [f"{'class':<{width}}{heads}{things:>14}"]
    for row in scores["per_class"]:
        cells = "".join(percent(row[name], wide[name]) for name in columns)
        lines.append(f"{row['class']:<{width}}{cells}{row[key]:>14,}")
    lines.append("-" * len(lines[0]))
    means = {name: label for name, label in task.metrics.items() if name in scores}
    longest = max(map(len, means.values()))
    lines += [f"{label:<{max(width, longest) + 2}}{percent(scores[name], 8)}" for name, label in means.items()]
    return "\n".join(lines)


def write_report(output: Path, results: dict[str, Any], spec: Any) -> None:
    """Write `index.html` beside `learning_curve.png` and `pictures.png`, which it embeds."""
    task, scores, training = get_task(results["task"]), results["scores"], results.get("training", {})
    means = {key: label for key, label in task.metrics.items() if scores.get(key) is not None}
    numbers = [(label, f"{100 * scores[key]:.1f} %") for key, label in means.items()]
    numbers.append(("parameters", f"{results['parameters'] / 1e6:.2f} M"))
    if training:
        numbers.append(("training", f"{training['wall_seconds'] / 60:.1f} min"))
    heads = "".join(
        f"<th>{label}" + "<th>" * (not place) for place, label in enumerate(task.columns_of(scores).values())
    )
    body = f"""<p class="note">{results["steps"]} steps;
{results["pictures"]} pictures of {html.escape(results["split"])};
{html.escape(task.protocol_name(results["protocol"]))}.
{html.escape(task.chance(scores))}</p>
{number_boxes(numbers)}
<h2>Pictures</h2><p class="note">{task.shown}</p>{_picture(output / "pictures.png")}
<h2>Classes</h2><table><tr><th>class{heads}<th>{task.counted[1]}</tr>{_class_rows(task, scores, spec)}</table>
<h2>Learning curve</h2>{_picture(output / "learning_curve.png")}
<h2>Recipe</h2><pre>{html.escape((output / "recipe.yaml").read_text())}</pre>
"""
    write_atomic(output / "index.html", whole_page(f"{results['model']} on {results['dataset']}", body))


def _class_rows(task: Task, scores: dict[str, Any], spec: Any) -> str:
    rows = []
    palette = getattr(spec, "palette", None) or color_wheel(spec.num_labels)
    first, *others = task.columns_of(scores)
    for row, color in zip(scores["per_class"], palette, strict=True):
        share = 100 * (row[first] or 0.0)
        rows.append(
            f"<tr><td>{class_name(row['class'], color)}"
            f'<td>{percent(row[first])}<td class="bar"><div style="{color_style(color)}; width: {share:.1f}%"></div>'
            + "".join(f"<td>{percent(row[key])}" for key in others)
            + f"<td>{row[task.counted[0]]:,}</tr>"
        )
    return "".join(rows)


def _picture(path: Path) -> str:
    return embedded(path.read_bytes(), "png", path.stem)
