"""`denseseg data check` proposes the label specification that fits the files, and the next check has no faults."""

import numpy as np
import pytest
import yaml
from PIL import Image

from hf_denseseg.cli import main
from hf_denseseg.data.labels import LabelSpec
from hf_denseseg.data.segmentation import load_segmentation

RED, GREEN, BLUE = (200, 0, 0), (0, 200, 0), (0, 0, 200)


def write_maps(folder, maps, spec=None):
    for index, image in enumerate(maps):
        for kind, each in (("images", Image.new("RGB", image.size)), ("labels", image)):
            (folder / "train" / kind).mkdir(parents=True, exist_ok=True)
            each.save(folder / "train" / kind / f"p{index}.png")
    if spec is not None:
        (folder / "labels.yaml").write_text(spec)
    return folder


def ids(*values, dtype=np.uint8):
    return Image.fromarray(np.array([values, values], dtype=dtype))


def palette_map(*values):
    image = ids(*values)
    image.putpalette([0, 0, 0, *RED, *GREEN, *BLUE])
    return image


def colors(*values):
    return Image.fromarray(np.array([values, values], dtype=np.uint8))


MANY = [np.arange(150), np.arange(150, 300)]

KINDS = {
    "0 and 255": (
        [ids(0, 255, 0), ids(0, 0, 255)],
        {"classes": ["background", "foreground"], "raw_to_train": {0: 0, 255: 1}},
        "One logit for both: config_overrides: {num_labels: 1}",
    ),
    "1 bit": ([ids(0, 255).convert("1"), ids(255, 0).convert("1")], {"classes": ["class_0", "class_1"]}, ""),
    "ids from 1": (
        [ids(1, 2, 3), ids(3, 3, 255)],
        {"classes": ["class_1", "class_2", "class_3"], "raw_to_train": {1: 0, 2: 1, 3: 2}},
        "255 is taken for ignored pixels. The ids begin at 1; there is no 0",
    ),
    "ids with a gap": ([ids(0, 1, 3)], {"classes": [f"class_{k}" for k in range(4)]}, "The ids 2 do not occur"),
    "scattered ids": (
        [ids(7, 26), ids(26, 100)],
        {"classes": ["class_7", "class_26", "class_100"], "raw_to_train": {7: 0, 26: 1, 100: 2}},
        "",
    ),
    "three equal channels": (
        [ids(0, 1, 2).convert("RGB"), ids(2, 1, 255).convert("RGB")],
        {"classes": ["class_0", "class_1", "class_2"]},
        "three equal channels, which are read as ids",
    ),
    "black and white with three channels": (
        [ids(0, 255).convert("RGB")],
        {"classes": ["background", "foreground"], "raw_to_train": {0: 0, 255: 1}},
        "",
    ),
    "palette": (
        [palette_map(0, 1, 2), palette_map(2, 3, 255)],
        {"classes": [f"class_{k}" for k in range(4)], "palette": [[0, 0, 0], [*RED], [*GREEN], [*BLUE]]},
        "palette images, whose colors are kept",
    ),
    "colors": (
        [colors(RED, GREEN, RED), colors(BLUE, BLUE, GREEN)],
        {
            "classes": ["class_0", "class_1", "class_2"],
            "palette": [[*BLUE], [*GREEN], [*RED]],
            "colors": {"class_0": [*BLUE], "class_1": [*GREEN], "class_2": [*RED]},
        },
        "The label maps hold 3 colors",
    ),
    "300 ids": (
        [ids(*MANY[0], dtype=np.uint16), ids(*MANY[1], 65535, dtype=np.uint16).resize((150, 2), Image.NEAREST)],
        {"classes": [f"class_{k}" for k in range(300)]},
        "300 classes: label maps have 16 bits",
    ),
    "16 bits with few ids": (
        [ids(0, 1, 65535, dtype=np.uint16)],
        {"classes": ["class_0", "class_1"], "raw_void": [65535]},
        "",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_without_specification_gets_one_that_fits(kind, tmp_path, capsys):
    maps, expected, reason = KINDS[kind]
    folder, file = write_maps(tmp_path / "data", maps), tmp_path / "spec.yaml"
    assert main(["data", "check", str(folder)]) == 2
    shown = capsys.readouterr().out
    assert "No label specification in" in shown
    pasted = yaml.safe_load(shown[shown.index("classes:") :])
    assert pasted == expected and reason in " ".join(shown.replace("\n# ", " ").split())
    assert main(["data", "check", str(folder), "--write_spec", str(file)]) == 0
    assert yaml.safe_load(file.read_text()) == expected
    spec = LabelSpec.from_file(file)
    assert spec.num_labels == len(expected["classes"])
    capsys.readouterr()
    assert main(["data", "check", str(folder), "--label_spec", str(file)]) == 0
    assert "no faults" in capsys.readouterr().out
    assert main(["data", "check", str(folder), "--write_spec", str(file)]) == 2
    assert "exists. Give another file" in capsys.readouterr().err
    assert yaml.safe_load(file.read_text()) == expected


CONTRADICTING = {
    "one class": ([ids(0, 255)], "classes: [lesion]", ["background", "lesion"]),
    "two classes, masks of 0 and 255": ([ids(0, 255)], "classes: [rest, lesion]", ["rest", "lesion"]),
    "one class, ids 0 and 1": ([ids(0, 1)], "classes: [lesion]", ["background", "lesion"]),
    "ids from 1": ([ids(1, 2, 3)], "classes: [a, b, c]", ["a", "b", "c"]),
    "colors": ([colors(RED, GREEN)], "classes: [a, b]", ["a", "b"]),
    "ids instead of colors": (
        [ids(0, 1, 2).convert("RGB")],
        "classes: [a, b, c]\ncolors: {a: [1, 2, 3], b: [4, 5, 6], c: [7, 8, 9]}",
        ["a", "b", "c"],
    ),
}


@pytest.mark.parametrize("kind", CONTRADICTING)
def test_a_specification_that_contradicts_the_files_is_replaced_and_its_names_are_kept(kind, tmp_path, capsys):
    maps, given, names = CONTRADICTING[kind]
    folder, file = write_maps(tmp_path / "data", maps, given), tmp_path / "spec.yaml"
    assert main(["data", "check", str(folder)]) == 2
    assert "--write_spec FILE writes it" in capsys.readouterr().out
    assert main(["data", "check", str(folder), "--write_spec", str(file)]) == 0
    assert list(LabelSpec.from_file(file).classes) == names
    assert main(["data", "check", str(folder), "--label_spec", str(file)]) == 0
    assert (folder / "labels.yaml").read_text() == given


def test_nothing_is_proposed_where_the_specification_fits_or_nothing_can_be_read(tmp_path, capsys):
    good = write_maps(tmp_path / "good", [ids(0, 1, 255)], "classes: [a, b]")
    (good / "train" / "images" / "p0.png").write_bytes(b"")
    assert main(["data", "check", str(good)]) == 2
    assert "--write_spec" not in capsys.readouterr().out
    assert main(["data", "check", str(good), "--write_spec", str(tmp_path / "a.yaml")]) == 2
    assert "what is there fits" in capsys.readouterr().err
    random = np.random.default_rng(0)
    smooth = np.where(np.arange(6400) < 6250, 255 * (np.arange(6400) % 2), np.arange(6400) % 256)
    noise = random.integers(0, 255, (40, 40, 3))
    for name, image, reason in (
        ("smooth", Image.fromarray(smooth.reshape(80, 80).astype(np.uint8)), "mixtures at edges"),
        ("noise", Image.fromarray(noise.astype(np.uint8)), "more than 256 colors"),
        ("one", ids(4, 4, 255), "there is one id, 4"),
    ):
        folder = write_maps(tmp_path / name, [image])
        assert main(["data", "check", str(folder), "--write_spec", str(tmp_path / "b.yaml")]) == 2
        assert reason in capsys.readouterr().err
    assert not list(tmp_path.glob("*.yaml"))
    assert main(["data", "check", "synthetic:2@40x48", "--write_spec", str(tmp_path / "c.yaml")]) == 2
    words = ["data", "check", str(good), "--task", "image-classification", "--write_spec", str(tmp_path / "c.yaml")]
    assert main(words) == 2 and not (tmp_path / "c.yaml").exists()


def test_three_equal_channels_are_ids_unless_there_are_colors(tmp_path):
    folder = write_maps(tmp_path, [ids(0, 1, 2).convert("RGB")], "classes: [a, b, c]")
    assert load_segmentation(folder, "train").dataset[0]["label"][0].tolist() == [0, 1, 2]
    (folder / "labels.yaml").write_text("classes: [a, b, c]\ncolors: {a: [2, 2, 2], b: [1, 1, 1], c: [0, 0, 0]}")
    assert load_segmentation(folder, "train").dataset[0]["label"][0].tolist() == [2, 1, 0]


def test_statistics_need_a_specification(tmp_path, capsys):
    folder = write_maps(tmp_path / "data", [ids(0, 1)])
    assert main(["data", "stats", str(folder), "--output", str(tmp_path / "stats.json")]) == 2
    assert "`denseseg data check` proposes one" in capsys.readouterr().out
    assert not (tmp_path / "stats.json").exists()
