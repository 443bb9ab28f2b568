"""Detection in plain loops, written from the formulas: the reference for the tests of both detectors."""

import math

import torch


def iou(a, b):
    """Intersection over union of two boxes (left, top, right, bottom)."""
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    both = width * height
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def anchors(size, stride, scales, ratios=(0.5, 1.0, 2.0)):
    """All anchors of a map of (height, width): row, column, ratio, scale."""
    boxes = []
    for row in range(size[0]):
        for column in range(size[1]):
            for ratio in ratios:
                for scale in scales:
                    side = stride * scale
                    height, width = side * math.sqrt(ratio), side / math.sqrt(ratio)
                    x, y = column * stride, row * stride
                    boxes.append([x - width / 2, y - height / 2, x + width / 2, y + height / 2])
    return boxes


def match(objects, boxes, high, low, smallest):
    """For each box the index of its object, -1 for background, -2 for neither; low-quality matches as mmdetection."""
    table = [[iou(each, box) for box in boxes] for each in objects]
    found = []
    for column in range(len(boxes)):
        overlaps = [row[column] for row in table]
        best = max(overlaps, default=0.0)
        found.append(overlaps.index(best) if overlaps and best >= high else -1 if best < low else -2)
    for index, row in enumerate(table):
        best = max(row)
        if best >= smallest:
            for column, overlap in enumerate(row):
                if overlap == best:
                    found[column] = index
    return found


def encode(box, anchor, weights=(1, 1, 1, 1)):
    """Offsets that map an anchor to a box."""
    width, height = anchor[2] - anchor[0], anchor[3] - anchor[1]
    x, y = anchor[0] + width / 2, anchor[1] + height / 2
    own = (box[2] - box[0], box[3] - box[1])
    values = (
        (box[0] + own[0] / 2 - x) / width,
        (box[1] + own[1] / 2 - y) / height,
        math.log(own[0] / width),
        math.log(own[1] / height),
    )
    return [value * weight for value, weight in zip(values, weights, strict=True)]


def decode(offsets, anchor, weights=(1, 1, 1, 1)):
    """Apply offsets to an anchor; a side grows or shrinks by a factor of 62.5 at most."""
    dx, dy, dw, dh = (value / weight for value, weight in zip(offsets, weights, strict=True))
    bound = math.log(1000 / 16)
    dw, dh = max(-bound, min(bound, dw)), max(-bound, min(bound, dh))
    width, height = anchor[2] - anchor[0], anchor[3] - anchor[1]
    x, y = anchor[0] + width / 2 + dx * width, anchor[1] + height / 2 + dy * height
    width, height = width * math.exp(dw), height * math.exp(dh)
    return [x - width / 2, y - height / 2, x + width / 2, y + height / 2]


def clip(box, size):
    """Clip a box to an image of (height, width)."""
    return [min(max(value, 0.0), float(size[1 - index % 2])) for index, value in enumerate(box)]


def focal(logit, positive):
    """Focal loss of one logit, gamma 2 and alpha 0.25."""
    probability = 1 / (1 + math.exp(-logit))
    if positive:
        return -0.25 * (1 - probability) ** 2 * math.log(probability)
    return -0.75 * probability**2 * math.log(1 - probability)


def suppress(candidates, threshold, limit):
    """Greedy suppression within a class of (score, label, box) triples; the best `limit` in order."""
    kept = []
    for score, label, box in sorted(candidates, key=lambda each: -each[0]):
        if all(other != label or iou(box, where) <= threshold for _, other, where in kept):
            kept.append((score, label, box))
    return kept[:limit]


def corners(box, size):
    """Normalized (center x, center y, width, height) -> corners in pixels."""
    x, y, width, height = (float(value) for value in box)
    rows, columns = size
    left, right = (x - width / 2) * columns, (x + width / 2) * columns
    return [left, (y - height / 2) * rows, right, (y + height / 2) * rows]


def assert_detections(found, expected, tolerance=1e-3):
    """Compare `{"scores", "labels", "boxes"}` with (score, label, box) triples in the same order."""
    assert len(found["scores"]) == len(expected)
    assert [int(each) for each in found["labels"]] == [label for _, label, _ in expected]
    torch.testing.assert_close(found["scores"], torch.tensor([each[0] for each in expected]), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        found["boxes"], torch.tensor([each[2] for each in expected]).reshape(-1, 4), atol=tolerance, rtol=0
    )
