"""Regions of a label map that are probably labeled wrongly, by the probabilities of a model.

The label quality of a pixel is its self-confidence, the model's probability of the given class (Northcutt et al. 2021,
"Confident Learning"; for segmentation Lad and Mueller 2023, "Estimating label quality and errors in semantic
segmentation data via any model"). Here regions are ranked, not pixels or images: the doubt of a region is the mean of
-log(self-confidence) over its pixels, times the log of their number. The sum over pixels would be the evidence if they
were independent; neighbors repeat each other, so that it grows much more slowly with the size.
"""

from typing import NamedTuple

import numpy as np

from hf_denseseg.evaluation.size_recall import segments_of

MOST_IN_IMAGE = 100  # regions that are kept of one image
SMALLEST_PROBABILITY = 1e-6  # one pixel that the model is sure of is not to outweigh all others


class Region(NamedTuple):
    """A connected set of pixels of one class in a label map.

    Args:
        doubt: see the module; the higher, the more probably is the label wrong.
        number: of the region in its image, see `doubtful_regions`.
        top, left, height, width: its box in pixels.
        pixels: their number.
        label: class id in the label map.
        predicted: class id that most of its pixels are predicted as that differ from the label.
        label_probability: geometric mean of the probabilities of the label.
        predicted_probability: mean probability of the pixels predicted as `predicted`.
    """

    doubt: float
    number: int
    top: int
    left: int
    height: int
    width: int
    pixels: int
    label: int
    predicted: int
    label_probability: float
    predicted_probability: float


def doubtful_regions(
    label: np.ndarray,
    predicted: np.ndarray,
    own: np.ndarray,
    best: np.ndarray,
    num_labels: int,
    min_pixels: int = 1,
) -> tuple[list[Region], np.ndarray]:
    """Find and score the regions where a model contradicts a label map.

    Of a segment (4-connected pixels of one class) most of whose pixels are predicted as other classes the region is
    all of it; of another one each connected part that is predicted as other classes. So an object that was labeled as
    the class around it is found as well.

    Args:
        label: `(H, W)` class ids, others ignored.
        predicted: `(H, W)` class ids.
        own: `(H, W)` log-probability of each pixel's label; any value where it is ignored.
        best: `(H, W)` log-probability of the predicted class.
        num_labels: number of classes.
        min_pixels: smaller regions are left out.

    Returns:
        At most `MOST_IN_IMAGE` regions, the most doubtful first, and the number of the region of each pixel `(H, W)`.
    """
    label, known = label.astype(np.int64), label < num_labels
    wrong = known & (predicted != label)
    segment = _numbered(label)
    mostly = (2 * np.bincount(segment.ravel(), wrong.ravel()) > np.bincount(segment.ravel()))[segment]
    # One value for each segment that is a region, another one for its parts that are; -1 for all other pixels.
    found = _numbered(np.where(known & mostly, 2 * segment, np.where(wrong, 2 * segment + 1, -1)))
    flat = found.ravel()
    pixels = np.bincount(flat)
    contradicted = np.bincount(flat, wrong.ravel()) > 0
    evidence = -np.maximum(own.ravel(), np.log(SMALLEST_PROBABILITY)).astype(np.float64)
    mean = np.bincount(flat, np.where(known.ravel(), evidence, 0.0)) / pixels
    doubt = mean * np.log(pixels)
    kept = np.flatnonzero(contradicted & (pixels >= max(min_pixels, 1)))
    kept = kept[np.argsort(-doubt[kept], kind="stable")][:MOST_IN_IMAGE]
    boxes = _boxes(found, kept)
    regions = []
    for number in kept.tolist():
        box = boxes[number]
        rows, columns = box
        inside = wrong[box] & (found[box] == number)
        other = np.bincount(predicted[box][inside]).argmax()
        probability = np.exp(best[box][inside & (predicted[box] == other)].astype(np.float64)).mean()
        place = (rows.start, columns.start, rows.stop - rows.start, columns.stop - columns.start)
        given = label[box][inside][0]
        numbers = (*place, int(pixels[number]), int(given), int(other))
        regions.append(
            Region(float(doubt[number]), number, *numbers, float(np.exp(-mean[number])), float(probability))
        )
    return regions, found


def _numbered(ids: np.ndarray) -> np.ndarray:
    """Number of the 4-connected segment of equal ids that each pixel belongs to, from 0."""
    starts, segment = segments_of(ids)
    return np.repeat(segment, np.diff(starts, append=ids.size)).reshape(ids.shape)


def _boxes(found: np.ndarray, numbers: np.ndarray) -> dict[int, tuple[slice, slice]]:
    from scipy import ndimage

    table = np.zeros(found.max() + 1, dtype=np.int64)
    table[numbers] = np.arange(1, len(numbers) + 1)
    boxes = ndimage.find_objects(table[found], len(numbers))
    return dict(zip(numbers.tolist(), boxes, strict=True))
