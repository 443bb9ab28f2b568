"""HFGD: the common contract, and what its paper and specification fix."""

import copy

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import ConvNextConfig, SwinConfig, TimmBackboneConfig

from closeness import assert_same_outputs
from hf_denseseg import (
    HfgdBackbone,
    HfgdConfig,
    HfgdForSemanticSegmentation,
    HfgdImageProcessor,
    HfgdImageProcessorPil,
    HfgdModel,
)
from hf_denseseg.errors import InputError
from hf_denseseg.models.auto.registration import reference_implementation
from hf_denseseg.models.hfgd.modeling_hfgd import HfgdAxialAttention, HfgdSelfAttention
from model_tester import NUM_LABELS, SegmentationModelTester
from processor_tester import ImageProcessorTester

STAGES = ["stage1", "stage2", "stage3", "stage4"]
TINY_RESNET = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 12, 16, 24],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
    "out_features": STAGES,
}
TINY = {
    "backbone_config": TINY_RESNET,
    "decoder_width": 16,
    "cae_wide_channels": 24,
    "cae_channels": 16,
    "cae_qk_channels": 4,
    "merge_channels": 16,
}


def without_regularization(model):
    """Class-aware regularization depends on the whole batch, and has lower bounds."""
    model.regularization = None
    return model


class TestHfgd(SegmentationModelTester):
    config_class, model_class, base_class, backbone_class = (
        HfgdConfig,
        HfgdForSemanticSegmentation,
        HfgdModel,
        HfgdBackbone,
    )
    tiny, output_stride, smallest_side, pools = TINY, 4, 4, True
    smallest_exported_side = 33  # below, the coarsest map has one row
    has_attentions = False
    own_outputs = ("high_level_logits", "loss_dict")
    typing_error = {"decoder_widht": 2}
    wrong_type = {"decoder_width": "wide"}

    def test_hidden_states_and_attentions_come_on_request(self, model, batch):
        """They are those of the backbone; a ResNet has no attention."""
        assert model(batch["pixel_values"]).hidden_states is None
        outputs = model(batch["pixel_values"], output_hidden_states=True, output_attentions=True)
        assert [each.shape[1] for each in outputs.hidden_states] == [8, 8, 12, 16, 24]
        assert outputs.attentions is None

    def test_tuple_and_named_output_agree(self, model, batch):
        named = model(**batch, output_hidden_states=True)
        plain = model(**batch, output_hidden_states=True, return_dict=False)
        assert_same_outputs(plain[:2], (named.loss, named.logits))
        assert len(plain) == len(named.to_tuple()) == 5
        assert model(batch["pixel_values"], return_dict=False)[0].shape == named.logits.shape

    def test_crop_of_ignored_pixels_gives_zero_loss_and_finite_gradients(self, model, batch):
        """CAR stays at its lower bounds; only ignored pixels, which count as other classes, get a gradient."""
        model.train()
        ignored = torch.full_like(batch["labels"], 255)
        outputs = model(batch["pixel_values"], labels=ignored)
        assert outputs.loss_dict["guided"] == outputs.loss_dict["high_level"] == 0
        assert outputs.loss_dict["car_intra"].item() == pytest.approx(1e-5)
        outputs.loss.backward()
        assert all(each.grad.isfinite().all() for each in model.parameters() if each.grad is not None)
        super().test_crop_of_ignored_pixels_gives_zero_loss_and_finite_gradients(without_regularization(model), batch)

    def test_accumulated_gradients_equal_the_large_batch(self, model, batch):
        super().test_accumulated_gradients_equal_the_large_batch(without_regularization(model), batch)

    def test_trainer_accumulates_without_rescaling_the_loss(self, config, batch, tmp_path):
        config.car_intra_weight = config.car_inter_weight = 0.0
        super().test_trainer_accumulates_without_rescaling_the_loss(config, batch, tmp_path)


class TestHfgdImageProcessors(ImageProcessorTester):
    torchvision_class, pil_class = HfgdImageProcessor, HfgdImageProcessorPil
    config_class, model_class, tiny = HfgdConfig, HfgdForSemanticSegmentation, TINY


def build(**fields):
    torch.manual_seed(0)
    model = HfgdForSemanticSegmentation(HfgdConfig(**{**TINY, "num_labels": NUM_LABELS, **fields}))
    with torch.no_grad():  # statistics that are no identity
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 1.5)
    return model


@torch.no_grad()
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"output_stride": 2, "align_corners": False},
        {"axial_projections": "shared", "merge_channels": 24},
        {"upsampler": "sfpn", "extra_encoding": "sa_car", "output_stride": 2},
    ],
    ids=str,
)
def test_rewritten_form_equals_the_reference_implementation(fields, training):
    model = build(**fields).double().train(training)
    pixel_values = torch.randn(2, 3, 65, 97, dtype=torch.float64)
    expected = reference_implementation(model)(pixel_values).logits
    torch.testing.assert_close(model(pixel_values).logits, expected, atol=1e-10, rtol=1e-10)


@torch.no_grad()
def test_axial_attention_equals_its_equations_in_loops():
    """Every pixel attends to its column, then to its row; 4 heads are blocks of channels, scale 1/sqrt(d)."""
    torch.manual_seed(0)
    config = HfgdConfig()
    config._attn_implementation = "sdpa"  # the one written out takes its softmax in float32
    layer = HfgdAxialAttention(config, 16).double()
    for parameter in layer.parameters():
        parameter.normal_(std=0.3)
    features = torch.randn(2, 16, 5, 3, dtype=torch.float64)

    def attend(axis, line):  # (length, C)
        query, key, value = (line @ each.weight.T + each.bias for each in (axis.q_proj, axis.k_proj, axis.v_proj))
        result = torch.zeros_like(line)
        for head in range(4):
            part = slice(4 * head, 4 * head + 4)
            for place in range(len(line)):
                products = torch.stack([query[place, part] @ other for other in key[:, part]]) / 2
                weights = products.exp() / products.exp().sum()
                result[place, part] = sum(w * v for w, v in zip(weights, value[:, part], strict=True))
        return result

    expected = features.clone()
    for image in expected:
        for column in range(3):
            image[:, :, column] = attend(layer.height, image[:, :, column].T).T
        for row in range(5):
            image[:, row] = attend(layer.width, image[:, row].T).T
    expected = torch.einsum("oc,bchw->bohw", layer.o_proj.weight, expected) + layer.o_proj.bias[:, None, None]
    torch.testing.assert_close(layer(features), expected)


def test_queries_and_keys_of_the_context_encoder_start_alike():
    """Specification, section 2: both come from the same random kernel."""
    layer = build().hfgd.context_encoder.self_attention
    assert isinstance(layer, HfgdSelfAttention)
    query, key = layer.qk_proj.weight.chunk(2)
    assert torch.equal(query, key) and query.std() > 0 and not layer.qk_proj.bias.any()


@torch.no_grad()
def test_513_pixels_keep_every_row_on_a_backbone_of_patches():
    """Section 2: 513 -> 129, 65, 33, 17; ConvNeXt and timm alone would floor to 128, 64, 32, 16."""
    sizes = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 12, 16, 24], "out_features": STAGES}
    with torch.device("meta"):
        model = HfgdModel(HfgdConfig(**TINY | {"backbone_config": ConvNextConfig(**sizes)})).eval()
        outputs = model(torch.zeros(1, 3, 513, 513), output_feature_maps=True)
    assert [each.shape[-1] for each in outputs.feature_maps] == [129, 65, 33, 17]
    assert outputs.last_hidden_state.shape[-1] == 129


BACKBONES = {
    "convnext": ConvNextConfig(depths=[1, 1, 1, 1], hidden_sizes=[8, 12, 16, 24], out_features=STAGES),
    "swin": SwinConfig(embed_dim=8, depths=[1, 1, 2, 1], num_heads=[1, 1, 2, 2], window_size=3, out_features=STAGES),
    "timm": TimmBackboneConfig(backbone="resnet10t", out_indices=[1, 2, 3, 4]),
    "dilated": TimmBackboneConfig(backbone="resnet10t", out_indices=[1, 2, 3, 4], output_stride=8),
}


@pytest.mark.parametrize("name", BACKBONES)
def test_backbone_trains_survives_saving_and_gives_raw_maps(name, tmp_path):
    model = build(backbone_config=BACKBONES[name])
    pixel_values, labels = torch.randn(2, 3, 65, 97), torch.randint(0, NUM_LABELS, (2, 65, 97))
    model.train()(pixel_values, labels=labels).loss.backward()
    assert not [key for key, each in model.named_parameters() if each.requires_grad and each.grad is None]
    assert not [key for key in model.state_dict() if "hidden_states_norms" in key]
    model.eval().save_pretrained(tmp_path)
    loaded = HfgdForSemanticSegmentation.from_pretrained(tmp_path)
    with torch.no_grad():
        assert_same_outputs(loaded(pixel_values).logits, model(pixel_values).logits)
        expected = 8 if name == "dilated" else 32
        outputs = model.hfgd(pixel_values, output_feature_maps=True)
    assert outputs.feature_maps[-1].shape[-2:] == (-(-65 // expected), -(-97 // expected))


def test_weights_of_a_timm_backbone_that_are_missing_are_initialized(tmp_path):
    """transformers' wrapper alone would leave them uninitialized."""
    model = build(backbone_config=BACKBONES["timm"])
    state = {key: value for key, value in model.state_dict().items() if "backbone" not in key}
    loaded = HfgdForSemanticSegmentation.from_pretrained(None, config=model.config, state_dict=state)
    assert all(value.isfinite().all() and value.abs().max() < 10 for value in loaded.state_dict().values())


def test_moving_centers_that_a_checkpoint_lacks_start_at_zero(tmp_path):
    build().save_pretrained(tmp_path)
    loaded = HfgdForSemanticSegmentation.from_pretrained(tmp_path, car_center_decay=0.9)
    assert loaded.regularization.class_centers.shape == (1, NUM_LABELS, 16)
    assert not loaded.regularization.class_centers.any()


def test_norms_of_the_maps_stay_on_request():
    model = build(backbone_config=BACKBONES["convnext"], normalize_features=True)
    assert [key for key in model.state_dict() if "hidden_states_norms.stage4" in key]


@torch.no_grad()
@pytest.mark.parametrize("name", ["swin", "resnet"])
def test_attention_can_be_chosen_when_a_checkpoint_is_loaded(name, tmp_path):
    """A ResNet without attention would refuse any choice but its own."""
    build(backbone_config=BACKBONES.get(name, TINY_RESNET)).save_pretrained(tmp_path)
    pixel_values, logits = torch.randn(1, 3, 64, 64), []
    for implementation in ("eager", "sdpa"):
        model = HfgdForSemanticSegmentation.from_pretrained(tmp_path, attn_implementation=implementation).eval()
        assert model.config._attn_implementation == implementation
        logits.append(model(pixel_values).logits)
    torch.testing.assert_close(*logits, atol=1e-4 * float(logits[0].std()), rtol=0)


def test_momentum_reaches_every_norm_of_the_model():
    model = build(batch_norm_momentum=0.0003)
    assert {each.momentum for each in model.modules() if isinstance(each, nn.BatchNorm2d)} == {0.0003}


def test_nothing_of_the_teachers_branch_is_computed_for_a_prediction():
    """Section 3: high-level logits, centers and regularization are for training."""
    model = build().eval()
    outputs = model(torch.randn(1, 3, 64, 64))
    assert outputs.high_level_logits is None and outputs.loss_dict is None
    asked = model(torch.randn(1, 3, 64, 64), output_auxiliary_logits=True)
    assert asked.high_level_logits.shape == (1, NUM_LABELS, 2, 2)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"axial_heads": 3}, "Change `decoder_width` or `axial_heads`"),
        ({"upsampler": "none"}, "set `guidance` and `axial_attention` to False"),
        ({"upsampler": "fapn", "output_stride": 2}, "'u_sfpn' or 'sfpn'"),
        ({"extra_encoding": "psp"}, "extra_encoding"),
        ({"car_center_decay": 0.9, "car_batch_center": False}, "set `car_batch_center`"),
    ],
)
def test_fields_that_do_not_fit_are_refused_with_a_fix(fields, message):
    with pytest.raises(StrictDataclassError, match=message):
        HfgdConfig(**{**TINY, **fields})


@pytest.mark.parametrize(
    "backbone, message",
    [
        ({**TINY_RESNET, "out_features": ["stage2", "stage4"]}, "returns 2 maps.*out_features"),
        ({**TINY_RESNET, "out_features": ["stem", *STAGES]}, "returns 5 maps"),
        ({**TINY_RESNET, "downsample_in_first_stage": True}, "strides 8, 16, 32, 64; 4, 8, 16, 32 are needed"),
    ],
)
def test_backbone_without_the_needed_maps_is_refused_at_construction(backbone, message):
    with pytest.raises(InputError, match=message):
        HfgdForSemanticSegmentation(HfgdConfig(**TINY | {"backbone_config": backbone}))


@torch.no_grad()
def test_running_the_backbone_at_construction_changes_no_statistics():
    model = HfgdForSemanticSegmentation(HfgdConfig(**copy.deepcopy(TINY), num_labels=2))
    assert all(not value.any() for key, value in model.state_dict().items() if key.endswith("running_mean"))
    assert model.hfgd.backbone.training
