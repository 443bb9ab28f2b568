"""`denseseg data check|stats|show` and the check before training."""

import json

import numpy as np
import pytest
from PIL import Image

from hf_denseseg.cli import main
from hf_denseseg.data.checks.segmentation import scan_segmentation
from hf_denseseg.data.labels import LabelSpec, SegmentationData
from hf_denseseg.data.segmentation import load_segmentation
from hf_denseseg.training.optimization import load_class_weights


def write_pairs(folder, masks):
    for index, mask in enumerate(masks):
        for kind, image in (("images", Image.new("RGB", mask.shape[1::-1])), ("labels", Image.fromarray(mask))):
            (folder / "train" / kind).mkdir(parents=True, exist_ok=True)
            image.save(folder / "train" / kind / f"p{index}.png")
    (folder / "labels.yaml").write_text("classes: [road, car, sky]\n")
    return folder


def good_mask():
    return np.repeat(np.array([[0, 1, 2, 255]], dtype=np.uint8), 4, axis=0)


def test_check_of_valid_pairs_finds_nothing(tmp_path, capsys):
    write_pairs(tmp_path, [good_mask(), good_mask()])
    assert main(["data", "check", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "2 pairs, no faults" in out and "sky" in out and "33.333" in out and "25.000" in out and "4x4: 2" in out


def test_check_names_every_fault_with_its_file(tmp_path, capsys):
    color, unknown = np.full((4, 4, 3), (9, 0, 0), np.uint8), np.full((4, 4), 77, np.uint8)
    ignored = np.full((4, 4), 255, np.uint8)
    write_pairs(tmp_path, [good_mask(), color, unknown, ignored, good_mask(), good_mask(), good_mask(), good_mask()])
    labels, images = tmp_path / "train/labels", tmp_path / "train/images"
    Image.fromarray(good_mask()[:3]).save(labels / "p4.png")
    (images / "p5.png").write_bytes(b"")
    (labels / "p6.png").unlink()
    (images / "p7.png").unlink()
    assert main(["data", "check", str(tmp_path)]) == 2
    out = capsys.readouterr().out
    faults = [line for line in out.splitlines() if line.startswith("fault: ")]
    for name, text in (
        ("labels/p1.png", "color image"),
        ("labels/p2.png", "Raw ids 77"),
        ("labels/p3.png", "every pixel of the label map is ignored"),
        ("images/p4.png", "Sizes differ"),
        ("images/p5.png", "empty"),
        ("images/p6.png", "has no label map"),
        ("labels/p7.png", "has no image"),
    ):
        assert sum(name in line and text in line for line in faults) == 1, (name, text)
    assert len(faults) == 7 and "7 faults" in out


def test_check_recognizes_black_and_white_masks(tmp_path, capsys):
    mask = np.array([[0, 255], [255, 0]], dtype=np.uint8)
    write_pairs(tmp_path, [mask, mask])
    assert main(["data", "check", str(tmp_path)]) == 2
    assert "black-and-white masks (0 and 255)" in capsys.readouterr().out
    (tmp_path / "labels.yaml").write_text("classes: [off, on]\nraw_to_train: {0: 0, 255: 1}\nraw_void: []\n")
    assert main(["data", "check", str(tmp_path)]) == 0


def test_check_mentions_palettes_and_classes_that_never_occur(tmp_path, capsys):
    write_pairs(tmp_path, [np.zeros((4, 4), np.uint8)])
    palette = Image.fromarray(np.zeros((4, 4), np.uint8), mode="P")
    palette.putpalette([1, 2, 3] * 256)
    palette.save(tmp_path / "train/labels/p0.png")
    assert main(["data", "check", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "No pixel of car, sky in 1 images" in out and "1 label maps are palette images" in out


def test_wrong_sources_end_with_code_2(tmp_path, capsys):
    assert main(["data", "check", str(tmp_path / "nowhere")]) == 2
    assert "error: Dataset" in capsys.readouterr().err
    assert main(["data", "check", str(write_pairs(tmp_path, [good_mask()])), "--split", "val"]) == 2
    assert "no split 'val'; available: train" in capsys.readouterr().err


def test_stats_count_and_weight_the_classes(tmp_path):
    """Weights by the formulas of the ENet and SegNet papers, on a hand-made example."""
    first = np.array([[0, 0, 0, 1]], dtype=np.uint8)
    second = np.array([[0, 0, 255, 255]], dtype=np.uint8)
    write_pairs(tmp_path / "data", [first, second])
    output = tmp_path / "stats.json"
    assert main(["data", "stats", str(tmp_path / "data"), "--output", str(output)]) == 0
    stats = json.loads(output.read_text())
    assert stats["pixels"] == [5, 1, 0] and stats["ignored_fraction"] == 0.25 and stats["sizes"] == {"1x4": 2}
    enet = [1 / np.log(1.02 + 5 / 6), 1 / np.log(1.02 + 1 / 6), 0]
    assert stats["class_weights"]["enet"] == pytest.approx(enet, abs=1e-5)
    frequencies = [5 / 6, 1 / 4]  # pixels of the class / valid pixels of the images that show it
    middle = np.median(frequencies)
    expected = [middle / frequencies[0], middle / frequencies[1], 0]
    assert stats["class_weights"]["median_frequency"] == pytest.approx(expected, abs=1e-5)


def test_class_weights_are_read_from_files_with_new_and_old_keys(tmp_path):
    """Only `class_weights` is read, which files of earlier versions hold beside `shares` and `void_share`."""
    write_pairs(tmp_path / "data", [good_mask()])
    path = tmp_path / "stats.json"
    assert main(["data", "stats", str(tmp_path / "data"), "--output", str(path)]) == 0
    stats = json.loads(path.read_text())
    assert {"images", "pixels", "fractions", "images_with_class", "ignored_fraction"} < set(stats)
    renamed = {"fractions": "shares", "images_with_class": "images_with_class", "ignored_fraction": "void_share"}
    old = tmp_path / "old.json"
    old.write_text(json.dumps({renamed.get(key, key): value for key, value in stats.items()}))
    for file in (path, old):
        assert load_class_weights(f"{file}:enet", 3).tolist() == pytest.approx(stats["class_weights"]["enet"])


def test_show_writes_an_image(tmp_path):
    output = tmp_path / "grid.png"
    assert main(["data", "show", "synthetic@40x48", "--limit", "2", "--output", str(output)]) == 0
    assert Image.open(output).width > 2 * 40


@pytest.mark.parametrize("action", ["check", "stats", "show"])
def test_help_shows_an_example(action, capsys):
    with pytest.raises(SystemExit) as end:
        main(["data", action, "--help"])
    assert end.value.code == 0 and f"example: denseseg data {action}" in " ".join(capsys.readouterr().out.split())


def test_the_check_before_training_reads_evenly_spaced_pairs(tmp_path):
    assert scan_segmentation(load_segmentation("synthetic:8@40x48", "train")).faults == []
    rows = [
        {"image": Image.new("RGB", (2, 2)), "label": np.full((2, 2), k % 2, np.uint8), "id": str(k)} for k in range(10)
    ]
    rows[9]["label"] = np.full((2, 2), 255, np.uint8)
    data = SegmentationData(rows, LabelSpec("s", ("a", "b")))
    faults = scan_segmentation(data, limit=4).faults
    assert len(faults) == 1 and str(faults[0]).startswith("9: every pixel")
    assert scan_segmentation(data, limit=4).images == 4


def test_streams_are_checked_up_to_the_first_fault(tmp_path):
    write_pairs(tmp_path, [good_mask(), np.full((4, 4), 77, np.uint8), good_mask()])
    faults = scan_segmentation(load_segmentation(tmp_path, "train", streaming=True)).faults
    assert len(faults) == 1 and "Raw ids 77" in str(faults[0])
