"""`denseseg predict` on files, folders and globs, good and bad."""

import argparse
import json
import os

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForSemanticSegmentation,
    SegformerConfig,
    SegformerForImageClassification,
    SegformerForSemanticSegmentation,
    SegformerImageProcessor,
)

from hf_denseseg.commands import predict
from hf_denseseg.data.labels import LabelSpec
from hf_denseseg.errors import InputError, RunError
from hf_denseseg.inference import InferenceSettings, class_probabilities

CONFIG = {
    "num_encoder_blocks": 2,
    "depths": [1, 1],
    "sr_ratios": [2, 1],
    "hidden_sizes": [8, 16],
    "patch_sizes": [7, 3],
    "strides": [4, 2],
    "num_attention_heads": [1, 2],
    "mlp_ratios": [2, 2],
    "decoder_hidden_size": 16,
    "id2label": {0: "road", 1: "tree", 2: "sky"},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    model = SegformerForSemanticSegmentation(SegformerConfig(**CONFIG))
    torch.nn.init.normal_(model.decode_head.classifier.weight, std=3.0)
    model.save_pretrained(folder)
    SegformerImageProcessor(do_resize=False).save_pretrained(folder)
    return folder


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    (folder / "night").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, (height, width) in {"a.png": (33, 48), "night/a.png": (20, 31), "b.jpg": (40, 40)}.items():
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / name)
    return folder


def run(*arguments):
    parser = argparse.ArgumentParser()
    predict.add_parser(parser.add_subparsers())
    return predict.main(parser.parse_args(["predict", *map(str, arguments)]))


def model_probabilities(checkpoint, path, settings):
    model = AutoModelForSemanticSegmentation.from_pretrained(checkpoint).eval()
    image = torch.from_numpy(np.asarray(Image.open(path).convert("RGB")).copy()).permute(2, 0, 1)
    processor = SegformerImageProcessor()
    return class_probabilities(model, image, settings, processor.image_mean, processor.image_std).numpy()


def test_a_folder_is_labelled_at_the_pictures_own_sizes(checkpoint, photos, tmp_path):
    output = tmp_path / "out"
    assert run(checkpoint, photos, "--output", output) == 0
    results = json.loads((output / "results.json").read_text())
    assert [record["mask"] for record in results["pictures"]] == ["masks/a.png", "masks/b.png", "masks/night/a.png"]
    assert results["failed"] == []
    for record in results["pictures"]:
        probabilities = model_probabilities(checkpoint, record["source"], InferenceSettings())
        mask = Image.open(output / record["mask"])
        ids = np.asarray(mask)
        assert ids.dtype == np.uint8 and mask.mode == "P"
        np.testing.assert_array_equal(ids, probabilities.argmax(0))
        assert record["size"] == list(ids.shape) == list(np.asarray(Image.open(record["source"])).shape[:2])
        assert Image.open(output / record["overlay"]).size == mask.size
        assert sum(row["share"] for row in record["classes"]) == pytest.approx(1)
        for row in record["classes"]:
            k = list(CONFIG["id2label"].values()).index(row["class"])
            assert row["share"] == pytest.approx((ids == k).mean())
            assert row["score"] == pytest.approx(probabilities[k][ids == k].mean(), abs=1e-5)


def test_windows_scales_flip_and_probabilities_are_passed_on(checkpoint, photos, tmp_path):
    options = [
        "--crop_size",
        24,
        24,
        "--stride",
        16,
        16,
        "--scales",
        0.75,
        1.5,
        "--flip",
        "--write",
        "masks",
        "probabilities",
        "--average",
        "logits",
    ]
    assert run(checkpoint, photos / "a.png", "--output", tmp_path / "out", *options) == 0
    settings = InferenceSettings("slide", (24, 24), (16, 16), (0.75, 1.5), True, average="logits")
    expected = model_probabilities(checkpoint, photos / "a.png", settings)
    with np.load(tmp_path / "out" / "probabilities" / "a.npz") as written:
        np.testing.assert_allclose(written["probabilities"], expected, atol=1e-3)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out/masks/a.png")), expected.argmax(0))
    assert json.loads((tmp_path / "out/results.json").read_text())["settings"] == settings.to_dict()


def test_settings_saved_with_the_checkpoint_are_used_and_can_be_replaced(checkpoint, photos, tmp_path):
    InferenceSettings("slide", (24, 24), (20, 20)).save(checkpoint)
    try:
        run(checkpoint, photos / "a.png", "--output", tmp_path / "saved")
        run(checkpoint, photos / "a.png", "--output", tmp_path / "given", "--crop_size", 16, 16)
    finally:
        (checkpoint / "inference_settings.json").unlink()
    saved, given = (json.loads((tmp_path / n / "results.json").read_text())["settings"] for n in ("saved", "given"))
    assert saved["crop_size"] == [24, 24] and saved["stride"] == [20, 20]
    assert given["crop_size"] == [16, 16] and given["stride"] is None


def test_bad_files_are_named_and_left_out(checkpoint, photos, tmp_path, capsys):
    (photos / "empty.png").touch()
    (photos / "text.png").write_text("no picture")
    whole = (photos / "b.jpg").read_bytes()
    (photos / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    assert run(checkpoint, photos, "--output", tmp_path / "out") == 1
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert len(results["pictures"]) == 3
    assert {os.path.basename(row["source"]) for row in results["failed"]} == {"empty.png", "text.png", "cut.jpg"}
    captured = capsys.readouterr()
    assert "3 pictures labelled, 3 left out" in captured.out
    assert all(name in captured.err for name in ("empty.png", "text.png", "cut.jpg"))


def test_a_second_run_makes_only_what_is_missing_or_out_of_date(checkpoint, photos, tmp_path, capsys):
    output = tmp_path / "out"
    run(checkpoint, photos, "--output", output)
    first = (output / "results.json").read_text()
    (output / "masks/b.png").unlink()
    (output / "records/night/a.json").unlink()
    capsys.readouterr()
    assert run(checkpoint, photos, "--output", output) == 0
    assert "2 pictures labelled, 1 were done before" in capsys.readouterr().out
    assert (output / "results.json").read_text() == first
    run(checkpoint, photos, "--output", output, "--flip")
    assert "3 pictures labelled, 0 left out" in capsys.readouterr().out
    Image.new("RGB", (9, 9)).save(photos / "a.png")
    run(checkpoint, photos, "--output", output, "--flip")
    assert "1 pictures labelled, 2 were done before" in capsys.readouterr().out
    assert Image.open(output / "masks/a.png").size == (9, 9)


def test_an_interrupted_picture_is_not_taken_for_finished(checkpoint, photos, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out"

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_denseseg.prediction.overlay", stop)
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint, photos, "--output", output)
    monkeypatch.undo()
    assert not (output / "results.json").exists()
    assert run(checkpoint, photos, "--output", output) == 0
    assert "3 pictures labelled, 0 left out" in capsys.readouterr().out
    assert not list(output.rglob(".*")), "temporary files are left"


def test_globs_and_equal_names_give_one_result_per_picture(checkpoint, photos, tmp_path):
    Image.new("RGB", (8, 8)).save(photos / "a.bmp")
    arguments = [photos / "*.png", photos / "a.bmp", photos / "night/a.png", photos / "a.png"]
    assert run(checkpoint, *arguments, "--output", tmp_path / "out") == 0
    masks = sorted(path.name for path in (tmp_path / "out/masks").iterdir())
    assert masks == ["a.png", "a_bmp.png", "a_png.png"]


def test_results_inside_the_input_folder_are_not_labelled_again(checkpoint, photos):
    for _ in range(2):
        run(checkpoint, photos, "--output", photos / "out")
    assert len(json.loads((photos / "out/results.json").read_text())["pictures"]) == 3


def test_colours_come_from_the_label_specification(checkpoint, photos, tmp_path):
    spec = tmp_path / "labels.json"
    spec.write_text(json.dumps({"classes": ["road", "tree", "sky"], "palette": [[9, 8, 7], [1, 2, 3], [4, 5, 6]]}))
    run(checkpoint, photos / "a.png", "--output", tmp_path / "out", "--label_spec", spec)
    assert Image.open(tmp_path / "out/masks/a.png").getpalette()[:9] == [9, 8, 7, 1, 2, 3, 4, 5, 6]
    beside = LabelSpec("toy", ("road", "tree", "sky"), palette=((3, 3, 3), (6, 6, 6), (7, 7, 7))).to_dict()
    (checkpoint / "labels.json").write_text(json.dumps(beside))
    try:
        run(checkpoint, photos / "a.png", "--output", tmp_path / "own")
    finally:
        (checkpoint / "labels.json").unlink()
    assert Image.open(tmp_path / "own/masks/a.png").getpalette()[:9] == [3, 3, 3, 6, 6, 6, 7, 7, 7]
    spec.write_text(json.dumps({"classes": ["road", "tree"]}))
    with pytest.raises(InputError, match="names 2 classes"):
        run(checkpoint, photos / "a.png", "--output", tmp_path / "out", "--label_spec", spec)


def test_wrong_input_is_one_sentence_with_the_remedy(checkpoint, photos, tmp_path):
    output = ["--output", tmp_path / "out"]
    (tmp_path / "nothing").mkdir()
    (tmp_path / "file").touch()
    for arguments, message in (
        ([checkpoint, tmp_path / "missing.png", *output], "leads to no picture"),
        ([checkpoint, tmp_path / "nothing", *output], "leads to no picture"),
        ([checkpoint, photos / "*.gif", *output], "leads to no picture"),
        ([tmp_path / "nothing", photos, *output], "config.json"),
        ([checkpoint, photos, "--output", tmp_path / "file"], "cannot be written"),
        ([checkpoint, photos, *output, "--device", "cuda:99"], "cannot be used"),
        ([checkpoint, photos, *output, "--device", "toaster"], "cannot be used"),
        ([checkpoint, photos, *output, "--mode", "slide"], "need `crop_size`"),
        ([checkpoint, photos, *output, "--mode", "whole", "--crop_size", 8, 8], "Leave out"),
        ([checkpoint, photos, *output, "--scales", -1], "scales is"),
    ):
        with pytest.raises(InputError, match=message):
            run(*arguments)


def test_a_checkpoint_of_another_kind_or_without_a_processor_is_refused(checkpoint, photos, tmp_path):
    model = SegformerForSemanticSegmentation.from_pretrained(checkpoint)
    model.save_pretrained(tmp_path / "bare")
    with pytest.raises(InputError, match="has no image processor"):
        run(tmp_path / "bare", photos, "--output", tmp_path / "out")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text(json.dumps({"model_type": "bert", "hidden_size": 8}))
    with pytest.raises(InputError, match="no whole semantic segmentation checkpoint"):
        run(tmp_path / "other", photos, "--output", tmp_path / "out")
    SegformerForImageClassification(SegformerConfig(**CONFIG)).save_pretrained(tmp_path / "classifier")
    SegformerImageProcessor().save_pretrained(tmp_path / "classifier")
    named = json.loads((tmp_path / "classifier/config.json").read_text())  # a classifier by its own name is answered
    named["architectures"] = ["SegformerForSemanticSegmentation"]
    (tmp_path / "classifier/config.json").write_text(json.dumps(named))
    with pytest.raises(InputError, match="lacks .* decode_head"):
        run(tmp_path / "classifier", photos, "--output", tmp_path / "out")


def test_a_hub_id_without_a_network_fails_with_the_reason(photos, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(RunError, match="somebody/some-model"):
        run("somebody/some-model", photos, "--output", tmp_path / "out")
