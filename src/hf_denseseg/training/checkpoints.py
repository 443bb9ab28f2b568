"""The `checkpoint-<step>` folders of a run: which are complete, which is the newest, and cleaning up a failed save."""

import json
import logging
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_denseseg.errors import RunError
from hf_denseseg.files import NO_ROOM, write_atomic

logger = logging.getLogger(__name__)

COMPLETE_MARK = "complete.json"
BLOCK = 1 << 20
# Parts of the messages of torch and safetensors when a write failed; they do not pass on errno.
_WRITE_FAILED = ("No space left", "PytorchStreamWriter", "unexpected pos", "File too large", "quota")


def mark_complete(folder: Path) -> None:
    """Mark a checkpoint folder as complete: write a list of its files, their sizes and CRC-32 checksums."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != COMPLETE_MARK)
    listed = {path.relative_to(folder).as_posix(): [path.stat().st_size, _crc32(path)] for path in files}
    write_atomic(folder / COMPLETE_MARK, json.dumps(listed, indent=1) + "\n")


def fault_of(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder; None if it is complete and every file is as it was written."""
    try:
        listed = json.loads((folder / COMPLETE_MARK).read_text())
        for name, (size, checksum) in listed.items():  # the size first, which is quicker to compare
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size:,} of {size:,} bytes"
            if _crc32(path) != checksum:
                return f"{name} has changed since it was written (wrong checksum)"
    except FileNotFoundError:
        return "its save was interrupted"
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return f"{COMPLETE_MARK} cannot be read ({error})"
    return None


def step_of(folder: Path) -> int:
    """Number of optimizer steps before `checkpoint-<step>` was saved."""
    return int(folder.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-"))


def checkpoints_of(output_dir: str | Path) -> list[Path]:
    """The `checkpoint-<step>` folders of a run, complete or not, oldest first."""
    folders = Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    return sorted((each for each in folders if each.name.rpartition("-")[2].isdigit()), key=step_of)


def last_complete_checkpoint(output_dir: str | Path) -> Path | None:
    """Newest complete `checkpoint-<step>` of a run; newer incomplete ones are removed with a warning."""
    for folder in reversed(checkpoints_of(output_dir)):
        fault = fault_of(folder)
        if fault is None:
            return folder
        logger.warning(
            "%s cannot be used: %s. It is removed; the steps since the previous checkpoint run again.", folder, fault
        )
        shutil.rmtree(folder)
    return None


@contextmanager
def explain_failed_save(folder: Path) -> Iterator[None]:
    """Turn a failed write inside the block into one sentence, and remove the partly written checkpoint.

    Raises:
        RunError: the disk is full, or a quota or file size limit is exceeded.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        failed = isinstance(error, OSError) and error.errno in NO_ROOM
        failed |= any(sign in f"{error} {error.__cause__ or ''}" for sign in _WRITE_FAILED)
        if not failed:
            raise
        shutil.rmtree(folder, ignore_errors=True)
        raise RunError(
            f"Could not save {folder}: the disk is full, or a quota or file size limit is reached. Free some space. "
            f"{what_is_kept(folder.parent)}"
        ) from error


def what_is_kept(output_dir: str | Path) -> str:
    """A sentence on where a run that stops now will continue."""
    last = next((each for each in reversed(checkpoints_of(output_dir)) if fault_of(each) is None), None)
    if last is None:
        return "There is no complete checkpoint yet: the same command starts again from step 0."
    return f"{last.name} is complete: the same command continues from step {step_of(last)}; later steps run again."


def _crc32(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            value = zlib.crc32(block, value)
    return value
