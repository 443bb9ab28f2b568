"""Images of any number of channels and bits: the model is given the same in training, evaluation and prediction."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline

from detection_model_tester import few_regions
from hf_denseseg import SetrConfig, SetrForSemanticSegmentation, SetrImageProcessor
from hf_denseseg.cli import main
from hf_denseseg.data.checks.pixels import PixelSurvey
from hf_denseseg.data.reading.pixels import PixelFormat
from hf_denseseg.errors import InputError
from hf_denseseg.inference import SlidingWindowSegmentationPipeline
from hf_denseseg.inference.predict.segmentation import SegmentationPredictor
from hf_denseseg.models.auto.pretrained import load_image_processor, load_trained_model
from hf_denseseg.models.channels import channel_statistics, image_channels
from hf_denseseg.training import run as training_run
from hf_denseseg.training.recipe import load_recipe
from raster_files import write_bands
from test_published_hlg import REDUCED
from tiny_models import TINY_SETR
from transformers_models import save as saved

SIZE = (32, 48)
CLASSES = ["a", "b", "c"]
# Channels, declared range, type in which the files store it.
FORMATS = {
    "8 bits, gray": (1, "uint8", np.uint8),
    "8 bits, color": (3, "uint8", np.uint8),
    "12 bits, gray": (1, [0, 4095], np.uint16),
    "12 bits, four channels": (4, [0, 4095], np.uint16),
    "16 bits, color": (3, "uint16", np.uint16),
    "16 bits, six channels": (6, "uint16", np.uint16),
    "floating, color": (3, [0, 1], np.float32),
    "floating, six channels": (6, [-1, 3], np.float32),
}


def label_of(number):
    return ((np.indices(SIZE).sum(0) // 8 + number) % 3).astype(np.uint8)


def bands_of(number, channels, pixel_range, kind):
    """Values `(H, W, C)` that differ between the classes of the label map."""
    low, high = PixelFormat(channels, pixel_range).bounds
    noise = np.random.default_rng(number).uniform(0, 0.3, (*SIZE, channels))
    values = low + (high - low) * (label_of(number)[..., None] / 3 + noise)
    return values.astype(kind) if kind == np.float32 else values.round().astype(kind)


def write_pairs(folder, pixel_format, counts=(("train", 4), ("validation", 2))):
    for split, count in counts:
        for name in ("images", "labels"):
            (folder / split / name).mkdir(parents=True)
        for number in range(count):
            write_bands(folder / split / "images" / f"{number}.tif", bands_of(number, *pixel_format))
            Image.fromarray(label_of(number)).save(folder / split / "labels" / f"{number}.png")
    (folder / "classes.json").write_text(json.dumps(CLASSES))
    return folder


def save_tiny(folder, channels=3, pixel_range="uint8"):
    names = dict(enumerate(CLASSES))
    config = SetrConfig(
        **{**TINY_SETR, "num_labels": 3}, auxiliary_layers=[1, 3], mla_layers=[0, 1, 2, 3], num_channels=channels
    )
    config.id2label, config.label2id = names, {name: index for index, name in names.items()}
    torch.manual_seed(0)
    SetrForSemanticSegmentation(config).save_pretrained(folder)
    statistics = channel_statistics(channels)
    SetrImageProcessor(do_resize=False, pixel_range=pixel_range, **statistics).save_pretrained(folder)
    return folder


def words(data, output, *more):
    return [
        *("--dataset", str(data), "--crop_size", str(SIZE[0]), str(SIZE[1]), "--per_device_train_batch_size", "2"),
        *("--max_steps", "4", "--save_steps", "2", "--eval_strategy", "no", "--use_cpu"),
        *("--output_dir", str(output), *more),
    ]


def given_to(model, run):
    """Batches of images that a model is given while `run` runs."""
    found = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: found.append(kwargs.get("pixel_values", args[0] if args else None)),
        with_kwargs=True,
    )
    run()
    hook.remove()
    return found


@pytest.mark.parametrize("name", FORMATS)
def test_the_model_is_given_the_same_everywhere(name, tmp_path):
    channels, pixel_range, kind = FORMATS[name]
    data, checkpoint = write_pairs(tmp_path / "data", FORMATS[name]), save_tiny(tmp_path / "m", channels, pixel_range)
    file = data / "validation" / "images" / "0.tif"
    low, high = PixelFormat(channels, pixel_range).bounds
    statistics = [np.array(each, np.float64) for each in channel_statistics(channels).values()]
    unit = (bands_of(0, *FORMATS[name]).astype(np.float64) - low) / (high - low)
    expected = torch.from_numpy((unit - statistics[0]) / statistics[1]).permute(2, 0, 1).float()

    still = ("--flip", "false", "--photometric_distortion", "false", "--scale_range", "1", "1")
    recipe = load_recipe(None, ["--model", str(checkpoint), *words(data, tmp_path / "r", *still)])
    recipe = training_run._with_pixel_format(recipe, training=True)
    eval_data = training_run.load_data(recipe, "eval")
    model = training_run.build_model(recipe.model, eval_data.spec, channels)
    trainer = training_run.build_trainer(recipe, model, eval_data, eval_data)
    batch = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[0]]))
    predictor = SegmentationPredictor.load(str(checkpoint), {}, "cpu")
    found = {
        "training": [batch["pixel_values"]],
        "evaluation": given_to(trainer.model, lambda: trainer.predict_labels(trainer.eval_dataset[0])),
        "prediction": given_to(
            predictor.model,
            lambda: predictor.predict(
                training_run.load_data(recipe, "eval").dataset[0]["image"],
                "0",
            ),
        ),
    }
    for kind in (None, SlidingWindowSegmentationPipeline):
        pipe = pipeline("image-segmentation", model=str(checkpoint), pipeline_class=kind, device="cpu")
        found[f"pipeline {kind}"] = given_to(pipe.model, lambda pipe=pipe: pipe(str(file)))
    for where, images in found.items():
        torch.testing.assert_close(
            images[0][0], expected, atol=2e-4, rtol=0, msg=lambda text, at=where: f"{at}: {text}"
        )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint of three channels, fine-tuned on four channels of 12 bits."""
    folder = tmp_path_factory.mktemp("pixels")
    data = write_pairs(folder / "data", FORMATS["12 bits, four channels"])
    save_tiny(folder / "start")
    keys = ("--num_channels", "4", "--pixel_range", "0", "4095")
    assert main(["train", "--model", str(folder / "start"), *words(data, folder / "run", *keys)]) == 0
    return folder


def test_a_run_evaluates_predicts_and_exports(trained, tmp_path):
    model, data = str(trained / "run" / "model"), str(trained / "data")
    assert image_channels(load_trained_model(model).config) == 4
    assert PixelFormat.of_processor(load_image_processor(model)) == PixelFormat(4, (0, 4095))
    assert main(["evaluate", model, "--dataset", data, "--output_dir", str(tmp_path / "evaluation")]) == 0
    scores = [
        json.loads((folder / "results.json").read_text())["scores"]
        for folder in (trained / "run", tmp_path / "evaluation")
    ]
    assert scores[0]["mean_iou"] == pytest.approx(scores[1]["mean_iou"], abs=1e-6)
    images = trained / "data" / "validation" / "images"
    assert main(["predict", model, str(images), "--output_dir", str(tmp_path / "out"), "--write", "masks"]) == 0
    (segments,) = [pipeline("image-segmentation", model=model, device="cpu")(str(images / "0.tif"))]
    with Image.open(tmp_path / "out" / "masks" / "0.png") as mask:
        ids = np.asarray(mask)
    for each in segments:
        assert np.array_equal(np.asarray(each["mask"]) == 255, ids == CLASSES.index(each["label"]))
    assert main(["features", model, "--dataset", data, "--output_dir", str(tmp_path / "features")]) == 0
    assert main(["export", model, "--output", str(tmp_path / "exported"), "--size", "32", "48"]) == 0


def test_a_model_of_transformers_gets_an_image_processor_that_keeps_the_format(trained, tmp_path):
    keys = ("--num_channels", "4", "--pixel_range", "0", "4095", "--max_steps", "1")
    run = tmp_path / "run"
    assert (
        main(["train", "--model", str(saved("segformer", tmp_path / "s")), *words(trained / "data", run, *keys)]) == 0
    )
    file, model = trained / "data" / "validation" / "images" / "0.tif", str(run / "model")
    assert main(["predict", model, str(file), "--output_dir", str(tmp_path / "out"), "--write", "masks"]) == 0
    with Image.open(tmp_path / "out" / "masks" / "0.png") as mask:
        ids = np.asarray(mask)
    for each in pipeline("image-segmentation", model=model, device="cpu")(str(file)):
        assert np.array_equal(np.asarray(each["mask"]) == 255, ids == CLASSES.index(each["label"]))


def test_the_first_convolution_is_adapted_by_the_rule(trained):
    recipe = load_recipe(
        None,
        [
            *("--model", str(trained / "start"), "--num_channels", "4", "--pixel_range", "0", "4095"),
            *words(trained / "data", trained / "unused"),
        ],
    )
    spec = training_run.load_data(training_run._with_pixel_format(recipe, training=True), "eval").spec
    adapted = training_run.build_model(recipe.model, spec, 4)
    start = load_trained_model(str(trained / "start"))
    name = next(name for name, each in adapted.state_dict().items() if each.ndim == 4 and each.shape[1] == 4)
    kernels = start.state_dict()[name]
    torch.testing.assert_close(adapted.state_dict()[name], kernels[:, [0, 1, 2, 0]] * 0.75)
    rest = {key: each for key, each in adapted.state_dict().items() if key != name}
    assert all(torch.equal(each, start.state_dict()[key]) for key, each in rest.items())


# Command line, and what its one line of error names.
REFUSED = {
    "channels of the files": ([], ("4, but", "num_channels is 3")),
    "range of the files": (["--num_channels", "4"], ("uint8", "uint16")),
    "contradicting overrides": (
        ["--num_channels", "4", "--config_overrides", "{num_channels: 3}"],
        ("is 4", "says 3"),
    ),
    "means for another number": (["--num_channels", "4", "--image_mean", "0.5"], ("1 numbers", "is 4")),
    "no channel": (["--num_channels", "0"], ("num_channels is 0",)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_before_the_first_step(case, trained, tmp_path, capsys):
    keys, named = REFUSED[case]
    start = ["train", "--model", str(trained / "start")]
    assert main([*start, *words(trained / "data", tmp_path / "run", *keys)]) == 2
    message = capsys.readouterr().err
    assert all(each in message for each in named)
    assert not (tmp_path / "run" / "recipe.yaml").exists()


def test_the_number_of_channels_of_a_checkpoint_that_cannot_be_adapted_is_refused(trained, tmp_path, capsys):
    start = ["train", "--model", str(trained / "run" / "model"), "--num_channels", "3", "--pixel_range", "uint8"]
    assert main([*start, *words("synthetic@64x64", tmp_path / "run")]) == 2
    assert "takes 4 channels, but num_channels is 3" in capsys.readouterr().err


def test_videos_are_refused_for_other_images_than_photographs(trained, tmp_path, capsys):
    (tmp_path / "a.mp4").write_bytes(b"\0")
    command = ["predict", str(trained / "run" / "model"), str(tmp_path / "a.mp4"), "--output_dir", str(tmp_path / "o")]
    assert main(command) == 1
    assert "num_channels 4 and pixel_range [0, 4095]" in capsys.readouterr().err


def test_data_check_proposes_the_keys_and_finds_no_fault_with_them(trained, tmp_path, capsys):
    data = str(trained / "data")
    assert main(["data", "check", data]) == 2
    assert "num_channels: 4, pixel_range: [0, 4095]" in capsys.readouterr().out
    keys = ["--num_channels", "4", "--pixel_range", "0", "4095"]
    assert main(["data", "check", data, *keys]) == 0
    assert main(["data", "stats", data, *keys, "--output", str(tmp_path / "s.json")]) == 0
    found = json.loads((tmp_path / "s.json").read_text())
    values = np.concatenate([bands_of(n, *FORMATS["12 bits, four channels"]).reshape(-1, 4) for n in range(4)]) / 4095
    np.testing.assert_allclose(found["image_mean"], values.mean(0), atol=1e-4)
    np.testing.assert_allclose(found["image_std"], values.std(0), atol=1e-4)


def test_images_without_a_finite_value_do_not_stop_the_check():
    survey = PixelSurvey()
    survey.add_stored(np.full((4, 5, 3), np.nan, np.float32))
    assert survey.keys(PixelFormat()) == {} and survey.note(PixelFormat()) is None
    survey.add_stored(np.full((4, 5, 3), -2.5, np.float32))
    survey.add_stored(np.full((4, 5, 3), 4.0, np.float32))
    assert survey.keys(PixelFormat()) == {"pixel_range": [-2.5, 4]}
    assert str(survey.note(PixelFormat())).endswith("pixel_range: [-2.5, 4].")


PIXELS = ["--num_channels", "5", "--pixel_range", "uint16", "--config_overrides", json.dumps(REDUCED)]


def run_and_predict(task_words, folder, images, capsys):
    output = folder / "run"
    common = ["--max_steps", "2", "--per_device_train_batch_size", "2", "--use_cpu", "--eval_strategy", "no"]
    assert main(["train", *task_words, *common, *PIXELS, "--output_dir", str(output)]) == 0
    model = str(output / "model")
    assert PixelFormat.of_processor(load_image_processor(model)) == PixelFormat(5, "uint16")
    assert main(["predict", model, str(images), "--output_dir", str(folder / "out")]) == 0
    return model


def test_a_classifier_takes_any_channels(tmp_path, capsys):
    for split in ("train", "validation"):
        for number, name in enumerate(("x", "y")):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for copy in range(2):
                bands = bands_of(2 * copy + number, 5, "uint16", np.uint16)
                write_bands(tmp_path / "data" / split / name / f"{copy}.tif", bands)
    task = ["--task", "image-classification", "--model", "hlg-tiny", "--crop_size", "32", "32"]
    task += ["--dataset", str(tmp_path / "data")]
    model = run_and_predict(task, tmp_path, tmp_path / "data" / "validation", capsys)
    file = tmp_path / "data" / "validation" / "x" / "0.tif"
    scores = pipeline("image-classification", model=model, device="cpu")(str(file))
    records = json.loads((tmp_path / "out" / "results.json").read_text())["images"]
    predicted = {row["id"]: row["predictions"] for row in records}["x/0"]
    assert [each["label"] for each in scores] == [each["label"] for each in predicted]
    assert scores[0]["score"] == pytest.approx(predicted[0]["score"], abs=1e-5)
    assert main(["train", *task, *PIXELS, "--color_jitter", "0.4", "--output_dir", str(tmp_path / "no")]) == 2
    assert "num_channels 5" in capsys.readouterr().err


def test_a_detector_takes_any_channels(tmp_path, monkeypatch, capsys):
    few_regions(monkeypatch)
    (tmp_path / "annotations").mkdir()
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        images, objects = [], []
        for number in range(2):
            write_bands(tmp_path / split / f"{number}.tif", bands_of(number, 5, "uint16", np.uint16))
            images.append({"id": number + 1, "file_name": f"{number}.tif", "height": SIZE[0], "width": SIZE[1]})
            box = {"bbox": [4, 4, 20, 16], "area": 320, "iscrowd": 0, "category_id": 1}
            objects.append({"id": number + 1, "image_id": number + 1, **box})
        content = {"images": images, "annotations": objects, "categories": [{"id": 1, "name": "x"}]}
        (tmp_path / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    task = ["--task", "object-detection", "--model", "hlg-retinanet-tiny", "--dataset", str(tmp_path)]
    task += ["--train_split", "train", "--eval_split", "val", "--shortest_edge", "64", "--longest_edge", "96"]
    task += ["--test_base_size", "64", "96"]
    model = run_and_predict(task, tmp_path, tmp_path / "val", capsys)
    found = pipeline("object-detection", model=model, device="cpu")(str(tmp_path / "val" / "0.tif"), threshold=0.0)
    assert all(each["label"] == "x" for each in found)


def test_a_processor_and_a_model_of_different_channels_are_refused(tmp_path):
    checkpoint = save_tiny(tmp_path / "m", 4)
    SetrImageProcessor(do_resize=False).save_pretrained(checkpoint)
    with pytest.raises(InputError, match="3 numbers.*4 channels"):
        SegmentationPredictor.load(str(checkpoint), {}, "cpu")
