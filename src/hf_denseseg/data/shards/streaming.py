"""Training from what is read in order: every process its own share, without end, and going on where it stopped."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState

from hf_denseseg.data.augmentation.sampler import TrainRows
from hf_denseseg.data.shards.packed_rows import PackedRows

_DECODED_ROWS = 64


class StreamingTrainDataset(IterableDataset):
    """The samples of a training set whose rows are read in order, once per epoch and without end.

    Packed shards: a process reads its own shards only, and a sample is a function of (seed, epoch, number of the row)
    and its place one of (seed, rank, number of processes), whatever the number of workers. Shares may be of unequal
    size, then a process with fewer rows begins its next epoch earlier. Resuming reads nothing again that came before.

    Other streams (`datasets`): processes and workers share the files if their number allows, else the rows; resuming
    reads again what came before.

    Args:
        dataset: `sample(row, epoch, index)` makes a sample, `data.dataset` gives the rows.
        seed: of the order.
    """

    def __init__(self, dataset: TrainRows, seed: int = 0) -> None:
        self.dataset = dataset
        self.seed = seed
        self.rank, self.world, self.batch_size, self.first_batch = 0, 1, 1, 0

    def share(self, rank: int, world: int, batch_size: int) -> None:
        """Say which process this is of how many, and how many samples a batch has.

        Raises:
            InputError: there are fewer shards than processes.
        """
        self.rank, self.world, self.batch_size = rank, world, batch_size
        if isinstance(self.dataset.data.dataset, PackedRows):
            self.dataset.data.dataset.share(rank, world)

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        number, count = (0, 1) if worker is None else (worker.id, worker.num_workers)
        rows = self.dataset.data.dataset
        yield from self._packed(rows, number, count) if isinstance(rows, PackedRows) else self._streamed(rows, number)

    def _packed(self, rows: PackedRows, worker: int, workers: int) -> Iterator[Any]:
        """Samples of every `workers`-th batch of this process."""

        def mine(places: np.ndarray) -> np.ndarray:
            batches = places // self.batch_size
            # The loader begins with the first worker, whichever batch that is.
            return (batches >= self.first_batch) & ((batches - self.first_batch) % workers == worker)

        shards = rows.share(self.rank, self.world)
        for epoch, index, row in rows.sequence(shards, (self.seed, self.rank, self.world), mine):
            yield self.dataset.sample(rows.decoded(row), epoch, index)

    def _streamed(self, rows: Any, worker: int) -> Iterator[Any]:
        """Samples of what `datasets` gives to this process and worker; nothing at all if it has too few sources."""
        from datasets.distributed import split_dataset_by_node

        rows = rows.shuffle(seed=self.seed, buffer_size=_DECODED_ROWS)
        rows = split_dataset_by_node(rows, self.rank, self.world)
        epoch, found = 0, True
        while found:
            found = False
            rows.set_epoch(epoch)
            for place, row in enumerate(rows):
                found = True
                yield self.dataset.sample(row, epoch, ((self.rank << 16) + worker << 32) + place)
            epoch += 1


class _GoOn(TrainerCallback):
    """Begin a stream where the checkpoint was written."""

    def __init__(self, dataset: StreamingTrainDataset) -> None:
        self.dataset = dataset

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.dataset.first_batch = state.global_step * args.gradient_accumulation_steps


def stream_loader(trainer: Any) -> DataLoader | None:
    """Load batches of this process; None for a training set that is no stream.

    accelerate would read all batches in the first process and send them round.

    Raises:
        InputError: there are fewer shards than processes.
    """
    dataset, args = trainer.train_dataset, trainer.args
    if not isinstance(dataset, StreamingTrainDataset):
        return None
    dataset.share(args.process_index, args.world_size, trainer._train_batch_size)
    if isinstance(dataset.dataset.data.dataset, PackedRows):
        args.ignore_data_skip = True  # the stream does it, without reading
        trainer.pop_callback(_GoOn)
        trainer.add_callback(_GoOn(dataset))
    loader: DataLoader = DataLoader(
        dataset,
        batch_size=dataset.batch_size,
        collate_fn=trainer.data_collator,
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
        prefetch_factor=args.dataloader_prefetch_factor,
        # Of its own: the seed for the workers would be drawn from that of dropout, once more in a resumed run.
        generator=torch.Generator(),
    )
    return prepare_data_loader(
        loader, args.device, num_processes=1, process_index=0, put_on_device=True, dispatch_batches=False
    )
