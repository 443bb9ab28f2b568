"""The other context encoders and upsamplers of HFGD against their equations, written without the modules."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError

from hf_denseseg import HfgdConfig, HfgdForSemanticSegmentation, HfgdModel
from hf_denseseg.models.hfgd import upsamplers_hfgd as upsamplers
from hf_denseseg.models.hfgd.configuration_hfgd import LEVELS
from hf_denseseg.models.hfgd.upsamplers_hfgd import ENCODERS, UPSAMPLERS

LOW = [4, 6, 10]
PAIRS = [("identity", "fapn"), ("ppm", "upernet"), ("aspp", "deeplabv3plus")]  # Table 8


def config(**fields):
    return HfgdConfig(**{"decoder_width": 8, "merge_channels": 8, "axial_heads": 2} | fields)


def randomized(module: torch.nn.Module) -> torch.nn.Module:
    """Eval mode, with random weights and norms that are no identity."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.is_floating_point():
            spread = 0.3 * torch.randn(tensor.shape, generator=generator)
            tensor.data.copy_(spread.exp() if name.endswith("running_var") else spread)
    return module.eval()


def pyramid(batch: int = 2) -> list[torch.Tensor]:
    """C2 to C5 of an image of 132 x 196."""
    sizes = [(33, 49), (17, 25), (9, 13), (5, 7)]
    return [torch.randn(batch, channels, *size) for channels, size in zip([*LOW, 12], sizes, strict=True)]


def cbr(block, features, dilation=1):
    """Convolution of the same size, norm with eps 1e-3, ReLU."""
    kernel, norm = block.convolution.weight, block.norm
    padding = dilation * (kernel.shape[-1] // 2)
    convolved = F.conv2d(features, kernel, padding=padding, dilation=dilation)
    values = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    mean, variance, gain, shift = (each[:, None, None] for each in values)
    return F.relu((convolved - mean) / (variance + 1e-3).sqrt() * gain + shift)


def agree(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def enlarge(features, like):
    return F.interpolate(features, size=like.shape[-2:], mode="bilinear", align_corners=True)


def deformable_in_loops(features, offsets, weights, kernel, bias):
    """Sum over the taps of weight * kernel * the map at (y, x) + tap + offset, bilinear and 0 outside."""
    _, height, width = features.shape
    out = bias[:, None, None].repeat(1, height, width)
    for y, x, tap in itertools.product(range(height), range(width), range(9)):
        at_y = y + tap // 3 - 1 + offsets[2 * tap, y, x].item()
        at_x = x + tap % 3 - 1 + offsets[2 * tap + 1, y, x].item()
        for row, column in itertools.product(range(height), range(width)):
            weight = max(1 - abs(at_y - row), 0) * max(1 - abs(at_x - column), 0)
            out[:, y, x] += weight * weights[tap, y, x] * (kernel[:, :, tap // 3, tap % 3] @ features[:, row, column])
    return out


def test_deformable_convolution_samples_where_the_offsets_point():
    module = randomized(upsamplers.HfgdDeformableConvolution(3))
    features, guide = torch.randn(1, 3, 5, 6), 3 * torch.randn(1, 3, 5, 6)
    predicted = F.conv2d(guide, module.offsets.weight, module.offsets.bias, padding=1)[0]
    assert predicted[:18].abs().max() > 2  # some taps leave the map
    kernel, bias = (each.detach() for each in module.convolution.parameters())
    weights = predicted[18:].sigmoid().detach()
    agree(module(features, guide)[0], deformable_in_loops(features[0], predicted[:18], weights, kernel, bias))


def test_alignment_shifts_the_top_by_offsets_from_both_maps_and_adds_the_lateral():
    module = randomized(upsamplers.HfgdFeatureAlignment(4, 8, align_corners=True))
    low, top = torch.randn(2, 4, 9, 7), torch.randn(2, 8, 5, 4)
    mean = low.sum(dim=(2, 3), keepdim=True) / 63
    gate = torch.sigmoid(F.conv2d(F.relu(F.conv2d(mean, module.squeeze.weight)), module.excite.weight))
    lateral = F.conv2d(low + gate * low, module.lateral.weight)
    from_lateral, from_top = module.difference.weight.split(8, dim=1)
    guide = F.conv2d(lateral, from_lateral) + 2 * F.conv2d(enlarge(top, low), from_top)
    expected = lateral + F.relu(module.deformable(enlarge(top, low), guide))
    agree(module(low, top), expected)


def test_new_model_starts_with_a_plain_convolution_at_half_strength():
    sizes = {"model_type": "resnet", "hidden_sizes": [8] * 4, "depths": [1] * 4, "embedding_size": 8}
    model = HfgdModel(config(upsampler="fapn", backbone_config=sizes | {"out_features": list(LEVELS)}))
    deformable, features = model.upsampler.alignments[0].deformable, torch.randn(2, 8, 5, 7)
    kernel, bias = deformable.convolution.parameters()
    expected = F.conv2d(features, kernel / 2, bias, padding=1)
    agree(deformable(features, features), expected)


def test_upsamplers_join_their_levels():
    *low, _ = pyramid()
    fapn, upernet, deeplab = (randomized(kind(config(), LOW, 8)) for kind in UPSAMPLERS.values())
    top = torch.randn(2, 8, 5, 7)
    maps = [top]
    for level in (2, 1, 0):
        maps.insert(0, fapn.alignments[level](low[level], maps[0]))
    torch.testing.assert_close(fapn(low, top, (132, 196)), fapn.semantic(maps, (132, 196)))

    maps = [cbr(upernet.top, top)]  # 16 wide there
    for level in (2, 1, 0):
        maps.insert(0, cbr(upernet.laterals[level], low[level]) + enlarge(maps[0], low[level]))
    levels = [*(cbr(block, each) for block, each in zip(upernet.smoothing, maps[:3], strict=True)), maps[3]]
    expected = cbr(upernet.fusion, torch.cat([enlarge(each, low[0]) for each in levels], dim=1))
    agree(upernet(low, top, (132, 196)), expected)

    joined = torch.cat([cbr(deeplab.low, low[0]), enlarge(top, low[0])], dim=1)
    expected = cbr(deeplab.fusion[1], cbr(deeplab.fusion[0], joined))
    agree(deeplab(low, top, (132, 196)), expected)


def test_aspp_pools_globally_and_convolves_at_four_rates():
    features = torch.randn(2, 12, 30, 27)
    module = randomized(ENCODERS["aspp"](config(), 12))
    pool, pixel, *atrous = module.branches
    pooled = cbr(pool.block, features.mean(dim=(2, 3), keepdim=True)).expand(-1, -1, 30, 27)
    dilated = [cbr(block, features, rate) for block, rate in zip(atrous, (12, 24, 36), strict=True)]
    expected = cbr(module.fusion, torch.cat([pooled, cbr(pixel, features), *dilated], dim=1))
    agree(module(features)[0], expected)


def test_ocr_attends_to_the_means_of_soft_regions():
    """Yuan et al. 2020, Eq. 1 to 4, for one image, region by region and pixel by pixel."""
    features = torch.randn(1, 12, 4, 3)
    module = randomized(ENCODERS["ocr"](config(cae_channels=8, num_labels=5), 12))
    hidden = cbr(module.regions[0], features)
    logits = F.conv2d(hidden, module.regions[1].weight, module.regions[1].bias)
    pixels = cbr(module.pixels, features)
    regions = torch.zeros(1, 8, 5, 1)
    for k in range(5):
        weights = logits[0, k].exp() / logits[0, k].exp().sum()
        regions[0, :, k, 0] = (weights * pixels[0]).sum(dim=(1, 2))
    query, key = (cbr(part[1], cbr(part[0], each)) for part, each in ((module.query, pixels), (module.key, regions)))
    value, context = cbr(module.value, regions), torch.zeros(1, 4, 4, 3)
    for y, x in itertools.product(range(4), range(3)):
        scores = torch.stack([query[0, :, y, x] @ key[0, :, k, 0] / 2 for k in range(5)])  # sqrt(4) channels
        context[0, :, y, x] = sum(w * value[0, :, k, 0] for k, w in enumerate(scores.softmax(0)))
    expected = cbr(module.fusion, torch.cat([cbr(module.expand, context), pixels], dim=1))
    high_level, region_logits = module(features)
    agree(high_level, expected)
    agree(region_logits, logits)


def bins_in_loops(features, bins):
    rows, columns = ([(i * n // bins, -(-(i + 1) * n // bins)) for i in range(bins)] for n in features.shape[-2:])
    means = [[features[..., a:b, c:d].mean(dim=(2, 3)) for c, d in columns] for a, b in rows]
    return torch.stack([torch.stack(row, dim=-1) for row in means], dim=-2)


@pytest.mark.parametrize("size", [(17, 13), (5, 3)], ids=str)
def test_pyramid_pooling_joins_four_grids_of_means(size):
    features = torch.randn(2, 12, *size)
    module = randomized(ENCODERS["ppm"](config(), 12))
    small = [cbr(pool.block, bins_in_loops(features, n)) for pool, n in zip(module.pools, (1, 2, 3, 6), strict=True)]
    pooled = [enlarge(each, features) for each in small]
    expected = cbr(module.fusion, torch.cat([features, *pooled], dim=1))
    agree(module(features)[0], expected)


def test_global_pooling_normalizes_by_the_statistics_of_the_means():
    module = upsamplers.HfgdPooledContext(4, 6, 1, bins=1, align_corners=True).train()
    features = torch.randn(3, 4, 5, 7)
    values = module.block.convolution(features.mean(dim=(2, 3), keepdim=True))
    expected = F.relu(F.batch_norm(values, None, None, training=True, eps=1e-3)).expand(-1, -1, 5, 7)
    torch.testing.assert_close(module(features), expected)
    torch.testing.assert_close(module.block.norm.running_mean, 0.1 * values.mean(dim=(0, 2, 3)))
    torch.nn.init.constant_(module.block.norm.bias, 0.5)
    torch.testing.assert_close(module(features[:1]), torch.full((1, 6, 5, 7), 0.5))  # one image has no variance


@pytest.mark.parametrize(("encoder", "upsampler"), PAIRS)
def test_one_image_of_odd_size_trains_every_weight(encoder, upsampler):
    *low, c5 = pyramid(batch=1)
    teacher = ENCODERS[encoder](config(), 12)
    student = UPSAMPLERS[upsampler](config(), LOW, teacher.channels)
    top, regularized = teacher(c5)
    out = student(low, top, (132, 196))
    assert regularized is None and top.shape == (1, teacher.channels, 5, 7)
    assert out.shape == (1, student.channels, 33, 49)
    out.square().mean().backward()
    assert not [name for part in (teacher, student) for name, p in part.named_parameters() if p.grad is None]


def test_parameters_follow_from_the_published_widths():
    def block(inputs, outputs, kernel):
        return inputs * outputs * kernel**2 + 2 * outputs

    def alignment(c):
        return 2 * c * c + 256 * c + 2 * 256 * 256 + (256 * 27 * 9 + 27) + (256 * 256 * 9 + 256)

    low, width = [256, 512, 1024], 512
    fapn = sum(alignment(c) for c in low) + 7 * block(256, 256, 3) + block(256, 256, 1)
    upernet = sum(block(c, width, 1) for c in low) + 3 * block(width, width, 3) + block(4 * width, width, 3)
    deeplab = block(256, 48, 1) + block(48 + 256, 256, 3) + block(256, 256, 3)
    expected = {
        "identity": block(2048, 256, 1),
        "ocr": block(2048, width, 1)
        + (width + 1) * 59
        + block(2048, width, 3)
        + 3 * block(width, 256, 1)
        + 2 * block(256, 256, 1)
        + block(256, width, 1)
        + block(2 * width, 256, 1),
        "aspp": 2 * block(2048, 256, 1) + 3 * block(2048, 256, 3) + block(5 * 256, 256, 1),
        "ppm": 4 * block(2048, width, 3) + block(2048 + 4 * width, width, 3),
        **{"fapn": fapn, "upernet": upernet, "deeplabv3plus": deeplab},
    }
    with torch.device("meta"):
        built = {name: kind(HfgdConfig(num_labels=59), 2048) for name, kind in ENCODERS.items()}
        tops = {upsampler: built[encoder].channels for encoder, upsampler in PAIRS}
        built |= {name: kind(HfgdConfig(), low, tops[name]) for name, kind in UPSAMPLERS.items()}
    assert {name: sum(p.numel() for p in each.parameters()) for name, each in built.items()} == expected


SMALL = {
    "backbone_config": {
        "model_type": "resnet",
        "hidden_sizes": [8] * 4,
        "depths": [1] * 4,
        "embedding_size": 8,
        "out_features": list(LEVELS),
    },
    **{"cae_channels": 8, "num_labels": 5, "guidance": False, "axial_attention": False},
}


@pytest.mark.parametrize("upsampler", ["none", "sfpn"])
def test_regions_of_ocr_learn_from_the_labels(upsampler):
    """Table 1; weight 0.4 as in its paper (Sec. 4.1)."""
    model = HfgdForSemanticSegmentation(config(**SMALL, extra_encoding="ocr", upsampler=upsampler))
    pixel_values, labels = torch.randn(2, 3, 65, 97), torch.randint(5, (2, 65, 97))
    outputs = model(pixel_values, labels=labels)
    assert set(outputs.loss_dict) == {"guided", "regions"}
    regions = enlarge(model.hfgd(pixel_values).region_logits, labels[:, None])
    torch.testing.assert_close(outputs.loss_dict["regions"], F.cross_entropy(regions, labels))
    torch.testing.assert_close(outputs.loss, outputs.loss_dict["guided"] + 0.4 * outputs.loss_dict["regions"])
    outputs.loss.backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]


@pytest.mark.parametrize("kind", ["joint", "stopped"])
def test_auxiliary_fcn_predicts_and_when_stopped_leaves_the_backbone_alone(kind):
    """Sec. 5.1: 44.35 and 40.04 are scores of this branch."""
    fields = {"extra_encoding": "identity", "upsampler": "sfpn", "auxiliary_fcn": kind}
    model = HfgdForSemanticSegmentation(config(**SMALL, **fields, batch_norm_momentum=0.25))
    assert {m.momentum for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {0.25}
    pixel_values, labels = torch.randn(2, 3, 65, 97), torch.randint(5, (2, 65, 97))
    outputs = model(pixel_values, labels=labels)
    top = enlarge(outputs.logits, labels[:, None])
    assert outputs.logits.shape == (2, 5, 3, 4)  # stride 32, the upsampler's would have 4
    torch.testing.assert_close(outputs.loss_dict["auxiliary"], F.cross_entropy(top, labels))
    torch.testing.assert_close(outputs.loss, outputs.loss_dict["auxiliary"] + outputs.loss_dict["guided"])
    outputs.loss_dict["auxiliary"].backward()
    reached = {name.partition(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert reached == ({"auxiliary_fcn"} if kind == "stopped" else {"auxiliary_fcn", "hfgd"})


def test_auxiliary_fcn_stands_beside_an_unguided_upsampler():
    with pytest.raises(StrictDataclassError, match="`auxiliary_fcn` is for unguided networks"):
        config(auxiliary_fcn="joint")
