"""The steps of the official segmentation notebooks, with our metric, processors and models in place of theirs."""

import math

import evaluate
import numpy as np
import pytest
import torch
from torch import nn
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments

from hf_denseseg import create_image_processor, create_model
from hf_denseseg.data.segmentation import load_segmentation
from hf_denseseg.errors import InputError
from hf_denseseg.evaluation.hub_metrics import METRIC_PATH
from test_published_dsct import REDUCED

NUM_LABELS = 5


@pytest.fixture
def maps():
    random = np.random.default_rng(0)
    predictions = [random.integers(0, 4, (6, 7)) for _ in range(3)]  # class 4 is never predicted
    references = [random.integers(0, 4, (6, 7)) for _ in range(3)]
    references[0][0] = 255
    return predictions, references


def by_pixels(predictions, references, ignore_index, reduce_labels=False):
    """IoU and accuracy of each class and over all, one pixel at a time, as the hub's `mean_iou` defines them."""
    both, predicted, labeled = ([0] * NUM_LABELS for _ in range(3))
    for prediction, reference in zip(predictions, references, strict=True):
        for guess, target in zip(prediction.flatten().tolist(), reference.flatten().tolist(), strict=True):
            if reduce_labels:
                target = 255 if target in (0, 255) else target - 1
            if target == ignore_index:
                continue
            predicted[guess] += 1
            labeled[target] += 1
            both[target] += guess == target
    unions = [p + t - b for p, t, b in zip(predicted, labeled, both, strict=True)]
    iou = [b / union if union else math.nan for b, union in zip(both, unions, strict=True)]
    accuracy = [b / t if t else math.nan for b, t in zip(both, labeled, strict=True)]
    return iou, accuracy, sum(both) / sum(labeled)


@pytest.mark.parametrize("ignore_index, reduce_labels", [(255, False), (255, True), (0, False), (2, False)])
@pytest.mark.parametrize("nan_to_num", [None, -1])
def test_the_call_of_the_notebooks_gives_the_scores_of_the_definition(maps, ignore_index, reduce_labels, nan_to_num):
    predictions, references = maps
    if ignore_index != 255:
        references[0][0] = ignore_index
    metric = evaluate.load(METRIC_PATH)
    options = {"num_labels": NUM_LABELS, "ignore_index": ignore_index, "reduce_labels": reduce_labels}
    if nan_to_num is not None:
        options["nan_to_num"] = nan_to_num
    found = metric.compute(predictions=predictions, references=references, **options)
    again = metric._compute(predictions=predictions, references=references, **options)
    iou, accuracy, overall = by_pixels(predictions, references, ignore_index, reduce_labels)
    assert isinstance(found["per_category_iou"], np.ndarray) and found["per_category_iou"].tolist()
    for expected, name in ((iou, "per_category_iou"), (accuracy, "per_category_accuracy")):
        wanted = [value if nan_to_num is None or not math.isnan(value) else nan_to_num for value in expected]
        np.testing.assert_allclose(found[name], wanted, rtol=1e-12)
        np.testing.assert_array_equal(again[name], found[name])
    assert found["mean_iou"] == pytest.approx(np.nanmean(iou))
    assert found["mean_accuracy"] == pytest.approx(np.nanmean(accuracy))
    assert found["overall_accuracy"] == pytest.approx(overall)


def test_a_refused_call_counts_nothing(maps):
    predictions, references = maps
    metric = evaluate.load(METRIC_PATH)
    with pytest.raises(InputError):
        metric.compute(predictions=predictions, references=[each + 7 for each in references], num_labels=NUM_LABELS)
    with pytest.raises(InputError, match="Nothing was added"):
        metric.compute()
    metric.add_batch(predictions=predictions, references=references, num_labels=NUM_LABELS)
    with pytest.raises(InputError, match="5 classes were added before, now num_labels is 6"):
        metric.add_batch(predictions=predictions, references=references, num_labels=6)
    expected = by_pixels(predictions, references, 255)[0]
    np.testing.assert_allclose(metric.compute()["per_category_iou"], expected)


def test_the_notebook_trains_evaluates_and_stops_early(tmp_path):
    """`set_transform`, `Trainer`, `compute_metrics` on resized logits, early stopping."""
    data = load_segmentation("synthetic@64x96", "train", limit=6)
    rows = data.dataset
    torch.manual_seed(0)
    names = {"id2label": data.spec.id2label, "label2id": data.spec.label2id}
    model = create_model("dsct-tiny-sac", **names, **REDUCED)
    processor = create_image_processor(model.config, size={"height": 32, "width": 48})
    decode = rows.format["format_kwargs"]["transform"]

    def transform(batch):
        batch = decode(batch)
        return processor(batch["image"], segmentation_maps=batch["label"], return_tensors="pt")

    rows.set_transform(transform)
    metric = evaluate.load(METRIC_PATH)

    def compute_metrics(prediction):
        logits = torch.from_numpy(prediction.predictions)
        logits = nn.functional.interpolate(logits, size=prediction.label_ids.shape[-2:], mode="bilinear")
        metrics = metric._compute(
            predictions=logits.argmax(1).numpy(),
            references=prediction.label_ids,
            num_labels=len(names["id2label"]),
            ignore_index=255,
            reduce_labels=processor.do_reduce_labels,
        )
        accuracies = metrics.pop("per_category_accuracy").tolist()
        metrics |= {f"accuracy_{names['id2label'][k]}": value for k, value in enumerate(accuracies)}
        return {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in metrics.items()}

    settings = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=30,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        learning_rate=1e-9,
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="mean_iou",
        greater_is_better=True,
        remove_unused_columns=False,
        label_names=["labels"],
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=model,
        args=settings,
        train_dataset=rows,
        eval_dataset=rows,
        compute_metrics=compute_metrics,
        callbacks=[EarlyStoppingCallback(2)],
    )
    trainer.train()
    assert trainer.state.global_step < 30  # it stopped
    logged = [row["eval_mean_iou"] for row in trainer.state.log_history if "eval_mean_iou" in row]
    assert max(logged) == pytest.approx(trainer.evaluate()["eval_mean_iou"], abs=1e-6)


@pytest.mark.parametrize("reduce_labels", [False, True])
def test_of_more_than_254_classes_65535_is_ignored_and_255_scored(reduce_labels):
    metric = evaluate.load(METRIC_PATH, num_labels=300)
    ground_truth = np.array([[255, 255, 299, 65535]], np.uint16)
    raw = np.where(ground_truth == 65535, 0, ground_truth + 1) if reduce_labels else ground_truth
    metric.add_batch(predictions=[[[255, 3, 299, 4]]], references=[raw], reduce_labels=reduce_labels)
    scores = metric.compute()
    found = scores["per_category_iou"]
    assert found[[255, 299, 3]].tolist() == [0.5, 1, 0] and np.isnan(found[4])
