"""Read packed shards in place, in any order and by several processes, without an indexed copy of them."""

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
"""Rows among which the next one is drawn; a process holds about so many, still encoded. They are packed in random
order and the order of the shards is drawn in every epoch, so this only has to tear neighbors apart."""


class PackedRows:
    """Rows of the shards of a split; iterated, all of them in the order of the shards.

    Args:
        folder: where the shards lie.
        manifest: what they hold.
        decode: batched row transform, as `datasets` takes it; None gives rows as they are stored.
        limit: use the first so many rows.

    Raises:
        InputError: shards are missing or cut short.
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
        """The first so many rows."""
        return PackedRows(self.folder, self.manifest, self.decode, min(count, self.limit))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number in range(self.manifest.count):
            for _, row in self.read(number, self._rows_of(number)):
                yield self.decoded(row)

    def own(self) -> Iterator[dict[str, Any]]:
        """Rows of the shards that belong to this process, as `torchrun` numbers it, in order."""
        for number in self.share(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))):
            for _, row in self.read(number, self._rows_of(number)):
                yield self.decoded(row)

    def share(self, rank: int, world: int) -> list[int]:
        """Numbers of the shards that belong to process `rank` of `world`: every `world`-th, whatever the epoch.

        Raises:
            InputError: there are fewer shards than processes.
        """
        used = [number for number in range(self.manifest.count) if len(self._rows_of(number))]
        if len(used) < world:
            smaller = max(1, self.limit // (4 * world))
            raise InputError(
                f"{self.folder} has {len(used)} shards of {self.manifest.split!r} for {world} processes, and each "
                f"reads shards of its own. Pack smaller ones: `denseseg data pack ... --rows_per_shard {smaller}`."
            )
        return used[rank::world]

    def sequence(
        self, shards: list[int], seed: tuple[int, ...], wanted: Callable[[np.ndarray], np.ndarray]
    ) -> Iterator[tuple[int, int, dict[str, Any]]]:
        """Give the rows of some shards without end, every one once per epoch, in an order drawn for each epoch.

        Args:
            shards: their numbers.
            seed: with the epoch it determines the order.
            wanted: of places in the sequence (0, 1, ... without end), which ones are given; the others are skipped,
                and shards of which nothing is wanted are not read.

        Returns:
            Iterator over epoch, number of the row in the split, and the row, not decoded.
        """
        start, epoch = 0, 0
        while True:
            rng = np.random.default_rng((*seed, epoch))
            parts = [self._rows_of(number) for number in rng.permutation(shards)]
            numbers = np.concatenate([np.arange(part.start, part.stop) for part in parts])
            # Every row moves by less than so many places: what is drawn early need not be held for long.
            order = np.argsort(np.arange(len(numbers)) + rng.random(len(numbers)) * SHUFFLED_ROWS, kind="stable")
            chosen = numbers[order[wanted(start + np.arange(len(numbers)))]]
            for number, row in self._in_order(chosen, [part.start // self.manifest.rows_per_shard for part in parts]):
                yield epoch, number, row
            start, epoch = start + len(numbers), epoch + 1

    def _in_order(self, chosen: np.ndarray, shards: list[int]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Read shards one after the other and give the chosen rows in their own order."""
        held: dict[int, dict[str, Any]] = {}
        place = 0
        for number in shards:
            rows = self._rows_of(number)
            here = np.sort(chosen[(chosen >= rows.start) & (chosen < rows.stop)])
            if not len(here):
                continue
            for found, row in self.read(number, here):
                held[found] = row
                while place < len(chosen) and int(chosen[place]) in held:
                    yield int(chosen[place]), held.pop(int(chosen[place]))
                    place += 1

    def _rows_of(self, number: int) -> range:
        rows = self.manifest.shard_rows(number)
        return range(min(rows.start, self.limit), min(rows.stop, self.limit))

    def decoded(self, row: dict[str, Any]) -> dict[str, Any]:
        """A row as the transform gives it."""
        if self.decode is None:
            return row
        return {key: values[0] for key, values in self.decode({key: [value] for key, value in row.items()}).items()}

    def read(self, number: int, wanted: range | np.ndarray) -> Iterator[tuple[int, dict[str, Any]]]:
        """Read some rows of a shard.

        Args:
            number: of the shard.
            wanted: numbers of rows in the split, ascending.

        Returns:
            Iterator over number and row.

        Raises:
            InputError: the shard is damaged, or holds other rows than the manifest says.
        """
        shard = self.manifest.shards[number]
        first = self.manifest.shard_rows(number).start
        places = [int(row) - first for row in wanted]
        read = _read_parquet if self.manifest.form == "parquet" else _read_tar
        count = 0
        try:
            for place, row in read(self.folder / shard.file, places, shard.rows):
                if missing := self.manifest.columns - row.keys():
                    raise ValueError(f"row {place} has no {', '.join(sorted(missing))}")
                count += 1
                yield first + place, row
        except InputError:
            raise
        except (OSError, ValueError, KeyError, tarfile.TarError) as error:  # pyarrow's errors are one of these
            raise InputError(
                f"{self.folder / shard.file} is damaged ({error}); {len(places) - count} of its rows are lost. "
                f"{self.manifest.fix}"
            ) from error


def _read_parquet(path: Path, places: list[int], rows: int) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        if file.metadata.num_rows != rows:
            raise ValueError(f"{file.metadata.num_rows} rows instead of {rows}")
        first, wanted = 0, np.asarray(places, dtype=np.int64)
        for group in range(file.metadata.num_row_groups):
            end = first + file.metadata.row_group(group).num_rows
            here = wanted[(wanted >= first) & (wanted < end)]
            if len(here):
                table = file.read_row_group(group, use_threads=False)
                yield from zip(here.tolist(), table.take(here - first).to_pylist(), strict=True)
            first = end


def _read_tar(path: Path, places: list[int], rows: int) -> Iterator[tuple[int, dict[str, Any]]]:
    wanted, place, key = set(places), -1, None
    row: dict[str, Any] = {}
    with tarfile.open(path, "r:") as archive:
        for member in archive:
            name, _, ending = member.name.rpartition("/")[2].partition(".")
            if (member_key := member.name[: len(member.name) - len(ending) - 1]) != key:
                if place in wanted:
                    yield place, row
                place, key, row = place + 1, member_key, {"id": member_key}
            if place in wanted:
                content = archive.extractfile(member)
                _add_member(row, ending, content.read() if content else b"", member.size)
            archive.members = []  # type: ignore[attr-defined]  # else it keeps every header
        if place + 1 != rows:  # a damaged header looks like the end
            raise ValueError(f"{place + 1} rows instead of {rows}")
        if place in wanted:
            yield place, row


def _add_member(row: dict[str, Any], ending: str, content: bytes, size: int) -> None:
    """Put a member of a tar into its row, under the name that the column has in Parquet."""
    if len(content) != size:
        raise ValueError(f"{row['id']}.{ending} is cut short")
    if ending == "json":
        row.update(json.loads(content))
    elif ending == "cls":
        row["label"] = int(content)
    else:
        row["label" if ending == "label.png" else "image"] = {"bytes": content, "path": None}
