"""References to files: plain text that says where the bytes of a file are, and how they are read.

A reference is a path, or `zip://MEMBER?ADDRESS::ARCHIVE` (`tar://...`), whose address spares a loader process from
listing the archive again, or `rle://NAME?...`, which holds the run lengths of a label map themselves.
"""

import functools
import gzip
import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

from hf_denseseg.data.reading.run_lengths import SCHEME, draw
from hf_denseseg.errors import InputError

MEMBER_LIMIT = 512 * 2**20  # bytes; COCO's largest annotation file has 448 MiB
GZIP_LIMIT = 2**30  # bytes of a complete .tar.gz, which is held in memory; Pascal Context's labels have 0.1 GiB
FETCH_AGAIN = "Fetch the archive again from its official source."
T = TypeVar("T")


def cached_per_file(maxsize: int) -> Callable[[Callable[[Path], T]], Callable[[Path], T]]:
    """Keep the results of a function of a path, each until its file is another one or has changed."""

    def decorate(function: Callable[[Path], T]) -> Callable[[Path], T]:
        @functools.lru_cache(maxsize=maxsize)
        def cached(path: Path, inode: int, time: int) -> T:
            return function(path)

        @functools.wraps(function)
        def current(path: Path) -> T:
            status = path.stat()
            return cached(path, status.st_ino, status.st_mtime_ns)

        return current

    return decorate


class Address(NamedTuple):
    """Where the bytes of a member lie; zip: offset of its local header, tar: offset of the bytes themselves."""

    offset: int
    stored: int
    size: int
    method: int = zipfile.ZIP_STORED
    checksum: int = 0


def read_reference(reference: str, limit: int = MEMBER_LIMIT) -> bytes:
    """Content of a file, never more than `limit` bytes of a member, whatever its header says.

    Raises:
        InputError: it cannot be read, is damaged, or is larger than `limit`.
    """
    if reference.startswith(SCHEME):
        return draw(reference)
    kind, archive, member, address = _parse(reference)
    try:
        if not kind:
            return archive.read_bytes()
        if max(address.size, address.stored) > limit:
            raise refused_member(archive, member, f"claims more than the {limit:,} bytes that are read")
        if kind == "zip":
            return _inflate(archive, member, address)
        content = _bytes_at(archive, address.offset, address.size)
    except OSError as error:
        raise InputError(f"File {archive} cannot be read: {error.strerror}. Check the path and its rights.") from error
    except (zlib.error, EOFError) as error:
        raise InputError(f"Archive {archive} is cut short or damaged ({error}). {FETCH_AGAIN}") from error
    if len(content) < address.size:
        raise refused_member(archive, member, "is cut short")
    return content


def describe_reference(reference: str) -> str:
    """A reference in words, for messages: the path, or member and archive."""
    if reference.startswith(SCHEME):
        return f"{file_name(reference)} (run lengths)"
    kind, archive, member, _ = _parse(reference)
    return f"{member} in {archive}" if kind else reference


def file_name(reference: str) -> str:
    """Path of a file, inside its archive if it is in one."""
    if reference.startswith(SCHEME):
        return reference.removeprefix(SCHEME).partition("?")[0]
    kind, path, member, _ = _parse(reference)
    return member if kind else str(path)


def is_reference(text: str) -> bool:
    """Whether a text is no path, but leads into an archive or holds run lengths."""
    return text.startswith(("zip://", "tar://", SCHEME))


def _parse(reference: str) -> tuple[str, Path, str, Address]:
    """Kind ("zip", "tar" or nothing for a plain path), archive or path, member, address."""
    if not reference.startswith(("zip://", "tar://")):
        return "", Path(reference), "", Address(0, 0, 0)
    inside, _, archive = reference[len("zip://") :].partition("::")
    member, _, address = inside.rpartition("?")
    try:
        numbers = [int(number) for number in address.split(",")]
        found = Address(*numbers)
        if min(numbers) < 0:
            raise ValueError("negative")
    except (TypeError, ValueError) as error:
        raise InputError(f"{reference!r} is no reference into an archive. Take those of `Tree.reference`.") from error
    return reference[:3], Path(archive), member, found


def refused_member(archive: Path, member: str, why: str) -> InputError:
    """The error for a member that cannot be used."""
    return InputError(f"Archive {archive}: member {member!r} {why}. {FETCH_AGAIN}")


def _inflate(archive: Path, member: str, address: Address) -> bytes:
    """Content of a zip member, at most as many bytes as the archive's table says."""
    header = _bytes_at(archive, address.offset, 30)
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise refused_member(archive, member, "is not where the archive's table says")
    name, extra = struct.unpack("<HH", header[26:30])
    packed = _bytes_at(archive, address.offset + 30 + name + extra, address.stored)
    try:
        deflated = address.method == zipfile.ZIP_DEFLATED
        content = zlib.decompressobj(-15).decompress(packed, address.size + 1) if deflated else packed
    except zlib.error as error:
        raise refused_member(archive, member, f"is damaged ({error})") from error
    if len(content) > address.size:
        raise refused_member(archive, member, "is larger than the archive's table says")
    if len(content) < address.size or zlib.crc32(content) != address.checksum:
        raise refused_member(archive, member, "is damaged or cut short")
    return content


def _bytes_at(archive: Path, offset: int, size: int) -> bytes:
    if archive.suffix.lower() not in (".zip", ".tar"):
        return unpacked(archive)[offset : offset + size]
    # Without a position of its own: threads and forked processes may share the handle.
    return os.pread(_handle(archive).number, size, offset)


class _Handle:
    """An open file, closed when nobody holds it any more."""

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


@cached_per_file(maxsize=64)
def _handle(archive: Path) -> _Handle:
    return _Handle(archive)


@cached_per_file(maxsize=2)
def unpacked(archive: Path) -> bytes:
    """Content of a .tar.gz, unpacked in memory.

    Raises:
        InputError: it is larger than `GZIP_LIMIT`.
    """
    with gzip.open(archive) as stream:
        content = stream.read(GZIP_LIMIT + 1)
    if len(content) > GZIP_LIMIT:
        raise InputError(f"Archive {archive} has more than {GZIP_LIMIT:,} bytes unpacked. Unpack it into its folder.")
    return content
