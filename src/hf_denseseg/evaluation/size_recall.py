"""Recall by the size of the target: of the pixels of small, medium and large segments of the label map.

A segment is a 4-connected set of pixels of one class. Semantic labels do not separate objects, so two cars that touch
are one segment, and a car behind a pole is two.
"""

import importlib.util

import numpy as np

from hf_denseseg.errors import InputError

# COCO's limits of small and large, 32x32 and 96x96 pixels on its usual 640x480 images, as fractions of an image.
SIZE_LIMITS = (32 * 32 / (640 * 480), 96 * 96 / (640 * 480))
SIZES = ("small", "medium", "large")


def check_installed() -> None:
    """Refuse to start what would fail at its first evaluation.

    Raises:
        InputError: scipy is not installed.
    """
    if importlib.util.find_spec("scipy") is None:
        raise InputError(
            "Evaluating segmentation needs scipy, which is not installed. Run `pip install 'hf-denseseg[train]'`."
        )


def segments_of(label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Split a label map into segments.

    Each row is cut into runs of one id, and runs that touch are joined. There are far fewer runs than pixels, and all
    classes are handled at once.

    Args:
        label: `(H, W)` integers; ignored pixels form segments too.

    Returns:
        The index into the flattened label map at which each run begins `(R,)`, and the number of its segment `(R,)`,
        counted from 0.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    width = label.shape[1]
    begins = np.ones(label.shape, dtype=bool)
    np.not_equal(label[:, 1:], label[:, :-1], out=begins[:, 1:])
    starts = np.flatnonzero(begins)
    # Two runs of adjacent rows touch where both hold the same id. Their overlap begins where one of them begins, so
    # each such pair is found once.
    touching = np.flatnonzero((begins[:-1] | begins[1:]) & (label[:-1] == label[1:]))
    # The run of a pixel is the last one that begins at it or before it; the pixel below lies `width` places further.
    upper, lower = (np.searchsorted(starts, pixels, side="right") - 1 for pixels in (touching, touching + width))
    shape = (len(starts), len(starts))  # adjacency matrix of the runs
    joined = coo_array((np.ones(len(touching), dtype=bool), (upper, lower)), shape=shape)
    return starts, connected_components(joined, directed=False)[1]


def size_counts(prediction: np.ndarray, label: np.ndarray, num_labels: int) -> np.ndarray:
    """Count the segments of one image by class and size; the counts add up over images.

    Args:
        prediction: `(H, W)` class ids.
        label: `(H, W)` class ids, others ignored; the size of a segment is its fraction of all the image's pixels
            (`SIZE_LIMITS`; a segment at a limit belongs to the larger size).
        num_labels: number of classes C.

    Returns:
        `(3, 3, C)` int64. Axes: size (`SIZES`); number of segments, their pixels, their correctly predicted pixels;
        class.
    """
    starts, segment = segments_of(label)
    lengths = np.diff(starts, append=label.size)  # (R,) pixels of each run
    right = np.add.reduceat(np.ravel(prediction == label), starts, dtype=np.int64)
    # (S,) for S segments: the sums over their runs.
    pixels, found = (np.bincount(segment, weights).astype(np.int64) for weights in (lengths, right))
    classes = np.zeros(len(pixels), dtype=np.int64)
    classes[segment] = label.ravel()[starts]
    sizes = np.digitize(pixels / label.size, SIZE_LIMITS)
    known = classes < num_labels  # leaves out the segments of ignored pixels
    bins = (sizes * num_labels + classes)[known]
    amounts = [
        np.bincount(bins, each[known], len(SIZES) * num_labels) for each in (np.ones(len(pixels)), pixels, found)
    ]
    return np.stack(amounts).reshape(3, len(SIZES), num_labels).astype(np.int64).swapaxes(0, 1)


def size_recall(counts: np.ndarray) -> dict[str, dict]:
    """Recall of the pixels by segment size, from summed `size_counts`.

    Returns:
        Size -> `segments`, `pixels`, `recall` (correct pixels / pixels, all classes together; None without pixels)
        and `per_class` (a list of the same ratio for each class).
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
