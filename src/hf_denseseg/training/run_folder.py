"""The folder of a run: which recipe it holds, whether that is finished, and the checkpoint to continue from."""

import errno
import fcntl
import json
import logging
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from hf_denseseg.errors import InputError
from hf_denseseg.files import write_atomic
from hf_denseseg.training.arguments import RENAMED_KEYS, TaskTrainingArguments
from hf_denseseg.training.checkpoints import last_complete_checkpoint

logger = logging.getLogger(__name__)

# Keys that do not change the result of a run, only where it writes or how fast it is.
FREE_KEYS = {
    *("output_dir", "data_root", "dataloader_num_workers"),
    *("disable_tqdm", "report_to", "logging_steps", "run_name"),
}
# The product of these and the number of processes must stay the same when a run continues, perhaps on other machines.
BATCH_KEYS = {"per_device_train_batch_size", "gradient_accumulation_steps"}
BATCH_NOTE = "batch.json"


@contextmanager
def sole_run(output: Path, process_index: int) -> Iterator[None]:
    """Keep other runs out of the folder until the block ends or the process does, killed or not.

    Raises:
        InputError: another process trains in this folder.
    """
    if process_index != 0:  # the main process locks for all processes of its run
        yield
        return
    lock = output / ".lock"
    with lock.open("w") as file:
        try:
            # POSIX locks belong to one process; `flock` would be shared with data workers that outlive a killed run.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:  # the others say that this file system has no locks
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise InputError(
                    f"Another process is training in {output}. Wait until it ends, or give another --output_dir."
                ) from error
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def _total_batch_size(args: TaskTrainingArguments) -> int:
    return args.train_batch_size * args.world_size * args.gradient_accumulation_steps


def note_run(given: dict[str, Any], text: str, args: TaskTrainingArguments, output: Path) -> None:
    """Write what `check_folder` compares later runs with; `text` is the recipe as YAML."""
    note = output / "recipe.yaml"
    if not note.exists():
        batch = {"total_batch_size": _total_batch_size(args)}
        write_atomic(output / BATCH_NOTE, json.dumps(batch) + "\n")
        write_atomic(note, text)
    elif _keys_of(note).get("max_steps") != given.get("max_steps"):  # a run that is made longer
        write_atomic(note, text)


def _keys_of(note: Path) -> dict[str, Any]:
    """Keys of a saved recipe by their current names."""
    import yaml

    return {RENAMED_KEYS.get(key, key): value for key, value in (yaml.safe_load(note.read_text()) or {}).items()}


def check_folder(given: dict[str, Any], args: TaskTrainingArguments, output: Path) -> dict[str, Any] | None:
    """Refuse the folder of another run, and return the results of a finished one; `given` are the recipe's keys."""
    note, batch_note = output / "recipe.yaml", output / BATCH_NOTE
    batch = _total_batch_size(args)
    if note.exists():
        saved = _keys_of(note)
        keys = [key for key in saved.keys() | given.keys() if saved.get(key) != given.get(key)]
        differing = sorted(set(keys) - FREE_KEYS - BATCH_KEYS)
        noted = json.loads(batch_note.read_text()) if batch_note.exists() else {}
        # Compared first: other factors of the same product are not another run.
        before = noted.get("total_batch_size", noted.get("pictures_per_step", batch))  # its former name
        if before != batch:
            raise InputError(
                f"{output} holds a run with a total batch size of {before}, now it is {batch}: {args.world_size} "
                f"processes x per_device_train_batch_size {args.train_batch_size} x gradient_accumulation_steps "
                f"{args.gradient_accumulation_steps}. Choose factors with the product {before}, or another "
                "--output_dir."
            )
        steps = saved.get("max_steps", TaskTrainingArguments.max_steps)
        if differing == ["max_steps"] and args.max_steps > steps:
            message = "%s holds this run with %d steps. It continues to step %d, and from here on the learning rate "
            logger.info(message + "follows the schedule of %d steps.", output, steps, args.max_steps, args.max_steps)
            return None
        if differing:
            lines = ", ".join(f"{key} ({saved.get(key)} there, {given.get(key)} now)" for key in differing[:3])
            raise InputError(f"{output} holds another run, different in {lines}. Give another --output_dir.")
        if (output / "results.json").exists():
            return json.loads((output / "results.json").read_text())
    return None


def checkpoint_for_all(output: Path, args: TaskTrainingArguments) -> Path | None:
    """Newest complete checkpoint, found by the main process alone, since it removes damaged ones."""
    found: list[Path | None] = [last_complete_checkpoint(output) if args.process_index == 0 else None]
    if args.world_size > 1:
        torch.distributed.broadcast_object_list(found)
    checkpoint = found[0]
    if checkpoint is None:
        return None
    if not checkpoint.is_dir():
        raise InputError(
            f"{checkpoint} is not visible from {platform.node()}. Put --output_dir on storage that all machines share."
        )
    logger.info("Continuing from %s.", checkpoint)
    # transformers saves one file of random states per process: without a number for one, else numbered from 0.
    states = {path.name for path in checkpoint.glob("rng_state*")}
    own = "rng_state.pth" if args.world_size == 1 else f"rng_state_{args.world_size - 1}.pth"
    if states and (own not in states or f"rng_state_{args.world_size}.pth" in states):
        logger.warning(
            "%s was saved by %d processes, now there are %d: order and augmentation continue unchanged, dropout uses "
            "other random numbers.",
            checkpoint,
            len(states),
            args.world_size,
        )
    return checkpoint


__all__ = ["check_folder", "checkpoint_for_all", "note_run", "sole_run"]
