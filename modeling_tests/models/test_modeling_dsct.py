"""DSCT: the common contract, and what its paper and specification fix."""

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError

import hf_denseseg
from classification_model_tester import ClassificationModelTester
from hf_denseseg import (
    DsctBackbone,
    DsctConfig,
    DsctForImageClassification,
    DsctForSemanticSegmentation,
    DsctImageProcessor,
    DsctImageProcessorPil,
    DsctModel,
)
from hf_denseseg.models.auto.registration import reference_implementation
from hf_denseseg.models.dsct.modeling_dsct import DsctConvBlock
from model_tester import SegmentationModelTester
from processor_tester import ImageProcessorTester

TINY = {
    "stem_channels": 8,
    "spatial_hidden_sizes": [8, 16, 24],
    "hidden_size": 16,
    "num_hidden_layers": 6,
    "num_attention_heads": 2,
    "decoder_hidden_size": 12,
    "sapp_hidden_size": 8,
}


class TestDsctSac(SegmentationModelTester):
    config_class, model_class, base_class, backbone_class = (
        DsctConfig,
        DsctForSemanticSegmentation,
        DsctModel,
        DsctBackbone,
    )
    tiny, output_stride, pools = TINY, 4, True


class TestDsctSapp:
    """Only what the other head can change."""

    tiny, output_stride = {**TINY, "decode_head": "sapp", "align_corners": True}, 2
    test_sizes = SegmentationModelTester.test_any_size_gives_logits_of_the_stride
    test_gradients = SegmentationModelTester.test_every_parameter_learns
    test_initialization = SegmentationModelTester.test_missing_weights_are_initialized_exactly_as_by_the_constructor
    config_class, model_class = DsctConfig, DsctForSemanticSegmentation
    smallest_side, logits_size = SegmentationModelTester.smallest_side, SegmentationModelTester.logits_size
    config, model, batch = SegmentationModelTester.config, SegmentationModelTester.model, SegmentationModelTester.batch


class TestDsctAuxiliary(TestDsctSapp):
    """Only what the auxiliary heads can change."""

    tiny, output_stride = {**TINY, "auxiliary_hidden_size": 8, "auxiliary_loss_weight": 0.4}, 4


class TestDsctImageProcessor(ImageProcessorTester):
    torchvision_class, pil_class = DsctImageProcessor, DsctImageProcessorPil
    config_class, model_class, tiny = DsctConfig, DsctForSemanticSegmentation, TINY


@torch.no_grad()
@pytest.mark.parametrize("head", ["sac", "sapp"])
@pytest.mark.parametrize("size, align_corners", [((64, 96), False), ((97, 61), True)])
def test_rewrites_equal_the_reference_implementation(head, size, align_corners):
    torch.manual_seed(0)
    config = DsctConfig(**TINY, decode_head=head, align_corners=align_corners, num_labels=5)
    model = DsctForSemanticSegmentation(config).eval()
    pixel_values = torch.randn(2, 3, *size)
    expected = reference_implementation(model)(pixel_values).logits
    torch.testing.assert_close(model(pixel_values).logits, expected, atol=1e-4 * float(expected.std()), rtol=0)


def test_loss_is_main_plus_weighted_auxiliary_of_both_streams():
    config = DsctConfig(**TINY, auxiliary_hidden_size=8, auxiliary_loss_weight=0.3, num_labels=5)
    model = DsctForSemanticSegmentation(config)
    pixel_values, labels = torch.randn(2, 3, 64, 64), torch.randint(0, 5, (2, 64, 64))
    labels[0, :20] = 255
    outputs = model(pixel_values, labels=labels)
    assert [each.shape for each in outputs.auxiliary_logits] == [(2, 5, 8, 8), (2, 5, 4, 4)]
    losses = [
        F.cross_entropy(F.interpolate(each, size=(64, 64), mode="bilinear"), labels, ignore_index=255)
        for each in (outputs.logits, *outputs.auxiliary_logits)
    ]
    torch.testing.assert_close(outputs.loss, losses[0] + 0.3 * (losses[1] + losses[2]))
    assert model(pixel_values).auxiliary_logits is None

    # The rest of the model is the one without: it takes these weights, and gives the same logits.
    plain = DsctForSemanticSegmentation(DsctConfig(**TINY, num_labels=5))
    missing, unexpected = plain.load_state_dict(model.state_dict(), strict=False)
    assert not missing and all(name.startswith("auxiliary_heads.") for name in unexpected)
    torch.testing.assert_close(plain.eval()(pixel_values).logits, model.eval()(pixel_values).logits)


@torch.no_grad()
def test_class_token_doubles_in_every_block():
    """Section 3, step 3: with silent Transformer blocks the token is multiplied by 2^(D-1)."""
    model = DsctModel(DsctConfig(**TINY, context_final_norm=False)).eval()
    for name, parameter in model.named_parameters():
        if "o_proj" in name or "fc2" in name:
            parameter.zero_()
    token = model(torch.randn(1, 3, 64, 64)).last_hidden_state[0, 0]
    torch.testing.assert_close(token, model.encoder.embeddings.cls_token[0, 0] * 2**5)


@pytest.mark.parametrize(
    "fields, strides, dilations",
    [
        ({"output_stride": 32}, [1, 1, 1, 2, 1, 1, 1, 2, 1, 1, 2], [1] * 11),
        ({"output_stride": 8, "dilated": False}, [1, 1, 1, 2, 1, 1, 1, 1, 1, 1, 1], [1] * 11),
        ({"output_stride": 8, "dilated": True}, [1, 1, 1, 2, 1, 1, 1, 1, 1, 1, 1], [1] * 7 + [1, 2, 2, 2]),
    ],
)
def test_strides_and_dilations_follow_section_4(fields, strides, dilations):
    with torch.device("meta"):
        encoder = DsctModel(DsctConfig(**{**TINY, "num_hidden_layers": 12}, **fields)).encoder
    blocks: list[tuple[DsctConvBlock, DsctConvBlock]] = [(block.spatial, block.fusion) for block in encoder.blocks]
    assert [first.conv2.stride[0] * second.conv2.stride[0] for first, second in blocks] == strides
    assert [first.conv2.dilation[0] for first, _ in blocks] == dilations
    later = [2 if fields.get("dilated") else 1] * 4
    assert [second.conv2.dilation[0] for _, second in blocks] == [1] * 7 + later
    assert all(conv.padding == conv.dilation for pair in blocks for conv in (pair[0].conv2, pair[1].conv2))


@torch.no_grad()
def test_769_gives_48_tokens_per_side_and_unpadded_maps():
    config = DsctConfig(**TINY, out_features=["stem", "stage1", "stage2", "stage3", "stage4", "context"])
    maps = DsctBackbone(config).eval()(torch.zeros(1, 3, 769, 769)).feature_maps
    assert [each.shape[-1] for each in maps] == [193, 193, 97, 97, 97, 48]


@torch.no_grad()
def test_coupling_equals_its_equations_written_as_loops():
    """Eq. 3-4 pixel by pixel: C2T averages k x k patches after a 1x1 convolution; T2C copies each token to k x k."""
    torch.manual_seed(0)
    block = DsctModel(DsctConfig(**TINY)).eval().encoder.blocks[0]
    unit, features = block.spatial_to_context, torch.randn(1, 2, 12, 15)
    weight, bias = unit.projection.weight[:, :, 0, 0], unit.projection.bias
    for token, found in enumerate(unit(features, (3, 3))[0]):
        row, column = divmod(token, 3)
        pixels = [features[0, :, 4 * row + i, 4 * column + j] for i in range(4) for j in range(4)]
        mean = sum(weight @ pixel + bias for pixel in pixels) / 16
        expected = F.gelu(F.layer_norm(mean, (16,), unit.layernorm.weight, unit.layernorm.bias, 1e-6))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    back, tokens = block.context_to_spatial, torch.randn(1, 9, 16)
    spread = back(tokens, (3, 3), (12, 12))
    weight, bias = back.projection.weight[:, :, 0, 0], back.projection.bias
    for row, column in ((0, 0), (5, 2), (11, 11)):
        expected = (weight @ tokens[0, row // 4 * 3 + column // 4] + bias).relu() / (1 + 1e-6) ** 0.5
        torch.testing.assert_close(spread[0, :, row, column], expected, atol=1e-5, rtol=1e-4)


class TestDsctClassification(ClassificationModelTester):
    config_class, model_class = DsctConfig, DsctForImageClassification
    tiny = {**TINY, "output_stride": 32}
    scores = ("spatial_logits", "context_logits")

    def test_logits_are_the_sum_of_both_streams(self, model, pixel_values):
        outputs = model(pixel_values)
        torch.testing.assert_close(outputs.logits, outputs.spatial_logits + outputs.context_logits)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"num_hidden_layers": 7}, "multiple of 3"),
        ({"num_attention_heads": 5}, "Change `hidden_size`"),
        ({"spatial_hidden_sizes": [8, 16]}, "need 3"),
        ({"spatial_hidden_sizes": [8, 16, 21]}, r"spatial_hidden_sizes\[2\]"),
        ({"output_stride": 16}, "output_stride"),
        ({"drop_path_rate": 1.5}, "probability"),
        ({"auxiliary_loss_weight": -1}, "use 0 .no heads. or more"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_a_fix(fields, message):
    with pytest.raises(StrictDataclassError, match=message):
        DsctConfig(**{**TINY, **fields})


@pytest.mark.parametrize("head", ["sac", "sapp"])
def test_weights_start_as_the_specification_says(head):
    """Section 3 and 6: convolutions Kaiming (fan out), linear layers and class token 0.02, classifier 0.01 and 0."""
    torch.manual_seed(0)
    model = hf_denseseg.create_model(f"dsct-tiny-{head}", num_labels=19, num_hidden_layers=6)
    encoder, classifier = model.dsct.encoder, model.decode_head.classifier
    assert float(classifier.weight.std()) == pytest.approx(0.01, rel=0.05)
    assert not classifier.bias.any()
    assert float(encoder.embeddings.cls_token.std()) == pytest.approx(0.02, rel=0.1)
    assert float(encoder.blocks[0].context.mlp.fc1.weight.std()) == pytest.approx(0.02, rel=0.02)
    convolution = encoder.blocks[0].spatial.conv2
    expected = (2 / (convolution.out_channels * 9)) ** 0.5
    assert float(convolution.weight.std()) == pytest.approx(expected, rel=0.05)
