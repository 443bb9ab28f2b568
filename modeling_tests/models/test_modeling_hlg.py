"""HLG: the common contract, and what its paper and specification fix for backbone, classification and segmentation."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoModelForImageClassification, UperNetConfig, UperNetForSemanticSegmentation

import hf_denseseg
from classification_model_tester import ClassificationModelTester
from closeness import assert_same_outputs
from hf_denseseg import (
    HlgBackbone,
    HlgConfig,
    HlgForImageClassification,
    HlgForSemanticSegmentation,
    HlgImageProcessor,
    HlgImageProcessorPil,
    HlgModel,
)
from hf_denseseg.models.auto.registration import reference_implementation
from hf_denseseg.models.hlg import modeling_hlg
from hf_denseseg.models.hlg.configuration_hlg import VARIANTS
from hf_denseseg.models.hlg.modeling_hlg import group_means
from hf_denseseg.models.hlg.positions_hlg import (
    HlgGrouping,
    HlgPlaces,
    HlgPositionBias,
    HlgTracedGrouping,
    gather_bias,
)
from model_tester import NUM_LABELS, SegmentationModelTester, gradients
from processor_tester import ImageProcessorTester

TINY = {
    "hidden_sizes": [16, 16, 32, 32],
    "depths": [2, 1, 2, 1],
    "num_attention_heads": [2, 2, 4, 2],
    "decoder_hidden_size": 32,
    "auxiliary_hidden_size": 8,
}


class TestHlgPup(SegmentationModelTester):
    config_class, model_class, base_class, backbone_class = (
        HlgConfig,
        HlgForSemanticSegmentation,
        HlgModel,
        HlgBackbone,
    )
    tiny, output_stride, smallest_side = TINY, 4, 4
    smallest_exported_side = 33  # below, the last stage has one row
    traced = {"depths": [1, 1, 1, 1]}
    own_outputs = ("auxiliary_logits",)
    typing_error = {"num_atention_heads": [1, 1, 1, 1]}

    def test_default_configuration_is_valid_and_has_the_common_fields(self):
        config = HlgConfig()
        assert (config.hidden_size, config.num_hidden_layers) == (512, 12)

    def test_wrong_type_is_refused(self):
        with pytest.raises(StrictDataclassError):
            HlgConfig(hidden_sizes="wide")

    def test_hidden_states_and_attentions_come_on_request(self, config, batch):
        """Maps of a pyramid; weights of every position over the windows, or over all positions (stage 4)."""
        config._attn_implementation = "eager"
        model = self.model_class(config).eval()
        plain = model(batch["pixel_values"])
        assert plain.hidden_states is None and plain.attentions is None
        outputs = model(batch["pixel_values"], output_hidden_states=True, output_attentions=True)
        sides = [(32, 32), (16, 16), (16, 16), (8, 8), (4, 4), (4, 4), (2, 2)]
        assert [tuple(each.shape[2:]) for each in outputs.hidden_states] == sides
        for weights, (height, width), stage in zip(outputs.attentions, sides[1:], (0, 0, 1, 2, 2, 3), strict=True):
            keys = math.ceil(height / 7) * math.ceil(width / 7) if stage < 3 else height * width
            assert weights.shape == (2, TINY["num_attention_heads"][stage], height * width, keys)
            torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
        outputs.hidden_states[0].retain_grad()
        outputs.logits.sum().backward()
        assert outputs.hidden_states[0].grad.abs().sum() > 0

    def test_every_parameter_learns(self, model, batch):
        """At 48 x 64 pixels the last stages have a single window; larger images reach every weight."""
        pixel_values = batch["pixel_values"].repeat(1, 1, 4, 4)
        model.train()(pixel_values, labels=batch["labels"].repeat(1, 4, 4)).loss.backward()
        missing = [name for name, each in model.named_parameters() if each.grad is None]
        assert not missing, f"no gradient reaches {missing[:5]}"

    @pytest.fixture
    def batch(self):
        generator = torch.Generator().manual_seed(1)
        labels = torch.randint(0, NUM_LABELS, (2, 64, 64), generator=generator)
        labels[0, :5] = 255
        return {"pixel_values": torch.randn(2, 3, 64, 64, generator=generator), "labels": labels}


class TestHlgUpernet:
    """Only the questions that another head can answer differently."""

    tiny, output_stride, smallest_side = {**TINY, "decode_head": "upernet"}, 4, 4
    config_class, model_class, base_class = HlgConfig, HlgForSemanticSegmentation, HlgModel
    logits_size = SegmentationModelTester.logits_size
    config, model, batch = SegmentationModelTester.config, SegmentationModelTester.model, TestHlgPup.batch
    test_sizes = SegmentationModelTester.test_any_size_gives_logits_of_the_stride
    test_gradients = SegmentationModelTester.test_every_parameter_learns
    test_initialization = SegmentationModelTester.test_missing_weights_are_initialized_exactly_as_by_the_constructor
    test_saving = SegmentationModelTester.test_saved_model_gives_the_same_logits_through_the_auto_class
    test_base_weights = SegmentationModelTester.test_base_weights_load_into_the_task_model_and_back


class TestHlgImageProcessor(ImageProcessorTester):
    torchvision_class, pil_class = HlgImageProcessor, HlgImageProcessorPil
    config_class, model_class, tiny = HlgConfig, HlgForSemanticSegmentation, TINY


def randomize(model):
    """Give every part an effect on the output: random weights, and BatchNorm statistics of random images."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.5
        parameter.data.normal_(std=scale, generator=generator)
    with torch.no_grad():
        model.train()(torch.randn(4, 3, 128, 96, generator=generator))
    return model.eval()


def build(model_class=HlgForSemanticSegmentation, **fields):
    return randomize(model_class(HlgConfig(**{**TINY, "num_labels": NUM_LABELS, **fields})))


# --- the complete model against the reference formulation


@torch.no_grad()
@pytest.mark.parametrize("mask_padding", [True, False])
@pytest.mark.parametrize("global_bias", ["window", "flat", "tuple4"])
@pytest.mark.parametrize("size", [(224, 224), (61, 100)])
def test_savings_equal_the_reference_implementation(mask_padding, global_bias, size):
    model = build(mask_padding=mask_padding, global_bias=global_bias)
    pixel_values = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(2))
    expected = reference_implementation(model)(pixel_values).logits
    for _ in range(2):  # the second time from the cache
        logits = F.interpolate(model(pixel_values).logits, size=size, mode="bilinear", align_corners=False)
        torch.testing.assert_close(logits, expected, atol=2e-5 * float(expected.std()), rtol=0)


ABLATIONS = {  # Tables 12 to 14
    "convolution": {"window_embedding": "convolution"},
    "plain": {"local_attention": "plain"},
    "dilated 5": {"dilated_window_size": 5},
    "dilated 5, convolution": {"dilated_window_size": 5, "window_embedding": "convolution"},
    "no local attention": {"local_attention": "none"},
    "baseline": {"local_attention": "none", "mlp_type": "plain"},
}


@torch.no_grad()
@pytest.mark.parametrize("mask_padding", [True, False])
@pytest.mark.parametrize("name", ABLATIONS)
def test_ablations_equal_their_reference_implementation(name, mask_padding):
    model = build(mask_padding=mask_padding, **ABLATIONS[name])
    pixel_values = torch.randn(2, 3, 61, 100, generator=torch.Generator().manual_seed(2))
    expected = reference_implementation(model)(pixel_values).logits
    logits = F.interpolate(model(pixel_values).logits, size=(61, 100), mode="bilinear", align_corners=False)
    torch.testing.assert_close(logits, expected, atol=2e-5 * float(expected.std()), rtol=0)


@pytest.mark.parametrize("kind, expected", [("dilated", [(7, False), (5, True)]), ("plain", [(7, False), (7, False)])])
def test_second_layer_of_a_stage_is_dilated_unless_all_are_plain(kind, expected):
    """Table 13; the window of a dilated layer spans the map with `dilated_window_size` tokens a side."""
    layers = build(local_attention=kind, dilated_window_size=5).hlg.encoder.stages[0]
    assert [(layer.attention.side, layer.attention.dilated) for layer in layers] == expected


@torch.no_grad()
def test_global_attention_alone_is_softmax_over_window_means():
    """Table 14 without local attention, position by position, on a map of two complete windows."""
    layer = build(local_attention="none").hlg.encoder.stages[0][0].attention
    features = torch.randn(1, 16, 7, 14)
    output, _ = layer(features, (7, 14))
    tokens = features.permute(0, 2, 3, 1)[0]
    means = torch.stack([tokens[:, :7].mean(dim=(0, 1)), tokens[:, 7:].mean(dim=(0, 1))])
    embedding = layer.layernorm_embedding(means)
    query, key, value = layer.q_proj(layer.layernorm_query(tokens)), layer.k_proj(embedding), layer.v_proj(embedding)
    attended = torch.zeros(7, 14, 16)
    for y in range(7):
        for x in range(14):
            bias = layer.global_bias.table(torch.tensor([[float(y - 3), float(x - u)] for u in (3, 10)]))
            for head in range(2):
                part = slice(head * 8, head * 8 + 8)
                weights = (key[:, part] @ query[y, x, part] * 8**-0.5 + bias[head]).softmax(0)
                attended[y, x, part] = weights @ value[:, part]
    torch.testing.assert_close(output[0].permute(1, 2, 0), tokens + layer.o_proj(attended), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_plain_mlp_is_a_patch_embedding_and_two_linear_layers():
    """Baseline of Table 14; the norm's statistics are fresh here, so BatchNorm divides by sqrt(1 + eps)."""
    mlp = modeling_hlg.HlgPlainMlp(HlgConfig(**TINY), 16, 32, downsample=True, drop_path_rate=0.0).eval()
    features = torch.randn(1, 16, 6, 4)
    weight = mlp.patch_embedding.weight.flatten(1)  # (32, 16 * 2 * 2)
    for y in range(3):
        for x in range(2):
            patch = features[0, :, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].flatten()
            token = weight @ patch + mlp.patch_embedding.bias
            expand, reduce = mlp.expand.convolution, mlp.reduce
            hidden = F.gelu((expand.weight[:, :, 0, 0] @ token + expand.bias) / (1 + mlp.expand.norm.eps) ** 0.5)
            expected = token + F.layer_norm(reduce.weight[:, :, 0, 0] @ hidden + reduce.bias, (32,), eps=1e-6)
            torch.testing.assert_close(mlp(features)[0, :, y, x], expected, atol=1e-5, rtol=1e-5)


def test_window_means_are_needed_without_local_attention():
    with pytest.raises(StrictDataclassError, match="'none' needs `window_embedding` 'mean', not 'max'"):
        HlgConfig(local_attention="none", window_embedding="max")


@pytest.mark.parametrize("grad", [True, False])
def test_attention_in_chunks_is_the_same_attention(grad, monkeypatch):
    """Above `CHUNK_ELEMENTS` the queries are processed in chunks; training recomputes each one."""
    model = build()
    pixel_values = torch.randn(2, 3, 96, 160)
    results = []
    for limit in (2**24, 256):
        monkeypatch.setattr(modeling_hlg, "CHUNK_ELEMENTS", limit)
        model.zero_grad()
        with torch.set_grad_enabled(grad):
            logits = model(pixel_values).logits
            if grad:
                logits.square().mean().backward()
        results.append((logits.detach(), gradients(model)))
    torch.testing.assert_close(results[1][0], results[0][0], atol=1e-5 * float(results[0][0].std()), rtol=0)
    scale = max((value.abs().max().item() for value in results[0][1].values()), default=1.0)
    for name, value in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], value, atol=1e-5 * scale, rtol=1e-3)


@torch.no_grad()
def test_padding_of_windows_does_not_matter_if_it_is_masked():
    """With `mask_padding` a map of 9 x 10 tokens gives the same as the attention written token by token."""
    layer = build().hlg.encoder.stages[0][0].attention
    features = torch.randn(1, 16, 9, 10)
    output, _ = layer(features, (9, 10))
    tokens = features.permute(0, 2, 3, 1)[0]  # (9, 10, C)
    normed = layer.layernorm_local(tokens)
    query, value = layer.q_proj(normed), layer.v_proj(normed)
    heads, dim = 2, layer.head_dim
    local = torch.zeros(9, 10, 16)
    windows = [(slice(i, i + 7), slice(j, j + 7)) for i in (0, 7) for j in (0, 7)]
    for rows, columns in windows:
        places = [(y, x) for y in range(9)[rows] for x in range(10)[columns]]
        for y, x in places:
            bias = layer.local_bias.table(torch.tensor([[float(y - v), float(x - u)] for v, u in places]))
            for head in range(heads):
                part = slice(head * dim, (head + 1) * dim)
                scores = torch.stack([query[y, x, part] @ query[v, u, part] for v, u in places]) * dim**-0.5
                weights = (scores + bias[head]).softmax(0)
                local[y, x, part] = sum(w * value[v, u, part] for w, (v, u) in zip(weights, places, strict=True))
    tokens = tokens + local
    means = torch.stack([tokens[rows, columns].mean(dim=(0, 1)) for rows, columns in windows])
    embedding = layer.layernorm_embedding(means)
    query = query + layer.query_convolution(layer.layernorm_query(local).permute(2, 0, 1)).permute(1, 2, 0)
    key, value = layer.k_proj(embedding), layer.v_proj(embedding)
    centers = [(3, 3), (3, 10), (10, 3), (10, 10)]
    attended = torch.zeros(9, 10, 16)
    for y in range(9):
        for x in range(10):
            bias = layer.global_bias.table(torch.tensor([[float(y - v), float(x - u)] for v, u in centers]))
            for head in range(heads):
                part = slice(head * dim, (head + 1) * dim)
                weights = (key[:, part] @ query[y, x, part] * dim**-0.5 + bias[head]).softmax(0)
                attended[y, x, part] = weights @ value[:, part]
    expected = tokens + layer.o_proj(attended)
    torch.testing.assert_close(output[0].permute(1, 2, 0), expected, atol=1e-5, rtol=1e-5)


# --- groups and places


@pytest.mark.parametrize("dilated", [False, True])
def test_windows_hold_the_tokens_that_the_specification_names(dilated):
    """Plain: rows 7i..7i+6. Dilated: rows a*h + i; the rate is the number of windows, also where h is not w."""
    grouping = HlgGrouping.windows((20, 12), 7, dilated)
    assert (grouping.groups, grouping.size) == ((3, 2), (21, 14))
    index = torch.arange(21 * 14).view(1, 21, 14, 1)
    groups = grouping.unfold(index)
    for i in range(3):
        for j in range(2):
            rows = [a * 3 + i for a in range(7)] if dilated else [7 * i + a for a in range(7)]
            columns = [b * 2 + j for b in range(7)] if dilated else [7 * j + b for b in range(7)]
            assert groups[2 * i + j, :, 0].tolist() == [y * 14 + x for y in rows for x in columns]
    assert torch.equal(grouping.fold(groups, 1, (21, 14)), index)


@pytest.mark.parametrize("size", [(20, 12), (14, 21), (5, 7)])
@pytest.mark.parametrize("kind", ["plain", "dilated", "phases"])
def test_grouping_of_exporters_is_the_same_one(kind, size):
    """Padding, several images, and maps of a single group."""
    plain = HlgGrouping.phases(size, 8) if kind == "phases" else HlgGrouping.windows(size, 7, kind == "dilated")
    tokens = torch.randn(3, *size, 4)
    traced = HlgTracedGrouping.of(plain, tokens)
    groups = plain.unfold(tokens, value=-1.0)
    assert torch.equal(traced.unfold(tokens, value=-1.0), groups)
    assert torch.equal(traced.fold(groups, 3, size), tokens) and torch.equal(plain.fold(groups, 3, size), tokens)
    keys = plain.keys(groups[:, 0], 3)
    assert torch.equal(traced.keys(groups[:, 0], 3), torch.cat([keys, keys[:, -1:]], dim=1))


@pytest.mark.parametrize("rule", ["window", "flat", "tuple4"])
def test_no_query_attends_to_the_spare_key_of_exporters(rule):
    bias = HlgPositionBias(16, 2)
    places = HlgPlaces.of(rule, (9, 17), HlgGrouping.windows((9, 17), 7, dilated=False))
    found = bias(places._replace(spare=True), torch.zeros(1))
    torch.testing.assert_close(found[..., :-1], bias(places, torch.zeros(1)))
    assert (found[..., -1] == -torch.inf).all()


def test_phases_of_the_decoder_have_a_fixed_rate():
    """Group (i, j) = rows i mod 8, columns j mod 8: it grows with the map."""
    grouping = HlgGrouping.phases((20, 30), 8)
    groups = grouping.unfold(torch.arange(24 * 32).view(1, 24, 32, 1))
    assert groups.shape == (64, 12, 1)
    assert groups[2 * 8 + 5, :, 0].tolist() == [y * 32 + x for y in (2, 10, 18) for x in (5, 13, 21, 29)]


def test_means_leave_the_padding_out_on_request():
    grouping = HlgGrouping.windows((9, 7), 7, dilated=False)
    tokens = torch.randn(1, 9, 7, 4)
    filled = F.pad(tokens, (0, 0, 0, 0, 0, 5))
    expected = torch.stack([tokens[0, :7].mean((0, 1)), tokens[0, 7:].mean((0, 1))])
    torch.testing.assert_close(group_means(filled, grouping, (9, 7)), expected)
    torch.testing.assert_close(group_means(filled, grouping, None)[1], expected[1] * 2 / 7)


def bias_by_definition(bias, rule, height, width, grouping):
    """Section 4 of the specification, entry by entry."""
    (h, w), (t, u) = grouping.groups, grouping.tokens
    rows = [(y, x) for y in range(1 - height, height) for x in range(1 - width, width)]
    offsets = []
    for n in range(height * width):
        y, x = divmod(n, width)
        for m in range(h * w):
            i, j = divmod(m, w)
            if rule == "flat":
                offset = (y - m // width, x - m % width)
            elif rule == "tuple4":
                offset = rows[(y - i + h - 1) * (2 * w - 1) + (x - j + w - 1)]
            elif grouping.dilated:
                offset = (y - (i + h * (t - 1) // 2), x - (j + w * (u - 1) // 2))
            else:
                offset = (y - (7 * i + 3), x - (7 * j + 3))
            offsets.append(offset)
    return bias.table(torch.tensor(offsets, dtype=torch.float32)).view(1, bias.num_heads, height * width, h * w)


@torch.no_grad()
@pytest.mark.parametrize("rule", ["window", "flat", "tuple4"])
@pytest.mark.parametrize(
    "grouping",
    [
        HlgGrouping.windows((9, 17), 7, dilated=False),
        HlgGrouping.windows((9, 17), 7, dilated=True),
        HlgGrouping.phases((9, 17), 8),
    ],
    ids=["plain", "dilated", "phases"],
)
def test_position_bias_is_that_of_the_definition(rule, grouping):
    torch.manual_seed(0)
    bias = HlgPositionBias(32, 2).eval()
    if rule == "tuple4" and grouping == HlgGrouping.phases((9, 17), 8):
        grouping = HlgGrouping.phases((9, 17), 4)  # the rule needs no more keys than positions
    found = bias(HlgPlaces.of(rule, (9, 17), grouping), torch.zeros(1))
    torch.testing.assert_close(found, bias_by_definition(bias, rule, 9, 17, grouping))
    table, query, key = bias.look_up(HlgPlaces.of(rule, (9, 17), grouping), torch.zeros(1))
    torch.testing.assert_close(gather_bias(table, query, key), found)


@torch.no_grad()
def test_position_bias_follows_weights_sizes_dtype_and_copies():
    """Averaging helpers write through `.data`, which leaves a tensor's version as it was."""
    torch.manual_seed(0)
    bias = HlgPositionBias(32, 2).eval()

    def check(height, width, dtype=torch.float32):
        like = torch.zeros(1, dtype=dtype)
        grouping = HlgGrouping.windows((height, width), 7, dilated=False)
        found = bias(HlgPlaces.of("window", (height, width), grouping), like)
        assert found.dtype == dtype
        expected = bias_by_definition(copy.deepcopy(bias).float(), "window", height, width, grouping)
        torch.testing.assert_close(found.float(), expected, atol=2e-2 if dtype == torch.half else 1e-5, rtol=0)
        return found

    first = check(9, 17)
    check(17, 9)
    torch.testing.assert_close(check(9, 17), first)
    for each in bias.parameters():
        each.data.mul_(1.5)
    assert not torch.allclose(check(9, 17), first)
    other = copy.deepcopy(bias)
    other.layers[2].bias.data.add_(1)
    check(9, 17)
    bias.half()
    check(9, 17, torch.half)
    assert bias.to("meta")(HlgPlaces((5, 6), (5, 6)), torch.zeros(1, device="meta")).device.type == "meta"


def test_trained_weights_are_seen_by_the_next_evaluation():
    model = build()
    pixel_values = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        before = model(pixel_values).logits
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()(pixel_values).logits.square().mean().backward()
    optimizer.step()
    with torch.no_grad():
        after = model.eval()(pixel_values).logits
        assert not torch.equal(before, after)
        torch.testing.assert_close(copy.deepcopy(model).train().eval()(pixel_values).logits, after)


def test_offsets_of_large_maps_stay_exact_in_bfloat16():
    bias = HlgPositionBias(32, 2)
    exact = bias.table(torch.tensor([[301.0, -299.0]]))
    low = copy.deepcopy(bias).bfloat16()
    rounded = low.table(torch.tensor([[301.0, -299.0]]))
    weights = copy.deepcopy(low).float().table(torch.tensor([[301.0, -299.0]]))
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, weights)
    assert exact.shape == (2, 1)


# --- tasks


def test_classification_is_linear_in_the_mean_of_the_last_map():
    model = build(HlgForImageClassification, normalize_stages=False)
    pixel_values = torch.randn(2, 3, 64, 96)
    tokens = model.hlg(pixel_values).last_hidden_state.flatten(2).mean(2)
    torch.testing.assert_close(model(pixel_values).logits, tokens @ model.classifier.weight.T + model.classifier.bias)


class TestHlgClassification(ClassificationModelTester):
    config_class, model_class = HlgConfig, HlgForImageClassification
    tiny = {**TINY, "normalize_stages": False}


@torch.no_grad()
def test_classification_checkpoint_feeds_the_dense_models(tmp_path, caplog):
    classifier = build(HlgForImageClassification, normalize_stages=False)
    classifier.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    pixel_values = torch.randn(1, 3, 64, 64)
    assert_same_outputs(loaded(pixel_values).logits, classifier(pixel_values).logits)
    dense, report = HlgForSemanticSegmentation.from_pretrained(
        tmp_path, normalize_stages=True, output_loading_info=True
    )
    encoder = [key for key in report["missing_keys"] if key.startswith("hlg.")]
    assert sorted(encoder) == [f"hlg.encoder.layernorms.{k}.{part}" for k in range(3) for part in ("bias", "weight")]
    assert all(torch.equal(each.weight, torch.ones_like(each.weight)) for each in dense.hlg.encoder.layernorms[:3])
    key = "hlg.encoder.stages.2.1.attention.q_proj.weight"
    assert torch.equal(dense.state_dict()[key], classifier.state_dict()[key])


@torch.no_grad()
def test_encoder_of_a_run_starts_a_dense_model_of_a_recipe(tmp_path, monkeypatch):
    """`encoder_weights` may be the folder of our own ImageNet run: rules and head are those of the recipe's model."""
    classifier = build(HlgForImageClassification, normalize_stages=False)
    classifier.save_pretrained(tmp_path)
    monkeypatch.setitem(VARIANTS, "hlg-pup-small", {**VARIANTS["hlg-pup-small"], **TINY})
    dense = hf_denseseg.load_official("hlg", str(tmp_path), "hlg-pup-small", num_labels=NUM_LABELS)
    assert (dense.config.global_bias, dense.config.mask_padding) == ("window", True)
    found, given = dense.hlg.state_dict(), classifier.hlg.state_dict()
    assert all(torch.equal(found[key], value) for key, value in given.items())
    assert {key for key in found if key not in given} == {
        f"encoder.layernorms.{k}.{part}" for k in range(3) for part in ("bias", "weight")
    }


def test_checkpoint_of_another_task_is_refused_with_its_name():
    with pytest.raises(ValueError, match="one of HlgForObjectDetection, but HlgForSemanticSegmentation"):
        hf_denseseg.load_official("hlg", {"bbox_head.retina_cls.weight": torch.zeros(9, 4)}, "hlg-pup-small")
    with pytest.raises(ValueError, match="hold no HLG encoder"):
        hf_denseseg.load_official("hlg", {"weight": torch.zeros(1)}, "hlg-pup-small")


@torch.no_grad()
@pytest.mark.parametrize("auxiliary", [True, False])
def test_upernet_is_transformers_own_and_exchanges_weights_with_it(auxiliary):
    model = build(decode_head="upernet", use_auxiliary_head=auxiliary)
    config = UperNetConfig(
        backbone_config=HlgConfig(**TINY, out_features=["stage1", "stage2", "stage3", "stage4"]),
        hidden_size=TINY["decoder_hidden_size"],
        auxiliary_channels=TINY["auxiliary_hidden_size"],
        use_auxiliary_head=auxiliary,
    )
    config.num_labels = NUM_LABELS
    theirs = UperNetForSemanticSegmentation(config).eval()
    state = {name.replace("hlg.", "backbone.", 1): value for name, value in model.state_dict().items()}
    theirs.load_state_dict(state)
    pixel_values = torch.randn(2, 3, 64, 96)
    logits = F.interpolate(model(pixel_values).logits, size=(64, 96), mode="bilinear", align_corners=False)
    torch.testing.assert_close(logits, theirs(pixel_values).logits, atol=1e-5, rtol=1e-4)


def test_loss_is_main_plus_weighted_auxiliary_over_all_pixels():
    model = build(auxiliary_loss_weight=0.3)
    labels = torch.randint(0, NUM_LABELS, (2, 64, 64))
    labels[0, :20] = 255
    outputs = model(torch.randn(2, 3, 64, 64), labels=labels)
    assert outputs.logits.shape == (2, NUM_LABELS, 16, 16)
    assert outputs.auxiliary_logits.shape == (2, NUM_LABELS, 4, 4)

    def mean_over_all(logits):
        logits = F.interpolate(logits, size=(64, 64), mode="bilinear", align_corners=False)
        return F.cross_entropy(logits, labels, ignore_index=255, reduction="sum") / labels.numel()

    expected = mean_over_all(outputs.logits) + 0.3 * mean_over_all(outputs.auxiliary_logits)
    torch.testing.assert_close(outputs.loss, expected)


@pytest.mark.parametrize("choice", ["max", "convolution"])
def test_other_window_embeddings_of_table_12(choice):
    model = build(window_embedding=choice).eval()
    layer = model.hlg.encoder.stages[0][0].attention
    tokens = torch.randn(1, 9, 7, 16)
    embedding = layer._embed(tokens, HlgGrouping.windows((9, 7), 7, dilated=False), None)
    if choice == "max":
        expected = torch.stack([tokens[0, :7].amax((0, 1)), tokens[0, 7:].amax((0, 1))])
    else:
        filled = F.pad(tokens, (0, 0, 0, 0, 0, 5)).permute(0, 3, 1, 2)
        weight, bias = layer.embedding_convolution.parameters()
        expected = F.conv2d(filled, weight, bias, stride=7, groups=16)[0, :, :, 0].T
    torch.testing.assert_close(embedding, expected)
    model.train()(torch.randn(2, 3, 224, 224)).logits.mean().backward()
    assert all(each.grad is not None for each in layer.parameters())


# --- sizes


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"hidden_sizes": [16, 24, 48, 96]}, "multiple of the 16 channels before it"),
        ({"num_attention_heads": [3, 2, 4, 2]}, "3 heads do not divide"),
        ({"depths": [2, 2, 2]}, "4 positive numbers"),
        ({"stem_kernel_sizes": [3, 2]}, "odd numbers"),
        ({"drop_path_rate": 1.0}, r"\[0, 1\)"),
        ({"decoder_hidden_size": 40}, "multiple of 32"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_the_field(fields, message):
    with pytest.raises(StrictDataclassError, match=message):
        HlgConfig(**{**TINY, **fields})


def test_drop_path_rises_linearly_and_serves_both_branches_of_a_layer():
    model = HlgModel(HlgConfig(**{**TINY, "drop_path_rate": 0.5}))
    layers = [layer for stage in model.encoder.stages for layer in stage]
    assert [layer.mlp.drop_path.rate for layer in layers] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])
    assert all(layer.attention.drop_path.rate == layer.mlp.drop_path.rate for layer in layers)


def test_depth_of_parameters_follows_the_layers():
    model = HlgForSemanticSegmentation(HlgConfig(**TINY, num_labels=NUM_LABELS))
    depths = {name: model.parameter_depth(name) for name, _ in model.hlg.named_parameters()}
    assert {deepest for _, deepest in depths.values()} == {7}
    assert depths["encoder.stem.0.convolution.weight"][0] == 0
    assert depths["encoder.stages.2.1.mlp.reduce.weight"][0] == 5
    assert depths["encoder.layernorms.0.weight"][0] == 2


def test_folded_batch_norm_equals_the_layer_and_follows_its_statistics():
    part = modeling_hlg.HlgConvNorm(6, 8, kernel_size=3, stride=2)
    for _ in range(3):
        part.train()(torch.randn(4, 6, 9, 9) * 3 + 1)
    features = torch.randn(2, 6, 9, 9)
    torch.testing.assert_close(part.eval()(features), part.norm(part.convolution(features)), atol=1e-5, rtol=1e-4)


def test_released_names_differ_as_the_specification_says():
    released = {size: hf_denseseg.create_config(f"hlg-{size}-release") for size in ("mobile", "tiny", "large")}
    assert all(list(config.stem_kernel_sizes) == [3, 3] for config in released.values())
    assert list(released["mobile"].hidden_sizes) == [32, 64, 192, 384]
    assert released["large"].depths[2] == 14 and hf_denseseg.create_config("hlg-large").depths[2] == 18


@pytest.mark.slow
def test_classifier_overfits_eight_images():
    torch.manual_seed(0)
    model = HlgForImageClassification(HlgConfig(**TINY, num_labels=8, normalize_stages=False, drop_path_rate=0.0))
    pixel_values, labels = torch.randn(8, 3, 64, 64), torch.arange(8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(60):
        optimizer.zero_grad()
        model.train()(pixel_values, labels=labels).loss.backward()
        optimizer.step()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    assert model(pixel_values).logits.argmax(1).equal(labels)
