"""300 classes end to end, of our models and of others: 16-bit label maps, class 255 is one like others."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation, pipeline

import transformers_models
from hf_denseseg.cli import main
from hf_denseseg.data.augmentation.segmentation import EvalDataset, TrainAugmentation, TrainDataset, collate_train
from hf_denseseg.data.segmentation import load_segmentation
from hf_denseseg.models.unept.targets_unept import boundary_targets
from test_published_dsct import REDUCED

COUNT = 300
# Two classes fill the images: those that a rule of bytes would lose.
SHOWN = (255, 299)
WORDS = ("--crop_size", "64", "64", "--per_device_train_batch_size", "2", "--use_cpu", "--scale_range", "1", "1")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Dark class 255 above bright class 299; the first rows are ignored (65535)."""
    folder, random = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 2)):
        for kind in ("images", "labels"):
            (folder / split / kind).mkdir(parents=True)
        for number in range(count):
            label = np.full((64, 80), SHOWN[0], np.uint16)
            label[random.integers(24, 40) :] = SHOWN[1]
            pixels = random.integers(0, 60, (64, 80, 3)) + (label[..., None] == SHOWN[1]) * 150
            label[:4] = 65535
            Image.fromarray(pixels.astype(np.uint8)).save(folder / split / "images" / f"{number}.png")
            Image.fromarray(label).save(folder / split / "labels" / f"{number}.png")
    (folder / "labels.json").write_text(json.dumps({"classes": [f"thing {k}" for k in range(COUNT)]}))
    return folder


@pytest.fixture(scope="module", params=["dsct", "segformer"])
def run(request, data, tmp_path_factory):
    output = tmp_path_factory.mktemp("run")
    model = ("--model", "dsct-tiny-sac", "--config_overrides", json.dumps(REDUCED))
    if request.param != "dsct":
        model = ("--model", str(transformers_models.save(request.param, output / "start")))
    words = (*WORDS, "--max_steps", "50", "--eval_strategy", "no", "--learning_rate", "5e-3")
    assert main(["train", "--dataset", str(data), *model, *words, "--output_dir", str(output / "run")]) == 0
    return output / "run"


def label_maps(data):
    files = [data / "val" / "labels" / f"{number}.png" for number in range(2)]
    return np.stack([np.asarray(Image.open(file)) for file in files])


def test_classes_beyond_bytes_are_learned_scored_and_written(run, data, tmp_path):
    words = ["--dataset", str(data), "--output_dir", str(tmp_path / "e")]
    assert main(["evaluate", str(run / "model"), *words]) == 0
    scores = json.loads((tmp_path / "e" / "results.json").read_text())["scores"]
    rows, ground_truth = scores["per_class"], label_maps(data)
    assert len(rows) == COUNT and sum(row["pixels"] for row in rows) == (ground_truth != 65535).sum()
    assert min(rows[k]["iou"] for k in SHOWN) > 0.6 and rows[255]["pixels"] == (ground_truth == 255).sum()
    assert 0 < rows[255]["boundary_iou"] <= 1
    words = [str(data / "val" / "images"), "--output_dir", str(tmp_path / "p"), "--write", "masks", "overlays"]
    assert main(["predict", str(run / "model"), *words]) == 0
    images = [Image.open(tmp_path / "p" / "masks" / f"{number}.png") for number in range(2)]
    assert {image.mode for image in images} == {"I;16"}
    masks = np.stack([np.asarray(image) for image in images])
    for k in SHOWN:
        found, true = (masks == k) & (ground_truth != 65535), ground_truth == k
        assert rows[k]["iou"] == pytest.approx((found & true).sum() / (found | true).sum(), abs=1e-9)
    if AutoModelForSemanticSegmentation.from_pretrained(run / "model").config.model_type == "dsct":
        assert AutoImageProcessor.from_pretrained(run / "model").ignore_index == 65535
    parts = pipeline("image-segmentation", model=str(run / "model"), device="cpu")(str(data / "val/images/0.png"))
    shown = {part["label"]: np.asarray(part["mask"]) > 0 for part in parts}
    assert (shown["thing 255"] == (masks[0] == 255)).mean() > 0.95


def test_the_data_check_counts_them_and_shards_keep_them(data, tmp_path, capsys):
    assert main(["data", "check", str(data)]) == 0
    assert main(["data", "stats", str(data), "--output", str(tmp_path / "stats.json")]) == 0
    stats = json.loads((tmp_path / "stats.json").read_text())
    assert [k for k, count in enumerate(stats["pixels"]) if count] == list(SHOWN)
    assert stats["ignored_fraction"] == pytest.approx(4 / 64)
    assert main(["data", "show", str(data), "--output", str(tmp_path / "shown.png"), "--limit", "2"]) == 0
    assert main(["data", "pack", str(data), "--output_dir", str(tmp_path / "shards"), "--rows_per_shard", "4"]) == 0
    packed, files = (
        {row["id"]: np.asarray(row["label"]) for row in load_segmentation(source, "train").dataset}
        for source in (tmp_path / "shards", data)
    )
    assert packed.keys() == files.keys() and all(np.array_equal(packed[name], files[name]) for name in files)


def test_crops_are_padded_with_the_ignored_id(data):
    loaded = load_segmentation(data, "train")
    augmentation = TrainAugmentation((96, 48), scale_range=(1, 1), flip=False, photometric=False)
    labels = TrainDataset(loaded, augmentation)[0]["labels"]
    assert labels.dtype == torch.int32 and (labels[64:] == 65535).all()
    assert set(labels[4:64].unique().tolist()) <= set(SHOWN)
    whole = EvalDataset(loaded)[0]["label"]
    assert np.array_equal(whole.numpy(), Image.open(data / "train" / "labels" / "0.png"))


def test_boundary_targets_of_unept_leave_the_ignored_id_out(data):
    rows = TrainDataset(load_segmentation(data, "train"), TrainAugmentation((64, 64), photometric=False))
    labels = collate_train([rows[0], rows[1]])["labels"]
    for label in labels.numpy():
        targets = boundary_targets(label, ignore_index=65535)
        assert (targets["boundary_labels"][label == 65535] == 255).all()
        assert (targets["boundary_labels"][label == 255] != 255).any()
