"""UN-EPT's four losses: weights, class balance, guards, gradients."""

import math

import pytest
import torch
from transformers.utils import logging

from closeness import assert_same_outputs
from hf_denseseg import UneptConfig, UneptForSemanticSegmentation
from hf_denseseg.errors import InputError
from hf_denseseg.models.losses import segmentation_loss
from hf_denseseg.models.unept.modeling_unept import enlarge
from hf_denseseg.models.unept.refinement_unept import balanced_loss
from test_modeling_unept import TINY


def build(**fields):
    torch.manual_seed(0)
    model = UneptForSemanticSegmentation(UneptConfig(**{**TINY, "num_labels": 5, **fields})).eval()
    torch.nn.init.normal_(model.boundary_head[3].weight, std=5)
    torch.nn.init.normal_(model.direction_head[3].weight, std=5)
    return model


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 5, (2, 6, 8), generator=generator).repeat_interleave(8, 1).repeat_interleave(8, 2)
    labels[0, :5] = 255
    return {"pixel_values": torch.randn(2, 3, 48, 64, generator=generator), "labels": labels}


def balanced_in_loops(logits, targets):
    """Section 9: weight 1 - n_i / n, mean weighted by it."""
    pixels = [(b, y, x) for b, y, x in torch.nonzero(targets != 255).tolist()]
    counts = [sum(int(targets[p]) == k for p in pixels) for k in range(logits.shape[1])]
    total = weight_sum = 0.0
    for b, y, x in pixels:
        k = int(targets[b, y, x])
        weight = 1 - counts[k] / len(pixels)
        values = logits[b, :, y, x].tolist()
        total += weight * (math.log(sum(math.exp(value) for value in values)) - values[k])
        weight_sum += weight
    return total / weight_sum


def test_class_balance_is_that_of_the_batch():
    logits, targets = torch.randn(2, 8, 6, 7), torch.randint(0, 8, (2, 6, 7))
    targets[0, :2] = 255
    assert float(balanced_loss(logits, targets)) == pytest.approx(balanced_in_loops(logits, targets), rel=1e-5)


@pytest.mark.parametrize("value", [0, 255])
def test_one_class_or_none_gives_zero_and_not_nan(value):
    """The released code divides 0 by 0."""
    logits = torch.randn(1, 2, 4, 5, requires_grad=True)
    loss = balanced_loss(logits, torch.full((1, 4, 5), value))
    loss.backward()
    assert loss.item() == 0 and (logits.grad == 0).all()


@pytest.mark.parametrize("preset, weights", [("code", (0.8, 1, 5, 0.6)), ("paper", (1, 1.5, 3, 0.7))])
@pytest.mark.parametrize("supervision", ["predicted", "true"])
def test_loss_is_the_weighted_sum_of_four_terms(batch, preset, weights, supervision):
    model = build(loss_weights=preset, direction_supervision=supervision)
    outputs = model(**batch, output_refined_logits=True)
    targets = [model.training_targets(label.numpy()) for label in batch["labels"]]
    boundary_labels, direction_labels = (
        torch.stack([torch.from_numpy(each[name]).long() for each in targets]) for name in targets[0]
    )
    boundary, direction = (
        enlarge(each, (48, 64), align_corners=True) for each in (outputs.boundary_logits, outputs.direction_logits)
    )
    chosen = boundary.softmax(1)[:, 1] > 0.5 if supervision == "predicted" else boundary_labels == 1
    assert 0 < chosen.sum() < chosen.numel()
    terms = (
        segmentation_loss(outputs.coarse_logits, batch["labels"], normalization="all"),
        segmentation_loss(outputs.refined_logits, batch["labels"], normalization="all"),
        balanced_in_loops(boundary, boundary_labels),
        balanced_in_loops(direction, torch.where(chosen, direction_labels, 255)),
    )
    expected = sum(weight * float(term) for weight, term in zip(weights, terms, strict=True))
    assert float(outputs.loss) == pytest.approx(expected, rel=1e-5)
    assert list(outputs.loss_dict) == ["coarse", "refined", "boundary", "direction"]
    for found, term in zip(outputs.loss_dict.values(), terms, strict=True):
        assert float(found) == pytest.approx(float(term), rel=1e-5)


def test_each_target_may_be_given_without_the_other(batch):
    model = build(direction_supervision="true")
    made = [model.training_targets(label.numpy()) for label in batch["labels"]]
    boundary, direction = (torch.stack([torch.from_numpy(each[name]) for each in made]) for name in made[0])
    plain = model(**batch).loss_dict
    for given in ({"boundary_labels": boundary}, {"direction_labels": direction.int()}):
        assert_same_outputs(model(**batch, **given).loss_dict, plain)
    outputs = model(**batch, boundary_labels=1 - boundary.clamp(max=1))
    logits = enlarge(outputs.boundary_logits, (48, 64), align_corners=True)
    expected = balanced_loss(logits, (1 - boundary.clamp(max=1)).long())
    assert_same_outputs(outputs.loss_dict["boundary"], expected)
    assert outputs.loss_dict["boundary"] != plain["boundary"]
    turned = torch.where(direction == 255, 255, (direction.long() + 1) % 8)
    found = model(**batch, direction_labels=turned).loss_dict
    assert found["direction"] != plain["direction"] and found["boundary"] == plain["boundary"]


def test_targets_that_do_not_fit_are_refused(batch):
    model = build()
    with pytest.raises(InputError, match="need `labels` beside them"):
        model(batch["pixel_values"], boundary_labels=batch["labels"])
    with pytest.raises(InputError, match=r"`boundary_labels` has the shape \(2, 24, 64\).*; \(2, 48, 64\)"):
        model(**batch, boundary_labels=torch.zeros(2, 24, 64).long())
    with pytest.raises(InputError, match=r"direction_labels hold ids 8 .*0 to 7, and 255"):
        model(**batch, direction_labels=torch.full((2, 48, 64), 8))


def test_attention_over_the_batch_warns_in_evaluation(batch, caplog):
    model = build(decoder_self_attention="batch")
    logging.get_logger("transformers").warning_once.cache_clear()
    model.train()(**batch)
    assert "decoder_self_attention" not in caplog.text
    model.eval()(batch["pixel_values"])
    assert "predictions depend on them" in caplog.text


def test_refined_loss_reaches_the_coarse_map_only(batch):
    """Section 7: offsets are whole pixels."""
    model = build(loss_weights=[0.0, 1.0, 0.0, 0.0])
    model(**batch).loss.backward()
    assert model.classifier.weight.grad.abs().sum() > 0
    heads = [*model.boundary_head.parameters(), *model.direction_head.parameters()]
    assert all((each.grad == 0).all() for each in heads)


@pytest.mark.parametrize("weights", [[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]], ids=["coarse", "boundary"])
def test_gradient_of_the_first_spatial_convolution_is_the_derivative_of_the_loss(batch, weights):
    """Finite differences along the gradient, of the terms without discrete steps."""
    model = build(loss_weights=weights)
    weight = model.unept.spatial_branch[0].weight
    model(**batch).loss.backward()
    direction = weight.grad / weight.grad.norm()
    with torch.no_grad():
        values = []
        for step in (2e-2, -2e-2):
            weight += step * direction
            values.append(float(model(**batch).loss))
            weight -= step * direction
    assert (values[0] - values[1]) / 4e-2 == pytest.approx(float(weight.grad.norm()), rel=0.05)
