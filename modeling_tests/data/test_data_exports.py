"""Exports of annotation tools: one scene gives the same label maps in every format, and nothing is lost unsaid."""

import contextlib
import json
import os
import random
import re

import numpy as np
import pytest
from PIL import Image, ImageOps

from export_writers import (
    CLASSES,
    SCENES,
    SIZE,
    WRITERS,
    Thing,
    box,
    brush,
    coco_flat,
    coco_json,
    coco_official,
    cvat,
    dump,
    flat,
    id_map,
    label_studio_json,
    labelme,
    pairs,
    rle,
    roboflow_masks,
    supervisely_polygons,
    supervisely_project,
    write_image,
    yolo,
)
from hf_denseseg import files
from hf_denseseg.cli import main
from hf_denseseg.data import conversion
from hf_denseseg.data.checks.segmentation import scan_segmentation_source
from hf_denseseg.data.reading.areas import decode_brush
from hf_denseseg.data.segmentation import load_segmentation
from hf_denseseg.data.sources.folder_options import FolderOptions
from hf_denseseg.errors import InputError
from test_published_dsct import REDUCED as TINY


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_label_maps(tmp_path, name):
    write, holes = WRITERS[name]
    write(tmp_path, SCENES)
    data = load_segmentation(tmp_path, "train")
    assert data.spec.classes == ("background", *CLASSES)
    rows = {row["id"].partition("-")[2] or row["id"]: row for row in data.dataset}  # Label Studio renames uploads
    assert set(rows) == set(SCENES)
    for key, things in SCENES.items():
        assert np.array_equal(rows[key]["label"], id_map(things, holes)), key


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_is_checked_by_its_folder_alone(tmp_path, capsys, name):
    WRITERS[name][0](tmp_path, SCENES)
    assert main(["data", "check", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "2 pairs, no faults." in printed


def polygon_of(folder, **changes):
    """A COCO export of one image whose only annotation has other values."""
    content = coco_json({"p": [SCENES["straße 1"][0]]}, lambda thing: [flat(thing.parts[0])])
    content["annotations"][0] |= changes
    write_image(folder / "images/p.png", "p")
    return content


BAD_COCO = {
    "two points": ({"segmentation": [[1, 1, 5, 5]]}, "annotation 0 (car): a polygon of 2 points; at least three"),
    "not a number": (
        {"segmentation": [[1, 1, 5, float("nan"), 5, 5]]},
        "annotation 0 (car): a coordinate that is NaN",
    ),
    "text": ({"segmentation": [[1, 1, 5, "5", 5, 5]]}, "annotation 0 (car): a coordinate that is NaN, infinite or no"),
    "far away": ({"segmentation": [[1, 1, 1e12, 5, 5, 5]]}, "its coordinates are not pixels of an image"),
    "other size": ({"segmentation": {"size": [3, 3], "counts": [9]}}, "its run lengths are of size [3, 3]"),
    "run lengths": ({"segmentation": {"size": list(SIZE), "counts": [9]}}, "its run lengths add up to 9"),
    "short text": ({"segmentation": {"size": list(SIZE), "counts": "11"}}, "its run lengths add up to 2, not to the"),
    "unknown encoding": ({"segmentation": {"data": "x"}}, "is neither polygons nor run lengths"),
    "unknown image": ({"image_id": 7}, "annotation 0 belongs to no entry of `images`"),
    "unknown class": ({"category_id": 7}, "annotation 0 (category 7): its class is not one of car, tree"),
}


@pytest.mark.parametrize("fault", BAD_COCO)
def test_bad_objects_are_named_and_refused(tmp_path, capsys, fault):
    changes, message = BAD_COCO[fault]
    dump(tmp_path / "annotations.json", polygon_of(tmp_path, **changes))
    assert main(["data", "check", str(tmp_path)]) == 2
    printed = capsys.readouterr().out
    assert message in printed and "annotations.json" in printed
    with pytest.raises(InputError, match=re.escape(message)):
        load_segmentation(tmp_path, "train").dataset[0]


BAD_FILES = {
    "empty": (lambda path: path.write_text(""), "is empty (0 bytes). Export it again."),
    "truncated": (lambda path: path.write_text(path.read_text()[:-40]), "is not valid JSON"),
    "deep": (lambda path: path.write_text('{"images": ' + "[" * 200_000), "nested too deeply"),
    "circular": (lambda path: (path.unlink(), path.symlink_to(path)), "cannot be read"),
    "too large": (lambda path: os.truncate(path, 2**30), "at most 536,870,912 are read"),
    "no lists": (lambda path: path.write_text('{"images": 3}'), "is not an annotation file in COCO's format"),
    "no images": (
        lambda path: path.write_text('{"images": [], "annotations": [], "categories": []}'),
        "has no images",
    ),
}


@pytest.mark.parametrize("fault", BAD_FILES)
def test_bad_annotation_files_are_refused(tmp_path, capsys, fault):
    damage, message = BAD_FILES[fault]
    path = tmp_path / "annotations/instances_train.json"
    coco_official(tmp_path, SCENES)
    damage(path)
    assert main(["data", "check", str(tmp_path)]) == 2
    printed = capsys.readouterr().err
    assert message in printed and "instances_train.json" in printed


def test_names_that_are_used_twice_are_refused(tmp_path, capsys):
    content = polygon_of(tmp_path)
    content["categories"][1]["name"] = "car"
    dump(tmp_path / "annotations.json", content)
    assert main(["data", "check", str(tmp_path)]) == 2
    assert "the class 'car' is named twice" in capsys.readouterr().err
    content = polygon_of(tmp_path)
    content["images"].append(content["images"][0] | {"id": 5})
    dump(tmp_path / "annotations.json", content)
    assert main(["data", "check", str(tmp_path)]) == 2
    assert "2 images have the name p. Rename all but one" in capsys.readouterr().out
    pairs(tmp_path / "pairs", SCENES)
    write_image(tmp_path / "pairs/images/empty.jpg", "empty")
    assert main(["data", "check", str(tmp_path / "pairs")]) == 2
    assert "have one name, by which images and label maps are paired" in capsys.readouterr().err


def test_objects_without_a_visible_pixel_are_listed_and_objects_counted(tmp_path, capsys):
    things = [
        Thing("car", [box(2, 2, 9, 9)]),
        Thing("tree", [box(0, 0, 20, 20)]),
        Thing("car", [box(-90, -90, -70, -70)]),
    ]
    coco_flat(tmp_path, {"p": things})
    assert main(["data", "check", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "nothing of annotation 0 (car) is seen: later objects cover it." in printed
    assert "nothing of annotation 2 (car) is seen: no pixel of the image is inside." in printed
    assert "3 objects in, 1 of them seen, 400 pixels out." in printed


def test_the_smaller_object_is_on_top_by_a_key(tmp_path):
    coco_flat(tmp_path, {"p": [Thing("car", [box(2, 2, 9, 9)]), Thing("tree", [box(0, 0, 20, 20)])]})
    assert not (load_segmentation(tmp_path, "train").dataset[0]["label"] == 1).any()
    smaller = load_segmentation(tmp_path, "train", options=FolderOptions(overlap="smaller")).dataset[0]["label"]
    assert (smaller == 1).sum() == 49 and (smaller == 2).sum() == 400 - 49


def test_splits_are_joined_and_have_the_same_classes(tmp_path):
    one, other = {"a": [Thing("tree", [box(2, 2, 9, 9)])]}, {"b": [Thing("car", [box(2, 2, 9, 9)])]}
    for split, scenes in (("train", one), ("valid", other)):
        labelme(tmp_path / "labelme" / split, scenes)
        dump(
            tmp_path / f"coco/annotations/instances_{split}2017.json",
            coco_json(scenes, lambda thing: [flat(thing.parts[0])]),
        )
        for name in scenes:
            write_image(tmp_path / f"coco/{split}2017/{name}.png", name)
    for folder, classes, raw in (("labelme", CLASSES[:2], 2), ("coco", CLASSES, 2)):
        data = load_segmentation(tmp_path / folder, "train+valid")
        assert data.spec.classes == ("background", *classes)
        assert [int(row["label"].max()) for row in data.dataset] == [raw, 1]


def test_images_without_objects_are_ignored_by_a_key(tmp_path):
    coco_flat(tmp_path, SCENES)
    rows = load_segmentation(tmp_path, "train", options=FolderOptions(empty_images="ignored")).dataset
    labels = {row["id"]: row["label"] for row in rows}
    assert (labels["empty"] == 255).all() and not (labels["straße 1"] == 255).any()


def test_crowds_are_ignored_below_objects(tmp_path):
    content = polygon_of(tmp_path)
    crowd = content["annotations"][0] | {"id": 9, "iscrowd": 1, "segmentation": rle(np.ones(SIZE))}
    dump(tmp_path / "annotations.json", content | {"annotations": [*content["annotations"], crowd]})
    label = load_segmentation(tmp_path, "train").dataset[0]["label"]
    assert (label[4:24, 4:24] == 1).all() and (label == 255).sum() == label.size - 400
    small = crowd | {"segmentation": rle(np.pad(np.ones((4, 4)), ((6, 30), (6, 46))))}
    dump(tmp_path / "annotations.json", content | {"annotations": [*content["annotations"], small]})
    options = FolderOptions(overlap="smaller")
    assert (load_segmentation(tmp_path, "train", options=options).dataset[0]["label"][4:24, 4:24] == 1).all()


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_label_maps_are_turned_as_their_image_is(tmp_path, capsys, orientation):
    """A label map of the stored size is turned with the image; one of the upright size stays."""
    ids = id_map(SCENES["straße 1"])
    stored = Image.fromarray(ids * 60)
    exif = Image.Exif()
    exif[0x0112] = orientation
    pairs(tmp_path, SCENES)
    stored.save(tmp_path / "images/straße 1.png", exif=exif)
    with Image.open(tmp_path / "images/straße 1.png") as image:
        upright = np.asarray(ImageOps.exif_transpose(image)) // 60
    row = load_segmentation(tmp_path, "train").dataset[1]
    assert np.array_equal(np.asarray(row["image"])[..., 0] // 60, upright) and np.array_equal(row["label"], upright)
    assert main(["data", "check", str(tmp_path)]) == 0
    assert "1 label maps have the size of images before their EXIF rotation" in capsys.readouterr().out
    Image.fromarray(np.ascontiguousarray(upright)).save(tmp_path / "masks/straße 1.png")
    assert np.array_equal(load_segmentation(tmp_path, "train").dataset[1]["label"], upright)


def test_a_mask_suffix_can_be_given(tmp_path, capsys):
    pairs(tmp_path, SCENES, images="", labels="", label="{}.lesion.png")
    assert main(["data", "check", str(tmp_path)]) == 2
    assert "Masks beside their images need an end that is common to all" in capsys.readouterr().err
    assert main(["data", "check", str(tmp_path), "--mask_suffix", ".lesion"]) == 0
    coco_flat(tmp_path / "coco", SCENES)
    assert main(["data", "check", str(tmp_path / "coco"), "--mask_suffix", "_x"]) == 2
    assert "mask_suffix has no meaning for" in capsys.readouterr().err


NEAREST = {
    "other names": ({"Image/a.png": "", "GroundTruth/a.png": ""}, "rename Image to images and GroundTruth to masks"),
    "yolo without yaml": ({"images/a.png": "", "labels/a.txt": ""}, "nearest to YOLO: add data.yaml"),
    "label studio without images": ({"task-1-annotation-2-by-3-tag-car-0.png": ""}, "the image of task 1 is unknown"),
    "cvat without images": ({"labelmap.txt": "", "x/a.png": ""}, "nearest to CVAT's"),
    "xml": ({"a.png": "", "a.xml": ""}, "no label maps of the same names"),
    "empty": ({}, "It is empty."),
}


@pytest.mark.parametrize("name", NEAREST)
def test_a_folder_that_is_none_is_told_the_nearest(tmp_path, name):
    files, message = NEAREST[name]
    for file, content in files.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(content)
    with pytest.raises(InputError, match=message):
        load_segmentation(tmp_path, "train")


@pytest.mark.parametrize("name", ["coco polygons", "cvat", "label studio brushes", "save_to_disk"])
def test_conversion_writes_the_plain_layout(tmp_path, name, capsys):
    WRITERS[name][0](tmp_path / "export", SCENES)
    assert main(["data", "convert", str(tmp_path / "export"), "--output", str(tmp_path / "plain")]) == 0
    assert "train: 2 pairs" in capsys.readouterr().out
    before, after = (load_segmentation(tmp_path / each, "train") for each in ("export", "plain"))
    assert after.spec.classes == before.spec.classes
    by_id = {row["id"]: row for row in before.dataset}
    assert len(after.dataset) == len(by_id)
    for ours in after.dataset:
        theirs = by_id[ours["id"]]
        assert np.array_equal(ours["label"], theirs["label"])
        assert np.array_equal(np.asarray(ours["image"]), np.asarray(theirs["image"]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export", "plain"]
    assert main(["data", "convert", str(tmp_path / "export"), "--output", str(tmp_path / "plain")]) == 2
    assert "exists and is not an empty folder" in capsys.readouterr().err


def test_a_conversion_that_was_killed_goes_on_and_a_faulty_one_leaves_nothing(tmp_path, monkeypatch):
    coco_flat(tmp_path / "export", SCENES)
    written = []

    def write(path, content):
        if path.parent.name == "images":
            written.append(path)
        if len(written) == 2:
            raise KeyboardInterrupt
        files.write_atomic(path, content)

    monkeypatch.setattr(conversion, "write_atomic", write)
    with pytest.raises(KeyboardInterrupt):
        conversion.convert(str(tmp_path / "export"), tmp_path / "plain", ["train"])
    monkeypatch.undo()
    kept = tmp_path / ".plain.unfinished"
    done = written[0]
    time = done.stat().st_mtime_ns
    assert kept.is_dir() and not (tmp_path / "plain").exists()
    assert conversion.convert(str(tmp_path / "export"), tmp_path / "plain", ["train"]) == {"train": 2}
    assert (tmp_path / "plain" / done.relative_to(kept)).stat().st_mtime_ns == time
    assert not kept.exists() and not list((tmp_path / "plain").glob("source.json"))
    (tmp_path / "export/images/straße 1.png").write_bytes(b"x")
    with pytest.raises(InputError, match="is not a readable image"):
        conversion.convert(str(tmp_path / "export"), tmp_path / "other", ["train"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export", "plain"]


def labelme_with(shape):
    return lambda folder: labelme(folder, {"p": []}, lambda _: [{"label": "car", "points": [], **shape}])


def supervisely_with(**entry):
    return lambda folder: supervisely_project(folder, {"p": [Thing("car", [])]}, lambda thing: [entry])


def yolo_with(line):
    def write(folder):
        yolo(folder, {"p": [Thing("car", [box(2, 2, 9, 9)])]})
        (folder / "labels/train/p.txt").write_text(line)

    return write


def label_studio_with(kind, value, **changes):
    def write(folder):
        label_studio_json(folder, {"p": [Thing("car", [])]}, lambda thing: [(kind, value)])
        if changes:
            path = folder / "project-1.json"
            content = json.loads(path.read_text())
            content[0] |= changes
            dump(path, content)

    return write


def changed(write, file, old, new):
    """An export with other text in one of its files."""

    def write_changed(folder):
        write(folder, SCENES)
        path = folder / file
        path.write_text(path.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")

    return write_changed


def without(write, file):
    def write_without(folder):
        write(folder, SCENES)
        (folder / file).unlink()

    return write_without


TRIANGLE = [[1, 1], [9, 1], [9, 9]]
BAD_EXPORTS = {
    "labelme shape": (labelme_with({"shape_type": "cube"}), "p.json: shape 0 (car): unknown shape_type 'cube'"),
    "labelme circle": (labelme_with({"shape_type": "circle", "points": [[1, 1]]}), "p.json: shape 0 (car): "),
    "labelme mask": (
        labelme_with({"shape_type": "mask", "points": TRIANGLE[:2], "mask": "%"}),
        "shape 0 (car) (not B",
    ),
    "labelme truncated": (changed(labelme, "empty.json", "}", ""), "empty.json: is not valid JSON"),
    "labelme image": (without(labelme, "empty.png"), "empty.json: the image"),
    "yolo box": (yolo_with("0 0.5 0.5 0.2 0.2"), "p.txt: line 1 (car): it is a box, not a polygon"),
    "yolo pixels": (yolo_with("0 10 10 30 10 30 30"), "YOLO's are fractions of the image size"),
    "yolo class": (yolo_with("9 0.1 0.1 0.3 0.1 0.3 0.3"), "p.txt: line 1 (class 9): its class is not one of car"),
    "yolo text": (yolo_with("0 a b c d e f"), "p.txt: line 1 (car): could not convert string to float"),
    "yolo odd": (yolo_with("0 0.1 0.1 0.3 0.1 0.3 0.3 0.2"), "p.txt: line 1 (car): a polygon of 3 points"),
    "yolo image": (without(yolo, "images/train/straße 1.png"), "straße 1.txt: it belongs to no image"),
    "yolo names": (changed(yolo, "data.yaml", "tree", "car"), "the class 'car' is named twice"),
    "supervisely shape": (supervisely_with(geometryType="ball"), "object 0 (car): unknown geometryType 'ball'"),
    "supervisely bitmap": (
        supervisely_with(geometryType="bitmap", bitmap={"data": "eJwBAAD//wAAAAE=", "origin": [0, 0]}),
        "has an invalid encoding in object 0 (car)",
    ),
    "supervisely image": (without(supervisely_polygons, "ds/img/empty.png"), "empty.png is missing"),
    "label studio brush": (
        label_studio_with("brushlabels", {"rle": [0, 0, 35, 0, 57]}),
        "brush strokes are truncated",
    ),
    "label studio kind": (label_studio_with("magiclabels", {"magic": 1}), "region r0 (car): a region of unknown kind"),
    "label studio image": (
        label_studio_with("brushlabels", {"rle": []}, data={"image": "/data/other.png"}),
        "the image of task 0 (other.png) is not in",
    ),
    "cvat mask": (without(cvat, "SegmentationClass/empty.png"), "empty has no mask in"),
    "cvat image": (without(cvat, "JPEGImages/empty.png"), "Export with `Save images`"),
    "cvat colors": (changed(cvat, "labelmap.txt", "0,128,0", "128,0,0"), "car and tree have the same color"),
    "cvat color": (changed(cvat, "labelmap.txt", "128,0,0", "128,0,1"), "Colors [[128, 0, 0]]"),
    "cvat line": (changed(cvat, "labelmap.txt", "128,0,0", "red"), "line 3: 'car:red::' is not"),
    "roboflow table": (changed(roboflow_masks, "train/_classes.csv", "2, ", "1, "), "a pixel value is there twice"),
    "roboflow mask": (without(roboflow_masks, "train/empty_mask.png"), "has no label map of the same name"),
}


@pytest.mark.parametrize("fault", BAD_EXPORTS)
def test_bad_exports_are_refused_with_file_and_object(tmp_path, capsys, fault):
    write, message = BAD_EXPORTS[fault]
    write(tmp_path)
    assert main(["data", "check", str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert message in printed.out + printed.err


def test_what_has_no_area_is_left_out_with_a_line(tmp_path, capsys):
    labelme(tmp_path, {"p": []}, lambda _: [{"label": "car", "points": TRIANGLE[:1], "shape_type": "point"}] * 2)
    write_image(tmp_path / "q.png", "q")
    assert main(["data", "check", str(tmp_path)]) == 2  # no class is left but the background
    printed = capsys.readouterr().out
    assert "p.json: shape 1 (car) is left out: a point has no area." in printed
    assert "q.png is left out: it has no annotation file q.json." in printed


def test_rectangles_circles_and_turned_shapes(tmp_path):
    """Against their equations, pixel by pixel; pixels whose center is on the edge are left out."""
    circle = {"label": "car", "shape_type": "circle", "points": [[20, 20], [32, 20]]}
    labelme(tmp_path / "a", {"p": []}, lambda _: [circle])
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]] + 0.5
    distance = np.hypot(columns - 20, rows - 20)
    sure = abs(distance - 12) > 1
    label = load_segmentation(tmp_path / "a", "train").dataset[0]["label"]
    assert np.array_equal((label == 1)[sure], (distance < 12)[sure])
    value = {"x": 50, "y": 25, "width": 25, "height": 25, "rotation": 90}  # clockwise about the top left corner
    label_studio_json(tmp_path / "b", {"p": [Thing("car", [])]}, lambda thing: [("rectanglelabels", value)])
    label = load_segmentation(tmp_path / "b", "train").dataset[0]["label"]
    expected = np.zeros(SIZE, np.uint8)
    expected[10:24, 18:28] = 1
    assert np.array_equal(label, expected)


def test_pascal_voc_needs_no_label_map(tmp_path):
    """Palette images in VOC's colors, whose index 255 is the border."""
    cvat(tmp_path, {"p": []})
    (tmp_path / "labelmap.txt").unlink()
    ids = np.zeros(SIZE, np.uint8)
    ids[:10], ids[10:12] = 15, 255  # person, border
    image = Image.fromarray(ids)
    bits = [[sum((k >> (3 * j + c) & 1) << (7 - j) for j in range(8)) for c in range(3)] for k in range(256)]
    image.putpalette([channel for color in bits for channel in color])
    image.save(tmp_path / "SegmentationClass/p.png")
    data = load_segmentation(tmp_path, "train")
    assert data.spec.num_labels == 21 and data.spec.classes[15] == "person"
    assert np.array_equal(data.dataset[0]["label"], ids)


def test_recorded_brush_strokes_have_the_header_of_the_definition():
    """The first bytes of a public export of Label Studio: an image of 3332 x 2527 pixels, 8 bits per value."""
    with pytest.raises(ValueError, match="truncated"):
        decode_brush([2, 1, 233, 240, 57, 27, 255, 255, 255, 0], 2527, 3332)
    assert brush(np.zeros((2527, 3332), bool))[:6] == [2, 1, 233, 240, 57, 27]


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_is_counted_shown_and_packed(tmp_path, name):
    WRITERS[name][0](tmp_path / "export", SCENES)
    export, stats = str(tmp_path / "export"), tmp_path / "stats.json"
    assert main(["data", "stats", export, "--output", str(stats)]) == 0
    pixels = sum(np.bincount(id_map(each, WRITERS[name][1]).ravel(), minlength=4) for each in SCENES.values())
    assert json.loads(stats.read_text())["pixels"] == pixels.tolist()
    assert main(["data", "show", export, "--output", str(tmp_path / "shown.png")]) == 0
    assert main(["data", "pack", export, "--output_dir", str(tmp_path / "shards")]) == 0
    packed = {row["id"]: row["label"] for row in load_segmentation(tmp_path / "shards", "train").dataset}
    for row in load_segmentation(export, "train").dataset:
        assert np.array_equal(packed[row["id"]], row["label"])


@pytest.mark.parametrize("name", ["coco polygons", "yolo", "labelme polygons"])
def test_an_export_is_trained_and_evaluated_by_its_folder(tmp_path, name):
    scenes = {f"image {number}": SCENES["straße 1"] for number in range(10)}
    WRITERS[name][0](tmp_path / "export", scenes)
    words = ["--dataset", str(tmp_path / "export"), "--eval_fraction", "0.3", "--use_cpu"]
    sizes = ["--config_overrides", json.dumps(TINY), "--crop_size", "32", "32", "--max_steps", "1"]
    output = ["--output_dir", str(tmp_path / "run")]
    assert main(["train", *words, *sizes, "--per_device_train_batch_size", "2", *output]) == 0
    labels = json.loads((tmp_path / "run/model/labels.json").read_text(encoding="utf-8"))
    assert labels["classes"] == ["background", *CLASSES]
    model = str(tmp_path / "run/model")
    assert main(["evaluate", model, *words, "--overlap", "smaller", "--output_dir", str(tmp_path / "scores")]) == 0


def with_another_value(content, generator):
    """JSON content with one node replaced by what it should not be."""
    holder, nodes = [content], []

    def walk(parent, key):
        nodes.append((parent, key))
        value = parent[key]
        for inner in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
            walk(value, inner)

    walk(holder, 0)
    parent, key = generator.choice(nodes)
    parent[key] = generator.choice([None, -1, 0, 1e308, float("nan"), "x", [], {}, [1], "", True, [[1, 2]], 10**30])
    return holder[0]


@pytest.mark.parametrize("name", WRITERS)
def test_any_damage_is_a_fault_and_no_crash(tmp_path, name):
    """Files with a node of another kind, other bytes, or half of them."""
    generator = random.Random(name)
    WRITERS[name][0](tmp_path, SCENES)
    files = sorted(path for path in tmp_path.rglob("*") if path.suffix in (".json", ".txt", ".csv", ".yaml"))
    for _ in range(12):
        path = generator.choice(files)
        before = path.read_bytes()
        if path.suffix == ".json" and generator.random() < 0.8:
            dump(path, with_another_value(json.loads(before), generator))
        elif before:
            content = bytearray(before)
            content[generator.randrange(len(content))] = generator.randrange(256)
            path.write_bytes(content[: generator.choice([len(content), len(content) // 2])])
        with contextlib.suppress(InputError):
            scan_segmentation_source(str(tmp_path), "train")
        path.write_bytes(before)
