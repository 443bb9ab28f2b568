"""Classes are compared by name: the same ids may mean other classes."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForSemanticSegmentation

from hf_denseseg import create_image_processor, create_model
from hf_denseseg.cli import main
from hf_denseseg.data.class_order import class_order
from hf_denseseg.data.labels import LabelSpec
from hf_denseseg.data.segmentation import load_segmentation
from hf_denseseg.errors import InputError
from test_published_dsct import REDUCED

DATA = ("--dataset", "synthetic@64x96", "--max_eval_samples", "3")
ORDER = [4, 0, 2, 1, 3, 10, 9, 8, 7, 6, 5]  # old id of each class in the other order


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    spec = load_segmentation("synthetic@64x96", "train").spec
    model = create_model("dsct-tiny-sac", id2label=spec.id2label, label2id=spec.label2id, **REDUCED).eval()
    model.decode_head.classifier.weight.data.mul_(100)  # several classes are predicted
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    create_image_processor(model.config, do_resize=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reordered(checkpoint, tmp_path_factory):
    """The same function with the rows of the classifier, and their names, in another order."""
    model = AutoModelForSemanticSegmentation.from_pretrained(checkpoint)
    names = [model.config.id2label[index] for index in ORDER]
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: index for index, name in enumerate(names)}
    for parameter in model.decode_head.classifier.parameters():
        parameter.data = parameter.data[ORDER]
    folder = tmp_path_factory.mktemp("reordered")
    model.save_pretrained(folder)
    create_image_processor(model.config, do_resize=False).save_pretrained(folder)
    return folder


def scores_of(checkpoint, output, *words):
    assert main(["evaluate", str(checkpoint), *DATA, "--output_dir", str(output), *words]) == 0
    return json.loads((output / "results.json").read_text())["scores"]


def test_a_checkpoint_with_the_classes_in_another_order_scores_the_same(checkpoint, reordered, tmp_path):
    expected, found = scores_of(checkpoint, tmp_path / "a"), scores_of(reordered, tmp_path / "b")
    assert sum(row["iou"] > 0 for row in expected["per_class"]) >= 2
    for one, other in zip(expected["per_class"], found["per_class"], strict=True):
        assert one["class"] == other["class"]
        assert other["iou"] == pytest.approx(one["iou"], abs=1e-6)


def test_a_checkpoint_of_other_classes_is_refused(checkpoint, tmp_path, capsys):
    model = AutoModelForSemanticSegmentation.from_pretrained(checkpoint)
    model.config.id2label = {**model.config.id2label, 3: "tulip"}
    model.save_pretrained(tmp_path / "model")
    create_image_processor(model.config).save_pretrained(tmp_path / "model")
    assert main(["evaluate", str(tmp_path / "model"), *DATA, "--output_dir", str(tmp_path / "out")]) == 2
    assert "11 classes each, but of other names (3: 'tulip' and 'fence')" in capsys.readouterr().err
    assert not (tmp_path / "out" / "results.json").exists()


def test_training_refuses_the_same_classes_in_another_order(reordered, tmp_path, capsys):
    words = ["train", "--model", str(reordered), *DATA, "--max_train_samples", "4", "--max_steps", "1", "--use_cpu"]
    assert main([*words, "--crop_size", "32", "48", "--output_dir", str(tmp_path)]) == 2
    assert "in another order" in capsys.readouterr().err


def test_predict_compares_the_names_of_a_label_specification(checkpoint, tmp_path, capsys):
    Image.fromarray(np.zeros((40, 50, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    spec = load_segmentation("synthetic@64x96", "train").spec
    names = [spec.classes[index] for index in ORDER]
    (tmp_path / "spec.json").write_text(json.dumps(LabelSpec("other", tuple(names)).to_dict()))
    words = ["predict", str(checkpoint), str(tmp_path / "a.png"), "--output_dir", str(tmp_path / "out")]
    assert main([*words, "--label_spec", str(tmp_path / "spec.json"), "--raw_ids", "--device", "cpu"]) == 2
    message = f"in another order. Put `classes` into the order of the checkpoint: {spec.classes[0]},"
    assert message in capsys.readouterr().err


def test_names_are_compared_without_case_and_separators():
    assert class_order(["Traffic light", "car"], ["traffic_light", "Car"], "m", "d") is None
    assert class_order(["LABEL_0", "LABEL_1"], ["road", "car"], "m", "d") is None
    assert class_order(["car", "Traffic-Light", "road"], ["road", "car", "trafficlight"], "m", "d") == [1, 2, 0]
    with pytest.raises(InputError, match="0: 'car' and 'truck'"):
        class_order(["car", "road"], ["truck", "road"], "m", "d")


def test_one_class_is_refused_with_the_specification_to_write(tmp_path, capsys):
    for part in ("train", "val"):
        for kind, value in (("images", 90), ("labels", 0)):
            (tmp_path / "data" / part / kind).mkdir(parents=True)
            Image.new("L", (40, 30), value).save(tmp_path / "data" / part / kind / "a.png")
    (tmp_path / "data" / "classes.json").write_text('{"classes": ["lesion"]}')
    data = str(tmp_path / "data")
    assert main(["data", "check", data, "--split", "train"]) != 0
    words = ["--dataset", data, "--eval_split", "val", "--crop_size", "24", "24", "--max_steps", "1", "--use_cpu"]
    words += [
        "--model",
        "dsct-tiny-sac",
        "--config_overrides",
        json.dumps(REDUCED),
        "--output_dir",
        str(tmp_path / "o"),
    ]
    assert main(["train", *words]) == 2
    found = capsys.readouterr()
    for text in (found.out + found.err.partition("error:")[0], found.err.partition("error:")[2]):
        assert "classes: [background, lesion], for masks of 0 and 255 with raw_to_train: {0: 0, 255: 1}" in text


def test_masks_of_0_and_255_can_be_named():
    spec = LabelSpec("tumor", ("background", "lesion"), raw_to_train={0: 0, 255: 1})
    assert spec.encode(np.array([[0, 255]], dtype=np.uint8)).tolist() == [[0, 1]]
    assert spec.raw_void == () and spec.inverse_table[:2].tolist() == [0, 255]


def test_features_are_those_of_the_classes_with_the_same_names(checkpoint, reordered, tmp_path):
    def numbers(folder, output):
        words = ["--dataset", "synthetic@64x96", "--max_eval_samples", "3", "--points", "20"]
        assert main(["features", str(folder), *words, "--output_dir", str(output), "--classes", "road", "sky"]) == 0
        return json.loads((output / "features.json").read_text())

    expected, found = numbers(checkpoint, tmp_path / "a"), numbers(reordered, tmp_path / "b")
    assert found["points"] == expected["points"]
    for name, value in expected["token_confidence"].items():
        assert found["token_confidence"][name] == pytest.approx(value, abs=1e-5)
    assert found["separability_all_classes"]["scatter_ratio"] == pytest.approx(
        expected["separability_all_classes"]["scatter_ratio"], rel=0.5
    )
    names = ["a", "b"] + list(expected["token_confidence"])[2:]
    model = AutoModelForSemanticSegmentation.from_pretrained(checkpoint)
    model.config.id2label = dict(enumerate(names))
    model.save_pretrained(tmp_path / "other")
    create_image_processor(model.config, do_resize=False).save_pretrained(tmp_path / "other")
    words = ["features", str(tmp_path / "other"), "--dataset", "synthetic@64x96", "--output_dir", str(tmp_path / "c")]
    assert main(words) == 2
