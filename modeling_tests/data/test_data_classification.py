"""Image classification data: layouts, class names, reproducible augmentation, mixing, accuracy."""

import json
import random

import evaluate
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from hf_denseseg.data.augmentation.classification import MixedBatch, TrainImages, posterize, training_transform
from hf_denseseg.data.augmentation.sampler import EpochSampler
from hf_denseseg.data.checks.classification import scan_classification
from hf_denseseg.data.class_names import ClassNames
from hf_denseseg.data.classification import load_classification
from hf_denseseg.errors import InputError
from hf_denseseg.evaluation.classification_metrics import AccuracyMeter, true_class_rank
from hf_denseseg.evaluation.hub_metrics import TOP_K_PATH

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture
def folder(tmp_path):
    """ImageNet's layout: synset folders; one class is missing from the validation split."""
    root = tmp_path / "tiny-imagenet"
    for split, keys in {"train": ("n01", "n02", "n03"), "val": ("n01", "n03")}.items():
        for key in keys:
            (root / split / key).mkdir(parents=True)
            for number in range(2):
                Image.new("RGB", (20 + number, 16), (number, 0, 0)).save(root / split / key / f"{key}_{number}.JPEG")
    return root


def test_class_ids_are_kept_in_a_split_that_lacks_a_class(folder):
    train, val = (load_classification(folder, split) for split in ("train", "validation"))
    assert train.spec.classes == val.spec.classes == ("n01", "n02", "n03")
    assert [row["label"] for row in val.dataset] == [0, 0, 2, 2]
    assert val.dataset[2]["id"] == "n03/n03_0" and val.dataset[0]["image"].mode == "RGB"


def test_numeric_folders_are_sorted_as_numbers(tmp_path):
    for key in ("0", "2", "10", "1"):
        (tmp_path / "val" / key).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "val" / key / "image.png")
    data = load_classification(tmp_path, "val")
    assert data.spec.classes == ("0", "1", "2", "10")
    assert {row["id"]: row["label"] for row in data.dataset}["10/image"] == 3


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("classes.json", json.dumps({"n01": "tench", "n02": "crane", "n03": "crane"})),
        ("classes.json", json.dumps({"classes": ["tench", "crane", "crane"], "license": "none"})),
        ("classes.txt", "n01 tench\nn02 crane\nn03 crane\n"),
        ("classes.txt", "tench\ncrane\ncrane\n"),
    ],
)
def test_folders_take_their_names_from_a_file(folder, file, text):
    (folder / file).write_text(text)
    spec = load_classification(folder, "train").spec
    assert spec.classes == ("tench", "crane (n02)", "crane (n03)")
    assert spec.id2label[0] == "tench" and spec.label2id["crane (n03)"] == 2


def test_file_that_does_not_name_every_class_is_refused(folder):
    (folder / "classes.json").write_text(json.dumps({"n01": "tench"}))
    with pytest.raises(InputError, match="no name for n02, n03 \\(2 of 3 classes\\)"):
        load_classification(folder, "train")


def test_duplicate_names_are_refused():
    with pytest.raises(InputError, match="duplicate names: a"):
        ClassNames("own", ("a", "b", "a"))


def test_parquet_shards_provide_their_class_names(tmp_path):
    import datasets

    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["cat", "dog"]))
    images = [Image.new("RGB", (8, 8), (k, 0, 0)) for k in range(4)]
    table = datasets.Dataset.from_dict({"image": images, "label": [0, 1, 1, 0]}, features=features)
    table.to_parquet(tmp_path / "train-00000-of-00001.parquet")
    data = load_classification(tmp_path, "train")
    assert data.spec.classes == ("cat", "dog")
    assert [(row["image"].getpixel((0, 0))[0], row["label"]) for row in data.dataset] == [
        (0, 0),
        (1, 1),
        (2, 1),
        (3, 0),
    ]


@pytest.mark.parametrize(
    ("name", "message"), [("nowhere", "no such folder"), ("synthetic:0", "is not understood"), (".", "holds no data")]
)
def test_anything_but_a_dataset_is_refused(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        load_classification(name, "train")


def test_check_names_the_damaged_image(folder):
    (folder / "train" / "n02" / "n02_1.JPEG").write_bytes(b"")
    data = load_classification(folder, "train")
    (fault,) = scan_classification(data).faults
    assert "n02_1.JPEG is empty" in str(fault)
    scan = scan_classification(load_classification(folder, "val"))
    assert scan.images_with_class.tolist() == [2, 0, 2] and "No image of n02" in scan.notes[0]


def test_embedded_classes_are_balanced_repeatable_and_not_separable_by_mean_color():
    train, val = (load_classification("synthetic:400", split) for split in ("train", "validation"))
    means, labels = zip(*[(np.asarray(row["image"]).mean((0, 1)), row["label"]) for row in train.dataset], strict=True)
    assert np.bincount(labels).tolist() == [50] * 8
    centers = np.stack([np.mean([m for m, k in zip(means, labels, strict=True) if k == c], axis=0) for c in range(8)])
    right = [
        np.linalg.norm(centers - np.asarray(row["image"]).mean((0, 1)), axis=1).argmin() == row["label"]
        for row in val.dataset
    ]
    assert np.mean(right) < 0.3  # 0.125 is chance
    again = load_classification("synthetic:400", "train").dataset[7]["image"]
    assert np.array_equal(again, train.dataset[7]["image"])


def transform(**options):
    words = {"auto_augment": "rand-m9-mstd0.5-inc1", "random_erasing": 0.25, **options}
    return training_transform((24, 32), mean=MEAN, std=STD, **words)


def batches(workers, collate):
    data = load_classification("synthetic:16@40x48", "train")
    sampler = EpochSampler(16, seed=5)
    sampler.set_epoch(3)
    loader = DataLoader(
        TrainImages(data, transform(), seed=5),
        batch_size=4,
        sampler=sampler,
        num_workers=workers,
        collate_fn=collate,
    )
    return list(loader)


def test_samples_and_mixing_do_not_depend_on_the_number_of_workers():
    collate = MixedBatch(8, mixup=0.8, cutmix=1.0, label_smoothing=0.1, seed=5)
    alone, several = batches(0, collate), batches(2, collate)
    for first, second in zip(alone, several, strict=True):
        assert torch.equal(first["pixel_values"], second["pixel_values"])
        assert torch.equal(first["labels"], second["labels"])


def test_epochs_give_new_samples_and_do_not_touch_the_global_generators():
    dataset = TrainImages(load_classification("synthetic:4@40x48", "train"), transform(), seed=1)
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    expected = random.random(), np.random.rand(), torch.rand(1).item()
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    first, again, other = (dataset[epoch, 2]["pixel_values"] for epoch in (0, 0, 1))
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.shape == (3, 24, 32)


def test_mixing_pairs_each_image_with_the_one_at_the_opposite_end_of_the_batch():
    """Mixup: labels are mixed in the ratio of the pixels; the weight of all other classes is the smoothing."""
    samples = [{"pixel_values": torch.full((3, 8, 8), float(k)), "label": k, "epoch": 0, "index": k} for k in range(4)]
    batch = MixedBatch(4, mixup=0.8, label_smoothing=0.1, seed=2)(samples)
    value = batch["pixel_values"][1, 0, 0, 0].item()
    weight = 2 - value  # lam * 1 + (1 - lam) * 2
    expected = torch.full((4,), 0.1 / 4)
    expected[1] += 0.9 * weight
    expected[2] += 0.9 * (1 - weight)
    assert 0 < weight < 1
    assert torch.allclose(batch["labels"][1], expected, atol=1e-6)
    assert torch.allclose(batch["labels"].sum(1), torch.ones(4))


def test_cutmix_labels_have_the_area_fraction_of_the_box():
    samples = [
        {"pixel_values": torch.full((3, 16, 16), float(k)), "label": k, "epoch": 1, "index": k} for k in range(2)
    ]
    batch = MixedBatch(2, cutmix=1.0, seed=4)(samples)
    from_other = (batch["pixel_values"][0, 0] == 1).float().mean()
    assert 0 < from_other < 1
    assert torch.allclose(batch["labels"][0], torch.stack([1 - from_other, from_other]), atol=1e-6)


def test_last_image_of_an_odd_batch_is_not_mixed():
    samples = [{"pixel_values": torch.full((3, 4, 4), float(k)), "label": k, "epoch": 0, "index": k} for k in range(3)]
    batch = MixedBatch(3, mixup=0.8)(samples)
    assert torch.equal(batch["pixel_values"][2], samples[2]["pixel_values"])
    assert batch["labels"][2].tolist() == [0.0, 0.0, 1.0]


def test_labels_stay_ids_without_mixing_and_smoothing():
    samples = [{"pixel_values": torch.zeros(3, 4, 4), "label": k, "epoch": 0, "index": k} for k in range(2)]
    assert MixedBatch(3)(samples)["labels"].tolist() == [0, 1]


def test_strongest_posterize_is_black_as_it_used_to_be():
    image = Image.new("RGB", (2, 2), (255, 129, 3))
    assert posterize(image, 0).getpixel((0, 0)) == (0, 0, 0)
    assert posterize(image, 1).getpixel((0, 0)) == (128, 128, 0)
    assert posterize(image, 8).getpixel((0, 0)) == (255, 129, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"auto_augment": "magic"}, "auto_augment 'magic' is not understood"),
        ({"scale": (0.0, 1.0)}, "scale is"),
    ],
)
def test_invalid_augmentation_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        transform(**options)


def test_mixing_out_of_range_is_refused():
    with pytest.raises(InputError, match="mixup -1"):
        MixedBatch(3, mixup=-1.0)


def test_accuracies_agree_with_their_definition_and_with_evaluate():
    """Top-1 is the fraction of correct argmax (the formula of `evaluate`'s accuracy), ties to the smaller id."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(0, 6, (500, 12), generator=generator).float()  # many ties
    labels = torch.randint(0, 12, (500,), generator=generator)
    meter = AccuracyMeter(12)
    for part in range(0, 500, 100):
        rows = slice(part, part + 100)
        meter.update(true_class_rank(logits[rows], labels[rows]), labels[rows])
    scores = meter.compute([f"class {k}" for k in range(12)])
    predicted = logits.numpy().argmax(1)
    assert scores["top1"] == float((predicted == labels.numpy()).mean())
    five = np.argsort(-logits.numpy(), axis=1, kind="stable")[:, :5]
    assert scores["top5"] == float((five == labels.numpy()[:, None]).any(1).mean())
    own = scores["per_class"][3]
    assert (
        own["accuracy"] == pytest.approx((predicted[labels == 3] == 3).mean()) and own["images"] == (labels == 3).sum()
    )
    metric = evaluate.load(TOP_K_PATH)
    metric.add_batch(predictions=logits[:300], references=labels[:300])
    metric.add_batch(predictions=logits[300:], references=labels[300:])
    assert metric.compute()["accuracy"] == scores["top1"]
    assert evaluate.load(TOP_K_PATH).compute(predictions=logits, references=labels)["top_5_accuracy"] == scores["top5"]


def test_nan_scores_are_never_correct():
    assert true_class_rank(torch.full((1, 3), float("nan")), torch.tensor([0])).tolist() == [2]


def test_labels_beyond_the_classes_are_refused():
    with pytest.raises(InputError, match="Labels from 0 to 3 for 3 classes"):
        true_class_rank(torch.zeros(2, 3), torch.tensor([0, 3]))
