"""`export.json` beside an exported model: what it is, how it was verified, and checksums of its files."""

import hashlib
import json
from pathlib import Path
from typing import Any

from hf_denseseg.errors import InputError
from hf_denseseg.files import write_atomic

RECORD = "export.json"


def is_export(checkpoint: str | Path) -> bool:
    """Whether a folder holds an exported model."""
    return (Path(checkpoint) / RECORD).is_file()


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write `export.json`, with size and SHA-256 of every file that is in the folder."""
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != RECORD
    }
    write_atomic(folder / RECORD, json.dumps({**record, "files": files}, indent=1) + "\n")


def read_record(folder: str | Path) -> dict[str, Any]:
    """Read `export.json` and compare the files with it.

    Raises:
        InputError: it is no record, or a file is missing, cut short or edited.
    """
    folder = Path(folder)
    try:
        record = json.loads((folder / RECORD).read_text())
        files, _ = record["files"], record["format"]
        expected = {str(name): (int(facts["bytes"]), str(facts["sha256"])) for name, facts in files.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{folder / RECORD} cannot be read ({error}). Export the checkpoint again.") from error
    for name, (size, checksum) in expected.items():
        path = folder / name
        if ".." in Path(name).parts or Path(name).is_absolute() or not path.is_file():
            raise InputError(f"{path} is missing. Export the checkpoint again.")
        if path.stat().st_size != size:
            raise InputError(
                f"{path} has {path.stat().st_size} bytes, {size} were written: it was cut short or edited. Copy the "
                "folder again, or export the checkpoint again."
            )
        if sha256(path) != checksum:
            raise InputError(
                f"{path} has another checksum than {RECORD} names: it was damaged or edited. Copy the folder again, "
                "or export the checkpoint again."
            )
    return record


def sha256(path: Path) -> str:
    """Checksum of a file in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
