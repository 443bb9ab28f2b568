"""Model cards from a run's results or from recipes: published and measured numbers in separate columns."""

import importlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hf_denseseg.evaluation.score_names import SCORE_NAMES, describe_protocol
from hf_denseseg.files import write_atomic
from hf_denseseg.models.auto.registration import create_config, families, model_info
from hf_denseseg.models.auto.tasks import SEMANTIC_SEGMENTATION, TASKS, task_of_class
from hf_denseseg.reports.class_table import class_table, percent
from hf_denseseg.reports.rendering import environment_of, render

NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class CardWords:
    """Words of a task in cards.

    Args:
        verb: name of the pipeline in the card's example.
        printed: what the example prints of each result of the pipeline.
        published: keys of the paper's scores in the card of a variant.
        also_published: key -> label of scores that few papers give; named where there is one.
        measured: keys of a run's scores there.
        figures: a sentence on what these scores are.
        counted_size: (height, width) at which the card of a variant counts multiply-adds.
        counted_labels: number of classes for the same.
        usual_labels: number of classes in the card's example.
        measured_heading: heading of the measured column.
    """

    verb: str
    printed: str
    published: tuple[str, ...]
    measured: tuple[str, ...]
    figures: str
    counted_size: tuple[int, int]
    counted_labels: int
    usual_labels: int
    measured_heading: str = "measured"
    also_published: Mapping[str, str] = field(default_factory=dict)


_BOX_FIGURES = ("box_ap", "box_ap_50", "box_ap_75", "box_ap_small", "box_ap_medium", "box_ap_large")
_MASK_FIGURES = ("box_ap", "box_ap_50", "box_ap_75", "mask_ap", "mask_ap_50", "mask_ap_75")
CARD_WORDS = {
    "semantic-segmentation": CardWords(
        verb="segment",
        printed='found["label"], found["mask"].size',
        published=("mean_iou", "mean_iou_multi_scale"),
        measured=("mean_iou",),
        figures="mIoU in percent, single scale / multi-scale with flip.",
        counted_size=(512, 512),
        counted_labels=2,
        usual_labels=19,
        measured_heading="measured (single scale)",
        also_published={"pixel_accuracy_multi_scale": "pixel accuracy"},
    ),
    "image-classification": CardWords(
        verb="classify",
        printed='found["label"], found["score"]',
        published=("top1",),
        measured=("top1",),
        figures="Top-1 accuracy in percent on central crops.",
        counted_size=(224, 224),
        counted_labels=1000,
        usual_labels=1000,
    ),
    "object-detection": CardWords(
        verb="detect",
        printed='found["label"], found["score"], found["box"]',
        published=_BOX_FIGURES,
        measured=_BOX_FIGURES,
        figures="Box AP / AP50 / AP75 / small / medium / large in percent, short side 800, long side at most 1333.",
        counted_size=(800, 1344),
        counted_labels=80,
        usual_labels=80,
    ),
    "instance-segmentation": CardWords(
        verb="segment",
        printed='found["label"], found["score"], found["mask"].size',
        published=_MASK_FIGURES,
        measured=_MASK_FIGURES,
        figures="Box AP / AP50 / AP75 / mask AP / AP50 / AP75 in percent, short side 800, long side at most 1333.",
        counted_size=(800, 1344),
        counted_labels=80,
        usual_labels=80,
    ),
}


class PublishedRow(NamedTuple):
    """One row of a paper's table, and what was measured for it.

    Args:
        recipe: name of the recipe that trains it.
        dataset: what the recipe trains on.
        steps: optimizer steps of the recipe.
        published: the paper's scores as fractions; `dataset` and `note` tell rows apart.
        measured: `scores` of a finished run of the recipe; empty without one.
    """

    recipe: str
    dataset: str
    steps: int
    published: Mapping[str, Any]
    measured: Mapping[str, Any]


def published_rows(published: Mapping[str, Any] | list[Any] | None) -> list[Mapping[str, Any]]:
    """What a recipe has under `published` as a list: no row, one, or several of the same model."""
    return list(published) if isinstance(published, list) else [published] if published else []


def write_card(folder: Path, results: dict[str, Any], spec: Any) -> None:
    """Write `README.md` for a trained model into its folder, from what `results.json` holds."""
    task, scores, recipe = results["task"], results["scores"], results["recipe"]
    names, words, tag = SCORE_NAMES[task], CARD_WORDS[task], TASKS[task].pipeline
    start = Path(results["model"])
    name = f"{start.name if start.is_dir() else start} on {results['dataset']}"
    protocol = describe_protocol(task, results["protocol"])
    means = names.means(scores)
    absent = f", absent classes: {scores['absent']}" if "absent" in scores else ""
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=tag,
        license="apache-2.0",
        tags=["hf_denseseg", results["model_type"], task],
        model_name=name,
        eval_results=[
            EvalResult(
                task_type=tag,
                dataset_type=results["dataset"],
                dataset_name=results["dataset"],
                dataset_split=results["split"],
                metric_type=names.hub_metrics.get(key, key),
                metric_name=f"{label} ({protocol}{absent})",
                metric_value=scores[key],
            )
            for key, label in means.items()
        ],
    )
    published = next(iter(published_rows(recipe.get("published"))), {})
    rows = [f"| {label} | {percent(published.get(key))} | {percent(scores[key])} |" for key, label in means.items()]
    card = render(
        "run_card.md",
        card_data=data.to_yaml(),
        name=name,
        pipeline=tag,
        paper=paper_of(results["model_type"]) if results["model_type"] in families() else None,
        words=words,
        results=results,
        num_classes=len(spec.classes),
        protocol=protocol,
        scored_on=names.scored_on,
        means="\n".join(rows),
        class_table=class_table(task, scores).as_markdown(),
        recipe=yaml.safe_dump(recipe, sort_keys=False),
        environment=environment_of(results),
        data_license=spec.license,
        data_citation=spec.citation,
    )
    write_atomic(folder / "README.md", str(ModelCard(card)))


def variant_card(name: str, rows: Iterable[PublishedRow]) -> str:
    """Text of the card of a published variant.

    Args:
        name: published name, such as `dsct-base-sac`.
        rows: every published row of this variant; those without `measured` read "not measured".
    """
    config = create_config(name)
    family = config.model_type
    task = task_of_class((config.architectures or [""])[0]) or SEMANTIC_SEGMENTATION
    words = CARD_WORDS[task]
    info = model_info(name, image_size=words.counted_size, num_labels=words.counted_labels)
    lines = []
    # Ablations have the data and steps of the variant itself; a note tells them apart, and they come last.
    for row in sorted(rows, key=lambda row: "note" in row.published):
        data = "; ".join(filter(None, (row.published.get("dataset", row.dataset), row.published.get("note"))))
        published = _several(row.published, words.published)
        for key in words.also_published.keys() & row.published.keys():
            published += f"; {words.also_published[key]} {percent(row.published[key])}"
        lines.append(
            f"| {data} | {row.steps:,} | {published} | "
            f"{_several(row.measured, words.measured) if row.measured else NOT_MEASURED} | `{row.recipe}` |"
        )
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=TASKS[task].pipeline,
        license="apache-2.0",
        tags=["hf_denseseg", family, task],
        model_name=name,
    )
    card = render(
        "variant_card.md",
        card_data=data.to_yaml(),
        name=name,
        paper=paper_of(family),
        words=words,
        info=info,
        rows="\n".join(lines),
    )
    return str(ModelCard(card))


def paper_of(family: str) -> dict[str, str]:
    """The paper of a family, from its package: title, venue, bibtex, official_code, differences."""
    return importlib.import_module(f"hf_denseseg.models.{family}").PAPER


def _several(figures: Mapping[str, Any], keys: Iterable[str]) -> str:
    return " / ".join(percent(figures.get(key)) for key in keys)
