"""Pixel losses against loops over pixels."""

import math

import pytest
import torch

from closeness import assert_same_outputs
from hf_denseseg.models.losses import segmentation_loss


@pytest.fixture
def sample():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 3, 5, generator=generator)
    labels = torch.randint(0, 4, (2, 3, 5), generator=generator)
    labels[0, 0, :3] = 255
    return logits, labels


def pixels(logits, labels):
    """(negative log probability, class, image) of every valid pixel, one at a time."""
    for image in range(len(labels)):
        for row in range(labels.shape[1]):
            for column in range(labels.shape[2]):
                label = int(labels[image, row, column])
                if label in (255, -100):
                    continue
                scores = [math.exp(score) for score in logits[image, :, row, column].tolist()]
                yield -math.log(scores[label] / sum(scores)), label, image


def test_mean_over_valid_pixels_equals_a_loop(sample):
    losses = [loss for loss, _, _ in pixels(*sample)]
    assert segmentation_loss(*sample).item() == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_normalization_by_all_pixels_counts_ignored_ones(sample):
    losses = [loss for loss, _, _ in pixels(*sample)]
    found = segmentation_loss(*sample, normalization="all").item()
    assert found == pytest.approx(sum(losses) / sample[1].numel(), rel=1e-5)


def test_class_weights_divide_by_the_summed_weight(sample):
    weights = [0.1, 2.0, 0.5, 0.25]
    summed = sum(weights[label] * loss for loss, label, _ in pixels(*sample))
    total = sum(weights[label] for _, label, _ in pixels(*sample))
    found = segmentation_loss(*sample, class_weights=torch.tensor(weights)).item()
    assert found == pytest.approx(summed / total, rel=1e-5)


@pytest.mark.parametrize("align_corners", [False, True])
def test_logits_are_resized_bilinearly_to_the_labels(align_corners):
    """On a 1 x 2 map the value at each output column is a hand-computed mixture of the two."""
    logits = torch.tensor([[[[0.0, 4.0]], [[1.0, -1.0]]]])
    labels = torch.tensor([[[0, 1, 0, 1]]])
    fractions = (0, 1 / 3, 2 / 3, 1) if align_corners else (0, 0.25, 0.75, 1)
    mixed = [[(1 - part) * row[0] + part * row[1] for part in fractions] for row in ([0.0, 4.0], [1.0, -1.0])]
    losses = []
    for column, label in enumerate(labels.flatten().tolist()):
        scores = [math.exp(mixed[each][column]) for each in range(2)]
        losses.append(-math.log(scores[label] / sum(scores)))
    found = segmentation_loss(logits, labels, align_corners=align_corners).item()
    assert found == pytest.approx(sum(losses) / 4, rel=1e-5)


def test_ignored_labels_are_255_or_minus_100_in_every_integer_type(sample):
    logits, labels = sample
    expected = segmentation_loss(logits, labels)
    assert_same_outputs(segmentation_loss(logits, labels.to(torch.uint8)), expected)
    negative, other = torch.where(labels == 255, -100, labels), torch.where(labels == 255, 9, labels)
    assert_same_outputs(segmentation_loss(logits, negative.to(torch.int16)), expected)
    assert_same_outputs(segmentation_loss(logits, other, ignore_index=9), expected)


@pytest.mark.parametrize("options", [{}, {"normalization": "all"}, {"ohem_threshold": 0.7, "ohem_min_kept": 3}])
def test_only_ignored_pixels_give_zero_and_zero_gradients(sample, options):
    logits = sample[0].requires_grad_()
    loss = segmentation_loss(logits, torch.full_like(sample[1], 255), **options)
    loss.backward()
    assert loss.item() == 0 and torch.equal(logits.grad, torch.zeros_like(logits))


def mmsegmentation_ohem(logits, labels, threshold, min_kept):
    """Mean loss over the pixels that mmsegmentation's OHEMPixelSampler keeps, pixel by pixel."""
    seen = sorted((math.exp(-loss), loss) for loss, _, _ in pixels(logits, labels))
    kept = min(min_kept * len(labels), len(seen) - 1)
    limit = max(seen[kept][0], threshold)
    chosen = [loss for probability, loss in seen if probability < limit]
    return sum(chosen) / len(chosen)


@pytest.mark.parametrize("threshold", [0.05, 0.3, 0.9])
def test_ohem_keeps_hard_pixels_but_never_too_few(sample, threshold):
    losses = sorted((loss for loss, _, _ in pixels(*sample)), reverse=True)
    hard = [loss for loss in losses if math.exp(-loss) < threshold]
    expected = hard if len(hard) >= 2 * 4 else losses[: 2 * 4]
    found = segmentation_loss(*sample, ohem_threshold=threshold, ohem_min_kept=4).item()
    assert found == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    assert found == pytest.approx(mmsegmentation_ohem(*sample, threshold, 4), rel=1e-5)


def test_low_precision_logits_give_a_float32_loss(sample):
    loss = segmentation_loss(sample[0].bfloat16(), sample[1])
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(segmentation_loss(*sample).item(), rel=0.02)


def test_unknown_normalization_names_the_choices(sample):
    with pytest.raises(ValueError, match="'valid' or 'all'"):
        segmentation_loss(*sample, normalization="mean")


@pytest.mark.parametrize("ohem_threshold", [None, 0.3])
@pytest.mark.parametrize("class_weights", [None, torch.tensor([0.5, 2.0, 1.0])])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_labels_may_be_compared_with_logits_of_other_pixels(ohem_threshold, class_weights, memory_format):
    """As if the logits had been gathered before, loss and gradients."""
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 4, 5).to(memory_format=memory_format).requires_grad_()
    labels, sources = torch.randint(0, 3, (2, 4, 5)), torch.randint(0, 20, (2, 4, 5))
    labels[0, 0] = 255
    options = {"class_weights": class_weights, "ohem_threshold": ohem_threshold, "ohem_min_kept": 3}
    rows, columns = sources // 5, sources % 5
    gathered = torch.stack([logits[b][:, rows[b], columns[b]] for b in range(2)])
    expected = segmentation_loss(gathered, labels, **options)
    found = segmentation_loss(logits, labels, sources=sources, **options)
    torch.testing.assert_close(found, expected)
    grads = [torch.autograd.grad(loss, logits)[0] for loss in (found, expected)]
    torch.testing.assert_close(*grads)
