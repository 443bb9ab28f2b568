"""`denseseg export`: what is written runs elsewhere and gives what the checkpoint gives, or nothing is written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import hf_denseseg
from hf_denseseg.cli import main
from hf_denseseg.inference.preprocessing import Preprocessing
from hf_denseseg.inference.segmentation import segment
from hf_denseseg.inference.settings import InferenceSettings
from hf_denseseg.models.auto.registration import create_image_processor
from tiny_models import TINY_SETR

ALONE = """
import sys
import numpy as np, onnxruntime
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "hf_denseseg", "transformers"):
            raise ImportError(name)
sys.meta_path.insert(0, Blocked())
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
image = np.load(sys.argv[2])
np.save(sys.argv[3], session.run(["class_map"], {"image": image})[0])
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("setr") / "model"
    torch.manual_seed(0)
    fields = {**TINY_SETR, "num_hidden_layers": 2, "auxiliary_layers": [0, 1]}
    model = hf_denseseg.create_model("setr-naive-deit-base", **fields)
    with torch.no_grad():  # classes that differ from place to place
        for each in model.decode_head.parameters():
            each.mul_(20)
    model.save_pretrained(folder)
    create_image_processor(model.config, do_resize=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def class_map_export(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "onnx"
    assert main(["export", str(checkpoint), "--format", "onnx", "--with_argmax", "--output", str(folder)]) == 0
    return folder


def expected_map(checkpoint: Path, image: np.ndarray) -> np.ndarray:
    """Class map `(H, W)` of the checkpoint for an image `(3, H, W)` uint8, by the inference of the package."""
    model = hf_denseseg.SetrForSemanticSegmentation.from_pretrained(checkpoint).eval()
    preprocessing = Preprocessing.from_image_processor(hf_denseseg.SetrImageProcessor.from_pretrained(checkpoint))
    return segment(model, torch.from_numpy(image), InferenceSettings(), preprocessing).numpy()


def test_class_map_is_that_of_the_checkpoint_where_neither_torch_nor_this_package_can_be_imported(
    checkpoint, class_map_export, tmp_path
):
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 75, 61), dtype=np.uint8)
    np.save(tmp_path / "image.npy", images)
    words = [class_map_export / "model.onnx", tmp_path / "image.npy", tmp_path / "map.npy"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", ALONE, *map(str, words)], check=True, env=environment)
    found = np.load(tmp_path / "map.npy")
    assert found.dtype == np.uint8 and found.shape == (2, 75, 61)
    assert len(np.unique(found)) > 1
    expected = np.stack([expected_map(checkpoint, image) for image in images])
    assert (found == expected).mean() >= 0.9999


def test_record_says_what_it_is_and_how_it_was_verified(class_map_export):
    record = json.loads((class_map_export / "export.json").read_text())
    assert (record["input"], record["outputs"], record["with_argmax"]) == ("image", ["class_map"], True)
    sizes = {(row["height"], row["width"]) for row in record["verified"]}
    assert len(sizes) == 4 and any(height % 2 for height, _ in sizes) and all(h != w for h, w in sizes)
    assert all(row["agreement"] >= 0.9999 for row in record["verified"])
    assert {"config.json", "model.onnx", "preprocessor_config.json"} == set(record["files"])
