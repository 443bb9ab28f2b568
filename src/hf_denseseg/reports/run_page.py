"""What a person reads after a run: a table for the terminal, and one self-contained HTML page."""

from pathlib import Path
from typing import Any

from hf_denseseg.data.labels import color_wheel
from hf_denseseg.evaluation.score_names import SCORE_NAMES, chance_level, describe_protocol
from hf_denseseg.files import write_atomic
from hf_denseseg.reports.calibration import calibration_of
from hf_denseseg.reports.class_table import class_table, percent
from hf_denseseg.reports.rendering import environment_of, image_uri, render

SHOWN_SCORE = 0.5  # of objects in the images of a report
# What the images of the report show.
SHOWN = {
    "semantic-segmentation": "Image, ground truth, prediction; ignored pixels are black.",
    "image-classification": "Predictions with their confidence, wrong ones first and with their ground truth.",
    "object-detection": f"Ground truth, and the boxes found with a score above {SHOWN_SCORE}.",
    "instance-segmentation": f"Ground truth, and the objects found with a score above {SHOWN_SCORE}.",
}


def format_scores(results: dict[str, Any]) -> str:
    """Per-class table and means of what `results.json` holds, in percent, as plain text."""
    task, scores = results["task"], results["scores"]
    table = class_table(task, scores).as_text()
    line = "-" * len(table.partition("\n")[0])
    metrics = {name: label for name, label in SCORE_NAMES[task].metrics.items() if name in scores}
    width = max(map(len, metrics.values())) + 2
    means = [f"{label:<{width}}{percent(scores[name]):>8}" for name, label in metrics.items()]
    return "\n".join([table, line, *means, *(f"{label:<{width}} {value}" for label, value in calibration_of(scores))])


def write_report(output: Path, results: dict[str, Any], spec: Any) -> None:
    """Write `index.html` beside `learning_curve.png` and `images.png`, which it embeds."""
    task, scores, training = results["task"], results["scores"], results.get("training", {})
    numbers = [(label, f"{percent(scores[key])} %") for key, label in SCORE_NAMES[task].means(scores).items()]
    numbers.append(("parameters", f"{results['parameters'] / 1e6:.2f} M"))
    if training:
        numbers.append(("training", f"{training['wall_seconds'] / 60:.1f} min"))
    page = render(
        "run_page.html",
        title=f"{results['model']} on {results['dataset']}",
        results=results,
        protocol=describe_protocol(task, results["protocol"]),
        chance=chance_level(task, scores),
        numbers=numbers,
        shown=SHOWN[task],
        images=image_uri((output / "images.png").read_bytes(), "png"),
        table=class_table(task, scores),
        colors=getattr(spec, "palette", None) or color_wheel(spec.num_labels),
        learning_curve=image_uri((output / "learning_curve.png").read_bytes(), "png"),
        environment=environment_of(results),
        recipe=(output / "recipe.yaml").read_text(),
    )
    write_atomic(output / "index.html", page)
