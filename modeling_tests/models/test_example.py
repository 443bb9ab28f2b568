"""The checkpoint in the package loads without a network, and finds what a person sees."""

import json
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

import hf_denseseg
from hf_denseseg.cli import main
from hf_denseseg.data.labels import LabelSpec
from hf_denseseg.data.synthetic.scenes import SYNTHETIC_SPEC
from reference import REPOSITORY

FOLDER = Path(hf_denseseg.example_checkpoint())
CAMVID = Path(os.environ.get("DENSESEG_CAMVID", REPOSITORY.parent / "shared/data/camvid"))
RESULTS = REPOSITORY / "scripts" / "results" / "hfgd_lite0_drawn_streets_cpu"


@pytest.fixture(scope="module")
def segment():
    model = AutoModelForSemanticSegmentation.from_pretrained(FOLDER).eval()
    processor = AutoImageProcessor.from_pretrained(FOLDER)
    assert all(value.dtype == torch.float32 for value in model.parameters())

    def run(image: Image.Image) -> np.ndarray:
        with torch.inference_mode():
            outputs = model(**processor(image, return_tensors="pt"))
        size = (image.height, image.width)
        return processor.post_process_semantic_segmentation(outputs, target_sizes=[size])[0].numpy()

    return run


def test_it_adds_less_than_six_megabytes_to_the_wheel():
    assert sum(len(zlib.compress(path.read_bytes())) for path in FOLDER.iterdir() if path.suffix != ".jpg") < 6e6


# Boxes (top, left, bottom, right) of the photograph in which a person sees nothing else.
@pytest.mark.parametrize(
    ("name", "box", "share"),
    [
        ("sky", (0, 0, 120, 80), 0.95),
        ("sky", (0, 420, 160, 620), 0.95),
        ("building", (160, 140, 300, 280), 0.6),
        ("vegetation", (330, 420, 420, 620), 0.6),
    ],
)
def test_it_finds_what_the_photograph_shows(segment, name, box, share):
    top, left, bottom, right = box
    with Image.open(FOLDER / "photo.jpg") as photo:
        ids = segment(photo.convert("RGB"))
    part = ids[top:bottom, left:right]
    assert (part == SYNTHETIC_SPEC.classes.index(name)).mean() > share


@pytest.mark.skipif(not CAMVID.is_dir(), reason="CamVid is not at $DENSESEG_CAMVID or ../shared/data/camvid")
def test_it_finds_most_of_real_streets(segment):
    spec = LabelSpec.from_file(REPOSITORY / "scripts" / "camvid_as_streets.yaml")
    names = json.loads((CAMVID / "classes.json").read_text())["classes"]
    same = {"tree": "vegetation", "pedestrian": "person", "bicyclist": "rider"}
    assert [spec.classes[spec.raw_to_train[raw]] for raw in range(11)] == [same.get(name, name) for name in names]
    right = known = 0
    for path in sorted((CAMVID / "val" / "labels").glob("*.png"))[::12]:
        labels = spec.encode(np.asarray(Image.open(path)))
        ids = segment(Image.open(CAMVID / "val" / "images" / f"{path.stem}.jpg"))
        right, known = right + ((ids == labels) & (labels != 255)).sum(), known + (labels != 255).sum()
    assert right / known > 0.7


def test_card_has_the_measured_scores():
    card = (FOLDER / "README.md").read_text()
    streets = json.loads((RESULTS / "camvid_val.json").read_text())
    assert f"{streets['images']} validation images of CamVid" in card
    for run in (streets, json.loads((RESULTS / "results.json").read_text())):
        for row in run["scores"]["per_class"]:
            assert f"| {row['class']} | {100 * row['iou']:.2f} |" in card
    assert "CC BY 2.0" in card and "Apache-2.0" in card


def test_the_command_line_names_it(capsys):
    assert main(["models", "--example"]) == 0
    assert capsys.readouterr().out == f"{FOLDER}\n"
