"""What a person looks at after a run: a table for the terminal, and one self-contained HTML page."""

import html
from pathlib import Path
from typing import Any

from hf_denseseg.data.labels import color_wheel
from hf_denseseg.evaluation.score_names import SCORE_NAMES, ScoreNames, chance_level, describe_protocol
from hf_denseseg.files import write_atomic
from hf_denseseg.reports.html import class_name, color_style, embedded, number_boxes, percent, whole_page

SHOWN_SCORE = 0.5  # of objects in the images of a report
# What the images of the report show.
SHOWN = {
    "semantic-segmentation": "Image, ground truth, prediction; ignored pixels are black.",
    "image-classification": "Predictions with their confidence, and the ground truth where they are wrong: wrong ones "
    "first.",
    "object-detection": f"Ground truth, and the boxes found with a score above {SHOWN_SCORE}.",
    "instance-segmentation": f"Ground truth, and the objects found with a score above {SHOWN_SCORE}.",
}


def format_scores(results: dict[str, Any]) -> str:
    """Per-class table and means of what `results.json` holds, in percent, as plain text."""
    names, scores = SCORE_NAMES[results["task"]], results["scores"]
    columns = names.columns_of(scores)
    key, things = names.counted
    width = max(len(row["class"]) for row in scores["per_class"]) + 2
    wide = {name: max(8, len(label) + 4) for name, label in columns.items()}
    heads = "".join(f"{label + ' %':>{wide[name]}}" for name, label in columns.items())
    lines = [f"{'class':<{width}}{heads}{things:>14}"]
    for row in scores["per_class"]:
        cells = "".join(percent(row[name], wide[name]) for name in columns)
        lines.append(f"{row['class']:<{width}}{cells}{row[key]:>14,}")
    lines.append("-" * len(lines[0]))
    means = {name: label for name, label in names.metrics.items() if name in scores}
    longest = max(map(len, means.values()))
    lines += [f"{label:<{max(width, longest) + 2}}{percent(scores[name], 8)}" for name, label in means.items()]
    return "\n".join(lines)


def write_report(output: Path, results: dict[str, Any], spec: Any) -> None:
    """Write `index.html` beside `learning_curve.png` and `images.png`, which it embeds."""
    task, scores, training = results["task"], results["scores"], results.get("training", {})
    names = SCORE_NAMES[task]
    numbers = [(label, f"{100 * scores[key]:.1f} %") for key, label in names.means(scores).items()]
    numbers.append(("parameters", f"{results['parameters'] / 1e6:.2f} M"))
    if training:
        numbers.append(("training", f"{training['wall_seconds'] / 60:.1f} min"))
    heads = "".join(
        f"<th>{label}" + "<th>" * (not place) for place, label in enumerate(names.columns_of(scores).values())
    )
    body = f"""<p class="note">{results["steps"]} steps;
{results["images"]} pictures of {html.escape(results["split"])};
{html.escape(describe_protocol(task, results["protocol"]))}.
{html.escape(chance_level(task, scores))}</p>
{number_boxes(numbers)}
<h2>Pictures</h2><p class="note">{SHOWN[task]}</p>{_picture(output / "images.png")}
<h2>Classes</h2><table><tr><th>class{heads}<th>{names.counted[1]}</tr>{_class_rows(names, scores, spec)}</table>
<h2>Learning curve</h2>{_picture(output / "learning_curve.png")}
<h2>Recipe</h2><pre>{html.escape((output / "recipe.yaml").read_text())}</pre>
"""
    write_atomic(output / "index.html", whole_page(f"{results['model']} on {results['dataset']}", body))


def _class_rows(names: ScoreNames, scores: dict[str, Any], spec: Any) -> str:
    rows = []
    palette = getattr(spec, "palette", None) or color_wheel(spec.num_labels)
    first, *others = names.columns_of(scores)
    for row, color in zip(scores["per_class"], palette, strict=True):
        share = 100 * (row[first] or 0.0)
        rows.append(
            f"<tr><td>{class_name(row['class'], color)}"
            f'<td>{percent(row[first])}<td class="bar"><div style="{color_style(color)}; width: {share:.1f}%"></div>'
            + "".join(f"<td>{percent(row[key])}" for key in others)
            + f"<td>{row[names.counted[0]]:,}</tr>"
        )
    return "".join(rows)


def _picture(path: Path) -> str:
    return embedded(path.read_bytes(), "png", path.stem)
