"""Pixel losses against loops over pixels."""

import math

import pytest
import torch

from closeness import assert_same_outputs
from hf_denseseg.models.losses import LOSSES, segmentation_loss


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


def class_probabilities(logits, labels):
    """(probabilities of the classes, class) of every valid pixel of the batch."""
    found = []
    for image in range(len(labels)):
        for row in range(labels.shape[1]):
            for column in range(labels.shape[2]):
                label = int(labels[image, row, column])
                if label not in (255, -100):
                    scores = [math.exp(score) for score in logits[image, :, row, column].tolist()]
                    found.append(([score / sum(scores) for score in scores], label))
    return found


def dice_by_loops(found, label):
    overlap = sum(row[label] for row, target in found if target == label)
    return 1 - 2 * overlap / (sum(row[label] for row, _ in found) + sum(target == label for _, target in found))


def lovasz_by_sets(found, label):
    """The Lovász extension of the Jaccard loss, a function of the set of wrong pixels (Berman et al., Def. 1)."""
    target = {k for k, (_, each) in enumerate(found) if each == label}
    errors = {k: abs((k in target) - row[label]) for k, (row, _) in enumerate(found)}

    def jaccard_loss(wrong):
        return len(wrong) / len(target | wrong)

    total, wrong = 0.0, set()
    for k in sorted(errors, key=errors.get, reverse=True):
        total += errors[k] * (jaccard_loss(wrong | {k}) - (jaccard_loss(wrong) if wrong else 0))
        wrong |= {k}
    return total


@pytest.mark.parametrize(("kind", "definition"), [("dice", dice_by_loops), ("lovasz", lovasz_by_sets)])
@pytest.mark.parametrize("weights", [None, [0.1, 2.0, 0.5, 0.25]])
def test_losses_of_regions_equal_their_definition(sample, kind, definition, weights):
    logits, labels = sample
    labels[labels == 2] = 1  # a class that does not occur costs nothing
    found = class_probabilities(logits, labels)
    present = sorted({label for _, label in found})
    shares = [1.0 if weights is None else weights[label] for label in present]
    losses = [share * definition(found, label) for share, label in zip(shares, present, strict=True)]
    expected = sum(losses) / sum(shares)
    given = None if weights is None else torch.tensor(weights)
    alone = segmentation_loss(logits, labels, kind=kind, class_weights=given).item()
    assert alone == pytest.approx(expected, rel=1e-5)
    pixel = segmentation_loss(logits, labels, class_weights=given).item()
    both = segmentation_loss(logits, labels, kind=f"ce+{kind}", class_weights=given).item()
    assert both == pytest.approx(pixel + expected, rel=1e-5)


@pytest.mark.parametrize("weights", [None, [0.0, 2.0, 0.5, 0.25]])
def test_focal_loss_lowers_the_share_of_easy_pixels(sample, weights):
    """Lin et al., 2017, Eq. 5 with gamma 2: -w (1 - p)^2 log p."""
    shares = weights or [1.0] * 4
    terms = [(shares[label], loss * (1 - math.exp(-loss)) ** 2) for loss, label, _ in pixels(*sample)]
    expected = sum(share * loss for share, loss in terms) / sum(share for share, _ in terms)
    given = None if weights is None else torch.tensor(weights)
    assert segmentation_loss(*sample, kind="focal", class_weights=given).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", LOSSES)
def test_no_loss_sends_a_gradient_to_ignored_pixels(sample, kind):
    logits, labels = sample
    logits.requires_grad_()
    segmentation_loss(logits, labels, kind=kind).backward()
    at_ignored = logits.grad.abs().sum(1)[labels == 255]
    assert at_ignored.tolist() == [0.0] * 3 and logits.grad.abs().sum() > 0
    logits.grad = None
    loss = segmentation_loss(logits, torch.full_like(labels, 255), kind=kind)
    loss.backward()
    assert loss.item() == 0 and not logits.grad.any()


@pytest.mark.parametrize("kind", ["focal", "dice", "ce+lovasz"])
def test_sources_choose_the_logits_of_other_pixels_for_every_loss(sample, kind):
    logits, labels = sample
    sources = torch.randint(0, 15, (2, 3, 5), generator=torch.Generator().manual_seed(1))
    moved = torch.stack([logits[k].flatten(1)[:, sources[k].flatten()].view(4, 3, 5) for k in (0, 1)])
    found = segmentation_loss(logits, labels, kind=kind, sources=sources)
    assert_same_outputs(found, segmentation_loss(moved, labels, kind=kind))


@pytest.mark.parametrize("weights", [None, [0.1, 2.0, 0.5, 0.25]])
def test_label_smoothing_spreads_a_part_of_the_target_over_all_classes(sample, weights):
    total, count = 0.0, 0.0
    for probabilities, label in class_probabilities(*sample):
        losses = [-math.log(each) for each in probabilities]
        weight = 1.0 if weights is None else weights[label]
        total += weight * (0.9 * losses[label] + 0.1 * sum(losses) / 4)
        count += weight
    options = {"label_smoothing": 0.1, "class_weights": None if weights is None else torch.tensor(weights)}
    assert segmentation_loss(*sample, **options).item() == pytest.approx(total / count, rel=1e-5)
    own = torch.arange(15).view(1, 3, 5).expand(2, -1, -1)  # every pixel is its own source
    assert segmentation_loss(*sample, sources=own, **options).item() == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("kind", ["focal", "dice"])
def test_label_smoothing_needs_a_cross_entropy(sample, kind):
    with pytest.raises(ValueError, match=f"the loss is '{kind}'"):
        segmentation_loss(*sample, kind=kind, label_smoothing=0.1)


def test_unknown_loss_is_refused(sample):
    with pytest.raises(ValueError, match="Use one of ce, focal"):
        segmentation_loss(*sample, kind="tversky")
