"""`denseseg predict` with classifiers and detectors, the demos of all tasks, and the loaders' public names."""

import json

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import hf_denseseg
import new_python
from hf_denseseg.cli import main
from hf_denseseg.commands import demo
from hf_denseseg.data.sources.coco import object_mask
from hf_denseseg.errors import InputError
from hf_denseseg.inference.predict.objects import ObjectPredictor
from hf_denseseg.models.auto.registration import create_image_processor
from hf_denseseg.models.auto.tasks import TASKS
from hf_denseseg.training.recipe import load_recipe
from hf_denseseg.training.tasks import get_task
from test_published_hlg import REDUCED

MODELS = {
    "image-classification": ("hlg-tiny", {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}}),
    "object-detection": ("hlg-retinanet-tiny", {"size": {"shortest_edge": 64, "longest_edge": 96}}),
    "instance-segmentation": ("hlg-maskrcnn-tiny", {"size": {"shortest_edge": 32, "longest_edge": 48}}),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A small random model of each task, saved with its image processor."""
    folders = {}
    for task, (name, options) in MODELS.items():
        torch.manual_seed(0)
        folders[task] = tmp_path_factory.mktemp(task)
        model = hf_denseseg.create_model(name, num_labels=3, **REDUCED)
        model.save_pretrained(folders[task])
        create_image_processor(model.config, **options).save_pretrained(folders[task])
    return folders


@pytest.fixture
def images(tmp_path):
    rng = np.random.default_rng(0)
    for name, size in (("a.png", (70, 90)), ("b.png", (96, 64))):
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("task", MODELS)
def test_predictions_are_written_beside_the_drawn_images(checkpoints, images, task):
    (images / "broken.png").write_bytes(b"not an image")
    words = ["predict", str(checkpoints[task]), str(images), "--output_dir", str(images / "out"), "--device", "cpu"]
    words += [] if task == "image-classification" else ["--threshold", "0.0"]
    assert main(words) == 1  # one file is broken
    results = json.loads((images / "out" / "results.json").read_text())
    assert results["task"] == task and "broken.png" in results["failed"][0]["source"]
    assert [record["size"] for record in results["images"]] == [[70, 90], [96, 64]]
    for record in results["images"]:
        scores = [prediction["score"] for prediction in record["predictions"]]
        assert scores == sorted(scores, reverse=True)
        if task == "image-classification":
            assert len(scores) == 3 and sum(scores) == pytest.approx(1.0, abs=1e-5)
            continue
        assert Image.open(images / "out" / record["drawn"]).size == tuple(record["size"][::-1])
        height, width = record["size"]
        for prediction in record["predictions"]:
            left, top, right, bottom = prediction["box"]
            assert 0 <= left <= right <= width and 0 <= top <= bottom <= height
            if task == "instance-segmentation":
                mask = object_mask(json.dumps(prediction["segmentation"]), (height, width))
                assert mask.shape == (height, width)


def test_finished_images_are_not_predicted_again(checkpoints, images, monkeypatch, capsys):
    words = ["predict", str(checkpoints["image-classification"]), str(images), "--output_dir", str(images / "out")]
    assert main(words) == 0
    monkeypatch.setattr(ObjectPredictor, "find", lambda *args: pytest.fail("predicted again"))
    assert main(words) == 0
    assert "2 finished before" in capsys.readouterr().out


def test_options_of_another_task_are_refused(checkpoints, images, capsys):
    words = ["predict", str(checkpoints["image-classification"]), str(images), "--output_dir", str(images / "out")]
    for option in (["--test_flip"], ["--threshold", "0.5"], ["--test_scales", "1.0"]):
        assert main([*words, *option]) == 2
        assert f"{option[0]} changes nothing for a checkpoint for image-classification" in capsys.readouterr().err
    with pytest.raises(InputError, match="--threshold is 2"):
        ObjectPredictor.load(str(checkpoints["object-detection"]), "object-detection", threshold=2)


@pytest.mark.parametrize("task", TASKS)
def test_demo_of_every_task_has_a_recipe_and_a_loader_of_its_model(task):
    path = demo.RECIPES / f"demo_{task.replace('-', '_')}.yaml"
    recipe = load_recipe(path)
    assert recipe.model.task == task and recipe.data.dataset.startswith("synthetic")
    assert hf_denseseg.create_config(recipe.model.model, **recipe.model.config_overrides)
    names = TASKS[task]
    assert hasattr(transformers, names.auto_class) and callable(getattr(hf_denseseg, names.loader))
    assert get_task(task).name == task and names.pipeline in transformers.pipelines.SUPPORTED_TASKS


def test_saved_models_run_in_a_new_process_through_auto_class_and_pipeline(checkpoints, tmp_path):
    """No score is required: a random model may detect nothing, but it is loaded and runs."""
    lines = []
    for task in MODELS:
        names, folders = TASKS[task], (str(checkpoints[task]), str(tmp_path / task))
        words = [names.auto_class, names.pipeline, names.loader, *folders, "synthetic:20", "test"]
        lines.append(demo.RELOAD.replace("sys.argv[1:]", repr(words)))
    done = new_python.run(["-c", "\n".join(lines)])
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.strip().splitlines()) == 4 * len(MODELS)
