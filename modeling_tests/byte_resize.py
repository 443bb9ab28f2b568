"""Resizing of bytes for the tests that restate a protocol in numpy."""

import torch
from torchvision.transforms.v2.functional import resize


def resize_image(image, size):
    """(H, W, 3) bytes -> (height, width, 3) bytes, antialiased.

    By torchvision as in the image processors: it resizes bytes in whole numbers on processors with AVX2, elsewhere in
    float32, and the two round some bytes differently.
    """
    pixels = torch.from_numpy(image.transpose(2, 0, 1).copy())
    return resize(pixels, list(size), antialias=True).numpy().transpose(1, 2, 0)
