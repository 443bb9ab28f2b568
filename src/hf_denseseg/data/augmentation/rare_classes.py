"""Rare class sampling (DAFormer: Hoyer et al., CVPR 2022, Sec. 3.3): a class, and an image that shows it."""

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from hf_denseseg.data.labels import SegmentationData
from hf_denseseg.errors import InputError


class RareClasses:
    """Draw a class, the rarer the likelier, and an image that shows it.

    With the fraction `f_c` of class c among the valid pixels of all images, a class has the probability
    `P(c) = exp((1 - f_c) / T) / sum_k exp((1 - f_k) / T)`, and its images are equally likely. Classes without
    a pixel are left out.

    Args:
        pixels: `(images, num_labels)`, pixels of each class in each image.
        temperature: T; 0.01 in the paper, a larger one makes the classes more alike.

    Raises:
        InputError: no image has a valid pixel.
    """

    def __init__(self, pixels: np.ndarray, temperature: float = 0.01) -> None:
        totals = pixels.sum(0)  # (num_labels,)
        self.classes = np.flatnonzero(totals)
        if not len(self.classes):
            raise InputError(
                "Rare classes cannot be drawn: all pixels of the training images are ignored. Fix "
                "the label specification."
            )
        rarity = (1 - totals[self.classes] / totals.sum()) / temperature
        weights = np.exp(rarity - rarity.max())  # the largest is 1, so that nothing overflows
        self.probabilities = weights / weights.sum()
        self.images = [np.flatnonzero(pixels[:, each]) for each in self.classes]

    def draw(self, rng: np.random.Generator) -> tuple[int, int]:
        """A class, and the index of an image that shows it."""
        drawn = rng.choice(len(self.classes), p=self.probabilities)
        return int(self.classes[drawn]), int(rng.choice(self.images[drawn]))


class _ClassCounts(Dataset):
    def __init__(self, data: SegmentationData) -> None:
        self.data = data

    def __getitem__(self, index: int) -> torch.Tensor:
        label, count = self.data.dataset[index]["label"], self.data.spec.num_labels
        return torch.from_numpy(np.bincount(label[(label >= 0) & (label < count)], minlength=count))  # (num_labels,)


def count_pixels(
    data: SegmentationData, first: int = 0, step: int = 1, workers: int = 0, progress: bool = True
) -> np.ndarray:
    """Pixels of each class in the images `first, first + step, ...`: `(images, num_labels)` int64.

    Args:
        data: what `load_segmentation` returned; no stream.
        first: index of the first image, the rank of a process.
        step: number of processes.
        workers: processes that read label maps.
        progress: show a progress bar on a terminal.
    """
    chosen = range(first, len(data.dataset), step)
    counts = DataLoader(_ClassCounts(data), sampler=chosen, batch_size=None, num_workers=workers)
    rows = list(tqdm(counts, desc="classes of the images", disable=None if progress else True))
    return torch.stack(rows).numpy() if rows else np.zeros((0, data.spec.num_labels), np.int64)


__all__ = ["RareClasses", "count_pixels"]
