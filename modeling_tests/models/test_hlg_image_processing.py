"""Image processors of HLG: their tasks, annotations, padding, and detections, masks and maps of objects."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor
from transformers.utils import ModelOutput

import hf_denseseg
from hf_denseseg import HlgImageProcessor, HlgImageProcessorPil
from hf_denseseg.errors import InputError
from hf_denseseg.models.hlg import annotations_hlg
from hf_denseseg.models.hlg.annotations_hlg import to_mask
from hf_denseseg.models.hlg.detections_hlg import paste_masks
from processor_tester import random_image

BOTH = pytest.mark.parametrize("backend", [HlgImageProcessor, HlgImageProcessorPil])
SMALL = {"shortest_edge": 64, "longest_edge": 100}


def thing(bbox, category_id=1, **more):
    return {"bbox": bbox, "category_id": category_id, "area": bbox[2] * bbox[3], "iscrowd": 0, **more}


# --- tasks


@pytest.mark.parametrize(
    "name, task",
    [
        ("hlg-tiny", "image-classification"),
        ("hlg-pup-small", "semantic-segmentation"),
        ("hlg-upernet-small", "semantic-segmentation"),
        ("hlg-retinanet-tiny", "object-detection"),
        ("hlg-maskrcnn-tiny", "instance-segmentation"),
    ],
)
def test_processor_of_a_variant_is_for_its_task(name, task, tmp_path):
    config = hf_denseseg.create_config(name)
    processor = hf_denseseg.create_image_processor(config)
    assert processor.task == task
    config.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "preprocessor_config.json").read_text())["task"] == task
    for backend in ("torchvision", "pil"):
        loaded = AutoImageProcessor.from_pretrained(tmp_path, backend=backend)
        assert (loaded.task, loaded.size, loaded.do_pad) == (task, processor.size, processor.do_pad)
        assert hasattr(loaded, "post_process_instance_segmentation") == (task == "instance-segmentation")
        assert hasattr(loaded, "post_process_semantic_segmentation") == (task == "semantic-segmentation")


def test_unknown_task_proposes_the_nearest():
    with pytest.raises(InputError, match="Did you mean 'object-detection'"):
        HlgImageProcessor(task="object-detecton")


@BOTH
def test_classifier_sees_the_center_of_the_image(backend):
    """Shorter side to 256, bicubic, then 224 x 224 from the center: Swin's loader, whose settings are released."""
    processor = backend(task="image-classification")
    image = random_image(size=(400, 300))
    uncropped = processor(image, do_center_crop=False, return_tensors="pt")["pixel_values"]
    assert uncropped.shape == (1, 3, 256, 341)
    found = processor(image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(found, uncropped[:, :, 16:240, 58:282])
    other = backend(task="image-classification", size={"shortest_edge": 40}, crop_size={"height": 32, "width": 24})
    assert other(image, return_tensors="pt")["pixel_values"].shape == (1, 3, 32, 24)


@BOTH
@pytest.mark.parametrize(
    "size, expected", [((640, 480), (800, 1066)), ((500, 200), (533, 1333)), ((100, 100), (800, 800))]
)
def test_detection_resizes_to_800_by_1333_at_most(backend, size, expected):
    found = backend(task="object-detection")(random_image(size=size), do_pad=False, return_tensors="pt")[
        "pixel_values"
    ]
    assert found.shape[-2:] == expected


@BOTH
def test_images_of_a_batch_are_padded_to_a_common_multiple_of_32(backend):
    processor = backend(task="object-detection", size=SMALL)
    images = [random_image(size=(90, 60)), random_image(size=(50, 70))]
    batch = processor(images, return_tensors="pt")
    assert batch["pixel_values"].shape == (2, 3, 96, 96) and batch["pixel_mask"].shape == (2, 96, 96)
    for index, image in enumerate(images):
        alone = processor(image, do_pad=False, return_tensors="pt")["pixel_values"][0]
        height, width = alone.shape[-2:]
        torch.testing.assert_close(batch["pixel_values"][index, :, :height, :width], alone)
        assert batch["pixel_mask"][index].sum() == height * width and batch["pixel_mask"][index, :height, :width].all()
        assert not (batch["pixel_values"][index] * (1 - batch["pixel_mask"][index])).any()
    given = processor(images, pad_size={"height": 128, "width": 160}, return_tensors="pt")
    assert given["pixel_values"].shape == (2, 3, 128, 160)
    with pytest.raises(InputError, match="Leave `do_pad` on"):
        processor(images, do_pad=False, return_tensors="pt")


# --- annotations


@BOTH
def test_annotations_become_normalized_boxes_and_masks_of_the_resized_image(backend):
    mask = np.zeros((60, 90), dtype=bool)
    mask[15:45, 30:60] = True
    annotation = {"image_id": 7, "annotations": [thing([30, 15, 30, 30], 3, segmentation=mask)]}
    processor = backend(task="instance-segmentation", size=SMALL)
    batch = processor(random_image(size=(90, 60)), annotations=annotation, return_tensors="pt")
    label = batch["labels"][0]
    height, width = label["size"].tolist()
    assert (
        (height, width) == (64, 96) and label["orig_size"].tolist() == [60, 90] and label["image_id"].tolist() == [7]
    )
    torch.testing.assert_close(label["boxes"], torch.tensor([[0.5, 0.5, 1 / 3, 0.5]]))
    assert label["class_labels"].tolist() == [3]
    assert label["area"].item() == pytest.approx(900 * 64 * 96 / 60 / 90)
    rows, columns = label["masks"][0].any(1).nonzero(), label["masks"][0].any(0).nonzero()
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (16, 47, 32, 63)
    without = processor(random_image(size=(90, 60)), annotations=annotation, return_segmentation_masks=False)
    assert "masks" not in without["labels"][0]


def test_crowds_and_boxes_without_extent_are_dropped_and_others_clipped():
    things = [
        thing([-10, 10, 30, 20]),
        thing([80, 50, 40, 40], 2),
        thing([20, 20, 10, 10], iscrowd=1),
        thing([10, 10, 0, 5]),
        thing([95, 10, 10, 5]),  # beyond the right border of 90
    ]
    processor = HlgImageProcessor(task="object-detection", size=SMALL)
    label = processor(random_image(size=(90, 60)), annotations={"image_id": 0, "annotations": things})["labels"][0]
    expected = torch.tensor([[10 / 90, 20 / 60, 20 / 90, 20 / 60], [85 / 90, 55 / 60, 10 / 90, 10 / 60]])
    torch.testing.assert_close(label["boxes"], expected)
    assert label["class_labels"].tolist() == [1, 2]


def test_image_without_objects_has_empty_labels():
    for task in ("object-detection", "instance-segmentation"):
        processor = HlgImageProcessor(task=task, size=SMALL)
        label = processor(random_image(size=(90, 60)), annotations={"image_id": 0, "annotations": []})["labels"][0]
        assert label["boxes"].shape == (0, 4) and label["class_labels"].dtype == torch.int64
        assert ("masks" in label) == (task == "instance-segmentation")
        assert task == "object-detection" or label["masks"].shape == (0, 64, 96)


@pytest.mark.parametrize(
    "annotations, message",
    [
        ({"image_id": 1}, "`image_id` and `annotations`"),
        ([{"image_id": 1, "annotations": []}] * 2, "2 annotations were given for 1"),
        ({"image_id": 1, "annotations": [{"bbox": [1, 2, 3, 4]}]}, "Image 1, object 0 lacks 'category_id'"),
        ({"image_id": 5, "annotations": [thing([1, 2, 3, 4]), thing([1, 2, float("nan"), 4])]}, "Image 5, object 1"),
    ],
)
def test_annotations_that_cannot_be_read_are_refused_with_image_and_object(annotations, message):
    with pytest.raises(InputError, match=message):
        HlgImageProcessor(task="object-detection", size=SMALL)(random_image(), annotations=annotations)


def test_labels_of_another_task_are_refused():
    annotations = {"image_id": 1, "annotations": []}
    with pytest.raises(InputError, match="'semantic-segmentation'"):
        HlgImageProcessor()(random_image(), annotations=annotations)
    with pytest.raises(InputError, match="no labels of object-detection"):
        HlgImageProcessor(task="object-detection")(random_image(), segmentation_maps=np.zeros((30, 40)))


def test_masks_are_decoded_from_every_format_of_coco():
    coco_mask = pytest.importorskip("pycocotools.mask", reason="pycocotools decodes polygons")
    polygon = [[10.0, 5.0, 30.0, 5.0, 30.0, 20.0, 10.0, 20.0], [2.0, 2.0, 6.0, 2.0, 4.0, 9.0]]
    runs = coco_mask.merge(coco_mask.frPyObjects(polygon, 30, 40))
    expected = coco_mask.decode(runs).astype(bool)
    counts, flat = [], expected.T.flatten()
    value, length = False, 0
    for each in flat:
        if each != value:
            counts.append(length)
            value, length = each, 0
        length += 1
    counts.append(length)
    text = {"size": [30, 40], "counts": runs["counts"].decode()}
    given = (polygon, runs, text, {"size": [30, 40], "counts": counts}, expected, torch.from_numpy(expected))
    for segmentation in given:
        assert np.array_equal(to_mask(segmentation, (30, 40), ""), expected)


@pytest.mark.parametrize(
    "segmentation, message",
    [
        ({"size": [30, 41], "counts": [1230]}, "of size"),
        ({"size": [30, 40], "counts": [7]}, "add up to 7, not to 1200"),
        (np.zeros((4, 4)), "or an array of"),
        (None, "NoneType"),
    ],
)
def test_masks_that_do_not_fit_the_image_are_refused(segmentation, message):
    with pytest.raises(InputError, match=f"object 3.*{message}|{message}"):
        to_mask(segmentation, (30, 40), "Image 1, object 3")


def test_polygons_without_pycocotools_say_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pycocotools", None)
    with pytest.raises(InputError, match="pip install pycocotools"):
        annotations_hlg.to_mask([[1.0, 1, 5, 1, 5, 5]], (30, 40), "Image 1, object 0")


# --- detections


def instances(boxes, scores, labels, logits):
    """Output of Mask R-CNN for one image, padded to 5 detections."""
    count, rest = len(boxes), 5 - len(boxes)
    pad = torch.nn.functional.pad
    masks = torch.stack([torch.full((28, 28), value) if np.isscalar(value) else value for value in logits])
    assert count == len(masks)
    return ModelOutput(
        pred_scores=pad(torch.tensor(scores), (0, rest))[None],
        pred_labels=pad(torch.tensor(labels), (0, rest), value=-1)[None],
        pred_boxes=pad(torch.tensor(boxes), (0, 0, 0, rest))[None],
        pred_masks=pad(masks, (0, 0, 0, 0, 0, rest))[None],
    )


@BOTH
def test_boxes_come_in_pixels_of_the_target_or_as_fractions_of_it(backend):
    outputs = instances([[0.5, 0.5, 0.2, 0.4], [0.95, 0.5, 0.3, 0.2]], [0.9, 0.6], [3, 1], [1.0, 1.0])
    processor = backend(task="instance-segmentation")
    found = processor.post_process_object_detection(outputs, threshold=0.5, target_sizes=[(50, 100)])[0]
    assert found.keys() == {"scores", "labels", "boxes"}
    torch.testing.assert_close(found["boxes"], torch.tensor([[40.0, 15, 60, 35], [80, 20, 100, 30]]))
    found = processor.post_process_object_detection(outputs, threshold=0.7)[0]
    torch.testing.assert_close(found["boxes"], torch.tensor([[0.4, 0.3, 0.6, 0.7]]))
    assert found["labels"].tolist() == [3]


def test_missing_or_wrong_sizes_and_outputs_are_refused():
    processor = HlgImageProcessor(task="instance-segmentation")
    outputs = instances([[0.5, 0.5, 0.2, 0.4]], [0.9], [3], [1.0])
    with pytest.raises(InputError, match="2 target sizes were given for 1"):
        processor.post_process_object_detection(outputs, target_sizes=[(5, 5)] * 2)
    with pytest.raises(InputError, match="in `target_sizes`"):
        processor.post_process_detections_with_masks(outputs)
    with pytest.raises(InputError, match="no masks"):
        boxes = ModelOutput(logits=torch.zeros(1, 2, 3), pred_boxes=torch.zeros(1, 2, 4))
        processor.post_process_detections_with_masks(boxes, target_sizes=[(5, 5)])
    with pytest.raises(InputError, match="training mode"):
        processor.post_process_object_detection(ModelOutput(loss=torch.zeros(())))


def test_pasted_masks_are_bilinear_samples_at_pixel_centers():
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(2, 4, 4, generator=generator)
    boxes = torch.tensor([[2.3, 1.5, 9.8, 8.1], [-3.0, -2.0, 4.0, 30.0]])
    found = paste_masks(masks, boxes, (10, 12), 0.5)
    for mask, (left, top, right, bottom), pasted in zip(masks.tolist(), boxes.tolist(), found, strict=True):
        for row in range(10):
            for column in range(12):
                y = (row + 0.5 - top) / (bottom - top) * 4 - 0.5
                x = (column + 0.5 - left) / (right - left) * 4 - 0.5
                value = 0.0
                for i in range(4):
                    for j in range(4):
                        value += max(0.0, 1 - abs(y - i)) * max(0.0, 1 - abs(x - j)) * mask[i][j]
                assert bool(pasted[row, column]) == (value >= 0.5) or abs(value - 0.5) < 1e-5


def test_masks_are_pasted_in_chunks_and_boxes_without_extent_are_empty(monkeypatch):
    boxes = torch.tensor([[1.0, 1, 8, 8], [3.0, 3, 3, 3], [0.0, 0, 5, 12]])
    pasted = paste_masks(torch.ones(3, 28, 28), boxes, (10, 12), 0.5)
    monkeypatch.setattr("hf_denseseg.models.hlg.detections_hlg.PASTED_ELEMENTS", 130)
    assert torch.equal(paste_masks(torch.ones(3, 28, 28), boxes, (10, 12), 0.5), pasted)
    assert pasted[0].sum() == 49 and not pasted[1].any() and pasted[2].sum() == 50


def test_each_pixel_goes_to_the_best_object_and_hidden_ones_are_dropped():
    left = [0.3, 0.5, 0.6, 1.0]  # columns 0 to 60 of 100
    boxes = [left, [0.7, 0.5, 0.6, 1.0], [0.25, 0.5, 0.3, 0.4], [0.9, 0.5, 0.1, 0.5]]
    outputs = instances(boxes, [0.95, 0.9, 0.8, 0.3], [2, 0, 1, 1], [9.0, 9.0, 9.0, 9.0])
    processor = HlgImageProcessor(task="instance-segmentation")
    found = processor.post_process_instance_segmentation(
        outputs, threshold=0.5, overlap_mask_area_threshold=0.5, target_sizes=[(20, 100)]
    )[0]
    expected = torch.ones(20, 100, dtype=torch.int32)
    expected[:, 60:] = 2  # two thirds of the second stay visible, nothing of the third, and the fourth scores too low
    assert torch.equal(found["segmentation"], expected)
    assert found["segments_info"] == [
        {"id": 1, "label_id": 2, "was_fused": False, "score": pytest.approx(0.95)},
        {"id": 2, "label_id": 0, "was_fused": False, "score": pytest.approx(0.9)},
    ]
    nothing = processor.post_process_instance_segmentation(outputs, threshold=0.99, target_sizes=[(20, 100)])[0]
    assert not nothing["segmentation"].any() and nothing["segments_info"] == []


def test_masks_of_objects_may_overlap_for_evaluation():
    outputs = instances([[0.3, 0.5, 0.6, 1.0], [0.7, 0.5, 0.6, 1.0]], [0.9, 0.8], [0, 0], [9.0, 9.0])
    found = HlgImageProcessor(task="instance-segmentation").post_process_detections_with_masks(
        outputs, threshold=0.0, target_sizes=[(20, 100)]
    )[0]
    assert found.keys() == {"scores", "labels", "boxes", "masks"} and found["masks"].dtype == torch.bool
    assert found["masks"].sum((1, 2)).tolist() == [1200, 1200] and found["masks"].all(0).sum() == 400
