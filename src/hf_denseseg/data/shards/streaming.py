"""Training from streams: each process reads its own shards, endlessly, and resumes at the batch where it stopped."""

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
    """Training samples whose rows are read sequentially: an endless stream, each row once per epoch.

    Packed shards: a process reads its own shards only. A sample depends on (seed, epoch, row number) alone and its
    position on (seed, rank, number of processes), whatever the number of workers. Processes may have different numbers
    of rows; one with fewer rows starts its next epoch earlier. Resuming skips earlier batches without reading them.

    Other streams (`datasets`): processes and workers divide the files if there are enough, else the rows; resuming
    reads the earlier rows again.

    Args:
        dataset: `sample(row, epoch, index)` makes a sample; `data.dataset` yields the rows.
        seed: seed of the order.
    """

    def __init__(self, dataset: TrainRows, seed: int = 0) -> None:
        self.dataset = dataset
        self.seed = seed
        self.rank, self.world, self.batch_size, self.first_batch = 0, 1, 1, 0

    def set_process(self, rank: int, world: int, batch_size: int) -> None:
        """Set the rank of this process, the number of processes, and the number of samples per batch.

        Raises:
            InputError: there are fewer shards than processes.
        """
        self.rank, self.world, self.batch_size = rank, world, batch_size
        if isinstance(self.dataset.data.dataset, PackedRows):
            self.dataset.data.dataset.shards_of(rank, world)  # fails now, not in a worker, if there are too few

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        number, count = (0, 1) if worker is None else (worker.id, worker.num_workers)
        rows = self.dataset.data.dataset
        yield from self._packed(rows, number, count) if isinstance(rows, PackedRows) else self._streamed(rows, number)

    def _packed(self, rows: PackedRows, worker: int, workers: int) -> Iterator[Any]:
        """Samples of every `workers`-th batch of this process: each worker makes complete batches."""

        def of_this_worker(positions: np.ndarray) -> np.ndarray:
            batches = positions // self.batch_size
            # The loader asks worker 0 first, also when a resumed run starts at a later batch.
            return (batches >= self.first_batch) & ((batches - self.first_batch) % workers == worker)

        shards = rows.shards_of(self.rank, self.world)
        for epoch, index, row in rows.sequence(shards, (self.seed, self.rank, self.world), of_this_worker):
            yield self.dataset.sample(rows.decoded(row), epoch, index)

    def _streamed(self, rows: Any, worker: int) -> Iterator[Any]:
        """Samples of the rows that `datasets` assigns to this process and worker; none if there are too few files."""
        from datasets.distributed import split_dataset_by_node

        rows = rows.shuffle(seed=self.seed, buffer_size=_DECODED_ROWS)
        rows = split_dataset_by_node(rows, self.rank, self.world)
        epoch, found = 0, True
        while found:
            found = False
            rows.set_epoch(epoch)
            for position, row in enumerate(rows):
                found = True
                # A stream has no row numbers; rank, worker and position make an index that is unique in the epoch.
                yield self.dataset.sample(row, epoch, ((self.rank << 16) + worker << 32) + position)
            epoch += 1


class _ResumeStream(TrainerCallback):
    """Start the stream at the batch after the checkpoint."""

    def __init__(self, dataset: StreamingTrainDataset) -> None:
        self.dataset = dataset

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.dataset.first_batch = state.global_step * args.gradient_accumulation_steps


def stream_loader(trainer: Any) -> DataLoader | None:
    """Data loader for the batches of this process; None if the training set is not a stream.

    Without it, accelerate would read all batches in the first process and send them to the others.

    Raises:
        InputError: there are fewer shards than processes.
    """
    dataset, args = trainer.train_dataset, trainer.args
    if not isinstance(dataset, StreamingTrainDataset):
        return None
    dataset.set_process(args.process_index, args.world_size, trainer._train_batch_size)
    if isinstance(dataset.dataset.data.dataset, PackedRows):
        args.ignore_data_skip = True  # the stream skips by itself, without reading
        trainer.pop_callback(_ResumeStream)
        trainer.add_callback(_ResumeStream(dataset))
    loader: DataLoader = DataLoader(
        dataset,
        batch_size=dataset.batch_size,
        collate_fn=trainer.data_collator,
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
        prefetch_factor=args.dataloader_prefetch_factor,
        # A generator of its own: else the loader would draw the workers' seed from torch's global generator, which
        # dropout uses, and a resumed run, which draws once more, would differ from an uninterrupted one.
        generator=torch.Generator(),
    )
    return prepare_data_loader(
        loader, args.device, num_processes=1, process_index=0, put_on_device=True, dispatch_batches=False
    )
