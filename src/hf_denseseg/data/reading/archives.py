"""Files of a dataset as they were distributed: a folder, a zip or tar, or a folder in which archives still lie.

Nothing is unpacked: every file is known by a reference (see `references`).
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
    read_reference,
    refused_member,
    unpacked,
)
from hf_denseseg.errors import InputError

ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz")
_HEADER_LIMIT = 2**20  # bytes; what a tar may put before a member (long names) is a few hundred


class Tree:
    """Read-only files by name, `/` between the folders.

    Args:
        root: what was opened, for messages.
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
        """Names that fit a pattern, sorted; `*` stays inside a folder, `**/` stands for any folders or none."""
        expression = re.compile(_as_expression(pattern))
        return [name for name in self._files if expression.fullmatch(name)]

    def reference(self, name: str) -> str:
        """Text that `read_reference` takes, in any process.

        Raises:
            InputError: there is no such file.
        """
        if name not in self._files:
            raise InputError(f"{self.root} holds no file {name}. Compare the names, or fetch what is missing.")
        return self._files[name]

    def read(self, name: str, limit: int = MEMBER_LIMIT) -> bytes:
        """Content of a file, as `read_reference`."""
        return read_reference(self.reference(name), limit)


def open_tree(path: str | Path, archives: tuple[str, ...] = ("*",)) -> Tree:
    """List a folder, an archive, or a folder in which archives lie beside unpacked folders.

    The members of an archive stand where unpacking it there would put them; of two files of one name the unpacked one
    counts, then that of the first archive by name. A tar inside a tar is a folder (ImageNet).

    Args:
        path: folder, .zip, .tar, .tar.gz or .tgz.
        archives: which archives of a folder (or of a folder in it) are opened, as patterns of their file names.

    Raises:
        InputError: nothing is there, or an archive is damaged or hides something: links, encryption, names that lead
            out of it, a name twice.
    """
    path = Path(path).expanduser().absolute()
    if path.is_file():
        if not is_archive(path):
            raise InputError(f"{path} is no archive. Give a folder, or one of {', '.join(ARCHIVE_SUFFIXES)}.")
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
    """Whether the name ends as that of an archive that can be read."""
    return str(path).lower().endswith(ARCHIVE_SUFFIXES)


def _as_expression(pattern: str) -> str:
    parts = re.split(r"(\*\*/|\*|\?)", pattern)
    words = {"**/": "(?:.*/)?", "*": "[^/]*", "?": "[^/]"}
    return "".join(words.get(part) or re.escape(part) for part in parts)


def _walk(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """Every folder with the names of its files; follows links to folders, each folder once."""
    seen = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        if os.path.realpath(place) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(place))
        folders[:] = sorted(name for name in folders if not _is_litter(name))
        yield Path(place), sorted(name for name in files if not _is_litter(name))


def _is_litter(name: str) -> bool:
    """What macOS leaves beside real files, under names that look like images."""
    return name.startswith("._") or name in ("__MACOSX", ".DS_Store")


@cached_per_file(maxsize=32)
def _members(archive: Path) -> Mapping[str, str]:
    """Name -> reference of an archive, listed once a process."""
    kind = "zip" if archive.suffix.lower() == ".zip" else "tar"
    files: dict[str, str] = {}
    try:
        for member, address in (_zip_members if kind == "zip" else _tar_members)(archive):
            name = _checked_name(archive, member)
            if any(_is_litter(part) for part in name.split("/")):
                continue
            if name in files:
                raise refused_member(archive, member, "stands in it twice")
            numbers = ",".join(str(number) for number in address)
            files[name] = f"{kind}://{name}?{numbers}::{archive}"
    except InputError:
        raise
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise InputError(f"Archive {archive} is cut short or damaged ({error}). {FETCH_AGAIN}") from error
    except (ValueError, OverflowError, NotImplementedError, struct.error, IndexError) as error:
        raise InputError(f"Archive {archive} cannot be listed ({error}). {FETCH_AGAIN}") from error
    return files


def _checked_name(archive: Path, member: str) -> str:
    """Name inside the tree; refused when unpacking it would write elsewhere."""
    name = member.removeprefix("./")
    parts = name.split("/")
    if not name or name.startswith(("/", "\\")) or ".." in parts or re.match(r"[A-Za-z]:", name):
        raise refused_member(archive, member, "has a name that leads out of the archive")
    if "::" in name or "\0" in name or "\\" in name or "" in parts or "." in parts:
        raise refused_member(archive, member, "has a name that no file can have")
    return name


def _zip_members(archive: Path) -> Iterator[tuple[str, Address]]:
    with zipfile.ZipFile(archive) as content:
        for entry in content.infolist():
            kind = stat.S_IFMT(entry.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise refused_member(archive, entry.filename, "is a link or a device, no file")
            if entry.flag_bits & 1:
                raise refused_member(archive, entry.filename, "is encrypted")
            if entry.is_dir():
                _checked_name(archive, entry.filename.rstrip("/"))
                continue
            if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise refused_member(
                    archive, entry.filename, f"is packed with method {entry.compress_type}, not deflate"
                )
            sizes = entry.header_offset, entry.compress_size, entry.file_size
            yield entry.filename, Address(*sizes, entry.compress_type, entry.CRC)


class _Headers(io.BufferedIOBase):
    """A tar as its listing reads it: headers only, so that no header can ask for gigabytes."""

    def __init__(self, content: BinaryIO) -> None:
        self.content = content

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= _HEADER_LIMIT:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self.content.read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self.content.seek(offset, whence)

    def tell(self) -> int:
        return self.content.tell()


def _tar_members(archive: Path) -> Iterator[tuple[str, Address]]:
    content: BinaryIO = archive.open("rb") if archive.suffix.lower() == ".tar" else io.BytesIO(unpacked(archive))
    with content:
        yield from _tar_part(archive, content, 0, content.seek(0, io.SEEK_END))


def _tar_part(
    archive: Path, content: BinaryIO, start: int, end: int, folder: str = ""
) -> Iterator[tuple[str, Address]]:
    """Members of the tar that fills `start..end` of the content; tars in it are listed as folders."""
    content.seek(start)
    with tarfile.TarFile(fileobj=_Headers(content)) as tar:
        last = start - 1
        for entry in tar:
            name = folder + entry.name
            if not entry.isdir() and (not entry.isreg() or entry.issparse()):
                raise refused_member(archive, name, "is a link or a device, no file")
            if entry.offset <= last or entry.size < 0 or entry.offset_data + entry.size > end:
                raise refused_member(archive, name, "is cut short")
            last = entry.offset
            if entry.isdir():
                if entry.name.strip("./"):
                    _checked_name(archive, entry.name)
                continue
            if name.endswith(".tar") and not folder:
                place, inside = content.tell(), _checked_name(archive, name).removesuffix(".tar") + "/"
                yield from _tar_part(archive, content, entry.offset_data, entry.offset_data + entry.size, inside)
                content.seek(place)
            else:
                yield name, Address(entry.offset_data, entry.size, entry.size)
        # `tarfile` takes a damaged header for the end; the true one is a block of zeros.
        content.seek(tar.offset)
        if tar.offset + tarfile.BLOCKSIZE > end or any(content.read(tarfile.BLOCKSIZE)):
            raise tarfile.ReadError("it has no end")
