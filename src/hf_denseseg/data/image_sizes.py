"""Sizes of resized images: training, inference and figures all round alike."""

Size = tuple[int, int]  # (height, width)


def scaled_size(size: Size, factor: float) -> Size:
    """Both sides times a factor, halves rounded up, at least 1."""
    height, width = (max(int(side * factor + 0.5), 1) for side in size)
    return height, width


def fit_factor(size: Size, short: float, long: float) -> float:
    """Largest factor at which an image, its ratio kept, fits into a box.

    Args:
        size: of the image.
        short: limit of its short side.
        long: limit of its long side.
    """
    return min(short / min(size), long / max(size))
