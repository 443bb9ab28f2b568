"""Losses of one logit, foreground against background, against loops over pixels and torch's own."""

import math

import pytest
import torch
import torch.nn.functional as F

from closeness import assert_same_outputs
from hf_denseseg.models.losses import LOSSES, segmentation_loss


@pytest.fixture
def sample():
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(2, 1, 4, 5, generator=generator)
    labels = torch.randint(0, 2, (2, 4, 5), generator=generator)
    labels[0, 0, :3] = 255
    labels[1, 2, 1] = -100
    return logits, labels


def pixels(logits, labels):
    """(logit, probability of the foreground, class) of every valid pixel."""
    for logit, label in zip(logits.flatten().tolist(), labels.flatten().tolist(), strict=True):
        if label in (0, 1):
            yield logit, 1 / (1 + math.exp(-logit)), label


def cross_entropies(sample):
    return [(-math.log(p if label else 1 - p), p if label else 1 - p, label) for _, p, label in pixels(*sample)]


def dice_by_loops(sample):
    found = list(pixels(*sample))
    overlap = sum(p for _, p, label in found if label)
    return 1 - 2 * overlap / (sum(p for _, p, _ in found) + sum(label for *_, label in found))


def lovasz_hinge_by_sets(sample):
    """The Lovász extension of the Jaccard loss at the margins max(0, 1 - y z) (Berman et al., Sec. 3.1)."""
    found = list(pixels(*sample))
    target = {k for k, (*_, label) in enumerate(found) if label}
    margins = {k: max(0.0, 1 - (2 * label - 1) * logit) for k, (logit, _, label) in enumerate(found)}
    total, wrong = 0.0, set()
    for k in sorted(margins, key=margins.get, reverse=True):
        before = len(wrong) / len(target | wrong) if wrong else 0.0
        wrong |= {k}
        total += margins[k] * (len(wrong) / len(target | wrong) - before)
    return total


def test_cross_entropy_is_the_binary_one(sample):
    terms = [loss for loss, _, _ in cross_entropies(sample)]
    found = segmentation_loss(*sample)
    assert found.item() == pytest.approx(sum(terms) / len(terms), rel=1e-5)
    logits, labels = sample
    valid = (labels == 0) | (labels == 1)
    torch.testing.assert_close(found, F.binary_cross_entropy_with_logits(logits[:, 0][valid], labels[valid].float()))
    assert segmentation_loss(*sample, normalization="all").item() == pytest.approx(sum(terms) / labels.numel())


def test_class_weights_are_those_of_background_and_foreground(sample):
    terms = cross_entropies(sample)
    weights = [0.25, 2.0]
    expected = sum(weights[c] * loss for loss, _, c in terms) / sum(weights[c] for *_, c in terms)
    found = segmentation_loss(*sample, class_weights=torch.tensor(weights)).item()
    assert found == pytest.approx(expected, rel=1e-5)


def test_focal_loss_and_hard_pixels_use_the_probability_of_the_true_class(sample):
    terms = cross_entropies(sample)
    focal = sum(loss * (1 - p) ** 2 for loss, p, _ in terms) / len(terms)
    assert segmentation_loss(*sample, kind="focal").item() == pytest.approx(focal, rel=1e-5)
    hard = [loss for loss, p, _ in terms if p < 0.4]
    found = segmentation_loss(*sample, ohem_threshold=0.4, ohem_min_kept=1).item()
    assert found == pytest.approx(sum(hard) / len(hard), rel=1e-5)


@pytest.mark.parametrize(("kind", "definition"), [("dice", dice_by_loops), ("lovasz", lovasz_hinge_by_sets)])
def test_losses_of_the_foreground_equal_their_definition(sample, kind, definition):
    expected = definition(sample)
    assert segmentation_loss(*sample, kind=kind).item() == pytest.approx(expected, rel=1e-5)
    both = segmentation_loss(*sample, kind=f"ce+{kind}").item()
    assert both == pytest.approx(segmentation_loss(*sample).item() + expected, rel=1e-5)


@pytest.mark.parametrize("kind", LOSSES)
def test_no_loss_sends_a_gradient_to_ignored_pixels(sample, kind):
    logits, labels = sample
    logits.requires_grad_()
    segmentation_loss(logits, labels, kind=kind).backward()
    ignored = (labels == 255) | (labels == -100)
    assert logits.grad[:, 0][ignored].tolist() == [0.0] * 4 and logits.grad.abs().sum() > 0
    logits.grad = None
    loss = segmentation_loss(logits, torch.full_like(labels, 255), kind=kind)
    loss.backward()
    assert loss.item() == 0 and not logits.grad.any()


@pytest.mark.parametrize("kind", LOSSES)
def test_sources_choose_the_logits_of_other_pixels(sample, kind):
    logits, labels = sample
    sources = torch.randint(0, 20, (2, 4, 5), generator=torch.Generator().manual_seed(1))
    moved = torch.stack([logits[k].flatten()[sources[k].flatten()].view(1, 4, 5) for k in (0, 1)])
    found = segmentation_loss(logits, labels, kind=kind, sources=sources)
    assert_same_outputs(found, segmentation_loss(moved, labels, kind=kind))
