"""The processes that `accelerate launch` or `torchrun` started: division of the work, and exchange of results."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch

from hf_denseseg.errors import InputError

LONGEST_WAIT = timedelta(days=30)  # of a process that has finished, for the others


@dataclass(frozen=True)
class Processes:
    """This process among those that share the work; the only one without a launcher.

    Args:
        rank: number of this process, from 0.
        count: number of processes.
        local_rank: number of this process on its machine.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0

    @classmethod
    def launched(cls) -> "Processes":
        """This process among those of the launcher; alone without one, for which accelerate is not needed.

        Raises:
            InputError: there are several, and accelerate is not installed.
        """
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            return cls()
        try:
            from accelerate import PartialState
        except ImportError as error:
            raise InputError(
                "Several processes need accelerate. Install it: pip install 'hf-denseseg[train]'."
            ) from error
        # Each process has its own model; only records are exchanged, for which gloo is enough on every machine.
        state = PartialState(cpu=True, timeout=LONGEST_WAIT)
        return cls(state.process_index, state.num_processes, state.local_process_index)

    def device(self, wanted: str | None) -> str:
        """The requested device; by default the GPU with this process's number, or the CPU.

        Raises:
            InputError: several processes would use one GPU.
        """
        gpus = torch.cuda.device_count()
        if wanted and self.count > 1 and ":" in wanted:
            raise InputError(
                f"--device {wanted} would be used by {self.count} processes. Leave it out: each uses its own."
            )
        if wanted in (None, "cuda") and gpus and self.count > 1:
            return f"cuda:{self.local_rank % gpus}"
        return wanted or ("cuda" if gpus else "cpu")

    def deal(self, weights: Sequence[float]) -> list[int]:
        """Numbers of the tasks of this process, in ascending order.

        Tasks are sorted by weight, the heaviest first, and assigned to ranks 0, 1, ..., N - 1, N - 1, ..., 1, 0 and so
        on, so that every process gets heavy and light ones. All processes compute the same assignment without
        communication.

        Args:
            weights: expected effort of each task.
        """
        heaviest_first = sorted(range(len(weights)), key=lambda k: (-weights[k], k))
        mine = (self.rank, 2 * self.count - 1 - self.rank)
        return sorted(task for turn, task in enumerate(heaviest_first) if turn % (2 * self.count) in mine)

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes in the order of their ranks; each waits for the slowest."""
        if self.count == 1:
            return [value]
        from accelerate.utils import gather_object

        return gather_object([value])
