"""The manifest of packed shards: files, rows, sizes and checksums, so that no loss goes unnoticed."""

import hashlib
import json
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from hf_denseseg.data.splits import resolve_split
from hf_denseseg.errors import InputError
from hf_denseseg.files import write_atomic

FORMAT_VERSION = 1
_ENDING = ".manifest.json"


class Shard(NamedTuple):
    """One file of a packed split.

    Args:
        file: file name within the folder.
        rows: number of images in the shard.
        size: in bytes.
        sha256: checksum of the file.
    """

    file: str
    rows: int
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """A packed split.

    Args:
        form: `"parquet"` or `"webdataset"`.
        task: the task that the rows were packed for.
        split: name of the split, in the source and in the file names.
        command: the `denseseg` command with which it was packed; run again, it packs what is missing.
        rows: total number of images.
        rows_per_shard: images in every shard but the last.
        ids_sha256: checksum of the ids in shard order; it reveals a source that has changed.
        shards: the complete shards.
        format_version: version of the manifest format.
    """

    form: str
    task: str
    split: str
    command: tuple[str, ...]
    rows: int
    rows_per_shard: int
    ids_sha256: str
    shards: tuple[Shard, ...] = ()
    format_version: int = FORMAT_VERSION

    @property
    def fix(self) -> str:
        """How to pack what is missing."""
        return f"Run `{shlex.join(self.command)}` again: it packs what is missing or damaged and keeps the rest."

    @property
    def columns(self) -> set[str]:
        """Columns that every row must have."""
        return {"image", "id", "objects" if self.task in ("object-detection", "instance-segmentation") else "label"}

    @property
    def count(self) -> int:
        """Number of shards once packing is complete."""
        return -(-self.rows // self.rows_per_shard)  # rounded up

    def shard_rows(self, number: int) -> range:
        """Row numbers, within the split, of a shard."""
        first = number * self.rows_per_shard
        return range(first, min(first + self.rows_per_shard, self.rows))

    def write(self, folder: Path) -> None:
        """Write the manifest atomically."""
        content = asdict(self) | {"shards": [shard._asdict() for shard in self.shards]}
        write_atomic(manifest_path(folder, self.split), json.dumps(content, indent=1) + "\n")


def manifest_path(folder: Path, split: str) -> Path:
    """Path of the manifest of a split."""
    return folder / f"{split}{_ENDING}"


def read_manifest(folder: Path, split: str) -> Manifest | None:
    """Read the manifest of a split (`val` and `validation` are the same); None if there is none.

    Raises:
        InputError: the file is damaged, or its format version is not supported.
    """
    there = sorted(path.name.removesuffix(_ENDING) for path in folder.glob(f"*{_ENDING}"))
    try:
        path = manifest_path(folder, resolve_split(split, there, str(folder)))
    except InputError:
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["format_version"] != FORMAT_VERSION:
            raise InputError(
                f"{path} has format version {values['format_version']}, supported is {FORMAT_VERSION}. Pack again."
            )
        shards = tuple(Shard(**each) for each in values.pop("shards"))
        if any(Path(shard.file).name != shard.file for shard in shards):  # never read outside the folder
            raise ValueError("a shard is in another folder")
        manifest = Manifest(**{**values, "command": tuple(values["command"]), "shards": shards})
        if any(shard.rows != len(manifest.shard_rows(number)) for number, shard in enumerate(shards)):
            raise ValueError("the row counts do not add up")
        return manifest
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}. Check its permissions.") from error
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise InputError(f"{path} is damaged ({error!r}). Delete it and pack the split again.") from error


def is_packed(name: str | Path, split: str) -> bool:
    """Whether the name is a folder that holds a manifest of the split."""
    folder = Path(name).expanduser()
    return folder.is_dir() and read_manifest(folder, split) is not None


def check_task(folder: Path, manifest: Manifest, *tasks: str) -> None:
    """Reject shards that were packed for another task.

    Raises:
        InputError: the task of the shards is none of `tasks`.
    """
    if manifest.task not in tasks:
        raise InputError(f"{folder} was packed for {manifest.task}. Pack the data with `--task {tasks[0]}`.")


def check_shards(folder: Path, manifest: Manifest) -> None:
    """Compare the sizes of the shards with the manifest.

    Raises:
        InputError: packing was not finished, or shards are missing or truncated; the message names them, the number
            of lost rows and the fix.
    """
    if len(manifest.shards) < manifest.count:
        raise InputError(
            f"{folder} holds {len(manifest.shards)} of {manifest.count} shards of {manifest.split!r}: packing was not "
            f"finished. {manifest.fix}"
        )
    faults = [fault for shard in manifest.shards if (fault := _size_fault(folder, shard))]
    if faults:
        more = [f"{len(faults) - 3} more shards are missing or truncated."] if len(faults) > 3 else []
        raise InputError(" ".join([*faults[:3], *more, manifest.fix]))


def damaged_shards(name: str | Path, split: str) -> list[str]:
    """Read every shard of a split and compare checksums: one sentence for each damaged shard, then the fix.

    Args:
        name: folder of the shards; if it is not a folder or has no manifest, the result is empty.
        split: as for `read_manifest`.
    """
    folder = Path(name).expanduser()
    manifest = read_manifest(folder, split) if folder.is_dir() else None
    if manifest is None:
        return []
    faults = []
    if len(manifest.shards) < manifest.count:
        faults.append(f"{manifest.count - len(manifest.shards)} of {manifest.count} shards were never packed.")
    for shard in manifest.shards:
        fault = _size_fault(folder, shard)
        if not fault and checksum(folder / shard.file) != shard.sha256:
            fault = (
                f"{folder / shard.file} has changed since it was packed (sha256 differs); "
                f"its {shard.rows} rows may be wrong."
            )
        faults += [fault] if fault else []
    return [*faults, manifest.fix] if faults else []


def is_intact(folder: Path, shard: Shard) -> bool:
    """Whether a shard has the size and checksum that the manifest records."""
    return not _size_fault(folder, shard) and checksum(folder / shard.file) == shard.sha256


def checksum(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _size_fault(folder: Path, shard: Shard) -> str:
    path = folder / shard.file
    if not path.is_file():
        return f"{path} is missing, and its {shard.rows} rows with it."
    size = path.stat().st_size
    return (
        ""
        if size == shard.size
        else f"{path} has {size} bytes instead of {shard.size}; its {shard.rows} rows are lost."
    )
