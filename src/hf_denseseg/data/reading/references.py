"""References to files: strings that say where the bytes of a file are and how to read them.

A reference is one of

* a path;
* `zip://MEMBER?OFFSET,STORED,SIZE,METHOD,CHECKSUM::ARCHIVE`, or the same with `tar://`: the byte range of a member, so
  that a data loader process reads it directly, without listing the archive again;
* `rle://NAME?JSON`: a label map whose areas are part of the reference itself, see `areas`.
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

from hf_denseseg.data.reading.areas import SCHEME, areas_name, decode_areas
from hf_denseseg.errors import InputError

MEMBER_LIMIT = 512 * 2**20  # bytes; the largest annotation file of COCO has 448 MiB
GZIP_LIMIT = 2**30  # bytes of an unpacked .tar.gz, which is kept in memory; the labels of Pascal Context have 0.1 GiB
FETCH_AGAIN = "Download the archive again from its official source."
T = TypeVar("T")


def cached_per_file(maxsize: int) -> Callable[[Callable[[Path], T]], Callable[[Path], T]]:
    """Cache a function of a path; an entry is invalid once the file was replaced or modified."""

    def decorate(function: Callable[[Path], T]) -> Callable[[Path], T]:
        @functools.lru_cache(maxsize=maxsize)
        def cached(path: Path, inode: int, time: int) -> T:  # inode and time only extend the cache key
            return function(path)

        @functools.wraps(function)
        def current(path: Path) -> T:
            status = path.stat()
            return cached(path, status.st_ino, status.st_mtime_ns)

        return current

    return decorate


class Address(NamedTuple):
    """Byte range of a member in its archive.

    Args:
        offset: in a zip, of the local header of the member; in a tar, of its content.
        stored: bytes in the archive, compressed or not.
        size: bytes of the content.
        method: compression method of the zip format.
        checksum: CRC-32 of the content; a tar has none.
    """

    offset: int
    stored: int
    size: int
    method: int = zipfile.ZIP_STORED
    checksum: int = 0


def read_reference(reference: str, limit: int = MEMBER_LIMIT) -> bytes:
    """Read a file; of an archive member never more than `limit` bytes, whatever its header states.

    Raises:
        InputError: it cannot be read, is damaged, or is larger than `limit`.
    """
    if reference.startswith(SCHEME):
        return decode_areas(reference)
    kind, archive, member, address = _parse(reference)
    try:
        if not kind:
            return archive.read_bytes()
        if max(address.size, address.stored) > limit:
            raise member_error(archive, member, f"has a stated size above the limit of {limit:,} bytes")
        if kind == "zip":
            return _inflate(archive, member, address)
        content = _bytes_at(archive, address.offset, address.size)
    except OSError as error:
        raise InputError(
            f"File {archive} cannot be read: {error.strerror}. Check the path and its permissions."
        ) from error
    except (zlib.error, EOFError) as error:
        raise InputError(f"Archive {archive} is truncated or damaged ({error}). {FETCH_AGAIN}") from error
    if len(content) < address.size:
        raise member_error(archive, member, "is truncated")
    return content


def describe_reference(reference: str) -> str:
    """Readable form of a reference for messages: the path, or the member and its archive."""
    if reference.startswith(SCHEME):
        return f"{file_name(reference)} (drawn)"
    kind, archive, member, _ = _parse(reference)
    return f"{member} in {archive}" if kind else reference


def file_name(reference: str) -> str:
    """Path of a file; for a member of an archive, its name in the archive."""
    if reference.startswith(SCHEME):
        return areas_name(reference)
    kind, path, member, _ = _parse(reference)
    return member if kind else str(path)


def is_reference(text: str) -> bool:
    """Whether this is a reference into an archive or to a map that is drawn, rather than a path."""
    return text.startswith(("zip://", "tar://", SCHEME))


def _parse(reference: str) -> tuple[str, Path, str, Address]:
    """Split into kind ("zip", "tar" or "" for a plain path), archive or path, member, address."""
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
        raise InputError(
            f"{reference!r} is not a reference into an archive. Use those that `Tree.reference` returns."
        ) from error
    return reference[:3], Path(archive), member, found


def member_error(archive: Path, member: str, why: str) -> InputError:
    """Error for an archive member that cannot be used."""
    return InputError(f"Archive {archive}: member {member!r} {why}. {FETCH_AGAIN}")


def _inflate(archive: Path, member: str, address: Address) -> bytes:
    """Decompress a zip member, up to the size that the central directory of the archive states."""
    # A local header has 30 fixed bytes, then the name and an extra field, both of variable length, then the content.
    header = _bytes_at(archive, address.offset, 30)
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise member_error(archive, member, "is not at the offset that the archive's directory states")
    name, extra = struct.unpack("<HH", header[26:30])
    packed = _bytes_at(archive, address.offset + 30 + name + extra, address.stored)
    try:
        deflated = address.method == zipfile.ZIP_DEFLATED
        # -15: raw deflate, without the zlib header. One byte more than stated is enough to detect a larger member.
        content = zlib.decompressobj(-15).decompress(packed, address.size + 1) if deflated else packed
    except zlib.error as error:
        raise member_error(archive, member, f"is damaged ({error})") from error
    if len(content) > address.size:
        raise member_error(archive, member, "is larger than the archive's directory states")
    if len(content) < address.size or zlib.crc32(content) != address.checksum:
        raise member_error(archive, member, "is damaged or truncated")
    return content


def _bytes_at(archive: Path, offset: int, size: int) -> bytes:
    """Bytes `offset..offset + size` of an archive; for a .tar.gz, of its unpacked content."""
    if archive.suffix.lower() not in (".zip", ".tar"):
        return unpacked(archive)[offset : offset + size]
    # pread, not seek + read: threads and forked processes share this descriptor, and so its file position.
    return os.pread(_handle(archive).number, size, offset)


class _Handle:
    """An open file descriptor, closed when the last reference to this object is gone."""

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
    """Unpack a .tar.gz in memory.

    Raises:
        InputError: it is larger than `GZIP_LIMIT`.
    """
    with gzip.open(archive) as stream:
        content = stream.read(GZIP_LIMIT + 1)
    if len(content) > GZIP_LIMIT:
        raise InputError(f"Archive {archive} has more than {GZIP_LIMIT:,} bytes unpacked. Unpack it in its folder.")
    return content
