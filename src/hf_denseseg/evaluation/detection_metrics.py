"""Box and mask AP as COCO defines them, counted by pycocotools over all images at once."""

import contextlib
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

KINDS = {"box": "bbox", "mask": "segm"}
_PARTS = ("ap", "ap_50", "ap_75", "ap_small", "ap_medium", "ap_large")  # the first six numbers of COCO's summary


def detection_metrics(
    rows: Sequence[Mapping[str, Any]],
    found: Mapping[int, Sequence[Mapping[str, Any]]],
    classes: Sequence[str],
    masks: bool = False,
) -> dict[str, Any]:
    """Average precision over IoU 0.5 to 0.95, at most 100 predictions per image; crowds are ignored regions.

    Args:
        rows: images with `height`, `width` and `objects` (`category`, `bbox`, `area`, `iscrowd`, `segmentation`).
        found: number of a row -> predictions with `category`, `score`, `bbox` (x, y, width, height in pixels) and,
            with masks, `segmentation` (RLE).
        classes: names of the categories.
        masks: whether mask AP is counted too.

    Returns:
        `box_ap`, `box_ap_50`, `box_ap_75`, `box_ap_small`, `box_ap_medium`, `box_ap_large`, with masks the same for
        `mask`, `chance` (box AP of predicting the objects of the next image), `objects`, and `per_class`, a list of
        `class`, `box_ap`, `box_ap_50`, with masks `mask_ap` and `mask_ap_50`, and `objects`. APs are fractions, and
        None where there is nothing to score: no object of that class or size, or no other image.
    """
    ground_truth = _ground_truth(rows, classes, masks)
    counts = [0] * len(classes)
    for annotation in ground_truth.dataset["annotations"]:
        counts[annotation["category_id"] - 1] += not annotation["iscrowd"]
    result: dict[str, Any] = {"objects": sum(counts)}
    per_class: list[dict[str, Any]] = [{"class": name} for name in classes]
    for name, kind in KINDS.items():
        if name == "mask" and not masks:
            continue
        overall, by_class = _evaluate(ground_truth, _predictions(found, kind), kind)
        result |= {f"{name}_{part}": value for part, value in zip(_PARTS, overall, strict=True)}
        for row, values in zip(per_class, by_class, strict=True):
            row |= {f"{name}_ap": values[0], f"{name}_ap_50": values[1]}
    by_chance = _predictions(_objects_of_the_next(rows), "bbox")
    result["chance"] = _evaluate(ground_truth, by_chance, "bbox")[0][0] if rows[1:] else None
    result["per_class"] = [row | {"objects": count} for row, count in zip(per_class, counts, strict=True)]
    return result


def _objects_of_the_next(rows: Sequence[Mapping[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    """For every image the objects of the next one, as a prediction that has not seen it."""
    return {
        place: [
            {"category": each["category"], "score": 1.0, "bbox": each["bbox"]}
            for each in rows[(place + 1) % len(rows)]["objects"]
            if not each["iscrowd"]
        ]
        for place in range(len(rows))
    }


def _ground_truth(rows: Sequence[Mapping[str, Any]], classes: Sequence[str], masks: bool) -> Any:
    """The annotations as pycocotools holds them; it takes id 0 for "no object", so all ids count from 1."""
    import json

    annotations: list[dict[str, Any]] = []
    for place, row in enumerate(rows):
        for each in row["objects"]:
            annotation = {
                "id": len(annotations) + 1,
                "image_id": place + 1,
                "category_id": each["category"] + 1,
                "bbox": each["bbox"],
                "area": each["area"],
                "iscrowd": each["iscrowd"],
            }
            if masks:
                annotation["segmentation"] = json.loads(each["segmentation"])
            annotations.append(annotation)
    images = [{"id": place + 1, "height": row["height"], "width": row["width"]} for place, row in enumerate(rows)]
    categories = [{"id": k + 1, "name": name} for k, name in enumerate(classes)]
    return _indexed({"images": images, "annotations": annotations, "categories": categories})


def _predictions(found: Mapping[int, Sequence[Mapping[str, Any]]], kind: str) -> list[dict[str, Any]]:
    return [
        {
            "image_id": place + 1,
            "category_id": each["category"] + 1,
            "score": each["score"],
            **({"segmentation": each["segmentation"]} if kind == "segm" else {"bbox": list(each["bbox"])}),
        }
        for place in sorted(found)
        for each in found[place]
    ]


def _indexed(dataset: dict[str, Any]) -> Any:
    from pycocotools.coco import COCO

    coco = COCO()
    coco.dataset = dataset
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def _evaluate(
    ground_truth: Any, predictions: list[dict[str, Any]], kind: str
) -> tuple[list[float | None], list[tuple[float | None, float | None]]]:
    """The six numbers over all classes, and (AP, AP at IoU 0.5) of each class."""
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):  # it prints its tables
        # `loadRes` fails on an empty list.
        results = (
            ground_truth.loadRes(predictions) if predictions else _indexed({**ground_truth.dataset, "annotations": []})
        )
        evaluation = COCOeval(ground_truth, results, kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # (IoU, recall, class): all sizes, 100 predictions
    by_class = [(_mean(precision[:, :, k]), _mean(precision[0, :, k])) for k in range(precision.shape[2])]
    return [None if value < 0 else float(value) for value in evaluation.stats[:6]], by_class


def _mean(values: np.ndarray) -> float | None:
    known = values[values > -1]  # pycocotools writes -1 where a class has no object
    return float(known.mean()) if known.size else None
