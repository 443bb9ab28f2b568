"""Mask R-CNN on HLG: proposals, regions, losses, detections, masks against plain loops; common tests; pipelines."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import roi_align
from transformers import AutoModelForInstanceSegmentation, AutoModelForSemanticSegmentation, pipeline

import detection_reference as plain
import hf_denseseg
from detection_model_tester import EMPTY, NUM_LABELS, TWO, DetectionModelTester, few_regions
from hf_denseseg import HlgConfig, HlgForInstanceSegmentation, HlgImageProcessor
from hf_denseseg.errors import InputError
from hf_denseseg.models.hlg import modeling_hlg_detection as detection
from hf_denseseg.models.hlg.detections_hlg import to_corners
from processor_tester import random_image

SIZE = (96, 128)


class TakeAll:
    """Takes every region instead of a random sample."""

    def __call__(self, kinds):
        return [each == 1 for each in kinds], [each == 0 for each in kinds]


@pytest.fixture
def pyramid():
    generator = torch.Generator().manual_seed(3)
    sizes = [(math.ceil(SIZE[0] / stride), math.ceil(SIZE[1] / stride)) for stride in detection.PROPOSAL_STRIDES]
    return {index: torch.randn(2, 256, *size, generator=generator) for index, size in enumerate(sizes)}


@pytest.fixture
def rpn():
    torch.manual_seed(0)
    rpn = detection.HlgRegionProposals(256)
    nn.init.normal_(rpn.head.cls_logits.weight, std=0.3)
    nn.init.normal_(rpn.head.bbox_pred.weight, std=0.1)
    return rpn.eval()


@pytest.fixture
def heads():
    torch.manual_seed(0)
    heads = detection.HlgRoiHeads(HlgConfig(num_labels=NUM_LABELS))
    for layer in heads.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            nn.init.kaiming_normal_(layer.weight)
    nn.init.normal_(heads.box_predictor.bbox_pred.weight, std=0.01)
    return heads.eval()


def targets_of(*labels):
    return detection.to_targets(labels, [SIZE] * len(labels), torch.device("cpu"))


# --- first stage


@torch.no_grad()
def test_proposals_are_those_of_plain_loops(rpn, pyramid):
    image = ImageList(torch.zeros(1, 3, *SIZE), [(90, 128)])
    levels = {index: each[:1] for index, each in pyramid.items()}
    found, losses = rpn(image, levels)
    assert losses == {}
    candidates = []
    scores, offsets = rpn.head(list(levels.values()))
    for level, stride in enumerate(detection.PROPOSAL_STRIDES):
        size = levels[level].shape[-2:]
        anchors = plain.anchors(size, stride, (8.0,))
        rows = scores[level][0].permute(1, 2, 0).flatten().sigmoid().tolist()
        codes = offsets[level][0].view(3, 4, *size).permute(2, 3, 0, 1).reshape(-1, 4).tolist()
        boxes = [plain.clip(plain.decode(*each), (90, 128)) for each in zip(codes, anchors, strict=True)]
        own = sorted(zip(rows, [level] * len(rows), boxes, strict=True), key=lambda each: -each[0])[:1000]
        candidates += [each for each in own if each[2][2] > each[2][0] and each[2][3] > each[2][1]]
    expected = torch.tensor([box for _, _, box in plain.suppress(candidates, 0.7, 1000)])
    # Two overlaps within rounding of the threshold may fall on either side of it.
    assert abs(len(found[0]) - len(expected)) <= 2
    torch.testing.assert_close(found[0][:50], expected[:50], atol=1e-2, rtol=1e-4)


def test_training_considers_more_proposals(rpn):
    assert (rpn.pre_nms_top_n(), rpn.post_nms_top_n(), rpn.nms_thresh) == (1000, 1000, 0.7)
    rpn.train()
    assert (rpn.pre_nms_top_n(), rpn.post_nms_top_n()) == (2000, 1000)


@torch.no_grad()
def test_losses_of_the_first_stage_are_those_of_plain_loops(rpn, pyramid):
    rpn.fg_bg_sampler = TakeAll()
    _, losses = rpn(ImageList(torch.zeros(2, 3, *SIZE), [SIZE] * 2), pyramid, targets_of(TWO, EMPTY))
    scores, offsets = rpn.head(list(pyramid.values()))
    classification = boxes = count = 0.0
    for index, label in enumerate((TWO, EMPTY)):
        objects = [plain.corners(box, SIZE) for box in label["boxes"]]
        anchors, logits, codes = [], [], []
        for level, stride in enumerate(detection.PROPOSAL_STRIDES):
            size = pyramid[level].shape[-2:]
            anchors += plain.anchors(size, stride, (8.0,))
            logits += scores[level][index].permute(1, 2, 0).flatten().tolist()
            codes += offsets[level][index].view(3, 4, *size).permute(2, 3, 0, 1).reshape(-1, 4).tolist()
        matches = plain.match(objects, anchors, 0.7, 0.3, 0.3)
        for match, anchor, logit, code in zip(matches, anchors, logits, codes, strict=True):
            count += match != -2
            if match >= 0:
                classification += math.log1p(math.exp(-logit))
                wanted = plain.encode(objects[match], anchor)
                boxes += sum(abs(a - b) for a, b in zip(code, wanted, strict=True))
            elif match == -1:
                classification += math.log1p(math.exp(logit))
    assert float(losses["rpn_classification"]) == pytest.approx(classification / count, rel=1e-4)
    assert float(losses["rpn_boxes"]) == pytest.approx(boxes / count, rel=1e-3)


def test_first_stage_samples_256_anchors_half_of_them_objects_at_most(rpn):
    assert (rpn.fg_bg_sampler.batch_size_per_image, rpn.fg_bg_sampler.positive_fraction) == (256, 0.5)
    heads = detection.HlgRoiHeads(HlgConfig(num_labels=3))
    assert (heads.sampler.batch_size_per_image, heads.sampler.positive_fraction) == (512, 0.25)


# --- regions


def test_regions_are_read_from_the_level_of_their_size_aligned_and_adaptively(pyramid):
    sides = (10, 55, 57, 111, 113, 223, 230, 500)  # pixels: a level for each doubling of 56
    boxes = [torch.tensor([[3.3, 5.7, 3.3 + side, 5.7 + side] for side in sides]), torch.tensor([[0.0, 0, 96, 20]])]
    maps = [pyramid[level] for level in range(4)]
    found = detection.HlgRoiAlign(7)(maps, boxes)
    expected = []
    for index, own in enumerate(boxes):
        for box in own:
            side = math.sqrt(float((box[2] - box[0]) * (box[3] - box[1])))
            level = min(3, max(0, math.floor(math.log2(side / 56 + 1e-6))))
            scale = 1 / (4 * 2**level)
            region = torch.cat((torch.tensor([float(index)]), box))[None]
            expected.append(roi_align(maps[level], region, 7, scale, sampling_ratio=-1, aligned=True))
    torch.testing.assert_close(found, torch.cat(expected))
    assert detection.HlgRoiAlign(7)(maps, [each[:0] for each in boxes]).shape == (0, 256, 7, 7)


def test_ground_truth_boxes_are_among_the_samples_and_background_is_the_rest(heads):
    proposals = torch.tensor([[0.0, 0, 20, 20], [44, 24, 86, 68], [100, 60, 120, 90]])
    target = targets_of(TWO)[0]
    regions, matched = heads._sample(proposals, target)
    torch.testing.assert_close(regions[:2], target["boxes"])
    overlaps = [max(plain.iou(box, each) for each in target["boxes"].tolist()) for box in proposals.tolist()]
    assert matched.tolist() == [0, 1] + [0 if overlap >= 0.5 else -1 for overlap in overlaps]
    regions, matched = heads._sample(proposals, targets_of(EMPTY)[0])
    assert matched.tolist() == [-1, -1, -1]


@torch.no_grad()
def test_losses_of_the_second_stage_are_those_of_plain_loops(heads, pyramid):
    heads.sampler = TakeAll()
    maps, targets = [pyramid[level] for level in range(4)], targets_of(TWO, EMPTY)
    shift = torch.tensor([[0.0, 0, 0, 0], [4, -3, 2, 5], [40, 30, 44, 20]])
    proposals = [(targets[0]["boxes"][:1] + shift).clamp(0, 96), torch.tensor([[3.0, 3, 40, 50]])]
    losses = heads.losses(maps, proposals, targets)
    classification = boxes = masks = positives = count = 0
    for index, (own, target) in enumerate(zip(proposals, targets, strict=True)):
        objects = target["boxes"].tolist()
        regions = objects + own.tolist()
        given = [torch.tensor(regions) if row == index else torch.zeros(0, 4) for row in range(2)]
        logits, codes = heads.classify(maps, given)
        matches = list(range(len(objects))) + plain.match(objects, own.tolist(), 0.5, 0.5, 0.5)
        for row, match in enumerate(matches):
            name = int(target["labels"][match]) if match >= 0 else NUM_LABELS
            classification -= float(logits[row].log_softmax(0)[name])
            count += 1
            if match < 0:
                continue
            wanted = plain.encode(objects[match], regions[row], detection.BOX_WEIGHTS)
            boxes += sum(abs(a - b) for a, b in zip(codes[row, 4 * name : 4 * name + 4].tolist(), wanted, strict=True))
            region = [each[row : row + 1] for each in given]
            mask = heads.masks(maps, region, torch.tensor([name]))[0]
            full_mask = target["masks"][match].float()[None, None]
            roi = torch.tensor([[0.0, *regions[row]]])
            cropped = (roi_align(full_mask, roi, 28, 1.0, sampling_ratio=-1, aligned=True)[0, 0] >= 0.5).float()
            masks += float(F.binary_cross_entropy_with_logits(mask, cropped))
            positives += 1
    assert positives >= 3 and count > positives
    assert float(losses["classification"]) == pytest.approx(classification / count, rel=1e-4)
    assert float(losses["boxes"]) == pytest.approx(boxes / count, rel=1e-4)
    assert float(losses["masks"]) == pytest.approx(masks / positives, rel=1e-3)


def test_mask_target_is_the_object_within_the_region(heads, pyramid, monkeypatch):
    """A mask that fills its box is all ones there, and its left half in a region that ends in its middle."""
    seen = []
    monkeypatch.setattr(
        F, "binary_cross_entropy_with_logits", lambda logits, masks, **_: seen.append(masks) or masks.sum()
    )
    target = targets_of(EMPTY)[0]
    target = {"boxes": torch.tensor([[32.0, 16, 96, 80]]), "labels": torch.tensor([2]), "masks": target["masks"]}
    target["masks"] = torch.zeros(1, *SIZE, dtype=torch.bool)
    target["masks"][0, 16:80, 32:96] = True
    regions = torch.tensor([[32.0, 16, 96, 80], [0.0, 16, 64, 80]])
    maps = [pyramid[level][:1] for level in range(4)]
    heads._mask_loss(maps, [(regions, torch.tensor([0, 0]))], torch.tensor([2, 2]), [target])
    assert seen[0][0].all()
    assert not seen[0][1][:, :14].any() and seen[0][1][:, 14:].all()


# --- detections


@torch.no_grad()
def test_detections_are_those_of_plain_loops(heads, pyramid):
    maps = [pyramid[level] for level in range(4)]
    generator = torch.Generator().manual_seed(5)
    places = torch.rand(20, 2, generator=generator) * 60
    regions = torch.cat((places, places + 10 + torch.rand(20, 2, generator=generator) * 30), dim=1)
    proposals, size = [regions, regions[:7]], (90, 120)
    scores, labels, boxes, masks = heads.detect(maps, proposals, [size] * 2)
    for index, own in enumerate(proposals):
        given = [own if row == index else own[:0] for row in range(2)]
        logits, codes = heads.classify(maps, given)
        candidates = [
            (
                score,
                name,
                plain.clip(
                    plain.decode(codes[row, 4 * name : 4 * name + 4].tolist(), box, detection.BOX_WEIGHTS), size
                ),
            )
            for row, box in enumerate(own.tolist())
            for name, score in enumerate(logits[row].softmax(0)[:-1].tolist())
            if score > 0.05
        ]
        expected = plain.suppress(candidates, 0.5, 100)
        count = len(expected)
        assert 3 < count < 100
        corners = to_corners(boxes[index, :count], size)
        plain.assert_detections(
            {"scores": scores[index, :count], "labels": labels[index, :count], "boxes": corners}, expected, 1e-2
        )
        assert not scores[index, count:].any() and (labels[index, count:] == -1).all()
        region = [corners if row == index else corners[:0] for row in range(2)]
        torch.testing.assert_close(
            masks[index, :count], heads.masks(maps, region, labels[index, :count]), atol=1e-2, rtol=1e-3
        )


class TestMaskRcnn(DetectionModelTester):
    model_class = HlgForInstanceSegmentation
    predictions = ("pred_scores", "pred_labels", "pred_boxes", "pred_masks")
    steps = 80

    @pytest.fixture(autouse=True)
    def regions(self, monkeypatch):
        """Other tests check the published numbers of regions."""
        few_regions(monkeypatch)

    def make_decided(self, model):
        nn.init.normal_(model.rpn.head.cls_logits.weight, std=0.1)
        nn.init.normal_(model.roi_heads.box_predictor.cls_score.weight, std=0.2)
        nn.init.normal_(model.roi_heads.box_predictor.bbox_pred.weight, std=0.02)

    @torch.no_grad()
    def test_predictions_have_their_shapes_and_come_in_eval_mode_only(self, model, batch):
        outputs = model(batch["pixel_values"])
        assert (outputs.pred_scores > 0.05).any()
        assert outputs.pred_boxes.shape == (2, 100, 4) and outputs.pred_masks.shape == (2, 100, 28, 28)
        assert outputs.loss is None
        outputs = model.train()(**batch)
        assert outputs.loss is not None and not set(self.predictions) & outputs.keys()
        with pytest.raises(InputError, match="without `labels`"):
            model(batch["pixel_values"])

    def test_bfloat16_weights_and_autocast_train_with_losses_in_float32(self, model):
        model.roi_heads.sampler.batch_size_per_image = 12
        super().test_bfloat16_weights_and_autocast_train_with_losses_in_float32(model)

    def test_masks_may_be_as_large_as_the_image_or_as_the_batch(self, model, batch):
        mask = torch.ones(2, *SIZE)
        mask[0, 90:] = 0
        losses = []
        for height in (90, 96):
            label = {**TWO, "masks": TWO["masks"][:, :height]}
            torch.manual_seed(0)
            losses.append(model(batch["pixel_values"], pixel_mask=mask, labels=[label, EMPTY]).loss)
        torch.testing.assert_close(*losses)

    def test_labels_without_masks_are_refused(self, model, batch):
        label = {name: TWO[name] for name in ("class_labels", "boxes")}
        with pytest.raises(InputError, match="image 0 lack 'masks'"):
            model(batch["pixel_values"], labels=[label, EMPTY])

    def test_costs_are_counted_with_the_largest_number_of_regions(self):
        """1000 proposals and 100 masks, as is usual; without weights their real number is unknown."""
        info = hf_denseseg.model_info("hlg-maskrcnn-tiny", (128, 160), num_labels=80)
        boxes = 1000 * (256 * 49 * 1024 + 1024 * 1024 + 1024 * (81 + 320))
        masks = 100 * (196 * 4 * 256 * 2304 + 784 * 256 * (256 + 80))
        assert info.executed_multiply_adds > boxes + masks

    # --- pipelines and Auto classes

    @pytest.fixture
    def folder(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        size = {"shortest_edge": 96, "longest_edge": 128}
        HlgImageProcessor(task="instance-segmentation", size=size).save_pretrained(tmp_path)
        return tmp_path

    @pytest.mark.parametrize("subtask", [None, "instance"])
    def test_segmentation_pipeline_gives_a_mask_of_the_size_of_the_image_for_each_object(
        self, folder, model, subtask, caplog
    ):
        segment = pipeline("image-segmentation", model=str(folder), device="cpu")
        assert type(segment.model) is HlgForInstanceSegmentation
        options = {} if subtask is None else {"subtask": subtask}
        image = random_image(size=(90, 60))
        found = segment(image, threshold=0.1, mask_threshold=0.3, overlap_mask_area_threshold=0.1, **options)
        assert found and all(each["mask"].size == (90, 60) and each["score"] > 0.1 for each in found)
        assert all(each["mask"].getextrema()[1] == 255 and each["label"].startswith("LABEL_") for each in found)
        assert "not supported" not in caplog.text

    def test_semantic_maps_of_instances_are_refused(self, folder):
        segment = pipeline("image-segmentation", model=str(folder), device="cpu")
        with pytest.raises(ValueError, match="semantic is not supported"):
            segment(random_image(size=(90, 60)), subtask="semantic")

    def test_detection_pipeline_loads_it_as_a_detector(self, folder, caplog):
        detect = pipeline("object-detection", model=str(folder), device="cpu")
        assert type(detect.model) is HlgForInstanceSegmentation
        found = detect(random_image(size=(90, 60)), threshold=0.1)
        assert found and all(0 <= each["box"]["xmin"] <= each["box"]["xmax"] <= 90 for each in found)
        assert "not supported" not in caplog.text

    def test_auto_classes_choose_by_the_checkpoint(self, folder):
        assert type(AutoModelForInstanceSegmentation.from_pretrained(folder)) is HlgForInstanceSegmentation
        model, report = AutoModelForSemanticSegmentation.from_pretrained(folder, output_loading_info=True)
        assert type(model).__name__ == "HlgForSemanticSegmentation"  # a backbone to start from, its head is missing
        assert any(name.startswith("decode_head.") for name in report["missing_keys"])

    def check_learned(self, model, images, labels):
        with torch.no_grad():
            outputs = model(images)
        processor = HlgImageProcessor(task="instance-segmentation")
        found = processor.post_process_detections_with_masks(outputs, 0.5, target_sizes=[SIZE] * 2)
        for each, label in zip(found, labels, strict=True):
            order = each["labels"].argsort()
            assert each["labels"][order].tolist() == label["class_labels"].tolist()
            masks = each["masks"][order]
            overlap = (masks & label["masks"]).sum((1, 2)) / (masks | label["masks"]).sum((1, 2))
            assert (overlap > 0.7).all()
