"""The train id of pixels that losses and metrics leave out."""

IGNORE_INDEX = 255  # train id of pixels that the loss and the metrics skip, see `ignore_index_of`
LARGEST_ID = 65535  # that a 16-bit PNG can hold
# The last two numbers of bytes (254, 255) are no classes: raw ids that a specification does not name (inside its
# lookup table only), and ignored pixels.
MOST_CLASSES_IN_BYTES = 254


def ignore_index_of(num_labels: int) -> int:
    """Train id of ignored pixels, the largest number that label maps hold: 255, or 65535 beyond 254 classes."""
    return IGNORE_INDEX if num_labels <= MOST_CLASSES_IN_BYTES else LARGEST_ID
