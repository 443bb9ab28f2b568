"""SETR: the common contract, and what its paper and specification fix."""

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from transformers import BeitConfig, BeitModel

from closeness import assert_same_outputs
from hf_denseseg import (
    SetrBackbone,
    SetrConfig,
    SetrForSemanticSegmentation,
    SetrImageProcessor,
    SetrImageProcessorPil,
    SetrModel,
)
from hf_denseseg.models.auto.registration import reference_implementation
from hf_denseseg.models.setr.modeling_setr import resize_position_embeddings
from model_tester import Logits, SegmentationModelTester
from processor_tester import ImageProcessorTester

TINY = {
    "image_size": 48,
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "decoder_hidden_size": 12,
    "mla_hidden_size": 8,
    "auxiliary_layers": [1, 3],
    "mla_layers": [0, 1, 2, 3],
}


class SetrTester(SegmentationModelTester):
    config_class, model_class, base_class, backbone_class = (
        SetrConfig,
        SetrForSemanticSegmentation,
        SetrModel,
        SetrBackbone,
    )
    smallest_side, smallest_exported_side = 16, 29
    traced = {"num_hidden_layers": 2, "auxiliary_layers": [0, 1]}
    own_outputs = ("auxiliary_logits",)

    def logits_size(self, height, width):
        """Of the image resized to whole patches."""
        return -(-height // 16) * 16 // self.output_stride, -(-width // 16) * 16 // self.output_stride


class TestSetrPup(SetrTester):
    tiny, output_stride = TINY, 2


class TestSetrNaive:
    """Only the questions that another head can answer differently."""

    tiny, output_stride = {**TINY, "decode_head": "naive"}, 16
    test_sizes = SetrTester.test_any_size_gives_logits_of_the_stride
    test_gradients = SetrTester.test_every_parameter_learns
    test_initialization = SetrTester.test_missing_weights_are_initialized_exactly_as_by_the_constructor
    config_class, model_class, base_class = SetrTester.config_class, SetrTester.model_class, SetrTester.base_class
    smallest_side, logits_size = SetrTester.smallest_side, SetrTester.logits_size
    config, model, batch = SetrTester.config, SetrTester.model, SetrTester.batch
    traced, traced_model = {}, SetrTester.traced_model


class TestSetrMla(TestSetrNaive):
    """Also the questions that the aggregation and the unused class token can answer differently."""

    tiny, output_stride = {**TINY, "decode_head": "mla"}, 4
    smallest_exported_side, pools = SetrTester.smallest_exported_side, False
    test_saving = SetrTester.test_saved_model_gives_the_same_logits_through_the_auto_class
    test_base_weights = SetrTester.test_base_weights_load_into_the_task_model_and_back
    test_checkpointing = SetrTester.test_gradient_checkpointing_changes_nothing_and_runs_batch_norms_once
    test_images = SetrTester.test_forward_is_deterministic_and_images_do_not_mix
    test_attention = SetrTester.test_eager_and_sdpa_attention_agree
    test_export = SetrTester.test_exports_with_dynamic_batch_height_and_width


class TestSetrBeit(SetrTester):
    tiny, output_stride = {**TINY, "encoder": "beit", "layer_scale_init_value": 0.1}, 2

    @torch.no_grad()
    def test_exports_with_dynamic_batch_height_and_width(self, traced_model):
        """transformers' BEiT computes its relative positions in Python, for one size: only the batch is dynamic."""
        program = Logits(traced_model)
        exported = torch.export.export(
            program, (torch.zeros(2, 3, 64, 96),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)
        )
        pixel_values = torch.randn(3, 3, 64, 96)
        torch.testing.assert_close(exported.module()(pixel_values), program(pixel_values), atol=1e-5, rtol=1e-4)


class TestSetrImageProcessor(ImageProcessorTester):
    torchvision_class, pil_class = SetrImageProcessor, SetrImageProcessorPil
    config_class, model_class, tiny = SetrConfig, SetrForSemanticSegmentation, TINY


def build(**fields):
    torch.manual_seed(0)
    return SetrForSemanticSegmentation(SetrConfig(**{**TINY, "num_labels": 5, **fields})).eval()


@torch.no_grad()
@pytest.mark.parametrize("encoder", ["vit", "beit"])
@pytest.mark.parametrize("head", ["naive", "pup", "mla"])
@pytest.mark.parametrize("size", [(48, 48), (61, 100)])
def test_savings_equal_the_reference_implementation(encoder, head, size):
    model = build(encoder=encoder, decode_head=head)
    pixel_values = torch.randn(2, 3, *size)
    logits = F.interpolate(model(pixel_values).logits, size=size, mode="bilinear", align_corners=False)
    expected = reference_implementation(model)(pixel_values).logits
    torch.testing.assert_close(logits, expected, atol=2e-5 * float(expected.std()), rtol=0)


@pytest.mark.parametrize("head", ["naive", "pup", "mla"])
@pytest.mark.parametrize("normalization", ["all", "valid"])
def test_loss_is_main_plus_weighted_auxiliary_means(head, normalization):
    """Section 4: the mean divides by all pixels, ignored ones included; the switch divides by the valid ones."""
    model = build(decode_head=head, loss_normalization=normalization, auxiliary_loss_weight=0.3)
    labels = torch.randint(0, 5, (2, 48, 48))
    labels[0, :20] = 255
    outputs = model(torch.randn(2, 3, 48, 48), labels=labels)
    means = []
    for logits in (outputs.logits, *outputs.auxiliary_logits):
        upsampled = F.interpolate(logits, size=(48, 48), mode="bilinear", align_corners=False)
        log_probabilities = upsampled.log_softmax(1)
        valid = [(b, y, x) for b, y, x in torch.nonzero(labels != 255).tolist()]
        total = -sum(log_probabilities[b, labels[b, y, x], y, x] for b, y, x in valid)
        means.append(total / (labels.numel() if normalization == "all" else len(valid)))
    assert len(means) == (5 if head == "mla" else 3)
    torch.testing.assert_close(outputs.loss, means[0] + 0.3 * sum(means[1:]))


def test_auxiliary_heads_cost_nothing_without_labels():
    model = build()
    for head in model.auxiliary_head:
        head.register_forward_hook(lambda *_: pytest.fail("an auxiliary head ran"))
    assert model(torch.zeros(1, 3, 48, 48)).auxiliary_logits is None
    without = build(use_auxiliary_head=False, auxiliary_layers=[])
    outputs = without(torch.zeros(1, 3, 48, 48), labels=torch.zeros(1, 48, 48, dtype=torch.long))
    assert outputs.auxiliary_logits == () and outputs.loss > 0


@torch.no_grad()
def test_only_the_requested_layers_are_kept():
    model = SetrModel(SetrConfig(**TINY)).eval()
    pixel_values = torch.randn(1, 3, 48, 64)
    outputs = model(pixel_values, layers=[0, 2], output_hidden_states=True)
    assert len(outputs.feature_maps) == 2 and model(pixel_values).feature_maps is None
    for layer, found in zip((0, 2), outputs.feature_maps, strict=True):
        tokens = outputs.hidden_states[layer + 1]
        for row in range(3):
            for column in range(4):
                assert torch.equal(found[0, :, row, column], tokens[0, 1 + 4 * row + column])


@torch.no_grad()
def test_class_token_takes_no_part_in_mla():
    """Section 2, step 5: it is removed right after the positions are added; elsewhere all patches attend to it."""
    for head, changes in (("mla", False), ("pup", True)):
        model, pixel_values = build(decode_head=head), torch.randn(1, 3, 48, 48)
        for name, parameter in model.setr.named_parameters():
            if "_proj." in name or "mlp." in name:  # freshly initialized, patches hardly attend to each other
                parameter.normal_(std=0.3)
        before = model(pixel_values).logits
        # Not a constant, which the first LayerNorm would remove.
        model.setr.encoder.embeddings.cls_token.normal_()
        model.setr.encoder.embeddings.position_embeddings[:, 0].normal_()
        after = model(pixel_values).logits
        if changes:
            assert (after - before).abs().max() > 1e-2 * before.abs().max()
        else:
            assert_same_outputs(after, before)


@torch.no_grad()
def test_positions_are_unchanged_at_the_training_size_and_bilinear_elsewhere():
    table = torch.randn(1, 1 + 12, 8)
    assert torch.equal(resize_position_embeddings(table, (3, 4), (3, 4)), table)
    found = resize_position_embeddings(table, (3, 4), (5, 7))
    grid = table[0, 1:].view(3, 4, 8)
    for row in range(5):
        for column in range(7):
            y, x = max((row + 0.5) * 3 / 5 - 0.5, 0), max((column + 0.5) * 4 / 7 - 0.5, 0)
            top, left = int(y), int(x)
            bottom, right = min(top + 1, 2), min(left + 1, 3)
            upper = grid[top, left] * (1 - x + left) + grid[top, right] * (x - left)
            lower = grid[bottom, left] * (1 - x + left) + grid[bottom, right] * (x - left)
            expected = upper * (1 - y + top) + lower * (y - top)
            torch.testing.assert_close(found[0, 1 + row * 7 + column], expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(found[:, 0], table[:, 0])


@torch.no_grad()
def test_beit_encoder_is_that_of_transformers():
    model = SetrModel(SetrConfig(**TINY, encoder="beit")).eval()
    for name, parameter in model.named_parameters():
        if "bias_table" in name or "lambda" in name:
            parameter.normal_()
    config = BeitConfig(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=48,
        layer_norm_eps=1e-6,
        use_relative_position_bias=True,
    )
    theirs = BeitModel(config, add_pooling_layer=False).eval()
    theirs.load_state_dict(model.encoder.beit.state_dict())
    for size in ((48, 48), (64, 96)):
        pixel_values = torch.randn(1, 3, *size)
        expected = theirs(pixel_values).last_hidden_state
        torch.testing.assert_close(model(pixel_values).last_hidden_state, expected)


@torch.no_grad()
def test_pup_in_two_steps_is_two_convolutions_and_4x_upsampling():
    model = build(pup_upsampling=4)
    head, features = model.decode_head, torch.randn(1, 16, 3, 4)
    assert len(head.convolutions) == 2
    step = head.convolutions[0](head.norm(features))
    step = F.interpolate(step, scale_factor=4, mode="bilinear", align_corners=False)
    expected = head.classifier(head.convolutions[1](step))
    torch.testing.assert_close(head(features), expected)
    assert model(torch.zeros(1, 3, 48, 48)).logits.shape[-2:] == (12, 12)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"image_size": 50}, "does not divide"),
        ({"image_size": [48, 40]}, "does not divide"),
        ({"image_size": [48, 48, 48]}, "one number or"),
        ({"patch_size": 12}, "multiple of 8"),
        ({"num_attention_heads": 3}, "Change `hidden_size`"),
        ({"auxiliary_layers": [3, 1]}, "rising numbers from 0 to 3"),
        ({"auxiliary_layers": [4]}, "rising numbers from 0 to 3"),
        ({"decode_head": "mla", "mla_layers": [0, 1, 2]}, "aggregates 4"),
        ({"decode_head": "fpn"}, "decode_head"),
        ({"drop_path_rate": 1.5}, "probability"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_the_fix(fields, message):
    with pytest.raises(StrictDataclassError, match=message):
        SetrConfig(**{**TINY, **fields})


def test_weights_start_as_the_specification_says():
    """Section 2 and 3: linear layers, class token and positions 0.02; convolutions as in torch; no zero heads."""
    torch.manual_seed(0)
    model = SetrForSemanticSegmentation(SetrConfig(**{**TINY, "hidden_size": 256, "num_labels": 19}))
    embeddings, layer = model.setr.encoder.embeddings, model.setr.encoder.layers[0]
    for weight in (embeddings.cls_token, embeddings.position_embeddings, layer.mlp.fc1.weight):
        assert float(weight.detach().std()) == pytest.approx(0.02, rel=0.15)
    convolution = model.decode_head.convolutions[0].convolution
    bound = (256 * 9) ** -0.5
    assert float(convolution.weight.detach().abs().max()) == pytest.approx(bound, rel=0.01)
    assert float(convolution.weight.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.02)
    assert 0 < float(convolution.bias.detach().abs().max()) <= bound
