"""Read packed shards in index, in any order and from several processes, without an indexed copy on disk."""

import json
import os
import tarfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hf_denseseg.data.shards.manifest import Manifest, check_shards
from hf_denseseg.errors import InputError

SHUFFLED_ROWS = 256
"""Size of the shuffle buffer: the next row is drawn from about this many, which a process holds still encoded. Rows
are packed in random order and the shards are reshuffled every epoch, so the buffer only has to separate neighbors."""


class PackedRows:
    """Rows of the shards of a split; iterating gives all of them in shard order.

    Args:
        folder: folder of the shards.
        manifest: manifest of the split.
        decode: batched row transform, as in `datasets`; None gives rows as they are stored.
        limit: use only the first `limit` rows; None uses all.

    Raises:
        InputError: shards are missing or truncated.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        decode: Callable[[Mapping[str, list[Any]]], dict[str, list[Any]]] | None = None,
        limit: int | None = None,
    ) -> None:
        check_shards(folder, manifest)
        self.folder = folder
        self.manifest = manifest
        self.decode = decode
        self.limit = manifest.rows if limit is None else min(limit, manifest.rows)

    def with_transform(self, decode: Callable[[Mapping[str, list[Any]]], dict[str, list[Any]]]) -> "PackedRows":
        """The same rows, decoded when they are read."""
        return PackedRows(self.folder, self.manifest, decode, self.limit)

    def take(self, count: int) -> "PackedRows":
        """The first `count` rows."""
        return PackedRows(self.folder, self.manifest, self.decode, min(count, self.limit))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number in range(self.manifest.count):
            for _, row in self.read(number, self._rows_of(number)):
                yield self.decoded(row)

    def rows_of_this_process(self) -> Iterator[dict[str, Any]]:
        """Rows of the shards assigned to this process (RANK and WORLD_SIZE, as set by `torchrun`), in order."""
        for number in self.shards_of(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))):
            for _, row in self.read(number, self._rows_of(number)):
                yield self.decoded(row)

    def shards_of(self, rank: int, world: int) -> list[int]:
        """Numbers of the shards assigned to process `rank` of `world`: every `world`-th, the same in every epoch.

        Raises:
            InputError: there are fewer shards than processes.
        """
        used = [number for number in range(self.manifest.count) if len(self._rows_of(number))]
        if len(used) < world:
            smaller = max(1, self.limit // (4 * world))
            raise InputError(
                f"{self.folder} has {len(used)} shards of {self.manifest.split!r} for {world} processes, but each "
                f"process needs at least one of its own. Pack smaller shards: `denseseg data pack ... "
                f"--rows_per_shard {smaller}`."
            )
        return used[rank::world]

    def sequence(
        self, shards: list[int], seed: tuple[int, ...], wanted: Callable[[np.ndarray], np.ndarray]
    ) -> Iterator[tuple[int, int, dict[str, Any]]]:
        """Yield the rows of some shards endlessly, each row once per epoch, in an order drawn for each epoch.

        Args:
            shards: numbers of the shards.
            seed: determines the order, together with the epoch.
            wanted: function from positions in the endless sequence (0, 1, ...) to a boolean mask of those to yield;
                the others are skipped, and shards without a wanted row are not read.

        Returns:
            Iterator over (epoch, number of the row in the split, row not yet decoded).
        """
        start, epoch = 0, 0
        while True:
            rng = np.random.default_rng((*seed, epoch))
            parts = [self._rows_of(number) for number in rng.permutation(shards)]
            numbers = np.concatenate([np.arange(part.start, part.stop) for part in parts])
            # Sorting by position plus noise below SHUFFLED_ROWS moves no row by more than that many places, which
            # bounds the rows that `_in_order` has to hold. The order is known before a row is read, so rows that are
            # not wanted cost nothing.
            order = np.argsort(np.arange(len(numbers)) + rng.random(len(numbers)) * SHUFFLED_ROWS, kind="stable")
            chosen = numbers[order[wanted(start + np.arange(len(numbers)))]]
            for number, row in self._in_order(chosen, [part.start // self.manifest.rows_per_shard for part in parts]):
                yield epoch, number, row
            start, epoch = start + len(numbers), epoch + 1

    def _in_order(self, chosen: np.ndarray, shards: list[int]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Read the shards one after the other and yield the rows in the order of `chosen`."""
        held: dict[int, dict[str, Any]] = {}  # rows read before their turn, at most about SHUFFLED_ROWS
        index = 0
        for number in shards:
            rows = self._rows_of(number)
            here = np.sort(chosen[(chosen >= rows.start) & (chosen < rows.stop)])
            if not len(here):
                continue
            for found, row in self.read(number, here):
                held[found] = row
                while index < len(chosen) and int(chosen[index]) in held:
                    yield int(chosen[index]), held.pop(int(chosen[index]))
                    index += 1

    def _rows_of(self, number: int) -> range:
        rows = self.manifest.shard_rows(number)
        return range(min(rows.start, self.limit), min(rows.stop, self.limit))

    def decoded(self, row: dict[str, Any]) -> dict[str, Any]:
        """Apply the transform to one row."""
        if self.decode is None:
            return row
        return {key: values[0] for key, values in self.decode({key: [value] for key, value in row.items()}).items()}

    def read(self, number: int, wanted: range | np.ndarray) -> Iterator[tuple[int, dict[str, Any]]]:
        """Read some rows of a shard.

        Args:
            number: number of the shard.
            wanted: row numbers within the split, ascending.

        Returns:
            Iterator over (row number, row).

        Raises:
            InputError: the shard is damaged, or its rows are not those of the manifest.
        """
        shard = self.manifest.shards[number]
        first = self.manifest.shard_rows(number).start
        indices = [int(row) - first for row in wanted]
        read = _read_parquet if self.manifest.form == "parquet" else _read_tar
        count = 0
        try:
            for index, row in read(self.folder / shard.file, indices, shard.rows):
                if missing := self.manifest.columns - row.keys():
                    raise ValueError(f"row {index} has no {', '.join(sorted(missing))}")
                count += 1
                yield first + index, row
        except InputError:
            raise
        except (OSError, ValueError, KeyError, tarfile.TarError) as error:  # pyarrow raises subclasses of these
            raise InputError(
                f"{self.folder / shard.file} is damaged ({error}); {len(indices) - count} of its rows are lost. "
                f"{self.manifest.fix}"
            ) from error


def _read_parquet(path: Path, indices: list[int], rows: int) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        if file.metadata.num_rows != rows:
            raise ValueError(f"{file.metadata.num_rows} rows instead of {rows}")
        first, wanted = 0, np.asarray(indices, dtype=np.int64)
        for group in range(file.metadata.num_row_groups):
            end = first + file.metadata.row_group(group).num_rows
            here = wanted[(wanted >= first) & (wanted < end)]
            if len(here):  # row groups without a wanted row are not read
                table = file.read_row_group(group, use_threads=False)
                yield from zip(here.tolist(), table.take(here - first).to_pylist(), strict=True)
            first = end


def _read_tar(path: Path, indices: list[int], rows: int) -> Iterator[tuple[int, dict[str, Any]]]:
    wanted, index, key = set(indices), -1, None
    row: dict[str, Any] = {}
    with tarfile.open(path, "r:") as archive:
        for member in archive:
            name, _, ending = member.name.rpartition("/")[2].partition(".")
            if (member_key := member.name[: len(member.name) - len(ending) - 1]) != key:
                if index in wanted:
                    yield index, row
                index, key, row = index + 1, member_key, {"id": member_key}
            if index in wanted:
                content = archive.extractfile(member)
                _add_member(row, ending, content.read() if content else b"", member.size)
            archive.members = []  # type: ignore[attr-defined]  # else tarfile keeps every header in memory
        if index + 1 != rows:  # tarfile takes a damaged header for the end of the archive
            raise ValueError(f"{index + 1} rows instead of {rows}")
        if index in wanted:
            yield index, row


def _add_member(row: dict[str, Any], ending: str, content: bytes, size: int) -> None:
    """Add a tar member to its row, under the name that its column has in Parquet."""
    if len(content) != size:
        raise ValueError(f"{row['id']}.{ending} is truncated")
    if ending == "json":
        row.update(json.loads(content))
    elif ending == "cls":
        row["label"] = int(content)
    else:
        row["label" if ending == "label.png" else "image"] = {"bytes": content, "path": None}
