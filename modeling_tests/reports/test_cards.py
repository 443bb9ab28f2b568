"""Cards of the published variants and of trained models."""

import re
from types import SimpleNamespace

import pytest
from huggingface_hub import ModelCard

import hf_denseseg
from hf_denseseg.cli import main
from hf_denseseg.data.labels import LabelSpec
from hf_denseseg.reports.model_card import write_card
from reference import REPOSITORY

CARDS = REPOSITORY / "model_cards"
COUNTS = r"([\d.]+) M parameters with .* classes, ([\d.]+) G .* counting \(([\d.]+) G executed"


@pytest.mark.parametrize("counted", ["one of a family", pytest.param("all", marks=pytest.mark.slow)])
def test_cards_show_published_and_unmeasured_numbers(tmp_path, capsys, monkeypatch, counted):
    """What is not counted again, since that takes a minute, is taken from the card itself."""
    seen = set()

    def info(name, image_size, num_labels):
        family = name.partition("-")[0]
        if counted == "all" or family not in seen:
            seen.add(family)
            return hf_denseseg.model_info(name, image_size=image_size, num_labels=num_labels)
        figures = re.search(COUNTS, (CARDS / f"{name}.md").read_text()).groups()
        parameters, published, executed = (
            float(figure) * factor for figure, factor in zip(figures, (1e6, 1e9, 1e9), strict=True)
        )
        return SimpleNamespace(
            image_size=image_size, parameters=parameters, multiply_adds=published, executed_multiply_adds=executed
        )

    monkeypatch.setattr("hf_denseseg.reports.model_card.model_info", info)
    assert main(["card", "--recipes", str(REPOSITORY / "scripts" / "recipes"), "--output_dir", str(tmp_path)]) == 0
    text = (tmp_path / "dsct-base-sac.md").read_text()
    assert "| ADE20K val | 160,000 | 48.66 / 49.27 | not measured | `dsct_base_sac_ade20k_160k` |" in text
    assert ModelCard(text).data.model_name == "dsct-base-sac"
    written, kept = ({path.name: path.read_text() for path in folder.glob("*.md")} for folder in (tmp_path, CARDS))
    assert written == kept, "run `denseseg card`"


@pytest.mark.parametrize("citation", ["", "Own et al. 2024"])
def test_card_of_a_trained_model_holds_names_of_any_kind(tmp_path, citation):
    """Markdown and YAML around the names stay whole; the citation of the data ends the card where there is one."""
    name = 'a: "b" | <c> {{ d }}'
    row = {"class": name, "iou": 0.5, "accuracy": None, "pixels": 12}
    scores = {"mean_iou": 0.5, "pixel_accuracy": 0.25, "absent": "zero", "per_class": [row]}
    results = {
        "task": "semantic-segmentation",
        "model": "setr-naive-deit-base",
        "model_type": "setr",
        "parameters": 10_000_000,
        "dataset": name,
        "split": "val",
        "images": 3,
        "protocol": {"mode": "whole", "crop_size": None},
        "scores": scores,
        "steps": 7,
        "recipe": {"max_steps": 7},
        "versions": {"torch": "2.14"},
        "machine": {"processor": "P", "accelerator": None, "threads": 2, "processes": 1},
    }
    write_card(tmp_path, results, LabelSpec(name="own", classes=(name,), citation=citation))
    card = ModelCard.load(tmp_path / "README.md")
    assert [(found.metric_value, found.dataset_name) for found in card.data.eval_results] == [
        (0.5, name),
        (0.25, name),
    ]
    assert card.text.count("{{ d }}") == 3  # heading, results, class
    assert 'a: "b" \\| <c> {{ d }} | 50.00 | – |\n' in card.text and "max_steps: 7\n```" in card.text
    assert "\nWith torch 2.14; P, 2 threads.\n" in card.text
    assert card.text.endswith(f"\n```\n\nData: {citation}\n" if citation else "\n}\n```\n")
