"""Metrics against plain loops, the published formulas, and the table of peers' semantics."""

import huggingface_hub
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_denseseg.errors import InputError
from hf_denseseg.evaluation.hub_metrics import METRIC_PATH
from hf_denseseg.evaluation.segmentation_metrics import (
    ConfusionMeter,
    category_metrics,
    confusion_matrix,
    segmentation_metrics,
)


def loop_matrix(prediction, label, num_labels, ignore_index):
    matrix = np.zeros((num_labels, num_labels), dtype=np.int64)
    for p, t in zip(np.ravel(prediction), np.ravel(label), strict=True):
        if t != ignore_index:
            matrix[t, p] += 1
    return matrix


def random_maps(seed, num_labels, shape=(17, 23), ignore_index=255, ignored_fraction=0.2):
    rng = np.random.default_rng(seed)
    prediction = rng.integers(0, num_labels, shape)
    label = rng.integers(0, num_labels, shape)
    label[rng.random(shape) < ignored_fraction] = ignore_index
    return prediction, label


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    num_labels=st.integers(1, 40),
    ignore_index=st.sampled_from([255, -100, -1, 250]),
    dtype=st.sampled_from([np.uint8, np.int16, np.int64, np.uint16]),
)
def test_matrix_equals_a_loop_over_the_pixels(seed, num_labels, ignore_index, dtype):
    prediction, label = random_maps(seed, num_labels, (5, 9), ignore_index)
    if ignore_index < 0 and np.dtype(dtype).kind == "u":
        dtype = np.int32
    matrix = confusion_matrix(prediction.astype(dtype), label.astype(dtype), num_labels, ignore_index)
    assert matrix.dtype == torch.int64
    np.testing.assert_array_equal(matrix.numpy(), loop_matrix(prediction, label, num_labels, ignore_index))


def test_more_classes_than_a_byte_holds_are_counted():
    prediction, label = random_maps(0, 847, ignore_index=-1)
    expected = loop_matrix(prediction, label, 847, -1)
    np.testing.assert_array_equal(confusion_matrix(prediction, label, 847, -1).numpy(), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_matrix_on_the_accelerator_equals_the_cpu():
    prediction, label = (torch.from_numpy(ids) for ids in random_maps(3, 19, (64, 64)))
    matrix = confusion_matrix(prediction.cuda(), label.cuda().to(torch.uint8), 19)
    assert matrix.is_cuda
    assert matrix.cpu().equal(confusion_matrix(prediction, label, 19))


def test_the_ignore_index_may_be_predicted_where_the_label_is_ignored():
    matrix = confusion_matrix(np.array([0, 1, 255]), np.array([0, 255, 255]), 2)
    assert matrix.tolist() == [[1, 0], [0, 0]]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
@pytest.mark.parametrize(
    ("prediction", "label", "message"),
    [
        ([0, 2], [0, 1], r"prediction holds ids .*2"),
        ([0, 2], [0, 255], r"prediction holds ids .*2"),
        ([0, 1], [0, 2], r"label holds ids .*2"),
        ([0, 255], [0, 1], r"prediction is 255 \(ignored\) at labeled pixels"),
        ([0, 254], [0, 1], r"prediction holds ids"),
    ],
)
def test_ids_that_are_neither_class_nor_ignored_are_refused(prediction, label, message, dtype):
    with pytest.raises(InputError, match=message):
        confusion_matrix(torch.tensor(prediction, dtype=dtype), torch.tensor(label, dtype=dtype), 2)


@pytest.mark.parametrize("bad", [-100, -1, 256, 65536 + 1, 2**40])
def test_ids_without_a_bin_are_refused_and_never_wrap_around(bad):
    good = torch.tensor([0, 1])
    with pytest.raises(InputError, match="label holds ids"):
        confusion_matrix(good, torch.tensor([0, bad]), 2)
    with pytest.raises(InputError, match="prediction holds ids"):
        confusion_matrix(torch.tensor([0, bad]), good, 2)


def test_input_that_is_not_a_pair_of_label_maps_is_refused():
    ids = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(InputError, match="one of the 3 classes"):
        confusion_matrix(ids, ids, 3, ignore_index=0)
    with pytest.raises(InputError, match=r"shape \(2, 3\), label \(3, 2\)"):
        confusion_matrix(ids, ids.T, 3)
    with pytest.raises(InputError, match="dtype torch.float32"):
        confusion_matrix(ids.float(), ids, 3)
    with pytest.raises(InputError, match="num_labels is 0"):
        confusion_matrix(ids, ids, 0)
    with pytest.raises(InputError, match="5000 classes have 25,000,000 pairs"):
        confusion_matrix(ids, ids, 5000)


@pytest.mark.parametrize(("num_labels", "ignore_index"), [(300, 65535), (300, None), (255, None), (3, 70_000)])
@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_more_than_254_classes_have_another_ignored_id(num_labels, ignore_index, dtype):
    ignored = 65535 if ignore_index is None else ignore_index
    if ignored > np.iinfo(dtype).max:
        return
    prediction, label = random_maps(1, num_labels, ignore_index=ignored)
    label[0, :5] = min(255, num_labels - 1)  # a class like others
    given = (prediction.astype(dtype), label.astype(dtype), num_labels, ignore_index)
    assert np.array_equal(confusion_matrix(*given).numpy(), loop_matrix(prediction, label, num_labels, ignored))
    wrong = label.copy()
    wrong[0, 0] = num_labels
    with pytest.raises(InputError, match=rf"label holds ids \[{num_labels}\]"):
        confusion_matrix(given[0], wrong.astype(dtype), num_labels, ignore_index)
    prediction[label != ignored] = ignored
    with pytest.raises(InputError, match="ignored\\) at labeled pixels"):
        confusion_matrix(prediction.astype(dtype), *given[1:])


def mmseg_areas(pairs, num_labels, ignore_index=255):
    """The histograms of mmsegmentation's and `evaluate`'s mean IoU: intersection, union, label area."""
    totals = np.zeros((3, num_labels))
    edges = np.arange(num_labels + 1)
    for prediction, label in pairs:
        kept = label != ignore_index
        prediction, label = prediction[kept], label[kept]
        intersect = np.histogram(prediction[prediction == label], edges)[0]
        area_prediction, area_label = np.histogram(prediction, edges)[0], np.histogram(label, edges)[0]
        totals += np.stack([intersect, area_prediction + area_label - intersect, area_label])
    return totals


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), num_labels=st.integers(1, 30), images=st.integers(1, 4))
def test_metrics_equal_the_formulas_of_mmsegmentation(seed, num_labels, images):
    rng = np.random.default_rng(seed)
    # Different sizes, few pixels: some classes are absent.
    pairs = [random_maps(rng, num_labels, (int(rng.integers(1, 8)), int(rng.integers(1, 8)))) for _ in range(images)]
    meter = ConfusionMeter(num_labels)
    meter.update([p for p, _ in pairs], [t for _, t in pairs])
    result = meter.compute([f"c{k}" for k in range(num_labels)])
    intersect, union, area = mmseg_areas(pairs, num_labels)
    if area.sum() == 0:
        assert result["mean_iou"] is None and result["pixel_accuracy"] is None
        return
    with np.errstate(invalid="ignore"):
        iou, accuracy = intersect / union, intersect / area
    assert result["mean_iou"] == pytest.approx(np.nanmean(iou), abs=1e-12)
    assert result["mean_accuracy"] == pytest.approx(np.nanmean(accuracy), abs=1e-12)
    assert result["pixel_accuracy"] == pytest.approx(intersect.sum() / area.sum(), abs=1e-12)
    frequency_weighted = np.nansum(iou * area) / area.sum()
    assert result["frequency_weighted_iou"] == pytest.approx(frequency_weighted, abs=1e-12)
    for row, expected_iou, expected_area in zip(result["per_class"], iou, area, strict=True):
        assert row["pixels"] == expected_area
        if np.isnan(expected_iou):
            assert row["iou"] is None
        else:
            assert row["iou"] == pytest.approx(expected_iou, abs=1e-12)


def test_a_perfect_prediction_scores_one_whatever_is_ignored_or_absent():
    label = np.array([[0, 1, 255], [3, 3, 255]])
    prediction = np.where(label == 255, 2, label)
    for absent in ("zero", "skip"):
        result = segmentation_metrics(confusion_matrix(prediction, label, 5), list("abcde"), absent)
        assert result["mean_iou"] == result["pixel_accuracy"] == result["mean_accuracy"] == 1.0
        assert [row["iou"] for row in result["per_class"]] == [1.0, 1.0, None, 1.0, None]


def test_a_class_that_is_only_predicted_counts_as_zero_or_is_skipped_as_named():
    """Six classes, five perfect, one false-positive pixel of the sixth on a map without ignored pixels."""
    label = np.repeat(np.arange(5), 1000)
    prediction = label.copy()
    prediction[0] = 5
    matrix = confusion_matrix(prediction, label, 6)
    zero, skip = (segmentation_metrics(matrix, list("abcdef"), absent) for absent in ("zero", "skip"))
    assert zero["absent"] == "zero" and skip["absent"] == "skip"
    assert zero["mean_iou"] == pytest.approx((4 + 0.999) / 6, abs=1e-12)
    assert skip["mean_iou"] == pytest.approx((4 + 0.999) / 5, abs=1e-12)
    assert zero["per_class"][5]["iou"] == 0.0 and skip["per_class"][5]["iou"] is None
    assert zero["mean_iou_by_absent"] == skip["mean_iou_by_absent"]
    assert zero["mean_iou_by_absent"] == {"zero": zero["mean_iou"], "skip": skip["mean_iou"]}


def test_counts_beyond_float_precision_stay_exact():
    meter = ConfusionMeter(2)
    huge = torch.tensor([[2**54 + 1, 0], [0, 1]])
    meter.add(huge)
    meter.add(torch.stack([torch.eye(2, dtype=torch.int64)] * 2))
    assert meter.matrix.tolist() == [[2**54 + 3, 0], [0, 3]]
    assert meter.compute(["a", "b"])["per_class"][0]["pixels"] == 2**54 + 3


def test_a_refused_batch_leaves_the_meter_unchanged():
    meter = ConfusionMeter(2)
    with pytest.raises(InputError):
        meter.update([np.array([0]), np.array([7])], [np.array([0]), np.array([1])])
    with pytest.raises(InputError, match="2 predictions came with 1 labels"):
        meter.update([np.array([0])] * 2, [np.array([0])])
    with pytest.raises(InputError, match="cannot be added"):
        meter.add(torch.zeros(3, 3, dtype=torch.int64))
    assert meter.matrix.sum() == 0


def test_metrics_refuse_an_unknown_convention_and_a_wrong_number_of_names():
    matrix = torch.eye(2, dtype=torch.int64)
    with pytest.raises(InputError, match="'zero', 'skip'"):
        segmentation_metrics(matrix, ["a", "b"], "drop")
    with pytest.raises(InputError, match="does not fit 3"):
        segmentation_metrics(matrix, ["a", "b", "c"])


def test_evaluate_opens_the_module_offline_and_gives_the_same_scores(tmp_path):
    evaluate = pytest.importorskip("evaluate")
    assert huggingface_hub.constants.HF_HUB_OFFLINE, "run the tests with HF_HUB_OFFLINE=1"
    pairs = [random_maps(seed, 4, size) for seed, size in enumerate([(6, 9), (5, 4), (9, 6)])]
    predictions, references = [p for p, _ in pairs], [t for _, t in pairs]
    metric = evaluate.load(METRIC_PATH, num_labels=4, cache_dir=str(tmp_path))
    metric.add(prediction=predictions[0], reference=references[0])
    metric.add_batch(predictions=predictions[1:], references=references[1:])
    added = metric.compute()
    intersect, union, area = mmseg_areas(pairs, 4)
    assert added["mean_iou"] == pytest.approx((intersect / union).mean(), abs=1e-12)
    assert added["overall_accuracy"] == pytest.approx(intersect.sum() / area.sum(), abs=1e-12)
    assert added["per_category_iou"] == pytest.approx((intersect / union).tolist(), abs=1e-12)
    assert added["per_category_accuracy"] == pytest.approx((intersect / area).tolist(), abs=1e-12)

    late = evaluate.load(METRIC_PATH, cache_dir=str(tmp_path))
    at_once = late.compute(predictions=predictions, references=references, num_labels=4)
    assert at_once["per_class"] == added["per_class"] and at_once["mean_iou"] == added["mean_iou"]
    zeros = [np.zeros((2, 2), dtype=int)]
    second = late.compute(predictions=zeros, references=zeros, num_labels=4)
    assert second["mean_iou"] == 1.0, "the counts of the first call are still there"
    with pytest.raises(ValueError, match="num_labels"):
        late.add(prediction=predictions[0], reference=references[0])
    with pytest.raises(ValueError, match="Nothing was added"):
        late.compute()


def test_one_class_and_fully_ignored_images_are_scored():
    meter = ConfusionMeter(1)
    meter.update([np.zeros((3, 4), int), np.zeros((2, 2), int)], [np.full((3, 4), 255), np.zeros((2, 2), int)])
    assert meter.compute(["all"])["mean_iou"] == 1.0 and meter.matrix.tolist() == [[4]]
    nothing = segmentation_metrics(torch.zeros(2, 2, dtype=torch.int64), ["a", "b"])
    assert nothing["mean_iou"] is nothing["pixel_accuracy"] is nothing["mean_accuracy"] is None


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_categories_are_scored_by_the_rule_of_cityscapes(seed):
    """Its script: true positives inside the category's block, false ones in its columns from all other classes."""
    matrix = np.random.default_rng(seed).integers(0, 3, (6, 6)) * 7
    classes, categories = list("abcdef"), {"first": ["a", "d"], "second": ["c"], "third": ["e", "f"]}
    result = category_metrics(matrix, classes, categories)
    expected = []
    for names in categories.values():
        own = [classes.index(name) for name in names]
        others = [k for k in range(6) if k not in own]
        right = matrix[np.ix_(own, own)].sum()
        missed, false = matrix[own].sum() - right, matrix[np.ix_(others, own)].sum()
        expected.append(right / (right + missed + false) if right + missed + false else None)
    assert [row["iou"] for row in result["per_category"]] == pytest.approx(expected, abs=1e-12)
    defined = [iou for iou in expected if iou is not None]
    assert result["category_iou"] == (pytest.approx(np.mean(defined), abs=1e-12) if defined else None)


def test_classes_confused_within_a_category_are_right():
    matrix = np.array([[1, 9, 0], [4, 2, 0], [0, 0, 5]])
    result = category_metrics(matrix, ["car", "bus", "sky"], {"vehicle": ["car", "bus"], "sky": ["sky"]})
    assert result["category_iou"] == 1.0
    assert result["per_category"][0] == {
        "category": "vehicle", "classes": ["car", "bus"], "iou": 1.0, "accuracy": 1.0, "pixels": 16,
    }  # fmt: skip
