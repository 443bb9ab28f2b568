"""What an evaluation has counted so far, on disk, so that a killed one goes on where it was.

Each process has a file of its own, with one line per picture: the counts that are not zero, the checksum of the
picture and its label, and the checksum of the line. A line is handed to the system before the next picture is begun:
a kill loses the picture at hand and nothing else. A line cut short is not read.
"""

import hashlib
import json
import logging
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch
from torch import nn

from hf_denseseg.files import write_atomic

logger = logging.getLogger(__name__)

KEY_FILE = "key.json"


class Record(NamedTuple):
    """One counted picture.

    Args:
        number: its place in the data set.
        id: its name.
        check: checksum of its content, see `content_check`.
        places: where its counts are not zero.
        amounts: the counts there.
    """

    number: int
    id: str
    check: int
    places: list[int]
    amounts: list[int]

    @classmethod
    def of(cls, number: int, name: str, check: int, counts: torch.Tensor) -> "Record":
        """Record of what `count_picture` gave."""
        places = counts.nonzero().flatten()
        return cls(number, name, check, places.tolist(), counts[places].tolist())

    def counts(self, length: int) -> torch.Tensor:
        """The counts as a vector of so many places."""
        vector = torch.zeros(length, dtype=torch.int64)
        vector[self.places] = torch.tensor(self.amounts, dtype=torch.int64)
        return vector


class Journal:
    """A folder that every process writes a file of, and any process reads.

    Args:
        folder: its place, nothing else lies in it.
        key: what the counts depend on besides the pictures, as JSON values; see `settle`.
        rank: number of the process, which names its file.
    """

    def __init__(self, folder: Path, key: dict[str, Any], rank: int) -> None:
        self.folder = folder
        self.key = json.loads(json.dumps(key))
        self._path = self.folder / f"process-{rank:05d}.jsonl"
        self._file: TextIO | None = None

    def settle(self) -> bool:
        """Keep a journal of the same key, or start anew and say why; for one process of a machine, before `read`.

        Returns:
            Whether it was kept.
        """
        note = self.folder / KEY_FILE
        if note.exists():
            there = json.loads(note.read_text())
            differing = [name for name in self.key if there.get(name) != self.key[name]]
            if not differing:
                return True
            logger.warning(
                "%s was begun with another %s: it is deleted, and all pictures are looked at anew.",
                self.folder,
                " and ".join(differing),
            )
        shutil.rmtree(self.folder, ignore_errors=True)
        write_atomic(note, json.dumps(self.key, indent=1) + "\n")
        return False

    def read(self) -> list[Record]:
        """Every picture that any process has counted."""
        found: dict[int, Record] = {}
        for path in sorted(self.folder.glob("process-*.jsonl")):
            for record in _records(path):
                found[record.number] = record
        return list(found.values())

    def add(self, record: Record) -> None:
        """Write down a picture."""
        if self._file is None:
            self._file = self._path.open("a", encoding="utf-8")
            self._file.write("\n")  # what was cut short before stays a line of its own
        text = json.dumps(record)
        self._file.write(f"{zlib.crc32(text.encode()):08x} {text}\n")
        self._file.flush()

    def close(self) -> None:
        """Close this process's file."""
        if self._file is not None:
            self._file.close()

    def delete(self) -> None:
        """Remove the journal, once the results are written."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _records(path: Path) -> Iterator[Record]:
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        check, _, text = line.partition(" ")
        if text and check == f"{zlib.crc32(text.encode()):08x}":
            yield Record(*json.loads(text))


def content_check(sample: dict[str, Any]) -> int:
    """Checksum of a sample of `EvalDataset`: its name, picture and label."""
    check = zlib.crc32(sample["id"].encode())
    for pixels in (sample["image"], sample["label"]):
        array = pixels.contiguous().numpy()
        check = zlib.crc32(array, zlib.crc32(str(array.shape).encode(), check))
    return check


def weights_digest(model: nn.Module) -> str:
    """Fingerprint of the weights and statistics of a model."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
