"""The order of training samples, which depends on seed and epoch alone."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler


class EpochSampler(Sampler[tuple[int, int]]):
    """Give `(epoch, index)` for every index once, in an order that depends on (seed, epoch) only.

    Args:
        length: number of pairs.
        seed: of the order.
        shuffle: False keeps the order 0, 1, 2, ...
    """

    def __init__(self, length: int, seed: int = 0, shuffle: bool = True) -> None:
        self.length = length
        self.seed = seed
        self.shuffle = shuffle
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next pass."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch = self.epoch
        order = np.random.default_rng((self.seed, epoch)).permutation(self.length) if self.shuffle else None
        for place in range(self.length):
            yield epoch, place if order is None else int(order[place])
