"""Model cards from a run's results or from recipes: published and measured numbers in separate columns."""

import importlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from hf_denseseg.data.labels import LabelSpec
from hf_denseseg.files import write_atomic
from hf_denseseg.recipe import Recipe
from hf_denseseg.registration import create_config, model_info

NOT_MEASURED = "not measured"
METRICS = {"mean_iou": "mIoU", "pixel_accuracy": "pixel accuracy", "mean_accuracy": "mean accuracy"}

USAGE = """```python
import hf_denseseg  # registers the architecture with the Auto classes
from transformers import pipeline

segment = pipeline("image-segmentation", model="{name}")
for found in segment("street.jpg"):
    print(found["label"], found["mask"].size)
```"""


def write_card(folder: Path, results: dict[str, Any], spec: LabelSpec) -> None:
    """Write `README.md` for a trained model into its folder, from what `results.json` holds."""
    paper = paper_of(results["model_type"])
    scores, recipe = results["scores"], results["recipe"]
    name = f"{results['model']} on {results['dataset']}"
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-segmentation",
        license="apache-2.0",
        tags=["hf_denseseg", results["model_type"], "semantic-segmentation"],
        model_name=name,
        eval_results=[
            EvalResult(
                task_type="image-segmentation",
                dataset_type=results["dataset"],
                dataset_name=results["dataset"],
                dataset_split=results["split"],
                metric_type=key,
                metric_name=f"{label} ({protocol_name(results['protocol'])}, absent classes: {scores['absent']})",
                metric_value=scores[key],
            )
            for key, label in METRICS.items()
        ],
    )
    published = recipe.get("published") or {}
    rows = [
        f"| {label} | {_percent(published.get(key))} | {_percent(scores[key])} |" for key, label in METRICS.items()
    ]
    lines = [
        f"---\n{data.to_yaml()}\n---\n",
        f"# {name}\n",
        f"{paper['title']} ({paper['venue']}), {results['parameters'] / 1e6:.2f} M parameters, {len(spec.classes)} "
        f"classes, trained for {results['steps']} steps.\n",
        USAGE.format(name="path/to/this/folder") + "\n",
        f"## Results\n\n{results['pictures']} pictures of `{results['dataset']}` ({results['split']}), "
        f"{protocol_name(results['protocol'])}, at the labels' own resolution.\n",
        "| metric | published % | measured % |\n|---|---|---|\n" + "\n".join(rows) + "\n",
        "| class | IoU % | accuracy % |\n|---|---|---|\n" + "\n".join(_class_rows(scores)) + "\n",
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
        recipes: (recipe name, recipe) of every published row of this variant; `published` holds `dataset`, `mean_iou`,
            `mean_iou_multi_scale`, and a `note` on what sets a row apart.
        measured: recipe name -> what that run's `results.json` holds; rows without read "not measured".
    """
    family = create_config(name).model_type
    paper, info = paper_of(family), model_info(name, image_size=(512, 512))
    rows = []
    for recipe_name, recipe in recipes:
        published = recipe.model.published or {}
        result = measured.get(recipe_name)
        # Ablations share data and steps with the variant itself; a note tells them apart.
        data = "; ".join(filter(None, (published.get("dataset", recipe.data.dataset), published.get("note"))))
        rows.append(
            f"| {data} | {recipe.training.max_steps:,} | "
            f"{_percent(published.get('mean_iou'))} / {_percent(published.get('mean_iou_multi_scale'))} | "
            f"{_percent(result['scores']['mean_iou']) if result else NOT_MEASURED} | `{recipe_name}` |"
        )
    front = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-segmentation",
        license="apache-2.0",
        tags=["hf_denseseg", family, "semantic-segmentation"],
        model_name=name,
    )
    return "\n".join(
        [
            f"---\n{front.to_yaml()}\n---\n",
            f"# {name}\n",
            f"{paper['title']} ({paper['venue']}). {info.parameters / 1e6:.2f} M parameters with 2 classes, "
            f"{info.multiply_adds / 1e9:.1f} G multiply-adds at 512x512 in the paper's counting "
            f"({info.executed_multiply_adds / 1e9:.1f} G executed).\n",
            "```python\nimport hf_denseseg\n\n"
            f'model = hf_denseseg.create_model("{name}", num_labels=19)  # random weights\n```\n',
            "## Results\n",
            "mIoU in percent, single scale / multi-scale with flip.\n",
            "| data | steps | published | measured (single scale) | recipe |\n|---|---|---|---|---|\n"
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


def protocol_name(protocol: dict[str, Any]) -> str:
    """The test protocol in a few words."""
    scales = protocol.get("scales") or [1.0]
    parts = ["whole picture" if protocol["mode"] == "whole" else f"window {_size(protocol['crop_size'])}"]
    parts.append("single scale" if len(scales) == 1 else f"{len(scales)} scales")
    return ", ".join(parts + (["flip"] if protocol.get("flip") else []))


def _class_rows(scores: dict[str, Any]) -> list[str]:
    return [
        f"| {row['class']} | {_percent(row['iou'])} | {_percent(row['accuracy'])} |" for row in scores["per_class"]
    ]


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f}"


def _size(size: Any) -> str:
    return "x".join(str(side) for side in size)


def _as_yaml(values: dict[str, Any], prefix: str = "") -> str:
    import yaml

    if prefix:
        return prefix + ", ".join(f"{key} {value}" for key, value in values.items()) + "."
    return yaml.safe_dump(values, sort_keys=False)
