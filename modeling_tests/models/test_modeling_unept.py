"""UN-EPT: the common contract for both backbones, and what its paper and specification fix."""

import copy

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from closeness import assert_same_outputs
from hf_denseseg import (
    UneptBackbone,
    UneptConfig,
    UneptForSemanticSegmentation,
    UneptImageProcessor,
    UneptImageProcessorPil,
    UneptModel,
)
from hf_denseseg.errors import InputError
from hf_denseseg.inference.introspection.refinement import can_refine
from hf_denseseg.models.auto.registration import reference_implementation
from hf_denseseg.models.unept.modeling_unept import resize_table
from hf_denseseg.models.unept.refinement_unept import DIRECTIONS, boundary_offsets, refine, refinement_sources
from model_tester import NUM_LABELS, SegmentationModelTester
from processor_tester import ImageProcessorTester

TINY = {
    "image_size": [48, 64],
    "depths": [1, 1, 1, 1],
    "base_channels": 4,
    "stem_channels": 8,
    "backbone_hidden_size": 16,
    "backbone_num_attention_heads": 2,
    "out_layers": [1, 2, 3],
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_points": 3,
    "intermediate_size": 24,
    "spatial_channels": [6, 8],
    "head_channels": 8,
    "min_class_pixels": 1,
}


class UneptTester(SegmentationModelTester):
    config_class, model_class, base_class, backbone_class = (
        UneptConfig,
        UneptForSemanticSegmentation,
        UneptModel,
        UneptBackbone,
    )
    output_stride, shows_features = 1, False
    traced = {"num_hidden_layers": 1}
    own_outputs = ("boundary_logits", "direction_logits", "coarse_logits", "refinement_offsets", "loss_dict")

    def test_hidden_states_and_attentions_come_on_request(self, model, batch):
        """Attention weights of each token, head, level and sampled point."""
        plain = model(batch["pixel_values"])
        assert plain.hidden_states is None and plain.attentions is None
        outputs = model(batch["pixel_values"], output_hidden_states=True, output_attentions=True)
        length = outputs.hidden_states[0].shape[1]
        assert len(outputs.hidden_states) == 3 and len(outputs.attentions) == 2
        assert {tuple(each.shape) for each in outputs.attentions} == {(2, length, 2, 3, 3)}
        torch.testing.assert_close(outputs.attentions[0].sum((-1, -2)), torch.ones(2, length, 2))
        assert_same_outputs(outputs.logits, plain.logits)
        outputs.hidden_states[0].retain_grad()
        outputs.logits.sum().backward()
        assert outputs.hidden_states[0].grad.abs().sum() > 0

    def test_accumulated_gradients_equal_the_large_batch(self, model, batch):
        """Of the two label maps; the class balance of boundary and direction is that of the batch, as in the code."""
        model.config.loss_weights = [0.8, 1.0, 0.0, 0.0]
        super().test_accumulated_gradients_equal_the_large_batch(model, batch)

    def test_trainer_accumulates_without_rescaling_the_loss(self, config, batch, tmp_path):
        config.loss_weights = [0.8, 1.0, 0.0, 0.0]
        super().test_trainer_accumulates_without_rescaling_the_loss(config, batch, tmp_path)


class TestUneptResNet(UneptTester):
    tiny, smallest_side, smallest_exported_side, pools = TINY, 8, 29, True


class TestUneptDeit(UneptTester):
    tiny, smallest_side, smallest_exported_side = {**TINY, "backbone_type": "deit"}, 16, 29

    # The transformer and the heads are traced with the ResNet, the blocks of a ViT with SETR.
    @pytest.mark.slow
    def test_compiles_as_one_graph(self, traced_model, batch):
        super().test_compiles_as_one_graph(traced_model, batch)

    @pytest.mark.slow
    def test_exports_with_dynamic_batch_height_and_width(self, traced_model):
        super().test_exports_with_dynamic_batch_height_and_width(traced_model)


class TestUneptImageProcessor(ImageProcessorTester):
    torchvision_class, pil_class = UneptImageProcessor, UneptImageProcessorPil
    config_class, model_class, tiny = UneptConfig, UneptForSemanticSegmentation, TINY


def build(**fields):
    torch.manual_seed(0)
    model = UneptForSemanticSegmentation(UneptConfig(**{**TINY, "num_labels": NUM_LABELS, **fields})).eval()
    for name, parameter in model.named_parameters():
        # At initialization points lie on whole pixels with equal weights, and there is hardly any boundary.
        if "sampling_offsets" in name or "attention_weights" in name or "_head." in name:
            nn.init.normal_(parameter, std=0.5)
    return model


@torch.no_grad()
@pytest.mark.parametrize("backbone_type", ["resnet", "deit"])
@pytest.mark.parametrize("axis", ["pointwise", "batch", "spatial"])
@pytest.mark.parametrize("size", [(48, 64), (37, 90)])
def test_savings_equal_the_reference_implementation(backbone_type, axis, size):
    model = build(backbone_type=backbone_type, decoder_self_attention=axis)
    pixel_values = torch.randn(2, 3, *size)
    expected = reference_implementation(model)(pixel_values).logits
    torch.testing.assert_close(model(pixel_values).logits, expected, atol=2e-5 * float(expected.std()), rtol=0)


@torch.no_grad()
def test_images_of_a_batch_mix_only_with_batch_attention():
    """Section 5d: on one image the released code is pointwise; on two its decoder mixes them."""
    pixel_values = torch.randn(2, 3, 48, 64)
    for axis, mixes in (("pointwise", False), ("batch", True), ("spatial", False)):
        model = build(decoder_self_attention=axis)
        alone = torch.cat([model(each[None]).logits for each in pixel_values])
        difference = (model(pixel_values).logits - alone).abs().max()
        assert (difference > 1e-3) == mixes, axis
        if axis == "batch":
            pointwise = build()
            pointwise.load_state_dict(model.state_dict())
            torch.testing.assert_close(pointwise(pixel_values).logits, alone, atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("backbone_type, unit", [("resnet", 8), ("deit", 16)])
def test_odd_sizes_equal_the_padded_image_cropped_to_size(backbone_type, unit):
    """Section 14: zeros at the right and bottom after normalization; no pixel moves."""
    model = build(backbone_type=backbone_type)
    pixel_values = torch.randn(1, 3, 45, 75)
    padded = torch.zeros(1, 3, -(-45 // unit) * unit, -(-75 // unit) * unit)
    padded[..., :45, :75] = pixel_values
    assert_same_outputs(model(pixel_values).logits, model(padded).logits[..., :45, :75])


@torch.no_grad()
def test_tables_are_untouched_at_the_training_size():
    table = torch.randn(12, 8)
    for mode in ("bilinear", "bicubic"):
        assert torch.equal(resize_table(table, (3, 4), (3, 4), mode), table)
        flat = resize_table(torch.ones(12, 8), (3, 4), (5, 7), mode)
        torch.testing.assert_close(flat, torch.ones(35, 8))


@torch.no_grad()
def test_refinement_takes_the_neighbor_clamped_to_the_image():
    """Section 7, pixel by pixel; and as the released code does it, by sampling with aligned corners."""
    coarse, boundary, direction = torch.randn(2, 3, 6, 7), torch.randn(2, 2, 6, 7), torch.randn(2, 8, 6, 7)
    offsets = boundary_offsets(boundary, direction)
    refined = refine(coarse, refinement_sources(offsets))
    for b in range(2):
        for y in range(6):
            for x in range(7):
                step = (0, 0)
                if boundary[b, 1, y, x] > 0.5:
                    step = DIRECTIONS[int(direction[b, :, y, x].argmax())]
                row, column = min(max(y + step[0], 0), 5), min(max(x + step[1], 0), 6)
                assert torch.equal(refined[b, :, y, x], coarse[b, :, row, column])
    grid = torch.stack(
        (
            (torch.arange(7) + offsets[:, 1]) / 6 * 2 - 1,
            (torch.arange(6)[:, None] + offsets[:, 0]) / 5 * 2 - 1,
        ),
        dim=3,
    )
    sampled = F.grid_sample(coarse, grid, padding_mode="border", align_corners=True)
    torch.testing.assert_close(refined, sampled, atol=5e-6, rtol=0)


@torch.no_grad()
def test_boundary_threshold_may_be_a_probability():
    boundary = torch.tensor([[[[3.0]], [[1.0]]], [[[-3.0]], [[0.0]]]])  # logit above and below 0.5
    direction = torch.zeros(2, 8, 1, 1)
    direction[:, 6] = 1
    assert boundary_offsets(boundary, direction).flatten().tolist() == [1, 0, 0, 0]
    assert boundary_offsets(boundary, direction, "probability").flatten().tolist() == [0, 0, 1, 0]


@torch.no_grad()
def test_refined_logits_come_on_request_or_as_the_prediction():
    model, pixel_values = build(), torch.randn(1, 3, 48, 64)
    nn.init.ones_(model.boundary_head[1].bias)
    nn.init.ones_(model.boundary_head[3].weight)  # boundary everywhere
    assert model(pixel_values).refined_logits is None
    outputs = model(pixel_values, output_refined_logits=True)
    assert torch.equal(outputs.logits, outputs.coarse_logits)
    assert not torch.equal(outputs.refined_logits, outputs.coarse_logits)
    model.config.use_boundary_refinement = True
    assert_same_outputs(model(pixel_values).logits, outputs.refined_logits)
    model.config.refine_scale = 2
    far = model(pixel_values)
    assert torch.equal(far.refinement_offsets, 2 * outputs.refinement_offsets)
    assert torch.equal(far.logits, refine(far.coarse_logits, refinement_sources(far.refinement_offsets)))


@torch.no_grad()
def test_offsets_stay_float32_under_autocast():
    attention = build().unept.context.encoder.layers[0].self_attn
    seen = []
    attention.sampling.register_forward_hook(lambda module, args, output: seen.extend(args[:3]))
    query = torch.randn(1, 6, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        attention(query, query, torch.rand(1, 6, 3, 2), [(1, 2)] * 3)
    assert [each.dtype for each in seen] == [torch.bfloat16, torch.float32, torch.bfloat16]
    copy.deepcopy(attention).to(torch.bfloat16)(*[query.bfloat16()] * 2, torch.rand(1, 6, 3, 2), [(1, 2)] * 3)
    assert seen[4].dtype == torch.float32


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"image_size": 50}, "multiples of 8"),
        ({"image_size": [48, 40], "backbone_type": "deit"}, "multiples of 16"),
        ({"image_size": [48, 48, 48]}, "one number or"),
        ({"patch_size": 12}, "multiple of 8"),
        ({"num_attention_heads": 3}, "Change `hidden_size`"),
        ({"backbone_type": "deit", "backbone_num_attention_heads": 3}, "Change `backbone_hidden_size`"),
        ({"hidden_size": 18}, "multiple of 4"),
        ({"depths": [1, 1, 1]}, "4 positive numbers"),
        ({"out_layers": [2, 1, 3]}, "increasing numbers"),
        ({"loss_weights": "best"}, "give 'code', 'paper' or four numbers"),
        ({"loss_weights": [1.0, 2.0]}, "four numbers"),
        ({"dropout": 1.5}, "probability"),
        ({"decoder_self_attention": "deformable"}, "decoder_self_attention"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_a_fix(fields, message):
    with pytest.raises(StrictDataclassError, match=message):
        UneptConfig(**{**TINY, **fields})


def overfitting_batch():
    """Eight images of colored boxes on a background, their edges between queries: separable at 1/8."""
    generator = torch.Generator().manual_seed(0)
    colors = torch.randn(NUM_LABELS, 3, generator=generator)
    labels = torch.zeros(8, 48, 64, dtype=torch.long)
    for label in labels:
        for number in range(1, NUM_LABELS):
            y, x = (8 * int(torch.randint(0, cells, (), generator=generator)) for cells in (5, 7))
            label[y : y + 16, x : x + 16] = number
    pixel_values = colors[labels].permute(0, 3, 1, 2) + 0.1 * torch.randn(8, 3, 48, 64, generator=generator)
    return {"pixel_values": pixel_values, "labels": labels}


@pytest.mark.slow
@pytest.mark.parametrize("backbone_type", ["resnet", "deit"])
def test_overfits_eight_images(backbone_type):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "base_channels": 8, "head_channels": 32, "spatial_channels": [16, 32], "dropout": 0.0}
    model = UneptForSemanticSegmentation(
        UneptConfig(**{**TINY, **sizes, "backbone_type": backbone_type, "num_labels": NUM_LABELS})
    ).train()
    batch, optimizer = overfitting_batch(), torch.optim.AdamW(model.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=300)
    for _ in range(300):
        optimizer.zero_grad()
        outputs = model(**batch)
        outputs.loss.backward()
        optimizer.step()
        schedule.step()
    found, labels = outputs.logits.argmax(1), batch["labels"]
    ious = [((found == k) & (labels == k)).sum() / ((found == k) | (labels == k)).sum() for k in range(NUM_LABELS)]
    assert torch.stack(ious).mean() > 0.9


# --- ablations (Tables 5 and 6)

ABLATIONS = {
    "baseline": {"use_spatial_branch": False, "num_levels": 1},
    "+ pyramid features": {"use_spatial_branch": False},
    "L = 1": {"num_levels": 1},
    "L = 2, DeiT": {"num_levels": 2, "backbone_type": "deit"},
    "N = 64": {"num_points": 64},
}


@pytest.mark.parametrize("row", ABLATIONS)
def test_ablations_train_and_equal_their_reference_implementation(row):
    model = build(**ABLATIONS[row])
    pixel_values, labels = torch.randn(2, 3, 41, 60), torch.randint(NUM_LABELS, (2, 41, 60))
    with torch.no_grad():
        expected = reference_implementation(model)(pixel_values).logits
        torch.testing.assert_close(model(pixel_values).logits, expected, atol=1e-4 * float(expected.std()), rtol=0)
    model(pixel_values, labels=labels).loss.backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not without, f"no gradient reaches {without[:3]}"


def test_without_spatial_branch_the_table_is_the_query_and_the_coarse_loss_is_left():
    """First rows of Table 5: neither dynamic queries nor boundaries."""
    model = build(use_spatial_branch=False)
    assert not [name for name in model.state_dict() if "spatial" in name or "boundary" in name or "direction" in name]
    assert model.training_targets is None and not can_refine(model) and can_refine(build())
    pixel_values, labels = torch.randn(2, 3, 48, 64), torch.randint(NUM_LABELS, (2, 48, 64))
    seen = []
    model.unept.context.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    outputs = model(pixel_values, labels=labels)
    assert torch.equal(seen[0], model.unept.query_embed.expand(2, -1, -1))
    torch.testing.assert_close(outputs.loss, 0.8 * F.cross_entropy(outputs.logits, labels))
    assert outputs.boundary_logits is None
    with pytest.raises(InputError, match="Without a spatial branch nothing is refined"):
        model(pixel_values, output_refined_logits=True)
    with pytest.raises(StrictDataclassError, match="needs `use_spatial_branch`"):
        UneptConfig(use_spatial_branch=False, use_boundary_refinement=True)


def test_backbone_names_the_maps_that_there_are():
    config = UneptConfig(**TINY, use_spatial_branch=False, num_levels=1, out_indices=[0, 1])
    assert config.stage_names == ["pyramid1", "context"]
    maps = UneptBackbone(config).eval()(torch.randn(1, 3, 48, 64)).feature_maps
    assert [tuple(each.shape) for each in maps] == [(1, 16, 6, 8), (1, 16, 6, 8)]
