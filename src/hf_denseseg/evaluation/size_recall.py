"""Recall by the size of what was to be found: pixels of small, medium and large segments of the label map.

A segment is a set of pixels of one class that touch by their sides. Semantic labels know no objects, so two cars that
touch are one segment, and a car behind a pole is two.
"""

import importlib.util

import numpy as np

from hf_denseseg.errors import InputError

# COCO's limits of small and large, 32x32 and 96x96 pixels on its usual 640x480 images, as shares of an image.
SIZE_LIMITS = (32 * 32 / (640 * 480), 96 * 96 / (640 * 480))
SIZES = ("small", "medium", "large")


def check_installed() -> None:
    """Refuse to begin what would fail at its first evaluation.

    Raises:
        InputError: scipy is not installed.
    """
    if importlib.util.find_spec("scipy") is None:
        raise InputError(
            "Evaluating segmentation needs scipy, which is not installed. Run `pip install 'hf-denseseg[train]'`."
        )


def segments_of(label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Split a label map into segments.

    Each row is cut into runs of one id, and runs that touch are joined: far fewer than pixels, and all classes at
    once.

    Args:
        label: `(H, W)` integers; void makes segments too.

    Returns:
        The flat place at which each run begins `(R,)`, and the number of its segment `(R,)`, counted from 0.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    width = label.shape[1]
    begins = np.ones(label.shape, dtype=bool)
    np.not_equal(label[:, 1:], label[:, :-1], out=begins[:, 1:])
    starts = np.flatnonzero(begins)
    # Two runs touch where the id below is the same; the place where their overlap begins is one for each such pair.
    touching = np.flatnonzero((begins[:-1] | begins[1:]) & (label[:-1] == label[1:]))
    upper, lower = (np.searchsorted(starts, places, side="right") - 1 for places in (touching, touching + width))
    shape = (len(starts), len(starts))
    joined = coo_array((np.ones(len(touching), dtype=bool), (upper, lower)), shape=shape)
    return starts, connected_components(joined, directed=False)[1]


def size_counts(prediction: np.ndarray, label: np.ndarray, num_labels: int) -> np.ndarray:
    """Segments of one image by class and size, which add up over images.

    Args:
        prediction: `(H, W)` class ids.
        label: `(H, W)` class ids and 255 = void; its segments are sorted by their share of all the image's pixels
            (`SIZE_LIMITS`; a segment at a limit is the larger).
        num_labels: number of classes C.

    Returns:
        `(3, 3, C)` int64: size (`SIZES`); segments, their pixels, and those of them predicted right; class.
    """
    starts, segment = segments_of(label)
    lengths = np.diff(starts, append=label.size)
    right = np.add.reduceat(np.ravel(prediction == label), starts, dtype=np.int64)
    pixels, found = (np.bincount(segment, weights).astype(np.int64) for weights in (lengths, right))
    classes = np.zeros(len(pixels), dtype=np.int64)
    classes[segment] = label.ravel()[starts]
    sizes = np.digitize(pixels / label.size, SIZE_LIMITS)
    known = classes < num_labels
    bins = (sizes * num_labels + classes)[known]
    amounts = [
        np.bincount(bins, each[known], len(SIZES) * num_labels) for each in (np.ones(len(pixels)), pixels, found)
    ]
    return np.stack(amounts).reshape(3, len(SIZES), num_labels).astype(np.int64).swapaxes(0, 1)


def size_recall(counts: np.ndarray) -> dict[str, dict]:
    """Recall of the pixels by size of summed `size_counts`.

    Returns:
        Size -> `segments`, `pixels`, `recall` (right pixels / pixels of all classes together, None without any) and
        `per_class` (a list of the same ratio).
    """
    result = {}
    for name, (segments, pixels, found) in zip(SIZES, counts.tolist(), strict=True):
        result[name] = {
            "segments": sum(segments),
            "pixels": sum(pixels),
            "recall": sum(found) / sum(pixels) if sum(pixels) else None,
            "per_class": [right / all_ if all_ else None for right, all_ in zip(found, pixels, strict=True)],
        }
    return result
