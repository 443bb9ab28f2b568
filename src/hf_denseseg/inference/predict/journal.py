"""The finished images of a run, on disk, so that a killed run continues where it stopped.

Prediction, evaluation and submission share this format. Each process appends to a file of its own, one line per image:
a checksum of the line, and as JSON the image's key, the state of its content and its record. Each line is flushed
before the next image begins, so a killed process loses the current image only. A truncated line is not read.
"""

import hashlib
import json
import logging
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch
from torch import nn

from hf_denseseg.files import write_atomic

logger = logging.getLogger(__name__)

KEY_FILE = "key.json"
FORMAT = 2  # of the lines

Key = int | str


class Entry(NamedTuple):
    """One finished image.

    Args:
        key: its number in the dataset, or its name.
        state: JSON value that identifies its content; an entry of another state is out of date.
        record: its result, as JSON values.
    """

    key: Key
    state: Any
    record: Any


class Journal:
    """A folder in which every process writes a file, and which any process reads.

    Args:
        folder: for the journal alone.
        made_with: everything that the records depend on besides the images, as JSON values; see `prepare`.
        rank: number of the process; its file is named after it.
    """

    def __init__(self, folder: Path, made_with: Mapping[str, Any], rank: int) -> None:
        self.folder = folder
        self.made_with = json.loads(json.dumps({"format": FORMAT, **made_with}))
        self._path = self.folder / f"process-{rank:05d}.jsonl"
        self._file: TextIO | None = None

    def prepare(self) -> bool:
        """Keep a journal with the same `made_with`, or warn and start a new one; one process per machine calls this.

        Returns:
            Whether the journal was kept.
        """
        note = self.folder / KEY_FILE
        if note.exists():
            before = json.loads(note.read_text())
            differing = [name for name in self.made_with if before.get(name) != self.made_with[name]]
            if not differing:
                return True
            logger.warning(
                "%s was made with another %s: it is deleted, and all images are run again.",
                self.folder,
                " and ".join(differing),
            )
        shutil.rmtree(self.folder, ignore_errors=True)
        write_atomic(note, json.dumps(self.made_with, indent=1) + "\n")
        return False

    def read(self) -> list[Entry]:
        """Every image that any process has finished; the last of several entries for one image is used."""
        found: dict[Key, Entry] = {}
        for path in sorted(self.folder.glob("process-*.jsonl")):
            for entry in _entries(path):
                found[entry.key] = entry
        return list(found.values())

    def add(self, entry: Entry) -> None:
        """Append an image."""
        if self._file is None:
            self._file = self._path.open("a", encoding="utf-8")
            self._file.write("\n")  # ends a line that an earlier run left truncated
        self._file.write(_line(entry))
        self._file.flush()

    def close(self) -> None:
        """Close this process's file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def compact(self, entries: Sequence[Entry]) -> None:
        """Merge these entries, and those of other images, into one file: the same for any number of processes.

        Entries without a state are left out. One process calls this after all of them have closed their files.

        Args:
            entries: in the order in which they are written; entries of other images follow, sorted by key.
        """
        kept = {entry.key: entry for entry in entries if entry.state is not None}
        others = sorted((entry for entry in self.read() if entry.key not in kept), key=lambda entry: str(entry.key))
        lines = [_line(entry) for entry in (*kept.values(), *others)]
        paths = list(self.folder.glob("process-*.jsonl"))
        write_atomic(self.folder / "process-00000.jsonl", "".join(lines))
        for path in paths:
            if path.name != "process-00000.jsonl":
                path.unlink()

    def delete(self) -> None:
        """Remove the journal, once the results are written."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _line(entry: Entry) -> str:
    text = json.dumps(entry)
    return f"{zlib.crc32(text.encode()):08x} {text}\n"


def _entries(path: Path) -> Iterator[Entry]:
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        check, _, text = line.partition(" ")
        if text and check == f"{zlib.crc32(text.encode()):08x}":
            yield Entry(*json.loads(text))


def content_check(sample: Mapping[str, Any]) -> int:
    """CRC-32 of a sample of an evaluation dataset: of the names, tensors and values in it."""
    check = 0
    for name, value in sorted(sample.items()):
        check = zlib.crc32(name.encode(), check)
        if isinstance(value, torch.Tensor):
            array = value.contiguous().numpy()
            check = zlib.crc32(array.data, zlib.crc32(f"{array.dtype} {array.shape}".encode(), check))
        else:
            check = zlib.crc32(repr(value).encode(), check)
    return check


def weights_digest(model: nn.Module) -> str:
    """Hash of the weights and buffers of a model."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
