"""Sizes of resized images, with the same rounding in training, inference and figures."""

Size = tuple[int, int]  # (height, width)


def scaled_size(size: Size, factor: float) -> Size:
    """Both sides times a factor, rounded half up, at least 1."""
    height, width = (max(int(side * factor + 0.5), 1) for side in size)
    return height, width


def fit_factor(size: Size, short: float, long: float) -> float:
    """Largest factor at which an image fits into a box without changing its aspect ratio.

    Args:
        size: (height, width) of the image.
        short: upper limit of its short side.
        long: upper limit of its long side.
    """
    return min(short / min(size), long / max(size))
