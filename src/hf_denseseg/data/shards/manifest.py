"""What packed shards should hold: files, rows, sizes and checksums, so that nothing is lost without a word."""

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
        file: name in the folder.
        rows: images in it.
        size: bytes.
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
        task: what the rows are for.
        split: name of the split in the source and here.
        command: `denseseg` and its arguments that packed it; given again, it packs what is missing.
        rows: images in all.
        rows_per_shard: images in every shard but the last.
        ids_sha256: checksum of the ids in the order of the shards; with it a changed source is noticed.
        shards: those that are complete.
        format_version: of this file.
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
        """What every row has at least."""
        return {"image", "id", "objects" if self.task in ("object-detection", "instance-segmentation") else "label"}

    @property
    def count(self) -> int:
        """Number of shards of the whole."""
        return -(-self.rows // self.rows_per_shard)

    def shard_rows(self, number: int) -> range:
        """Numbers of the rows in a shard."""
        first = number * self.rows_per_shard
        return range(first, min(first + self.rows_per_shard, self.rows))

    def write(self, folder: Path) -> None:
        """Write the manifest in one step."""
        content = asdict(self) | {"shards": [shard._asdict() for shard in self.shards]}
        write_atomic(manifest_path(folder, self.split), json.dumps(content, indent=1) + "\n")


def manifest_path(folder: Path, split: str) -> Path:
    """File of the manifest of a split."""
    return folder / f"{split}{_ENDING}"


def read_manifest(folder: Path, split: str) -> Manifest | None:
    """Read the manifest of a split (`val` and `validation` are the same); None where nothing was packed.

    Raises:
        InputError: the file is damaged, or of a version that is not known here.
    """
    there = sorted(path.name.removesuffix(_ENDING) for path in folder.glob(f"*{_ENDING}"))
    try:
        path = manifest_path(folder, resolve_split(split, there, str(folder)))
    except InputError:
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["format_version"] != FORMAT_VERSION:
            raise InputError(f"{path} has version {values['format_version']}, known is {FORMAT_VERSION}. Pack again.")
        shards = tuple(Shard(**each) for each in values.pop("shards"))
        if any(Path(shard.file).name != shard.file for shard in shards):
            raise ValueError("a shard lies in another folder")
        manifest = Manifest(**{**values, "command": tuple(values["command"]), "shards": shards})
        if any(shard.rows != len(manifest.shard_rows(number)) for number, shard in enumerate(shards)):
            raise ValueError("its numbers of rows do not add up")
        return manifest
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}. Check its rights.") from error
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise InputError(f"{path} is damaged ({error!r}). Delete it and pack the split again.") from error


def is_packed(name: str | Path, split: str) -> bool:
    """Whether a name is that of a folder with shards of the split, and a manifest."""
    folder = Path(name).expanduser()
    return folder.is_dir() and read_manifest(folder, split) is not None


def check_task(folder: Path, manifest: Manifest, *tasks: str) -> None:
    """Refuse shards that were packed for another task.

    Raises:
        InputError: the task of the shards is none of `tasks`.
    """
    if manifest.task not in tasks:
        raise InputError(f"{folder} was packed for {manifest.task}. Pack the data with `--task {tasks[0]}`.")


def check_shards(folder: Path, manifest: Manifest) -> None:
    """Compare the sizes of the shards with the manifest.

    Raises:
        InputError: packing was not finished, or shards are missing or cut short; names them, their rows and the
            fix.
    """
    if len(manifest.shards) < manifest.count:
        raise InputError(
            f"{folder} holds {len(manifest.shards)} of {manifest.count} shards of {manifest.split!r}: packing was not "
            f"finished. {manifest.fix}"
        )
    faults = [fault for shard in manifest.shards if (fault := _size_fault(folder, shard))]
    if faults:
        more = [f"{len(faults) - 3} more shards are faulty."] if len(faults) > 3 else []
        raise InputError(" ".join([*faults[:3], *more, manifest.fix]))


def damaged_shards(name: str | Path, split: str) -> list[str]:
    """Read every shard of a split and compare its checksum: a sentence on each that differs, and the fix.

    Args:
        name: folder of the shards; what is no folder, or has no manifest, has no faults either.
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
                f"{folder / shard.file} is not as it was packed (sha256 differs); its {shard.rows} rows are in doubt."
            )
        faults += [fault] if fault else []
    return [*faults, manifest.fix] if faults else []


def is_intact(folder: Path, shard: Shard) -> bool:
    """Whether a shard has the size and checksum that it should have."""
    return not _size_fault(folder, shard) and checksum(folder / shard.file) == shard.sha256


def checksum(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _size_fault(folder: Path, shard: Shard) -> str:
    path = folder / shard.file
    if not path.is_file():
        return f"{path} is missing; with it {shard.rows} rows."
    size = path.stat().st_size
    return (
        ""
        if size == shard.size
        else f"{path} has {size} bytes instead of {shard.size}; its {shard.rows} rows are lost."
    )
