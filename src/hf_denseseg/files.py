"""Write files under a temporary name and rename them, so that no partial file is ever read as a complete one."""

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hf_denseseg.errors import InputError, RunError

NO_ROOM = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Give a temporary path with the same ending in the same folder, and rename it to `path` when the block succeeds.

    Raises:
        RunError: the disk is full or the folder cannot be written; `path` keeps its previous content.
    """
    path = Path(path)
    with _explain_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
        os.close(handle)
        aside = Path(name)
        try:
            yield aside
            # mkstemp creates private files; give a result the permissions that the umask allows.
            mask = os.umask(0)
            os.umask(mask)
            aside.chmod(0o666 & ~mask)
            with aside.open("rb+") as written:
                os.fsync(written.fileno())
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: str | Path) -> Iterator[Path]:
    """Give an empty folder beside `folder`, and rename it to `folder`, which it replaces, when the block succeeds.

    Raises:
        RunError: the disk is full or the parent cannot be written; `folder` keeps its previous content.
    """
    folder = Path(folder)
    with _explain_write_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as beside:
            aside = Path(beside) / folder.name
            aside.mkdir()
            yield aside
            if folder.exists():
                os.replace(folder, Path(beside) / "previous")
            os.replace(aside, folder)


def write_atomic(path: str | Path, data: str | bytes) -> None:
    """Write text (UTF-8) or bytes to `path` in one step, see `atomic_path`."""
    with atomic_path(path) as aside:
        aside.write_bytes(data.encode() if isinstance(data, str) else data)


def check_output_folder(folder: str | Path) -> Path:
    """Create `folder` and check that it can be written, before any work is done.

    Raises:
        InputError: the path is a file, or the folder cannot be created or written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"x")
    except OSError as error:
        raise InputError(
            f"Output folder {folder} cannot be written ({error.strerror}). Give another, or change its permissions."
        ) from error
    return folder


@contextmanager
def _explain_write_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in NO_ROOM:
            reason = "the disk is full, or a quota or file size limit is reached: free some space"
        elif error.errno in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR):
            reason = f"{error.strerror}: give a folder that can be written"
        else:
            raise
        raise RunError(f"Could not write {path}: {reason}, then run the same command again.") from error
