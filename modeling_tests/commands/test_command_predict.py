"""`denseseg predict` on images, videos and streams, valid and damaged, in one and in two processes."""

import argparse
import json
import os
import shutil
import socket
import time
import types

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

from closeness import assert_highest
from hf_denseseg.commands import predict
from hf_denseseg.data.labels import LabelSpec
from hf_denseseg.errors import InputError, RunError
from hf_denseseg.inference.predict.journal import Journal
from hf_denseseg.inference.predict.segmentation import SegmentationPredictor
from hf_denseseg.inference.preprocessing import Preprocessing
from hf_denseseg.inference.segmentation import InferenceSettings, class_probabilities
from hf_denseseg.visualization.label_maps import overlay
from processes import run_two, start

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
    return predict.main(parser.parse_args(["predict", "--device", "cpu", *map(str, arguments)]))


def model_probabilities(checkpoint, path, settings):
    model = AutoModelForSemanticSegmentation.from_pretrained(checkpoint).eval()
    image = torch.from_numpy(np.asarray(Image.open(path).convert("RGB")).copy()).permute(2, 0, 1)
    preprocessing = Preprocessing.from_image_processor(SegformerImageProcessor())
    return class_probabilities(model, image, settings, preprocessing).numpy()


def finished(output):
    """Names of the images in the journal of an output folder."""
    return [entry.key for entry in Journal(output / "journal", {}, 0).read()]


def forget(output, name):
    """Remove an image from the journal."""
    for path in (output / "journal").glob("process-*.jsonl"):
        kept = [line for line in path.read_text().splitlines() if f'["{name}", ' not in line]
        path.write_text("\n".join(kept) + "\n")


def test_a_folder_is_segmented_at_the_images_own_sizes(checkpoint, photos, tmp_path):
    output = tmp_path / "out"
    assert run(checkpoint, photos, "--output_dir", output) == 0
    results = json.loads((output / "results.json").read_text())
    assert [record["mask"] for record in results["images"]] == ["masks/a.png", "masks/b.png", "masks/night/a.png"]
    assert results["failed"] == []
    for record in results["images"]:
        probabilities = model_probabilities(checkpoint, record["source"], InferenceSettings())
        mask = Image.open(output / record["mask"])
        ids = np.asarray(mask)
        assert ids.dtype == np.uint8 and mask.mode == "P"
        assert_highest(ids, probabilities)
        assert record["size"] == list(ids.shape) == list(np.asarray(Image.open(record["source"])).shape[:2])
        assert Image.open(output / record["overlay"]).size == mask.size
        assert sum(row["fraction"] for row in record["classes"]) == pytest.approx(1)
        for row in record["classes"]:
            k = list(CONFIG["id2label"].values()).index(row["class"])
            assert row["fraction"] == pytest.approx((ids == k).mean())
            assert row["score"] == pytest.approx(probabilities[k][ids == k].mean(), abs=1e-5)


def test_windows_scales_flip_and_probabilities_are_applied(checkpoint, photos, tmp_path):
    options = [
        "--test_crop_size",
        24,
        24,
        "--test_stride",
        16,
        16,
        "--test_scales",
        0.75,
        1.5,
        "--test_flip",
        "--write",
        "masks",
        "probabilities",
        "--test_average",
        "logits",
    ]
    assert run(checkpoint, photos / "a.png", "--output_dir", tmp_path / "out", *options) == 0
    settings = InferenceSettings("slide", (24, 24), (16, 16), (0.75, 1.5), True, average="logits")
    expected = model_probabilities(checkpoint, photos / "a.png", settings)
    with np.load(tmp_path / "out" / "probabilities" / "a.npz") as written:
        np.testing.assert_allclose(written["probabilities"], expected, atol=1e-3)
    assert_highest(Image.open(tmp_path / "out/masks/a.png"), expected)
    assert json.loads((tmp_path / "out/results.json").read_text())["settings"] == settings.to_dict()


def test_settings_saved_with_the_checkpoint_are_used_and_can_be_replaced(checkpoint, photos, tmp_path):
    InferenceSettings("slide", (24, 24), (20, 20)).save(checkpoint)
    try:
        run(checkpoint, photos / "a.png", "--output_dir", tmp_path / "saved")
        run(checkpoint, photos / "a.png", "--output_dir", tmp_path / "given", "--test_crop_size", 16, 16)
    finally:
        (checkpoint / "inference_settings.json").unlink()
    saved, given = (json.loads((tmp_path / n / "results.json").read_text())["settings"] for n in ("saved", "given"))
    assert saved["crop_size"] == [24, 24] and saved["stride"] == [20, 20]
    assert given["crop_size"] == [16, 16] and given["stride"] is None


def test_damaged_files_are_named_and_left_out(checkpoint, photos, tmp_path, capsys):
    (photos / "empty.png").touch()
    (photos / "notes.xml").touch()
    (photos / "text.png").write_text("not an image")
    data = (photos / "b.jpg").read_bytes()
    (photos / "cut.jpg").write_bytes(data[: len(data) // 2])
    assert run(checkpoint, photos, "--output_dir", tmp_path / "out") == 1
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert len(results["images"]) == 3
    assert {os.path.basename(row["source"]) for row in results["failed"]} == {"empty.png", "text.png", "cut.jpg"}
    captured = capsys.readouterr()
    assert "3 images predicted, 3 left out, passed over 1 .xml files; see" in captured.out
    assert results["passed_over"] == {".xml": 1}
    assert all(name in captured.err for name in ("empty.png", "text.png", "cut.jpg"))


def test_a_second_run_predicts_only_what_is_missing_or_out_of_date(checkpoint, photos, tmp_path, capsys):
    output = tmp_path / "out"
    run(checkpoint, photos, "--output_dir", output)
    first = (output / "results.json").read_text()
    (output / "masks/b.png").unlink()
    forget(output, "night/a")
    capsys.readouterr()
    assert run(checkpoint, photos, "--output_dir", output) == 0
    assert "2 images predicted, 1 finished before" in capsys.readouterr().out
    assert (output / "results.json").read_text() == first
    run(checkpoint, photos, "--output_dir", output, "--test_flip")
    assert "3 images predicted, 0 left out" in capsys.readouterr().out
    Image.new("RGB", (9, 9)).save(photos / "a.png")
    run(checkpoint, photos, "--output_dir", output, "--test_flip")
    assert "1 image predicted, 2 finished before" in capsys.readouterr().out
    assert Image.open(output / "masks/a.png").size == (9, 9)


def test_an_interrupted_image_is_not_entered_as_finished(checkpoint, photos, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out"

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_denseseg.inference.predict.segmentation.overlay", stop)
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint, photos, "--output_dir", output)
    monkeypatch.undo()
    assert not (output / "results.json").exists()
    assert run(checkpoint, photos, "--output_dir", output) == 0
    assert "3 images predicted, 0 left out" in capsys.readouterr().out
    assert not list(output.rglob(".*")), "temporary files are left"


def test_globs_and_equal_names_give_one_result_per_image(checkpoint, photos, tmp_path):
    Image.new("RGB", (8, 8)).save(photos / "a.bmp")
    arguments = [photos / "*.png", photos / "a.bmp", photos / "night/a.png", photos / "a.png"]
    assert run(checkpoint, *arguments, "--output_dir", tmp_path / "out") == 0
    masks = sorted(path.name for path in (tmp_path / "out/masks").iterdir())
    assert masks == ["a.png", "a_bmp.png", "a_png.png"]


def test_results_inside_the_input_folder_are_not_predicted_again(checkpoint, photos):
    for _ in range(2):
        run(checkpoint, photos, "--output_dir", photos / "out")
    assert len(json.loads((photos / "out/results.json").read_text())["images"]) == 3


def test_colors_come_from_the_label_specification(checkpoint, photos, tmp_path):
    spec = tmp_path / "labels.json"
    spec.write_text(json.dumps({"classes": ["road", "tree", "sky"], "palette": [[9, 8, 7], [1, 2, 3], [4, 5, 6]]}))
    run(checkpoint, photos / "a.png", "--output_dir", tmp_path / "out", "--label_spec", spec)
    assert Image.open(tmp_path / "out/masks/a.png").getpalette()[:9] == [9, 8, 7, 1, 2, 3, 4, 5, 6]
    saved_spec = LabelSpec("toy", ("road", "tree", "sky"), palette=((3, 3, 3), (6, 6, 6), (7, 7, 7))).to_dict()
    (checkpoint / "labels.json").write_text(json.dumps(saved_spec))
    try:
        run(checkpoint, photos / "a.png", "--output_dir", tmp_path / "own")
    finally:
        (checkpoint / "labels.json").unlink()
    assert Image.open(tmp_path / "own/masks/a.png").getpalette()[:9] == [3, 3, 3, 6, 6, 6, 7, 7, 7]
    spec.write_text(json.dumps({"classes": ["road", "tree"]}))
    with pytest.raises(InputError, match="names 2 classes"):
        run(checkpoint, photos / "a.png", "--output_dir", tmp_path / "out", "--label_spec", spec)


def test_wrong_input_is_refused_in_one_sentence_with_the_fix(checkpoint, photos, tmp_path):
    output = ["--output_dir", tmp_path / "out"]
    (tmp_path / "nothing").mkdir()
    (tmp_path / "file").touch()
    for arguments, message in (
        ([checkpoint, tmp_path / "missing.png", *output], "There is no image at"),
        ([checkpoint, tmp_path / "nothing", *output], "There is no image at"),
        ([checkpoint, photos / "*.gif", *output], "There is no image at"),
        ([tmp_path / "nothing", photos, *output], "config.json"),
        ([checkpoint, photos, "--output_dir", tmp_path / "file"], "cannot be written"),
        ([checkpoint, photos, *output, "--device", "cuda:99"], "cannot be used"),
        ([checkpoint, photos, *output, "--device", "toaster"], "cannot be used"),
        ([checkpoint, photos, *output, "--test_mode", "slide"], "need `crop_size`"),
        ([checkpoint, photos, *output, "--test_mode", "whole", "--test_crop_size", 8, 8], "Leave out"),
        ([checkpoint, photos, *output, "--test_scales", -1], "scales is"),
    ):
        with pytest.raises(InputError, match=message):
            run(*arguments)


def test_a_checkpoint_of_another_kind_or_without_a_processor_is_refused(checkpoint, photos, tmp_path):
    model = SegformerForSemanticSegmentation.from_pretrained(checkpoint)
    model.save_pretrained(tmp_path / "bare")
    with pytest.raises(InputError, match="has no image processor"):
        run(tmp_path / "bare", photos, "--output_dir", tmp_path / "out")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text(json.dumps({"model_type": "bert", "hidden_size": 8}))
    with pytest.raises(InputError, match="no complete semantic segmentation checkpoint"):
        run(tmp_path / "other", photos, "--output_dir", tmp_path / "out")
    SegformerForImageClassification(SegformerConfig(**CONFIG)).save_pretrained(tmp_path / "classifier")
    SegformerImageProcessor().save_pretrained(tmp_path / "classifier")
    named = json.loads(
        (tmp_path / "classifier/config.json").read_text()
    )  # under its own name a classifier is predicted with
    named["architectures"] = ["SegformerForSemanticSegmentation"]
    (tmp_path / "classifier/config.json").write_text(json.dumps(named))
    with pytest.raises(InputError, match="lacks .* decode_head"):
        run(tmp_path / "classifier", photos, "--output_dir", tmp_path / "out")


def test_a_hub_id_without_a_network_fails_with_the_reason(photos, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(RunError, match="somebody/some-model"):
        run("somebody/some-model", photos, "--output_dir", tmp_path / "out")


def contents(folder):
    """Path below the folder -> bytes, of all files."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.fixture
def many(tmp_path):
    """Thirty images of many sizes."""
    rng = np.random.default_rng(1)
    (tmp_path / "many").mkdir()
    for k in range(30):
        height, width = rng.integers(20, 60, 2)
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        image.save(tmp_path / "many" / f"{k:02d}.png")
    return tmp_path / "many"


@pytest.mark.parametrize("views", [[], ["--test_flip"]])
def test_strips_of_rows_give_the_same_files_as_the_whole_image(checkpoint, photos, tmp_path, caplog, views):
    options = [
        "--test_crop_size",
        16,
        16,
        "--test_stride",
        11,
        11,
        "--write",
        "masks",
        "overlays",
        "confidence",
        *views,
    ]
    run(checkpoint, photos, *options, "--output_dir", tmp_path / "whole")
    with caplog.at_level("INFO", "hf_denseseg.inference.predict.segmentation"):
        run(checkpoint, photos, *options, "--output_dir", tmp_path / "strips", "--tile_above_pixels", 0)
    assert caplog.text.count("segmented in strips of rows") == 1
    whole, strips = contents(tmp_path / "whole"), contents(tmp_path / "strips")
    assert whole.keys() == strips.keys()
    masks = [np.asarray(Image.open(tmp_path / each / "masks/a.png")) for each in ("whole", "strips")]
    if not views:  # the same sums
        assert (masks[0] == masks[1]).all()
    assert (masks[0] != masks[1]).mean() < 1e-3  # rows are averaged separately: equal except for rounding
    if (masks[0] == masks[1]).all():
        assert all(whole[name] == strips[name] for name in whole if name.startswith(("masks/", "overlays/")))
    confidences = [
        np.asarray(Image.open(tmp_path / each / "confidence/a.png"), dtype=int) for each in ("whole", "strips")
    ]
    assert abs(confidences[0] - confidences[1]).max() <= 1  # rounding


def test_confidence_is_the_probability_of_the_predicted_class(checkpoint, photos, tmp_path):
    run(checkpoint, photos / "a.png", "--output_dir", tmp_path / "out", "--write", "confidence")
    expected = model_probabilities(checkpoint, photos / "a.png", InferenceSettings()).max(0)
    written = np.asarray(Image.open(tmp_path / "out/confidence/a.png"))
    np.testing.assert_allclose(written / 255, expected, atol=0.5 / 255 + 1e-5)
    assert not (tmp_path / "out/masks").exists()


def test_raw_ids_are_those_of_the_dataset_and_keep_their_colors(checkpoint, photos, tmp_path):
    spec = {"classes": ["road", "tree", "sky"], "palette": [[9, 8, 7], [1, 2, 3], [4, 5, 6]]}
    spec["raw_to_train"] = {"7": 0, "21": 1, "23": 2}
    (tmp_path / "labels.json").write_text(json.dumps(spec))
    words = [checkpoint, photos / "a.png", "--label_spec", tmp_path / "labels.json", "--output_dir"]
    run(*words, tmp_path / "train")
    run(*words, tmp_path / "raw", "--raw_ids")
    train, raw = (Image.open(tmp_path / each / "masks/a.png") for each in ("train", "raw"))
    np.testing.assert_array_equal(np.asarray(raw), np.array([7, 21, 23])[np.asarray(train)])
    np.testing.assert_array_equal(np.asarray(raw.convert("RGB")), np.asarray(train.convert("RGB")))
    assert (tmp_path / "raw/overlays/a.jpg").read_bytes() == (tmp_path / "train/overlays/a.jpg").read_bytes()
    spec["raw_to_train"]["300"] = spec["raw_to_train"].pop("23")
    (tmp_path / "labels.json").write_text(json.dumps(spec))
    run(*words, tmp_path / "wide", "--raw_ids")
    wide = np.asarray(Image.open(tmp_path / "wide/masks/a.png"))
    np.testing.assert_array_equal(wide, np.array([7, 21, 300])[np.asarray(train)])
    with pytest.raises(InputError, match="raw ids are not known. Give --label_spec"):
        run(checkpoint, photos, "--output_dir", tmp_path / "none", "--raw_ids")


def test_the_table_holds_masks_and_fractions(checkpoint, photos, tmp_path):
    datasets = pytest.importorskip("datasets")
    run(checkpoint, photos, "--output_dir", tmp_path / "out", "--write", "masks", "parquet")
    table = datasets.Dataset.from_parquet(str(tmp_path / "out/results.parquet"), cache_dir=str(tmp_path / "cache"))
    images = json.loads((tmp_path / "out/results.json").read_text())["images"]
    assert table["id"][:] == ["a", "b", "night/a"]
    for row, record in zip(table, images, strict=True):
        assert row["source"] == record["source"] and [row["height"], row["width"]] == record["size"]
        assert row["classes"] == record["classes"]
        np.testing.assert_array_equal(
            np.asarray(row["mask"]), np.asarray(Image.open(tmp_path / "out" / record["mask"]))
        )


@pytest.fixture
def video(tmp_path):
    pytest.importorskip("av")
    from fractions import Fraction

    from hf_denseseg.inference.predict.video import write_video

    rng = np.random.default_rng(2)
    files = [tmp_path / "frames" / f"{k}.png" for k in range(40)]
    files[0].parent.mkdir()
    for file in files:
        Image.fromarray(rng.integers(0, 256, (40, 64, 3), dtype=np.uint8)).save(file)
    write_video(files, tmp_path / "drive.mp4", Fraction(15))
    return tmp_path / "drive.mp4"


def test_a_video_becomes_numbered_frames_and_a_video_of_overlays(checkpoint, video, tmp_path):
    import av

    assert run(checkpoint, video, "--output_dir", tmp_path / "out", "--frame_stride", 5) == 0
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert [record["mask"] for record in results["images"]] == [f"masks/drive/{k:06d}.png" for k in range(0, 40, 5)]
    assert [record["seconds"] for record in results["images"]] == pytest.approx([k / 15 for k in range(0, 40, 5)])
    assert results["videos"] == ["overlays/drive.mp4"]
    with av.open(str(video)) as container:
        frames = [frame.to_image() for frame in container.decode(container.streams.video[0])]
    frames[35].save(tmp_path / "frame.png")
    expected = model_probabilities(checkpoint, tmp_path / "frame.png", InferenceSettings())
    mask = Image.open(tmp_path / "out/masks/drive/000035.png")
    assert_highest(mask, expected)
    with av.open(str(tmp_path / "out/overlays/drive.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.average_rate == 3 and stream.frames == 8  # every fifth frame of 15 per second: the same duration
        last = list(container.decode(stream))[-1].to_image()
    palette = np.array(mask.getpalette()[:9]).reshape(3, 3).tolist()
    drawn = overlay(frames[35], expected.argmax(0), palette)
    assert np.abs(np.asarray(last, dtype=float) - np.asarray(drawn)).mean() < 20


def test_a_stream_on_standard_input_is_predicted_as_the_file_is(checkpoint, video, tmp_path, monkeypatch):
    run(checkpoint, video, "--output_dir", tmp_path / "file", "--frame_stride", 10)
    for turn in ("first", "again"):  # a stream is never resumed
        with video.open("rb") as stream:
            monkeypatch.setattr("sys.stdin", types.SimpleNamespace(buffer=stream))
            assert run(checkpoint, "-", "--output_dir", tmp_path / turn, "--frame_stride", 10) == 0
    file, stream = contents(tmp_path / "file/masks/drive"), contents(tmp_path / "again/masks/stdin")
    assert file == stream and len(file) == 4


def test_an_interrupt_ends_a_stream_and_keeps_its_predictions(checkpoint, video, tmp_path, monkeypatch):
    predict_one, seen = SegmentationPredictor.predict, []

    def interrupted(self, image, name):
        seen.append(name)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return predict_one(self, image, name)

    monkeypatch.setattr(SegmentationPredictor, "predict", interrupted)
    with video.open("rb") as stream:
        monkeypatch.setattr("sys.stdin", types.SimpleNamespace(buffer=stream))
        assert run(checkpoint, "-", "--output_dir", tmp_path / "out") == 0
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert [record["id"] for record in results["images"]] == ["stdin/000000", "stdin/000001"]
    seen.clear()
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint, video, "--output_dir", tmp_path / "file")


def test_a_truncated_video_keeps_its_frames_and_the_other_inputs(checkpoint, video, photos, tmp_path, capsys):
    data = video.read_bytes()
    video.write_bytes(data[: len(data) // 2])
    assert run(checkpoint, video, photos, "--output_dir", tmp_path / "out") == 1
    results = json.loads((tmp_path / "out/results.json").read_text())
    names = [record["id"] for record in results["images"]]
    assert names[-3:] == ["a", "b", "night/a"] and 2 < len(names) - 3 < 40
    assert [row["source"] for row in results["failed"]] == [str(video)]
    assert "left out" in capsys.readouterr().err


def test_two_processes_write_the_files_of_one(checkpoint, many, video, tmp_path):
    words = ["predict", str(checkpoint), str(many), str(video), "--frame_stride", "3", "--device", "cpu"]
    words += ["--write", "masks", "overlays", "video", "--output_dir"]
    one = start([*words, str(tmp_path / "one")], {"OMP_NUM_THREADS": "1"}, str(tmp_path / "one.txt"))
    run_two([*words, str(tmp_path / "two")], free_port(), tmp_path)
    one.join(240)
    assert one.exitcode == 0, (tmp_path / "one.txt").read_text()
    assert "44 images predicted, 0 left out" in (tmp_path / "rank0.txt").read_text()
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_killed_run_is_finished_by_two_processes_with_the_same_files(checkpoint, many, tmp_path):
    words = ["predict", str(checkpoint), str(many), "--device", "cpu", "--output_dir"]
    killed = start([*words, str(tmp_path / "out")])
    deadline = time.monotonic() + 120
    while len(finished(tmp_path / "out")) < 4:
        assert killed.is_alive() and time.monotonic() < deadline, "the run ended before it could be killed"
        time.sleep(0.001)
    killed.kill()
    killed.join()
    before = len(finished(tmp_path / "out"))
    assert before < 30 and not (tmp_path / "out/results.json").exists()
    run_two([*words, str(tmp_path / "out")], free_port(), tmp_path)
    assert f"{30 - before} images predicted, {before} finished before" in (tmp_path / "rank0.txt").read_text()
    run(*words[1:], tmp_path / "uninterrupted")
    left = {
        name: data for name, data in contents(tmp_path / "out").items() if "/." not in name
    }  # without partly written files
    assert left == contents(tmp_path / "uninterrupted")


def test_damaged_files_of_one_process_do_not_stop_the_other(checkpoint, many, tmp_path):
    for k in (3, 4, 5):
        (many / f"{k:02d}.png").write_bytes(b"not an image")
    words = ["predict", str(checkpoint), str(many), "--device", "cpu", "--output_dir", str(tmp_path / "out")]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    ranks = [start(words, {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in (0, 1)]
    for process in ranks:
        process.join(240)
    assert [process.exitcode for process in ranks] == [1, 0]  # rank 0 reports for both
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert [os.path.basename(row["source"]) for row in results["failed"]] == ["03.png", "04.png", "05.png"]
    assert len(results["images"]) == 27


def test_an_image_that_the_model_fails_on_or_that_is_too_long_is_left_out(checkpoint, photos, tmp_path, monkeypatch):
    Image.new("RGB", (65_501, 2)).save(photos / "long.png")
    strips = SegmentationPredictor._strips

    def fails_on_small_images(self, image):
        if image.height == 20:
            raise RuntimeError("kernel size is greater than input\nsecond line")
        return strips(self, image)

    monkeypatch.setattr(SegmentationPredictor, "_strips", fails_on_small_images)
    assert run(checkpoint, photos, "--output_dir", tmp_path / "out") == 1
    results = json.loads((tmp_path / "out/results.json").read_text())
    long, small = (row["reason"] for row in results["failed"])
    assert "Take overlays out of --write" in long and "(20x31) cannot be predicted by this model: kernel" in small
    assert [record["id"] for record in results["images"]] == ["a", "b"]


def test_fewer_outputs_than_before_are_listed_as_in_a_new_run(checkpoint, photos, tmp_path):
    run(checkpoint, photos, "--output_dir", tmp_path / "out")
    for folder in ("out", "new"):
        run(checkpoint, photos, "--output_dir", tmp_path / folder, "--write", "masks")
    assert (tmp_path / "out/results.json").read_text() == (tmp_path / "new/results.json").read_text()


def test_a_truncated_record_or_one_of_another_image_is_made_again(checkpoint, photos, tmp_path, capsys):
    output = tmp_path / "out"
    run(checkpoint, photos, "--output_dir", output)
    (journal,) = (output / "journal").glob("process-*.jsonl")
    lines = journal.read_text().splitlines()
    journal.write_text("\n".join(line[:100] if '["a", ' in line else line for line in lines))
    stamp = (photos / "b.jpg").stat()
    shutil.copy(photos / "a.png", photos / "b.jpg")  # another size in bytes, the same modification time
    os.utime(photos / "b.jpg", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    capsys.readouterr()
    run(checkpoint, photos, "--output_dir", output)
    assert "2 images predicted, 1 finished before" in capsys.readouterr().out


def test_contradicting_options_are_refused_with_the_fix(checkpoint, photos, tmp_path):
    output = ["--output_dir", tmp_path / "out"]
    for options, message in (
        (["--write", "parquet"], "Add masks to --write"),
        (["--write", "masks", "video"], "there is no video"),
        (["--frame_stride", 2], "there is no video"),
        (["--frame_stride", 0], "--frame_stride is 0"),
        (["--max_pixels", 0], "--max_pixels is 0"),
        (["--write", "overlays", "--raw_ids"], "--raw_ids changes nothing"),
        (["--write", "probabilities", "--tile_above_pixels", 9], "contradict each other"),
    ):
        with pytest.raises(InputError, match=message):
            run(checkpoint, photos, *output, *options)
    assert run(checkpoint, photos, *output, "--max_pixels", 700) == 1  # night/a.png has 620
    assert len(json.loads((tmp_path / "out/results.json").read_text())["images"]) == 1
