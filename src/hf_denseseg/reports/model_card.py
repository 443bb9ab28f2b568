"""Model cards from a run's results or from recipes: published and measured numbers in separate columns."""

import importlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from hf_denseseg.files import write_atomic
from hf_denseseg.models.auto.registration import create_config, model_info
from hf_denseseg.models.auto.tasks import TASKS, task_of_class
from hf_denseseg.training.recipe import Recipe
from hf_denseseg.training.tasks import get_task
from hf_denseseg.training.tasks.task import Task

NOT_MEASURED = "not measured"

USAGE = """```python
import hf_denseseg  # registers the architecture with the Auto classes
from transformers import pipeline

{call} = pipeline("{pipeline}", model="{name}")
for found in {call}("street.jpg"):
    print({shown})
```"""


def write_card(folder: Path, results: dict[str, Any], spec: Any) -> None:
    """Write `README.md` for a trained model into its folder, from what `results.json` holds."""
    paper = paper_of(results["model_type"])
    task, scores, recipe = get_task(results["task"]), results["scores"], results["recipe"]
    name = f"{results['model']} on {results['dataset']}"
    protocol = task.protocol_name(results["protocol"])
    means = {key: label for key, label in task.metrics.items() if scores.get(key) is not None}
    absent = f", absent classes: {scores['absent']}" if "absent" in scores else ""
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=task.pipeline,
        license="apache-2.0",
        tags=["hf_denseseg", results["model_type"], task.name],
        model_name=name,
        eval_results=[
            EvalResult(
                task_type=task.pipeline,
                dataset_type=results["dataset"],
                dataset_name=results["dataset"],
                dataset_split=results["split"],
                metric_type=task.metric_types.get(key, key),
                metric_name=f"{label} ({protocol}{absent})",
                metric_value=scores[key],
            )
            for key, label in means.items()
        ],
    )
    published = recipe.get("published") or {}
    rows = [f"| {label} | {_percent(published.get(key))} | {_percent(scores[key])} |" for key, label in means.items()]
    lines = [
        f"---\n{data.to_yaml()}\n---\n",
        f"# {name}\n",
        f"{paper['title']} ({paper['venue']}), {results['parameters'] / 1e6:.2f} M parameters, {len(spec.classes)} "
        f"classes, trained for {results['steps']} steps.\n",
        USAGE.format(name="path/to/this/folder", pipeline=task.pipeline, call=task.verb, shown=task.found) + "\n",
        f"## Results\n\n{results['pictures']} pictures of `{results['dataset']}` ({results['split']}), {protocol}, "
        f"{task.scored_at}.\n",
        "| metric | published % | measured % |\n|---|---|---|\n" + "\n".join(rows) + "\n",
        *_class_table(task, scores),
        "## Training\n\n```yaml\n" + _as_yaml(recipe) + "```\n\n" + _as_yaml(results["versions"], "Versions: ") + "\n",
        f"## Licences\n\nCode: Apache-2.0. Data: {spec.licence or 'as its owners say'}. "
        f"Weights trained on data carry the terms of that data.\n",
        f"## Citation\n\n```bibtex\n{paper['bibtex']}\n```\n"
        + (f"\nData: {spec.citation}\n" if spec.citation else ""),
    ]
    write_atomic(folder / "README.md", "\n".join(lines))


def variant_card(name: str, recipes: Iterable[tuple[str, Recipe]], measured: dict[str, dict[str, Any]]) -> str:
    """Text of the card of a published variant.

    Args:
        name: published name, such as `dsct-base-sac`.
        recipes: (recipe name, recipe) of every published row of this variant; `published` holds `dataset`, the figures
            that the task names in its `published`, and a `note` on what sets a row apart.
        measured: recipe name -> what that run's `results.json` holds; rows without read "not measured".
    """
    config = create_config(name)
    family = config.model_type
    task = get_task(task_of_class((config.architectures or [""])[0]) or TASKS[0])
    paper = paper_of(family)
    info = model_info(name, image_size=task.counted_size, num_labels=task.counted_labels)
    size = "x".join(map(str, info.image_size))
    rows = []
    # Ablations share data and steps with the variant itself; a note tells them apart, and they come last.
    for recipe_name, recipe in sorted(recipes, key=lambda row: "note" in (row[1].model.published or {})):
        published = recipe.model.published or {}
        result = measured.get(recipe_name)
        data = "; ".join(filter(None, (published.get("dataset", recipe.data.dataset), published.get("note"))))
        rows.append(
            f"| {data} | {recipe.training.max_steps:,} | {_several(published, task.published)} | "
            f"{_several(result['scores'], task.measured) if result else NOT_MEASURED} | `{recipe_name}` |"
        )
    front = ModelCardData(
        library_name="transformers",
        pipeline_tag=task.pipeline,
        license="apache-2.0",
        tags=["hf_denseseg", family, task.name],
        model_name=name,
    )
    return "\n".join(
        [
            f"---\n{front.to_yaml()}\n---\n",
            f"# {name}\n",
            f"{paper['title']} ({paper['venue']}). {info.parameters / 1e6:.2f} M parameters with "
            f"{task.counted_labels} classes, {info.multiply_adds / 1e9:.1f} G multiply-adds at {size} in the paper's "
            f"counting ({info.executed_multiply_adds / 1e9:.1f} G executed).\n",
            "```python\nimport hf_denseseg\n\n"
            f'model = hf_denseseg.create_model("{name}", num_labels={task.usual_labels})  # random weights\n```\n',
            "## Results\n",
            f"{task.figures}\n",
            f"| data | steps | published | {task.measured_heading} | recipe |\n|---|---|---|---|---|\n"
            + "\n".join(rows)
            + "\n",
            f"## Known differences\n\n{paper['differences']}\n",
            f"## Licence and citation\n\nCode: Apache-2.0. {paper['official_code']}\n\n"
            f"```bibtex\n{paper['bibtex']}\n```\n",
        ]
    )


def paper_of(family: str) -> dict[str, str]:
    """What a family's package says of its paper: title, venue, bibtex, official_code, differences."""
    return importlib.import_module(f"hf_denseseg.models.{family}").PAPER


def _class_table(task: Task, scores: dict[str, Any]) -> list[str]:
    columns = task.columns_of(scores)
    head = "| class | " + " | ".join(f"{label} %" for label in columns.values()) + " |\n|---|" + "---|" * len(columns)
    rows = [
        f"| {row['class']} | " + " | ".join(_percent(row[key]) for key in columns) + " |"
        for row in scores["per_class"]
    ]
    return [head + "\n" + "\n".join(rows) + "\n"]


def _several(figures: Mapping[str, Any], keys: Iterable[str]) -> str:
    return " / ".join(_percent(figures.get(key)) for key in keys)


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f}"


def _as_yaml(values: dict[str, Any], prefix: str = "") -> str:
    import yaml

    if prefix:
        return prefix + ", ".join(f"{key} {value}" for key, value in values.items()) + "."
    return yaml.safe_dump(values, sort_keys=False)
