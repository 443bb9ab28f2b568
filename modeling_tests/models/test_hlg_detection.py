"""RetinaNet on HLG: published counts; anchors, matches, losses, detections against plain loops; common tests."""

import json
import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.export import Dim
from torchvision.ops import sigmoid_focal_loss
from transformers import pipeline

import detection_reference as plain
import hf_denseseg
from detection_model_tester import EMPTY, NUM_LABELS, TINY, TWO, DetectionModelTester, labels_of
from hf_denseseg import HlgConfig, HlgForObjectDetection, HlgImageProcessor
from hf_denseseg.models.hlg import modeling_hlg_detection as detection
from hf_denseseg.models.hlg.detections_hlg import retinanet_detections, to_corners, to_normalized
from hf_denseseg.models.hlg.modeling_hlg import HlgModelOutput
from processor_tester import random_image
from reference import reference_folder

# Section 7 of the specification: Tables 10 and 11 in millions.
PUBLISHED = {
    "retinanet": {"tiny": 20.7, "small": 34.4, "medium": 57.9, "large": 94.8},
    "maskrcnn": {"tiny": 30.6, "small": 43.7, "medium": 67.3, "large": 103.6},
}
CELLS = [(kind, size) for kind, sizes in PUBLISHED.items() for size in sizes]


@pytest.mark.parametrize("kind, size", CELLS)
def test_parameters_are_those_of_the_paper(kind, size):
    with torch.device("meta"):
        model = hf_denseseg.create_model(f"hlg-{kind}-{size}", num_labels=80)
    assert round(model.num_parameters() / 1e6, 1) == PUBLISHED[kind][size]


@pytest.mark.parametrize("kind, size", CELLS)
def test_every_key_of_an_official_checkpoint_is_used_and_every_key_of_ours_filled(kind, size, caplog):
    manifest = f"manifest_{kind.replace('maskr', 'mask_r')}_{size}_stem31.json"
    content = json.loads((reference_folder("hlg") / manifest).read_text())
    totals = content.pop("__totals__")
    with torch.device("meta"):
        official = {key: torch.empty(shape) for key, shape in content.items()}
        model = hf_denseseg.load_official("hlg", official, f"hlg-{kind}-{size}")
    assert model.config.num_labels == 80
    assert model.num_parameters() / 1e6 == pytest.approx(totals["parameters_M"], abs=5.1e-5)
    assert len(model.state_dict()) == len(content)
    assert f"Loaded {totals['keys']} tensors of the checkpoint" in caplog.text
    assert "dropped those without use: none" in caplog.text


def test_multiply_adds_are_counted_without_weights():
    """The head dominates: five levels, two branches of four 3x3 convolutions, and the two predictors."""
    info = hf_denseseg.model_info("hlg-retinanet-tiny", (128, 160), num_labels=80)
    places = sum(math.ceil(128 / stride) * math.ceil(160 / stride) for stride in (8, 16, 32, 64, 128))
    head = places * 9 * 256 * (8 * 256 + 9 * 80 + 9 * 4)
    backbone = hf_denseseg.model_info(hf_denseseg.create_config("hlg-tiny", architectures=["HlgModel"]), (128, 160))
    pyramid = info.executed_multiply_adds - head - backbone.executed_multiply_adds
    assert 0 < pyramid < 0.1 * info.executed_multiply_adds


# --- parts


@pytest.mark.parametrize("rules", [(detection.RETINANET_STRIDES, detection.RETINANET_SCALES), ((4, 8), (8.0,))])
def test_anchors_are_those_of_the_formula_at_fixed_strides(rules):
    strides, scales = rules
    sizes = [(5 - index, 3) for index in range(len(strides))]
    found = detection.HlgAnchors(strides, scales).of_levels([torch.zeros(1, 1, *size) for size in sizes])
    for level, size, stride in zip(found, sizes, strides, strict=True):
        torch.testing.assert_close(level, torch.tensor(plain.anchors(size, stride, scales)), atol=1e-3, rtol=1e-5)


def test_anchors_of_retinanet_have_the_areas_of_the_paper_and_are_not_rounded():
    """4 x stride x 2^(k/3): 32, 40.3, 50.8 pixels on the finest level."""
    model = detection.HlgAnchors(detection.RETINANET_STRIDES, detection.RETINANET_SCALES)
    first = model.of_levels([torch.zeros(1, 1, 1, 1)] * 5)[0]
    sides = ((first[:, 2] - first[:, 0]) * (first[:, 3] - first[:, 1])).sqrt()
    torch.testing.assert_close(sides, torch.tensor([32.0, 40.3175, 50.7968] * 3), atol=1e-3, rtol=0)


def test_anchors_on_the_padding_of_a_batch_are_known():
    anchors = detection.HlgAnchors((8, 16), (4.0,))
    levels = [torch.zeros(1, 1, 12, 16), torch.zeros(1, 1, 6, 8)]
    inside = anchors.inside(levels, (50, 60))  # alone it would be padded to 64 x 64
    expected = [
        row * stride < 64 and column * stride < 64
        for stride, (rows, columns) in ((8, (12, 16)), (16, (6, 8)))
        for row in range(rows)
        for column in range(columns)
        for _ in range(3)
    ]
    assert inside.tolist() == expected


def test_boxes_come_back_from_their_offsets_and_sides_are_bounded_both_ways():
    coder = detection.HlgBoxCoder(weights=detection.BOX_WEIGHTS)
    anchor = torch.tensor([[10.0, 20, 60, 90], [5, 5, 9, 30]])
    box = torch.tensor([[12.0, 18, 40, 100], [2, 0, 30, 28]])
    codes = coder.encode_single(box, anchor)
    expected = [plain.encode(*each, detection.BOX_WEIGHTS) for each in zip(box.tolist(), anchor.tolist(), strict=True)]
    torch.testing.assert_close(codes, torch.tensor(expected))
    torch.testing.assert_close(coder.decode_single(codes, anchor), box)
    wild = torch.tensor([[0.5, -0.5, 99.0, -99.0, 1, 1, -99.0, 99.0]])
    found = coder.decode_single(wild, anchor[:1]).view(2, 4)
    for row, codes in zip(found, wild.view(2, 4).tolist(), strict=True):
        torch.testing.assert_close(
            row, torch.tensor(plain.decode(codes, anchor[0].tolist(), detection.BOX_WEIGHTS)), rtol=1e-4, atol=1e-3
        )


@pytest.mark.parametrize("rule", [(0.5, 0.4, 0.0), (0.7, 0.3, 0.3), (0.5, 0.5, 0.5)])
@pytest.mark.parametrize("seed", range(4))
def test_matches_are_those_of_the_rule(rule, seed):
    generator = torch.Generator().manual_seed(seed)
    places = torch.rand(60, 2, generator=generator) * 60
    boxes = torch.cat((places, places + 8 + torch.rand(60, 2, generator=generator) * 40), dim=1)
    objects = torch.cat((boxes[:4] + torch.randn(4, 4, generator=generator) * 3, boxes[7:8]))
    objects = torch.cat((objects, objects[:1]))  # of two equal objects the later one takes the best box
    found = detection.HlgMatcher(*rule)(detection.box_iou(objects, boxes))
    expected = plain.match(objects.double().tolist(), boxes.double().tolist(), *rule)
    assert found.tolist() == expected


def test_focal_loss_is_that_of_torchvision_in_value_and_gradient():
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(50, 7, generator=generator) * 4).requires_grad_()
    judged, positive = torch.rand(50, generator=generator) < 0.9, torch.arange(50) % 9 == 0
    judged |= positive
    labels = torch.randint(0, 7, (int(positive.sum()),), generator=generator)
    targets = torch.zeros(50, 7)
    targets[positive, labels] = 1
    expected = sigmoid_focal_loss(logits[judged], targets[judged], alpha=0.25, gamma=2, reduction="sum")
    found = detection.focal_loss(logits, judged, positive, labels)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, logits), torch.autograd.grad(expected, logits))


def test_low_quality_match_takes_a_box_from_an_object_it_overlaps_more():
    """torchvision keeps the match of such a box with the other object."""
    overlap = torch.tensor([[0.6, 0.9], [0.45, 0.1]])
    assert detection.HlgMatcher(0.5, 0.4, smallest=0.0)(overlap).tolist() == [1, 0]
    assert detection.HlgMatcher(0.5, 0.4, smallest=0.5)(overlap).tolist() == [0, 0]


def test_pyramid_adds_two_levels_from_stage_four_without_relu():
    torch.manual_seed(0)
    model = HlgForObjectDetection(HlgConfig(**TINY, num_labels=3)).feature_pyramid
    maps = [torch.randn(1, width, side, side + 1) for width, side in ((16, 12), (32, 6), (32, 3))]
    found = list(model(dict(enumerate(maps))).values())
    lateral = [block[0](each) for block, each in zip(model.inner_blocks, maps, strict=True)]
    for level in (1, 0):
        size = lateral[level].shape[-2:]
        lateral[level] = lateral[level] + F.interpolate(lateral[level + 1], size=size, mode="nearest")
    for block, each, level in zip(model.layer_blocks, lateral, found, strict=False):
        torch.testing.assert_close(level, block[0](each))
    p6 = F.conv2d(maps[-1], model.extra_blocks.p6.weight, model.extra_blocks.p6.bias, stride=2, padding=1)
    torch.testing.assert_close(found[3], p6)
    p7 = F.conv2d(p6, model.extra_blocks.p7.weight, model.extra_blocks.p7.bias, stride=2, padding=1)
    torch.testing.assert_close(found[4], p7)
    assert (p6 < 0).any()


def test_parts_start_as_mmdetection_starts_them():
    torch.manual_seed(0)
    model = HlgForObjectDetection(HlgConfig(**TINY | {"pyramid_hidden_size": 256}, num_labels=3))
    head = model.detection_head
    assert float(head.classification_head.cls_logits.bias.detach().sigmoid().mean()) == pytest.approx(0.01, rel=1e-4)
    for layer in (head.classification_head.conv[0][0], head.regression_head.bbox_reg):
        assert float(layer.weight.detach().std()) == pytest.approx(0.01, rel=0.05)
        assert not layer.bias.any()
    layer = model.feature_pyramid.layer_blocks[0][0]
    bound = math.sqrt(6 / (2 * 256 * 9))
    assert float(layer.weight.detach().abs().max()) == pytest.approx(bound, rel=0.01)


# --- the model


class Pyramid(nn.Module):
    """Stand-in for the backbone: four maps of the padded images, by one convolution each."""

    def __init__(self, widths):
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3, width, 3, padding=1) for width in widths)

    def forward(self, pixel_values, **kwargs):
        height, width = pixel_values.shape[-2:]
        padded = F.pad(pixel_values, (0, -width % 32, 0, -height % 32))
        maps = [layer(F.avg_pool2d(padded, 4 * 2**level)) for level, layer in enumerate(self.layers)]
        return HlgModelOutput(feature_maps=tuple(maps))


class TestRetinaNet(DetectionModelTester):
    model_class = HlgForObjectDetection
    predictions = ("logits", "pred_boxes")
    # Level P7 then has four positions: on some processors torch leaves the bfloat16 weight gradients of a convolution
    # over one position unwritten.
    bfloat16_size = (132, 132)

    def make_decided(self, model):
        head = model.detection_head
        for layer in head.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight)
        nn.init.normal_(head.classification_head.cls_logits.weight, std=0.02)
        nn.init.normal_(head.regression_head.bbox_reg.weight, std=0.005)
        head.classification_head.cls_logits.bias.data.fill_(-3.0)

    def test_outputs_count_the_anchors_of_each_level(self, model, batch):
        outputs = model(batch["pixel_values"])
        expected = [9 * math.ceil(96 / stride) * math.ceil(128 / stride) for stride in (8, 16, 32, 64, 128)]
        assert outputs.anchors_per_level.tolist() == [expected] * 2
        assert outputs.logits.shape == (2, sum(expected), NUM_LABELS)

    @torch.no_grad()
    def test_boxes_are_decoded_anchors_as_fractions_of_the_image(self, model, batch):
        mask = torch.ones(2, 96, 128)
        mask[:, 90:] = 0  # within the image's own padding to 96
        offsets = {}
        hook = model.detection_head.register_forward_hook(lambda _, __, output: offsets.update(output))
        boxes = model(batch["pixel_values"], pixel_mask=mask).pred_boxes
        hook.remove()
        level = torch.tensor(plain.anchors((12, 16), 8, detection.RETINANET_SCALES))
        for index in (0, 500, len(level) - 1):
            decoded = plain.decode(offsets["bbox_regression"][1, index].tolist(), level[index].tolist())
            found = plain.corners(boxes[1, index], (90, 128))
            torch.testing.assert_close(torch.tensor(found), torch.tensor(decoded), atol=1e-2, rtol=1e-3)

    def expected_losses(self, outputs, labels, size, kept=None):
        """Focal and L1 loss in plain loops, from logits and boxes alone."""
        strides = detection.RETINANET_STRIDES
        sizes = [(math.ceil(size[0] / stride), math.ceil(size[1] / stride)) for stride in strides]
        scales = detection.RETINANET_SCALES
        anchors = sum((plain.anchors(*each, scales) for each in zip(sizes, strides, strict=True)), [])
        classification = boxes = positives = 0.0
        for index, each in enumerate(labels):
            objects = [plain.corners(box, size) for box in each["boxes"]]
            chosen = range(len(anchors)) if kept is None else kept[index]
            matches = plain.match(objects, [anchors[place] for place in chosen], 0.5, 0.4, 0.0)
            positives += max(1, sum(match >= 0 for match in matches))
            for place, match in zip(chosen, matches, strict=True):
                if match == -2:
                    continue
                wanted = int(each["class_labels"][match]) if match >= 0 else -1
                for name, logit in enumerate(outputs.logits[index, place].tolist()):
                    classification += plain.focal(logit, name == wanted)
                if match >= 0:
                    own = plain.encode(plain.corners(outputs.pred_boxes[index, place], size), anchors[place])
                    target = plain.encode(objects[match], anchors[place])
                    boxes += sum(abs(a - b) for a, b in zip(own, target, strict=True))
        return classification / positives, boxes / positives

    @torch.no_grad()
    @pytest.mark.parametrize("labels", [[TWO, EMPTY], [TWO, TWO], [EMPTY, EMPTY]])
    def test_losses_are_divided_by_the_positives_of_the_batch(self, model, labels):
        pixel_values = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
        outputs = model(pixel_values, labels=labels)
        classification, boxes = self.expected_losses(outputs, labels, (64, 96))
        assert float(outputs.loss_dict["classification"]) == pytest.approx(classification, rel=1e-4)
        assert float(outputs.loss_dict["boxes"]) == pytest.approx(boxes, rel=1e-3, abs=1e-6)

    @torch.no_grad()
    def test_anchors_on_the_padding_of_a_batch_are_not_trained(self, model):
        freeze = model.train()
        for module in freeze.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        pixel_values, mask = torch.randn(1, 3, 64, 96), torch.zeros(1, 64, 96)
        mask[:, :64, :64] = 1
        label = labels_of([[0.5, 0.5, 0.5, 0.6]], [2], (64, 64))
        outputs = model(pixel_values, pixel_mask=mask, labels=[label])
        inside = model.anchors.inside([torch.zeros(1, 1, *size) for size in self.grids((64, 96))], (64, 64))
        kept = [inside.nonzero().squeeze(1).tolist()]
        stretched = {**label, "boxes": label["boxes"] * torch.tensor([64 / 96, 1, 64 / 96, 1])}
        boxes = to_normalized(to_corners(outputs.pred_boxes, (64, 64)), (64, 96))  # the loop knows one size only
        outputs["pred_boxes"] = boxes
        classification, offsets = self.expected_losses(outputs, [stretched], (64, 96), kept)
        assert float(outputs.loss_dict["classification"]) == pytest.approx(classification, rel=1e-4)
        assert float(outputs.loss_dict["boxes"]) == pytest.approx(offsets, rel=1e-3)

    def grids(self, size):
        return [(math.ceil(size[0] / stride), math.ceil(size[1] / stride)) for stride in detection.RETINANET_STRIDES]

    def test_positives_are_averaged_over_processes(self, model, batch, monkeypatch):
        """Then the mean of the processes' gradients is that of one batch of all images."""
        alone = model.train()(**batch).loss_dict
        monkeypatch.setattr(dist, "is_initialized", lambda: True)
        monkeypatch.setattr(dist, "get_world_size", lambda: 2)
        monkeypatch.setattr(
            dist, "all_reduce", lambda count: count.mul_(6)
        )  # the other process has five times as many
        together = model(**batch).loss_dict
        torch.testing.assert_close(together["boxes"], alone["boxes"] / 3, rtol=0.1, atol=1e-3)
        monkeypatch.setattr(dist, "all_reduce", lambda count: pytest.fail("evaluation waits for other processes"))
        model.eval()(**batch)

    # --- detections

    @pytest.mark.parametrize("threshold", [0.0, 0.3])
    def test_detections_are_those_of_plain_loops(self, threshold):
        generator = torch.Generator().manual_seed(0)
        per_level, classes = [400, 100, 3], 4
        logits = torch.randn(sum(per_level), classes, generator=generator) * 1.5 - 2.5
        boxes = torch.rand(sum(per_level), 4, generator=generator) * 0.4 + 0.05
        boxes[:, :2] *= 2.2
        scores, labels, found = retinanet_detections(logits, boxes, per_level, threshold)
        candidates, start = [], 0
        for count in per_level:
            level = [
                (float(logits[row, name].sigmoid()), name, plain.clip(plain.corners(boxes[row], (1, 1)), (1, 1)))
                for row in range(start, start + count)
                for name in range(classes)
            ]
            level = sorted((each for each in level if each[0] > max(threshold, 0.05)), key=lambda each: -each[0])
            candidates += level[:1000]
            start += count
        expected = plain.suppress(candidates, 0.5, 100)
        plain.assert_detections({"scores": scores, "labels": labels, "boxes": found}, expected, 1e-5)

    def test_a_level_gives_its_thousand_best_pairs_of_anchor_and_class(self):
        # Each pair scores lower than the one before, so that the best 1000 belong to 500 anchors.
        logits = torch.linspace(5, -2, 3000).view(1500, 2)
        boxes = torch.zeros(1500, 4)
        boxes[:, 0] = torch.arange(1500) / 1500
        boxes[:, 1], boxes[:, 2:] = 0.5, 1 / 4000  # none overlaps another
        boxes[500:] = torch.tensor([0.5, 0.5, 1.0, 1.0])
        # With more pairs the box that covers the image would be among them: above 0.05, and suppressed by none.
        found = retinanet_detections(logits.flip(0).flip(1), boxes.flip(0), [1500])
        assert len(found[0]) == 100
        corners = retinanet_detections(logits - 2, boxes, [1500])[2]
        assert not (corners[:, 2] - corners[:, 0] > 0.9).any()

    def test_padding_behind_the_anchors_is_no_candidate(self):
        logits, boxes = torch.full((10, 2), 4.0), torch.tensor([[0.5, 0.5, 0.2, 0.2]] * 10)
        boxes[6:, 0] = 0.1
        _, _, found = retinanet_detections(logits, boxes, [4, 2])
        torch.testing.assert_close(found, torch.tensor([[0.4, 0.4, 0.6, 0.6]] * 2))

    # --- pipelines, compilation, export

    def test_pipeline_gives_boxes_in_pixels_of_the_image(self, model, tmp_path, caplog):
        processor = HlgImageProcessor(task="object-detection", size={"shortest_edge": 64, "longest_edge": 128})
        model.save_pretrained(tmp_path)
        processor.save_pretrained(tmp_path)
        detect = pipeline("object-detection", model=str(tmp_path), device="cpu")
        image = random_image(size=(90, 60))
        found = detect(image, threshold=0.1)
        with torch.no_grad():
            outputs = model(**processor(image, return_tensors="pt"))
        expected = processor.post_process_object_detection(outputs, 0.1, [(60, 90)])[0]
        assert [each["score"] for each in found] == pytest.approx(expected["scores"].tolist(), abs=1e-5)
        assert [each["label"] for each in found] == [f"LABEL_{name}" for name in expected["labels"].tolist()]
        boxes = np.array([list(each["box"].values()) for each in found])
        assert len(boxes) > 5
        np.testing.assert_allclose(boxes + 0.5, expected["boxes"], atol=0.501, rtol=0)  # integer pixels, truncated
        assert "not supported" not in caplog.text

    @torch.no_grad()
    def test_all_behind_the_backbone_compiles_as_one_graph(self, model, batch):
        """The backbone has the same test of its own."""
        model.hlg = Pyramid(model.config.hidden_sizes)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        self.same(compiled(batch["pixel_values"]), model(batch["pixel_values"]))

    @torch.no_grad()
    def test_exports_with_fixed_shapes(self, model, batch):
        self.check_export(model, batch["pixel_values"], None, [batch["pixel_values"]])

    @pytest.mark.slow
    @torch.no_grad()
    def test_all_behind_the_backbone_exports_with_dynamic_batch_height_and_width(self, model):
        """The backbone has the same test of its own. From 129 pixels on: a level of one row is another program."""
        model.hlg = Pyramid(model.config.hidden_sizes)
        dynamic = ({0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC},)
        others = [torch.randn(1, 3, 129, 193), torch.randn(3, 3, 257, 180)]
        self.check_export(model, torch.zeros(2, 3, 288, 320), dynamic, others)

    def check_export(self, model, example, dynamic, inputs):
        class Tensors(nn.Module):
            def __init__(self):
                super().__init__()
                self.model = model

            def forward(self, pixel_values):
                outputs = self.model(pixel_values)
                return outputs.logits, outputs.pred_boxes, outputs.anchors_per_level

        program = Tensors()
        exported = torch.export.export(program, (example,), dynamic_shapes=dynamic).module()
        for pixel_values in inputs:
            for found, expected in zip(exported(pixel_values), program(pixel_values), strict=True):
                torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)

    def check_learned(self, model, images, labels):
        with torch.no_grad():
            outputs = model(images)
        found = HlgImageProcessor(task="object-detection").post_process_object_detection(outputs, 0.5, [(96, 128)] * 2)
        for each, label in zip(found, labels, strict=True):
            order = each["labels"].argsort()
            assert each["labels"][order].tolist() == label["class_labels"].tolist()
            overlap = detection.box_iou(each["boxes"][order], to_corners(label["boxes"], (96, 128))).diagonal()
            assert (overlap > 0.7).all()
