"""What a person looks at after a run: a table for the terminal, and one self-contained HTML page."""

import base64
import html
from pathlib import Path
from typing import Any

from hf_denseseg.data.labels import color_wheel
from hf_denseseg.files import write_atomic
from hf_denseseg.tasks import get_task
from hf_denseseg.tasks.task import Task

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #1c1c1c }
h1 { margin-bottom: 0 } .note { color: #666 }
.numbers { display: flex; gap: 1rem; flex-wrap: wrap; margin: 1.5rem 0 }
.numbers div { background: #f3f4f6; border-radius: .6rem; padding: .8rem 1.4rem }
.numbers b { display: block; font-size: 1.8rem }
img { max-width: 100%; border-radius: .4rem } table { border-collapse: collapse; width: 100% }
td, th { text-align: left; padding: .25rem .6rem; border-bottom: 1px solid #e5e7eb }
td.bar { width: 45% } td.bar div { height: .9rem; border-radius: .2rem }
.swatch { display: inline-block; width: .9rem; height: .9rem; border-radius: .2rem; margin-right: .5rem }
pre { background: #f3f4f6; padding: 1rem; border-radius: .6rem; overflow-x: auto }
"""


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
        cells = "".join(_cell(row[name], wide[name]) for name in columns)
        lines.append(f"{row['class']:<{width}}{cells}{row[key]:>14,}")
    lines.append("-" * len(lines[0]))
    means = {name: label for name, label in task.metrics.items() if name in scores}
    longest = max(map(len, means.values()))
    lines += [f"{label:<{max(width, longest) + 2}}{_cell(scores[name])}" for name, label in means.items()]
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
    title = html.escape(f"{results['model']} on {results['dataset']}")
    page = f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>
<h1>{title}</h1>
<p class="note">{results["steps"]} steps; {results["pictures"]} pictures of {html.escape(results["split"])};
{html.escape(task.protocol_name(results["protocol"]))}.
{html.escape(task.chance(scores))}</p>
<div class="numbers">{"".join(f"<div>{label}<b>{value}</b></div>" for label, value in numbers)}</div>
<h2>Pictures</h2><p class="note">{task.shown}</p>{_embedded(output / "pictures.png")}
<h2>Classes</h2><table><tr><th>class{heads}<th>{task.counted[1]}</tr>{_class_rows(task, scores, spec)}</table>
<h2>Learning curve</h2>{_embedded(output / "learning_curve.png")}
<h2>Recipe</h2><pre>{html.escape((output / "recipe.yaml").read_text())}</pre></html>
"""
    write_atomic(output / "index.html", page)


def _class_rows(task: Task, scores: dict[str, Any], spec: Any) -> str:
    rows = []
    palette = getattr(spec, "palette", None) or color_wheel(spec.num_labels)
    first, *others = task.columns_of(scores)
    for row, (red, green, blue) in zip(scores["per_class"], palette, strict=True):
        color = f"background: rgb({red}, {green}, {blue})"
        share = 100 * (row[first] or 0.0)
        rows.append(
            f'<tr><td><span class="swatch" style="{color}"></span>{html.escape(row["class"])}'
            f'<td>{_cell(row[first])}<td class="bar"><div style="{color}; width: {share:.1f}%"></div>'
            + "".join(f"<td>{_cell(row[key])}" for key in others)
            + f"<td>{row[task.counted[0]]:,}</tr>"
        )
    return "".join(rows)


def _embedded(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{path.stem}" src="data:image/png;base64,{data}">'


def _cell(value: float | None, width: int = 8) -> str:
    return f"{'–' if value is None else f'{100 * value:.2f}':>{width}}"
