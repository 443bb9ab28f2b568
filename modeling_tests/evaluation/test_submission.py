"""Submission files: what the servers of Cityscapes and ADE20K require, and each fault that is refused."""

import io
import shutil
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from hf_denseseg.cli import main
from hf_denseseg.data.sources.benchmarks.layouts import get_benchmark
from hf_denseseg.errors import InputError, RunError
from hf_denseseg.evaluation.submission import (
    SERVERS,
    encode_prediction,
    pack_submission,
    server_for,
    validate_submission,
)
from hf_denseseg.models.auto.registration import create_image_processor, create_model
from hf_denseseg.training import run as training_run
from hf_denseseg.training.recipe import load_recipe
from test_published_dsct import REDUCED

# labels.py of the Cityscapes scripts: the ids that are scored, in the order of the train ids.
CITYSCAPES_IDS = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
BERLIN = [f"berlin_{number:06}_000019" for number in range(3)]
SIZES = dict.fromkeys(BERLIN, (8, 16))


def png(ids, mode="L"):
    data = io.BytesIO()
    Image.fromarray(np.asarray(ids, dtype=np.uint8)).convert(mode).save(data, "PNG")
    return data.getvalue()


def read(path):
    with zipfile.ZipFile(path) as archive:
        return {name: np.array(Image.open(io.BytesIO(archive.read(name)))) for name in archive.namelist()}


@pytest.fixture
def predictions(tmp_path):
    """A folder of correct files."""
    folder = tmp_path / "predictions"
    folder.mkdir()
    for place, name in enumerate(BERLIN):
        (folder / f"{name}_gtFine_labelIds.png").write_bytes(png(np.full((8, 16), CITYSCAPES_IDS[place])))
    return folder


@pytest.mark.parametrize(("name", "ids"), [("cityscapes", CITYSCAPES_IDS), ("ade20k", list(range(1, 151)))])
def test_predictions_hold_the_official_ids(name, ids):
    server = server_for(get_benchmark(name).spec)
    assert server is SERVERS[name] and server.ids == set(ids)
    image = Image.open(io.BytesIO(encode_prediction(server, np.arange(len(ids), dtype=np.uint8)[None])))
    assert image.mode == "L" and np.array(image).tolist() == [ids]
    # Data read from label maps of train ids are submitted with the official ids too.
    other = next(spec for key, spec in get_benchmark(name).encodings.items() if key == "train_ids")
    assert server_for(other) is server


def test_correct_predictions_are_packed_and_pass_as_zip_and_in_subfolders(predictions, tmp_path):
    pack_submission(predictions, tmp_path / "out.zip", "cityscapes", SIZES)
    validate_submission(tmp_path / "out.zip", "cityscapes", SIZES)
    assert sorted(read(tmp_path / "out.zip")) == [f"{name}_gtFine_labelIds.png" for name in BERLIN]
    (predictions / "berlin").mkdir()
    shutil.move(predictions / f"{BERLIN[0]}_gtFine_labelIds.png", predictions / "berlin" / f"{BERLIN[0]}_ours.png")
    validate_submission(predictions, "cityscapes", SIZES)


def replaced(folder, data):
    (folder / f"{BERLIN[1]}_gtFine_labelIds.png").write_bytes(data)


FAULTS = {
    "no file": (
        lambda folder: (folder / f"{BERLIN[1]}_gtFine_labelIds.png").unlink(),
        f"{BERLIN[1]} has no prediction",
    ),
    "two files": (lambda folder: (folder / f"{BERLIN[1]}.png").write_bytes(png(np.full((8, 16), 7))), "has several"),
    "another name": (
        lambda folder: (folder / "berlin_000009_000019.png").write_bytes(png(np.full((8, 16), 7))),
        "berlin_000009_000019.png belongs to no image",
    ),
    "a stray file": (lambda folder: (folder / "notes.txt").write_text("x"), "notes.txt belongs to no image"),
    "train ids": (lambda folder: replaced(folder, png(np.full((8, 16), 0))), r"holds the ids \[0\].*train ids"),
    "the ignore index": (lambda folder: replaced(folder, png(np.full((8, 16), 255))), r"holds the ids \[255\]"),
    "another size": (lambda folder: replaced(folder, png(np.full((16, 8), 7))), "is 16x8, its image 8x16"),
    "colors": (lambda folder: replaced(folder, png(np.full((8, 16), 7), "RGB")), "has the mode RGB"),
    "a palette": (lambda folder: replaced(folder, png(np.full((8, 16), 7), "P")), "has the mode P"),
    "no image": (lambda folder: replaced(folder, b"no image"), "is not a readable PNG"),
    "a cut file": (
        lambda folder: replaced(folder, png(np.random.default_rng(0).integers(7, 9, (8, 16)))[:-30]),
        "is not a readable PNG",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_named_and_no_zip_is_written(predictions, tmp_path, fault):
    damage, message = FAULTS[fault]
    damage(predictions)
    with pytest.raises(InputError, match=message):
        validate_submission(predictions, "cityscapes", SIZES)
    with pytest.raises(RunError, match=message):
        pack_submission(predictions, tmp_path / "out.zip", "cityscapes", SIZES)
    assert not (tmp_path / "out.zip").exists()


def test_names_of_ade20k_must_match_exactly(tmp_path):
    name = "ADE_test_00000001"
    (tmp_path / f"{name}.png").write_bytes(png(np.full((3, 4), 150)))
    validate_submission(tmp_path, "ade20k", {name: (3, 4)})
    (tmp_path / f"{name}.png").rename(tmp_path / f"{name}_mine.png")
    with pytest.raises(InputError, match=r"_mine.png belongs to no image[^$]*ADE_test_00000001 has no prediction"):
        validate_submission(tmp_path, "ade20k", {name: (3, 4)})


def test_a_file_that_is_not_a_zip_is_refused(tmp_path):
    (tmp_path / "out.zip").write_bytes(b"PK no zip")
    with pytest.raises(InputError, match="is not a readable zip"):
        validate_submission(tmp_path / "out.zip", "cityscapes", SIZES)


@pytest.fixture(scope="module")
def city(tmp_path_factory):
    """A test split as Cityscapes is unpacked, and a checkpoint for its classes."""
    root, rng = tmp_path_factory.mktemp("city"), np.random.default_rng(0)
    folder = root / "leftImg8bit" / "test" / "berlin"
    folder.mkdir(parents=True)
    for name, shape in zip(BERLIN, [(24, 40, 3), (32, 64, 3), (24, 40, 3)], strict=True):
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(folder / f"{name}_leftImg8bit.png")
    torch.manual_seed(0)
    model = create_model("dsct-tiny-sac", num_labels=19, **REDUCED)
    model.save_pretrained(root / "model")
    create_image_processor(model.config, do_resize=False).save_pretrained(root / "model")
    return root


def test_a_test_split_is_predicted_and_an_interrupted_run_continues(city, tmp_path, monkeypatch):
    from hf_denseseg.training.tasks.segmentation_trainer import SegmentationTrainer

    predicted, predict = [], SegmentationTrainer.predict_labels

    def counting(self, sample):
        if len(predicted) == 2:
            predicted.append("stopped")
            raise KeyboardInterrupt
        predicted.append(sample["id"])
        return predict(self, sample)

    monkeypatch.setattr(SegmentationTrainer, "predict_labels", counting)
    words = ["evaluate", str(city / "model"), "--dataset", "cityscapes", "--data_root", str(city), "--eval_split"]
    words += ["test", "--use_cpu", "--submission", str(tmp_path / "city.zip"), "--output_dir", str(tmp_path / "out")]
    assert main(words) == 1 and not (tmp_path / "city.zip").exists()
    assert main(words) == 0
    assert predicted == [*BERLIN[:2], "stopped", BERLIN[2]]
    files = read(tmp_path / "city.zip")
    validate_submission(tmp_path / "city.zip", "cityscapes", dict.fromkeys(BERLIN, (24, 40)) | {BERLIN[1]: (32, 64)})
    recipe = load_recipe(None, ["--model", words[1], *words[2:9], "--output_dir", str(tmp_path / "again")])
    data = recipe.task.load(recipe.data, "eval")
    trainer = training_run.build_evaluator(recipe, data)
    for number, name in enumerate(BERLIN):
        expected = np.array(CITYSCAPES_IDS)[predict(trainer, trainer.eval_dataset[number])]
        np.testing.assert_array_equal(files[f"{name}_gtFine_labelIds.png"], expected)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dataset", "synthetic", "--submission", "out.zip"], "known for Cityscapes and ADE20K"),
        (["--dataset", "synthetic", "--submission", "out.tar"], "a path that ends in .zip"),
        (["--dataset", "cityscapes", "--data_root", ".", "--eval_split", "test"], "evaluate ... --submission ZIP"),
    ],
)
def test_what_no_server_accepts_is_refused_before_any_work(city, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(city)
    assert main(["evaluate", str(city / "model"), *words, "--use_cpu", "--output_dir", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
