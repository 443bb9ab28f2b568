"""Experiment trackers get losses, scores, and sample images at each evaluation; stand-ins where none is installed."""

import importlib
import importlib.util
import json
import os
import sqlite3
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from test_task_runs import RUNS
from test_training import WORDS
from transformers.integrations import TensorBoardCallback

from detection_model_tester import few_regions
from hf_denseseg.evaluation.score_names import SCORE_NAMES
from hf_denseseg.training import run as training_run
from hf_denseseg.training.recipe import load_recipe
from hf_denseseg.training.tasks import get_task
from hf_denseseg.training.tracking import SampleImages

EVALUATED = ["--max_eval_samples", "3", "--max_steps", "2", "--eval_strategy", "steps", "--eval_steps", "1"]
SEGMENT = [*WORDS, *EVALUATED, "--save_strategy", "no", "--logging_steps", "1"]


def train(output, *words):
    return training_run.train(load_recipe(None, [*words, "--output_dir", str(output)]))


def state(step, main=True):
    return SimpleNamespace(global_step=step, is_world_process_zero=main)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_images_are_logged_beside_the_step(monkeypatch, name):
    logged = []
    module = SimpleNamespace(Image=lambda image: ("image", image.size), log=logged.append)
    monkeypatch.setitem(sys.modules, name, module)
    trainer = SimpleNamespace(is_in_train=True, callback_handler=SimpleNamespace(callbacks=[]))
    callback = SampleImages(trainer, lambda: Image.new("RGB", (5, 4)))
    args = SimpleNamespace(report_to=[name, "mlflow"])
    callback.on_evaluate(args, state(3), None)
    assert logged == [{"samples": ("image", (5, 4)), "train/global_step": 3}]
    callback.draw = lambda: pytest.fail("drawn for nothing")
    callback.on_evaluate(args, state(3, main=False), None)
    callback.on_evaluate(SimpleNamespace(report_to=[]), state(3), None)
    trainer.is_in_train = False
    callback.on_evaluate(args, state(3), None)


def test_images_are_written_where_tensorboard_writes_the_scores():
    written = []
    callback = TensorBoardCallback.__new__(TensorBoardCallback)  # without tensorboard the constructor refuses
    callback.tb_writer = SimpleNamespace(
        add_image=lambda tag, pixels, step, dataformats: written.append((tag, pixels.shape, step, dataformats))
    )
    trainer = SimpleNamespace(is_in_train=True, callback_handler=SimpleNamespace(callbacks=[callback]))
    samples = SampleImages(trainer, lambda: Image.new("RGB", (5, 4)))
    for step in (1, 1, 2):  # a classifier with averaged weights is evaluated twice
        samples.on_evaluate(SimpleNamespace(report_to=["tensorboard"]), state(step), None)
    assert written == [("samples", (4, 5, 3), step, "HWC") for step in (1, 2)]


def test_without_trackers_images_are_drawn_once_at_the_end(monkeypatch, tmp_path):
    task, drawn = get_task("semantic-segmentation"), []
    whole = task.draw_results
    monkeypatch.setattr(type(task), "draw_results", lambda self, trainer: drawn.append(1) or whole(trainer))
    train(tmp_path, *SEGMENT)
    assert len(drawn) == 1 and (tmp_path / "images.png").stat().st_size > 0


@pytest.mark.parametrize("task", ["semantic-segmentation", *RUNS])
def test_tensorboard_gets_losses_scores_and_images_of_every_task(task, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    few_regions(monkeypatch)
    words = [*SEGMENT, *EVALUATED] if task == "semantic-segmentation" else [*RUNS[task], *EVALUATED]
    results = train(tmp_path, *words, "--save_strategy", "no", "--logging_steps", "1", "--report_to", "tensorboard")
    events = EventAccumulator(str(next(tmp_path.rglob("events.out.tfevents.*")).parent)).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2]
    score = f"eval/{SCORE_NAMES[task].main_metric[0]}"
    assert [event.step for event in events.Scalars(score)] == [1, 2] and results["steps"] == 2
    images = events.Images("samples")
    assert [image.step for image in images] == [1, 2] and images[0].width > 100


def test_wandb_gets_images_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    train(tmp_path / "run", *SEGMENT, "--report_to", "wandb")
    importlib.import_module("wandb").finish()
    images = list(tmp_path.glob("wandb/offline-run*/files/media/images/samples_*.png"))
    assert len(images) == 2
    with Image.open(images[0]) as first, Image.open(tmp_path / "run" / "images.png") as last:
        assert first.size == last.size and np.asarray(first).std() > 0


def test_trackio_gets_images_and_one_run_with_all_scores(tmp_path):
    if importlib.util.find_spec("trackio") is None:  # not imported here, see below
        pytest.skip("trackio is not installed")
    for name, words in {"evaluated": SEGMENT, "scored": [*SEGMENT, "--eval_strategy", "no"]}.items():
        words = ["train", *words, "--report_to", "trackio", "--output_dir", str(tmp_path / name)]
        # A process of its own: trackio reads its folder when it is imported, and sends the last scores at the exit.
        environment = os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio")}
        subprocess.run([sys.executable, "-m", "hf_denseseg.cli", *words], env=environment, check=True)
    scored = []
    with sqlite3.connect(next(tmp_path.glob("trackio/*.db"))) as table:
        for name, metrics in table.execute("select run_name, metrics from metrics"):
            scored += [name for key in json.loads(metrics) if key == "eval/mean_iou"]
    assert sorted(scored) == ["evaluated", "evaluated", "scored"]  # also of the evaluation after the last step
    assert len(list(tmp_path.glob("trackio/media/*/evaluated/*/*.png"))) == 2
