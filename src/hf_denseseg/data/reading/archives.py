"""List the files of a dataset as it is distributed: a folder, a zip or tar, or a folder that contains archives.

Nothing is unpacked to disk. Every file is identified by a reference (see `references`), which says where its bytes
are. Archives come from the network, so their contents are not trusted: links, encrypted members, names that lead out
of the archive and sizes that do not fit are rejected while listing.
"""

import fnmatch
import io
import os
import re
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from hf_denseseg.data.reading.references import (
    FETCH_AGAIN,
    MEMBER_LIMIT,
    Address,
    cached_per_file,
    member_error,
    read_reference,
    unpacked,
)
from hf_denseseg.errors import InputError

ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz")
_HEADER_LIMIT = 2**20  # bytes; extended tar headers (long file names) take a few hundred


class Tree:
    """Read-only mapping from file names, with `/` between folders, to references.

    Args:
        root: path that was opened, for messages.
        files: name -> reference.
    """

    def __init__(self, root: Path, files: Mapping[str, str]) -> None:
        self.root = root
        self._files = dict(sorted(files.items()))

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __len__(self) -> int:
        return len(self._files)

    def names(self) -> list[str]:
        """All names, sorted."""
        return list(self._files)

    def glob(self, pattern: str) -> list[str]:
        """Names that match a pattern, sorted; `*` does not cross a `/`, `**/` matches any number of folders."""
        expression = re.compile(_as_expression(pattern))
        return [name for name in self._files if expression.fullmatch(name)]

    def reference(self, name: str) -> str:
        """Reference to a file, for `read_reference`; valid in any process on this machine.

        Raises:
            InputError: there is no such file.
        """
        if name not in self._files:
            raise InputError(f"{self.root} contains no file {name}. Check the name, or download the missing files.")
        return self._files[name]

    def read(self, name: str, limit: int = MEMBER_LIMIT) -> bytes:
        """Read a file with `read_reference`."""
        return read_reference(self.reference(name), limit)


def open_tree(path: str | Path, archives: tuple[str, ...] = ("*",)) -> Tree:
    """List a folder, an archive, or a folder that contains both archives and unpacked files.

    Members of an archive get the names that unpacking it in place would give them. If a name occurs more than once,
    the unpacked file takes precedence, then the first archive in alphabetical order. A tar inside a tar is listed as a
    folder (ImageNet's training set is a tar of 1000 tars).

    Args:
        path: folder, .zip, .tar, .tar.gz or .tgz.
        archives: file name patterns of the archives to open; only those in the folder and its direct subfolders are.

    Raises:
        InputError: the path does not exist, or an archive is damaged or not safe to read: it contains links, encrypted
            members, names that lead out of it, or a name twice.
    """
    path = Path(path).expanduser().absolute()
    if path.is_file():
        if not is_archive(path):
            raise InputError(f"{path} is not an archive. Give a folder, or one of {', '.join(ARCHIVE_SUFFIXES)}.")
        return Tree(path, _members(path))
    if not path.is_dir():
        raise InputError(f"{path} does not exist. Give a folder, or one of {', '.join(ARCHIVE_SUFFIXES)}.")
    files, packed = {}, []
    for folder, names in _walk(path):
        inside = folder.relative_to(path)
        for name in names:
            near = len(inside.parts) <= 1 and is_archive(Path(name))
            if near and any(fnmatch.fnmatch(name, pattern) for pattern in archives):
                packed.append(folder / name)
            else:
                files[(inside / name).as_posix()] = str(folder / name)
    for archive in sorted(packed):
        prefix = archive.parent.relative_to(path)
        for name, reference in _members(archive).items():
            files.setdefault((prefix / name).as_posix(), reference)
    return Tree(path, files)


def is_archive(path: str | Path) -> bool:
    """Whether the file name has the suffix of a supported archive."""
    return str(path).lower().endswith(ARCHIVE_SUFFIXES)


def _as_expression(pattern: str) -> str:
    """Glob pattern -> regular expression."""
    parts = re.split(r"(\*\*/|\*|\?)", pattern)
    words = {"**/": "(?:.*/)?", "*": "[^/]*", "?": "[^/]"}
    return "".join(words.get(part) or re.escape(part) for part in parts)


def _walk(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """Yield every folder with the names of its files. Symbolic links are followed, each folder is visited once."""
    seen = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        if os.path.realpath(place) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(place))
        folders[:] = sorted(name for name in folders if not _is_litter(name))
        yield Path(place), sorted(name for name in files if not _is_litter(name))


def _is_litter(name: str) -> bool:
    """Whether this is a metadata file of macOS; `._photo.jpg` would otherwise pass for an image."""
    return name.startswith("._") or name in ("__MACOSX", ".DS_Store")


@cached_per_file(maxsize=32)
def _members(archive: Path) -> Mapping[str, str]:
    """Name -> reference of all members of an archive; cached, as a process may open it many times."""
    kind = "zip" if archive.suffix.lower() == ".zip" else "tar"
    files: dict[str, str] = {}
    try:
        for member, address in (_zip_members if kind == "zip" else _tar_members)(archive):
            name = _checked_name(archive, member)
            if any(_is_litter(part) for part in name.split("/")):
                continue
            if name in files:
                raise member_error(archive, member, "occurs more than once")
            numbers = ",".join(str(number) for number in address)  # the byte range and how to decode it
            files[name] = f"{kind}://{name}?{numbers}::{archive}"
    except InputError:
        raise
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise InputError(f"Archive {archive} is truncated or damaged ({error}). {FETCH_AGAIN}") from error
    except (ValueError, OverflowError, NotImplementedError, struct.error, IndexError) as error:
        raise InputError(f"Archive {archive} cannot be listed ({error}). {FETCH_AGAIN}") from error
    return files


def _checked_name(archive: Path, member: str) -> str:
    """Normalized name of a member.

    Raises:
        InputError: unpacking the member would write outside the folder, or no file can have this name.
    """
    name = member.removeprefix("./")
    parts = name.split("/")
    if not name or name.startswith(("/", "\\")) or ".." in parts or re.match(r"[A-Za-z]:", name):
        raise member_error(archive, member, "has a name that leads out of the archive")
    if "::" in name or "\0" in name or "\\" in name or "" in parts or "." in parts:
        raise member_error(archive, member, "has a name that no file can have")
    return name


def _zip_members(archive: Path) -> Iterator[tuple[str, Address]]:
    """Members by the central directory at the end of the zip."""
    with zipfile.ZipFile(archive) as content:
        for entry in content.infolist():
            kind = stat.S_IFMT(entry.external_attr >> 16)  # Unix file type; 0 in archives written on Windows
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise member_error(archive, entry.filename, "is a link or a device, not a regular file")
            if entry.flag_bits & 1:  # general purpose bit 0: encrypted
                raise member_error(archive, entry.filename, "is encrypted")
            if entry.is_dir():
                _checked_name(archive, entry.filename.rstrip("/"))
                continue
            if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise member_error(
                    archive, entry.filename, f"is compressed with method {entry.compress_type}, not deflate"
                )
            sizes = entry.header_offset, entry.compress_size, entry.file_size
            yield entry.filename, Address(*sizes, entry.compress_type, entry.CRC)


class _Headers(io.BufferedIOBase):
    """File object for listing a tar: reads are limited in size, so that a forged header cannot request gigabytes.

    `tarfile` reads the long name of a member into memory at whatever size the header states.
    """

    def __init__(self, content: BinaryIO) -> None:
        self.content = content

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= _HEADER_LIMIT:
            raise tarfile.ReadError(f"a header states a size of {size} bytes")
        return self.content.read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self.content.seek(offset, whence)

    def tell(self) -> int:
        return self.content.tell()


def _tar_members(archive: Path) -> Iterator[tuple[str, Address]]:
    # A plain tar is read in place. A compressed one has no random access, so it is unpacked in memory.
    content: BinaryIO = archive.open("rb") if archive.suffix.lower() == ".tar" else io.BytesIO(unpacked(archive))
    with content:
        yield from _tar_part(archive, content, 0, content.seek(0, io.SEEK_END))


def _tar_part(
    archive: Path, content: BinaryIO, start: int, end: int, folder: str = ""
) -> Iterator[tuple[str, Address]]:
    """Members of the tar in bytes `start..end` of the content; a tar inside it is listed as the folder `folder`."""
    content.seek(start)
    with tarfile.TarFile(fileobj=_Headers(content)) as tar:
        last = start - 1  # offset of the previous header: headers must advance, or a forged one loops forever
        for entry in tar:
            name = folder + entry.name
            if not entry.isdir() and (not entry.isreg() or entry.issparse()):
                raise member_error(archive, name, "is a link or a device, not a regular file")
            if entry.offset <= last or entry.size < 0 or entry.offset_data + entry.size > end:
                raise member_error(archive, name, "is truncated")
            last = entry.offset
            if entry.isdir():
                if entry.name.strip("./"):
                    _checked_name(archive, entry.name)
                continue
            if name.endswith(".tar") and not folder:
                # The inner listing moves the shared file position, which the outer one needs back.
                place, inside = content.tell(), _checked_name(archive, name).removesuffix(".tar") + "/"
                yield from _tar_part(archive, content, entry.offset_data, entry.offset_data + entry.size, inside)
                content.seek(place)
            else:
                yield name, Address(entry.offset_data, entry.size, entry.size)
        # `tarfile` treats a damaged header as the end of the archive; a real end is a block of 512 zero bytes.
        content.seek(tar.offset)
        if tar.offset + tarfile.BLOCKSIZE > end or any(content.read(tarfile.BLOCKSIZE)):
            raise tarfile.ReadError("the end-of-archive block is missing")
