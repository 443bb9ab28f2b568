"""Detection data: every kind of faulty entry, geometry of images, boxes and masks, batches, and AP by definition."""

import copy
import json

import numpy as np
import pytest
import torch
from PIL import Image

from hf_denseseg.cli import main
from hf_denseseg.data.augmentation.detection import (
    AspectRatioSampler,
    DetectionAugmentation,
    TrainDetections,
    collate_train,
)
from hf_denseseg.data.detection import load_detection
from hf_denseseg.data.sources.coco import encode_mask, object_mask, read_coco, trainable
from hf_denseseg.errors import InputError
from hf_denseseg.evaluation.detection_metrics import detection_metrics
from hf_denseseg.evaluation.score_names import chance_level

SQUARE = [[2, 3, 12, 3, 12, 13, 2, 13]]  # x, y of the corners


def annotation(number, image, category, box, **more):
    polygon = [[box[0], box[1], box[0] + box[2], box[1], box[0] + box[2], box[1] + box[3], box[0], box[1] + box[3]]]
    return {
        "id": number, "image_id": image, "category_id": category, "bbox": box, "area": box[2] * box[3],
        "iscrowd": 0, "segmentation": polygon, **more,
    }  # fmt: skip


CONTENT = {
    "info": {"description": "mini"},
    "images": [
        {"id": 7, "file_name": "a.png", "height": 40, "width": 60},
        {"id": 9, "file_name": "b.png", "height": 60, "width": 40},
        {"id": 11, "file_name": "c.png", "height": 20, "width": 20},
    ],
    # Ids 2 and 4 are left out, as in COCO's own 1 to 90.
    "categories": [{"id": 5, "name": "tree"}, {"id": 1, "name": "person"}, {"id": 3, "name": "car"}],
    "annotations": [
        annotation(1, 7, 1, [2, 3, 10, 10]),
        annotation(2, 7, 5, [50, 30, 20, 20]),  # extends beyond the image
        annotation(3, 9, 3, [5, 5, 20, 30]),
        annotation(4, 9, 3, [0, 0, 30, 40], iscrowd=1, segmentation={"size": [60, 40], "counts": [0, 1200, 1200]}),
        annotation(5, 9, 1, [10, 10, 0, 5]),  # degenerate
        annotation(6, 7, 1, [100, 100, 5, 5]),  # outside
    ],
}


@pytest.fixture
def coco(tmp_path):
    """Write the mini dataset in COCO's layout; returns the folder and a function that changes the annotations."""
    root = tmp_path / "coco"
    (root / "annotations").mkdir(parents=True)
    (root / "val2017").mkdir()
    for image in CONTENT["images"]:
        Image.new("RGB", (image["width"], image["height"]), (90, 120, 60)).save(root / "val2017" / image["file_name"])

    def write(change=None):
        content = copy.deepcopy(CONTENT)
        if change is not None:
            change(content)
        (root / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
        return root

    write()
    return root, write


def test_category_ids_with_gaps_become_0_to_k(coco):
    data = load_detection(coco[0], "val2017", masks=True)
    assert data.spec.classes == ("person", "car", "tree")
    assert data.spec.id2label == {0: "person", 1: "car", 2: "tree"}
    row = data.dataset[0]
    assert (row["image"].size, row["image_id"], row["id"]) == ((60, 40), 7, "a")
    assert [each["category"] for each in row["objects"]] == [0, 2, 0]
    assert row["objects"][0]["bbox"] == [2.0, 3.0, 10.0, 10.0]


def test_annotation_file_is_accepted_by_its_path(coco):
    data = load_detection(coco[0] / "annotations" / "instances_val2017.json", "val2017")
    assert len(data.dataset) == 3 and data.dataset[1]["image"].size == (40, 60)


def test_images_without_trainable_objects_are_excluded_from_training_only(coco):
    assert len(load_detection(coco[0], "val2017").dataset) == 3
    assert len(load_detection(coco[0], "val2017", filter_empty=True).dataset) == 2


def test_entries_handled_by_a_rule_are_noted_with_count_and_id(coco):
    notes = " ".join(load_detection(coco[0], "val2017").notes)
    for text in (
        "1 boxes stick out of their image, cut at its border in training (ids 2)",
        "1 crowds, left out of training, ignored regions in evaluation (ids 4)",
        "1 boxes less than a pixel wide or high, left out of training (ids 5)",
        "1 boxes outside their image, left out of training (ids 6)",
        "1 images have no objects",
        "2 category ids are left out; the others become 0 to 2 (ids 2, 4)",
    ):
        assert text in notes


def set_to(part, place, **values):
    return lambda content: content[part][place].update(values)


FAULTS = {
    "unknown image": (set_to("annotations", 0, image_id=99), "annotation 1: .*image 99 is not in `images`"),
    "unknown category": (set_to("annotations", 2, category_id=4), "annotation 3: .*category 4 is not in `categories`"),
    "not a number": (set_to("annotations", 1, bbox=[1, 2, float("nan"), 4]), "annotation 2: .*four finite numbers"),
    "infinite": (set_to("annotations", 1, bbox=[1, 2, float("inf"), 4]), "annotation 2: .*four finite numbers"),
    "three numbers": (set_to("annotations", 1, bbox=[1, 2, 3]), "annotation 2: .*four finite numbers"),
    "no box": (lambda content: content["annotations"][1].pop("bbox"), "annotation 2: .*bbox is None"),
    "annotation twice": (set_to("annotations", 1, id=1), "2 annotation entries have the id 1"),
    "image twice": (set_to("images", 1, id=7), "2 image entries have the id 7"),
    "category twice": (set_to("categories", 1, id=5), "2 category entries have the id 5"),
    "name twice": (set_to("categories", 1, name="tree"), "duplicate names: tree"),
    "no size": (lambda content: content["images"][0].pop("height"), "image 7: .*`height` or `width` is missing"),
    "no mask": (set_to("annotations", 0, segmentation=[]), "annotation 1: .*no segmentation.*task: object-detection"),
    "half a point": (set_to("annotations", 0, segmentation=[[1, 2, 3, 4, 5, 6, 7]]), "annotation 1: .*odd number"),
    "no coordinate": (
        set_to("annotations", 0, segmentation=[[1, 2, 3, float("nan"), 5, 6]]),
        "annotation 1: .*cannot be drawn .a coordinate that is NaN",
    ),
    "short run lengths": (
        set_to("annotations", 0, segmentation={"size": [40, 60], "counts": "11"}),
        "annotation 1: .*cannot be drawn .its run lengths add up to 2, not to the 2400 pixels",
    ),
    "no lists": (lambda content: content.pop("images"), "not an annotation file in COCO's format"),
    "no categories": (lambda content: content.update(categories=[]), "has 0 categories"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_faulty_entry_is_refused_with_file_id_and_fix(coco, case):
    change, message = FAULTS[case]
    with pytest.raises(InputError, match=message):
        load_detection(coco[1](change), "val2017", masks=True)


def test_check_lists_every_fault_and_ends_with_code_2(coco, capsys):
    def break_two(content):
        content["annotations"][0]["image_id"] = 99
        content["annotations"][2]["category_id"] = 77

    words = ["data", "check", str(coco[1](break_two)), "--split", "val2017", "--task", "object-detection"]
    assert main(words) == 2
    text = capsys.readouterr().out
    assert text.count("fault:") == 2 and "annotation 1" in text and "annotation 3" in text


def test_check_names_missing_and_mismatched_images(coco, capsys):
    root, _ = coco
    (root / "val2017" / "a.png").unlink()
    Image.new("RGB", (41, 60)).save(root / "val2017" / "b.png")
    assert main(["data", "check", str(root), "--split", "val2017", "--task", "object-detection"]) == 2
    text = capsys.readouterr().out
    assert "a.png cannot be read" in text and "is 60x41 (height x width), but its entry has 60x40" in text
    assert main(["data", "check", str(root), "--split", "train", "--task", "object-detection"]) == 2


def test_meaningless_options_are_refused(coco, capsys):
    words = ["data", "check", str(coco[0]), "--split", "val2017", "--task", "object-detection", "--revision", "x"]
    assert main(words) == 2
    assert "has no meaning for object-detection data" in capsys.readouterr().err


def test_neither_folder_nor_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="neither a folder with annotations/instances_<split>.json"):
        load_detection(tmp_path, "val")
    with pytest.raises(InputError, match="has no split 'train'"):
        (tmp_path / "annotations").mkdir()
        (tmp_path / "annotations" / "instances_val.json").write_text(json.dumps(CONTENT))
        load_detection(tmp_path, "train")


def test_boxes_are_clipped_to_the_image_and_crowds_excluded(coco):
    row = load_detection(coco[0], "val2017").dataset[0]
    kept, boxes = trainable(row["objects"], row["height"], row["width"])
    assert kept == [0, 1]
    assert boxes.tolist() == [[2, 3, 12, 13], [50, 30, 60, 40]]


def test_polygons_and_both_forms_of_rle_paint_the_same_mask():
    mask = np.zeros((20, 30), dtype=np.uint8)
    mask[3:13, 2:12] = 1
    counts, value = [], 0
    for bit in mask.T.ravel():  # column by column, from 0
        if bit != value or not counts:
            counts.append(0)
            if len(counts) == 1 and bit:
                counts.append(0)
            value = bit
        counts[-1] += 1
    forms = (SQUARE, {"size": [20, 30], "counts": counts}, encode_mask(mask))
    for form in forms:
        assert np.array_equal(object_mask(json.dumps(form), (20, 30)), mask)
        assert np.array_equal(object_mask(json.dumps(form), (20, 30), (40, 60)), mask.repeat(2, 0).repeat(2, 1))
    assert object_mask("", (20, 30)).sum() == 0


def test_image_boxes_and_masks_stay_aligned_when_scaled_and_flipped():
    """A bright block on a dark background: the mask is set where the image is bright, and the box encloses it."""
    pixels = np.zeros((40, 60, 3), dtype=np.uint8)
    pixels[8:24, 4:24] = 255
    mask = pixels[..., 0] // 255
    found = {"category": 1, "bbox": [4.0, 8.0, 20.0, 16.0], "area": 320.0, "iscrowd": 0,
             "segmentation": json.dumps(encode_mask(mask))}  # fmt: skip
    row = {"image": Image.fromarray(pixels), "objects": [found]}
    flipped = set()
    for seed in range(8):
        sample = DetectionAugmentation([80, 120], 150, masks=True)(row, np.random.default_rng(seed))
        height, width = sample["pixel_values"].shape[1:]
        assert (height, width) in ((80, 120), (100, 150))  # the long side is kept below 150
        bright = sample["pixel_values"][0] > 127
        assert (bright != sample["masks"][0]).float().mean() < 0.02
        rows, columns = bright.any(1).nonzero(), bright.any(0).nonzero()
        expected = torch.tensor([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]) / torch.tensor(
            [width, height, width, height]
        )
        x, y, wide, high = sample["boxes"][0]
        corners = torch.stack([x - wide / 2, y - high / 2, x + wide / 2, y + high / 2])
        assert torch.allclose(corners, expected, atol=0.012)
        flipped.add(bool(columns[0] > width / 4))
    assert flipped == {True, False}


def test_image_without_objects_gives_empty_labels(coco):
    row = load_detection(coco[0], "val2017").dataset[2]
    sample = DetectionAugmentation([32], 64, masks=True)(row, np.random.default_rng(0))
    assert sample["boxes"].shape == (0, 4) and sample["masks"].shape == (0, 32, 32)
    assert sample["class_labels"].dtype == torch.int64


def test_batches_are_padded_to_multiples_of_32_beside_the_images(coco):
    dataset = TrainDetections(load_detection(coco[0], "val2017"), DetectionAugmentation([40], 100, flip=False))
    batch = collate_train([dataset[0], dataset[1]])
    assert batch["pixel_values"].shape == (2, 3, 64, 64)
    assert batch["pixel_mask"].sum((1, 2)).tolist() == [40 * 60, 60 * 40]
    assert batch["pixel_values"][0, :, :40, :60].float().mean() > 0
    assert batch["pixel_values"][0, :, 40:].sum() == 0 and batch["pixel_values"][0, :, :, 60:].sum() == 0
    assert [len(each["boxes"]) for each in batch["labels"]] == [2, 1]


def test_batches_hold_wide_or_tall_images_and_an_epoch_every_image_once():
    is_wide = [bool(each) for each in np.random.default_rng(0).random(103) < 0.7]
    sampler = AspectRatioSampler(is_wide, 8, seed=3)
    sampler.set_epoch(2)
    order = list(sampler)
    assert {epoch for epoch, _ in order} == {2} and sorted(index for _, index in order) == list(range(103))
    batches = [order[start : start + 8] for start in range(0, 103, 8)]
    mixed = [len({is_wide[index] for _, index in batch}) > 1 for batch in batches]
    assert not any(mixed[:-2])
    assert list(sampler) == order
    sampler.set_epoch(3)
    assert [index for _, index in sampler] != [index for _, index in order]


def test_embedded_objects_match_their_masks_and_every_tenth_street_is_empty():
    data = load_detection("synthetic:20", "train", masks=True)
    crowds = 0
    for index, row in enumerate(data.dataset):
        assert bool(row["objects"]) == (index % 10 != 9)
        for each in row["objects"]:
            mask = object_mask(each["segmentation"], (row["height"], row["width"]))
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            x, y, wide, high = each["bbox"]
            assert (x, y, x + wide, y + high) == (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
            assert mask.sum() == each["area"]
            crowds += each["iscrowd"]
    assert crowds > 0


def prediction(category, score, box, size=(40, 60)):
    mask = np.zeros(size, dtype=np.uint8)
    mask[int(box[1]) : int(box[1] + box[3]), int(box[0]) : int(box[0] + box[2])] = 1
    return {"category": category, "score": score, "bbox": box, "segmentation": encode_mask(mask)}


def ground_truth(category, box, crowd=0):
    return {
        "category": category, "bbox": box, "area": box[2] * box[3], "iscrowd": crowd,
        "segmentation": json.dumps(prediction(category, 1.0, box)["segmentation"]),
    }  # fmt: skip


def iou(a, b):
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    return shared / (a[2] * a[3] + b[2] * b[3] - shared)


def loop_ap(rows, found, threshold):
    """Interpolated AP of one class without crowds, in plain loops (101 points of recall)."""
    ranked = sorted(((each["score"], k, each["bbox"]) for k in found for each in found[k]), key=lambda each: -each[0])
    open_boxes = {k: [each["bbox"] for each in row["objects"]] for k, row in enumerate(rows)}
    total, hits, curve = sum(map(len, open_boxes.values())), 0, []
    for rank, (_, k, box) in enumerate(ranked, start=1):
        best = max(open_boxes[k], key=lambda own: iou(own, box), default=None)
        if best is not None and iou(best, box) >= threshold:
            open_boxes[k].remove(best)
            hits += 1
        curve.append((hits / total, hits / rank))
    return np.mean([max((p for r, p in curve if r >= point - 1e-12), default=0) for point in np.linspace(0, 1, 101)])


def test_ap_equals_its_definition_in_plain_loops():
    rng = np.random.default_rng(0)
    rows, found = [], {}
    for k in range(6):
        boxes = [[float(v) for v in (*rng.integers(0, 30, 2), *rng.integers(4, 10, 2))] for _ in range(3)]
        rows.append({"height": 40, "width": 60, "objects": [ground_truth(0, box) for box in boxes]})
        moved = [[box[0] + d, box[1], box[2], box[3]] for box, d in zip(boxes, rng.integers(0, 3, 3), strict=True)]
        found[k] = [prediction(0, float(rng.random()), [float(v) for v in box]) for box in moved[: 1 + k % 3]]
    scores = detection_metrics(rows, found, ["thing"], masks=True)
    expected = [loop_ap(rows, found, t) for t in np.linspace(0.5, 0.95, 10)]
    assert scores["box_ap_50"] == pytest.approx(expected[0], abs=1e-9)
    assert scores["box_ap"] == pytest.approx(np.mean(expected), abs=1e-9)
    assert scores["mask_ap"] == pytest.approx(scores["box_ap"], abs=1e-9)  # full boxes as masks
    assert scores["box_ap_small"] == pytest.approx(scores["box_ap"]) and scores["box_ap_large"] is None
    assert scores["per_class"] == [
        {"class": "thing", "objects": 18, "box_ap": scores["box_ap"], "box_ap_50": scores["box_ap_50"],
         "mask_ap": scores["mask_ap"], "mask_ap_50": scores["mask_ap_50"]}
    ]  # fmt: skip


def test_perfect_predictions_score_1_and_none_score_0():
    rows = [
        {
            "height": 40,
            "width": 60,
            "objects": [ground_truth(0, [2.0, 3.0, 10.0, 10.0]), ground_truth(1, [20.0, 3.0, 9.0, 9.0])],
        }
    ]
    perfect = {0: [prediction(each["category"], 0.9, each["bbox"]) for each in rows[0]["objects"]]}
    assert detection_metrics(rows, perfect, ["a", "b"])["box_ap"] == pytest.approx(1.0)
    nothing = detection_metrics(rows, {0: []}, ["a", "b", "absent"])
    assert nothing["box_ap"] == 0.0
    assert [row["box_ap"] for row in nothing["per_class"]] == [0.0, 0.0, None]


def test_chance_is_what_the_objects_of_another_image_score():
    boxes = ([2.0, 3.0, 10.0, 10.0], [2.0, 3.0, 10.0, 10.0], [30.0, 20.0, 10.0, 10.0])
    rows = [{"height": 40, "width": 60, "objects": [ground_truth(0, box)]} for box in boxes]
    assert detection_metrics(rows, {}, ["a"])["chance"] == pytest.approx(1 / 3, abs=0.01)  # one of three is correct
    alone = detection_metrics(rows[:1], {}, ["a"])
    assert alone["chance"] is None and "With one image" in chance_level("object-detection", alone)


def test_predictions_within_a_crowd_are_neither_correct_nor_wrong():
    own, crowd = [2.0, 3.0, 10.0, 10.0], [30.0, 3.0, 20.0, 20.0]
    within = [prediction(0, 0.99, [32.0, 5.0, 6.0, 6.0]), prediction(0, 0.9, own)]
    for is_crowd, expected in ((1, 1.0), (0, 0.5)):
        rows = [{"height": 40, "width": 60, "objects": [ground_truth(0, own), ground_truth(0, crowd, is_crowd)]}]
        found = within if is_crowd else within[1:]
        scores = detection_metrics(rows, {0: found}, ["a"])
        assert scores["box_ap"] == pytest.approx(expected, abs=0.01)
        assert scores["objects"] == 2 - is_crowd


def test_reading_keeps_raw_boxes_for_evaluation(coco):
    table = read_coco(coco[0] / "annotations" / "instances_val2017.json")
    assert table.objects[0][1]["bbox"] == [50.0, 30.0, 20.0, 20.0]
    assert table.category_ids == [1, 3, 5]
