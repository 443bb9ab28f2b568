"""Training samples and their order; both depend on seed, epoch and index alone."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
from torch.utils.data import Dataset, Sampler
from transformers.image_processing_utils import BaseImageProcessor


class LoadedData(Protocol):
    """What the loaders of all tasks return: rows, and the meaning of their labels."""

    @property
    def dataset(self) -> Any:
        """The rows."""

    @property
    def spec(self) -> Any:
        """Names of the classes, or a label specification."""


class RowDataset(Dataset):
    """Samples of loaded data, one per row.

    Args:
        data: what a loader returned.
    """

    def __init__(self, data: LoadedData) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data.dataset)


class TrainRows(RowDataset, ABC):
    """Augmented samples, indexed by `(epoch, index)` as `EpochSampler` gives them, or by a plain index (epoch 0).

    Args:
        data: what a loader returned.
        seed: determines the sample, together with epoch and index.
    """

    def __init__(self, data: LoadedData, seed: int = 0) -> None:
        super().__init__(data)
        self.seed = seed

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        return self.sample(self.data.dataset[self.row_of(epoch, index)], epoch, index)

    def row_of(self, epoch: int, index: int) -> int:
        """Number of the row of which a sample is made: its index."""
        return index

    @abstractmethod
    def sample(self, row: dict[str, Any], epoch: int, index: int) -> dict[str, Any]:
        """Make the sample of one row."""


class EvalRows(RowDataset):
    """Samples for evaluation.

    Args:
        data: what `a loader` returned.
        processor: image processor of the model, so that evaluation sees the same input as the pipeline.
    """

    def __init__(self, data: LoadedData, processor: BaseImageProcessor) -> None:
        super().__init__(data)
        self.processor = processor


class EpochSampler(Sampler[tuple[int, int]]):
    """Yield `(epoch, index)` once for every index, in an order that depends on (seed, epoch) only.

    The epoch travels with the index, so that a data worker knows it without being restarted.

    Args:
        length: number of samples.
        seed: seed of the order.
        shuffle: False keeps the order 0, 1, 2, ...
    """

    def __init__(self, length: int, seed: int = 0, shuffle: bool = True) -> None:
        self.length = length
        self.seed = seed
        self.shuffle = shuffle
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next pass."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch = self.epoch
        order = np.random.default_rng((self.seed, epoch)).permutation(self.length) if self.shuffle else None
        for position in range(self.length):
            yield epoch, position if order is None else int(order[position])
