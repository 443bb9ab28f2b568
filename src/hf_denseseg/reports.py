"""What a person looks at after a run: a table for the terminal, and one self-contained HTML page."""

import base64
import html
from pathlib import Path
from typing import Any

from hf_denseseg.data.labels import LabelSpec
from hf_denseseg.files import write_atomic
from hf_denseseg.model_card import METRICS, protocol_name

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


def format_scores(scores: dict[str, Any]) -> str:
    """Per-class table and means, in percent, as plain text."""
    width = max(len(row["class"]) for row in scores["per_class"]) + 2
    lines = [f"{'class':<{width}}{'IoU %':>8}{'acc %':>8}{'pixels':>14}"]
    for row in scores["per_class"]:
        lines.append(f"{row['class']:<{width}}{_cell(row['iou'])}{_cell(row['accuracy'])}{row['pixels']:>14,}")
    lines.append("-" * (width + 30))
    lines += [f"{label:<{width + 8}}{_cell(scores[key])}" for key, label in METRICS.items()]
    return "\n".join(lines)


def constant_prediction_miou(scores: dict[str, Any]) -> tuple[float, str]:
    """Chance level: the mIoU of the best constant answer, and the class it names."""
    pixels = {row["class"]: row["pixels"] for row in scores["per_class"]}
    name = max(pixels, key=lambda key: pixels[key])
    present = sum(count > 0 for count in pixels.values())
    return pixels[name] / sum(pixels.values()) / present, name


def write_report(output: Path, results: dict[str, Any], spec: LabelSpec) -> None:
    """Write `index.html` beside `learning_curve.png` and `pictures.png`, which it embeds."""
    scores, training = results["scores"], results.get("training", {})
    numbers = [(label, f"{100 * scores[key]:.1f} %") for key, label in METRICS.items()]
    numbers.append(("parameters", f"{results['parameters'] / 1e6:.2f} M"))
    if training:
        numbers.append(("training", f"{training['wall_seconds'] / 60:.1f} min"))
    chance, common = constant_prediction_miou(scores)
    title = html.escape(f"{results['model']} on {results['dataset']}")
    page = f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>
<h1>{title}</h1>
<p class="note">{results["steps"]} steps; {results["pictures"]} pictures of {html.escape(results["split"])};
{html.escape(protocol_name(results["protocol"]))}.
Always answering "{html.escape(common)}" would give {100 * chance:.1f} % mIoU.</p>
<div class="numbers">{"".join(f"<div>{label}<b>{value}</b></div>" for label, value in numbers)}</div>
<h2>Pictures</h2><p class="note">Picture, truth, prediction; void is black.</p>{_embedded(output / "pictures.png")}
<h2>Classes</h2><table><tr><th>class<th>IoU<th><th>accuracy<th>pixels</tr>{_class_rows(scores, spec)}</table>
<h2>Learning curve</h2>{_embedded(output / "learning_curve.png")}
<h2>Recipe</h2><pre>{html.escape((output / "recipe.yaml").read_text())}</pre></html>
"""
    write_atomic(output / "index.html", page)


def _class_rows(scores: dict[str, Any], spec: LabelSpec) -> str:
    rows = []
    for row, (red, green, blue) in zip(scores["per_class"], spec.palette, strict=True):
        color = f"background: rgb({red}, {green}, {blue})"
        share = 100 * (row["iou"] or 0.0)
        rows.append(
            f'<tr><td><span class="swatch" style="{color}"></span>{html.escape(row["class"])}'
            f'<td>{_cell(row["iou"])}<td class="bar"><div style="{color}; width: {share:.1f}%"></div>'
            f"<td>{_cell(row['accuracy'])}<td>{row['pixels']:,}</tr>"
        )
    return "".join(rows)


def _embedded(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{path.stem}" src="data:image/png;base64,{data}">'


def _cell(value: float | None) -> str:
    return f"{'–' if value is None else f'{100 * value:.2f}':>8}"
