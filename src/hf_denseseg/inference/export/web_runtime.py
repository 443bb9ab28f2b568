"""onnxruntime-web, which runs a model in the browser: two files of its npm package."""

import json
import os
import subprocess
import tarfile
from pathlib import Path
from typing import NamedTuple

from hf_denseseg.errors import InputError

VERSION = "1.30.0"
FILES = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")
COMMAND = f"npm pack onnxruntime-web@{VERSION}"
NPM_SECONDS = 300  # the package has 33 MB


class WebRuntime(NamedTuple):
    """The runtime's files.

    Args:
        version: of the npm package.
        files: name -> content.
    """

    version: str
    files: dict[str, bytes]


def find_runtime(given: str | None) -> WebRuntime:
    """Read onnxruntime-web from a folder or tarball of its npm package.

    Args:
        given: folder or tarball; None takes the tarball of the cache folder, into which npm downloads it if need be.

    Raises:
        InputError: it is not there, or is no such package; the message names the command that gets it.
    """
    path = Path(given) if given else cached_tarball()
    if not given and not path.exists():
        _download(path)
    try:
        read = _read_folder if path.is_dir() else _read_tarball
        package, *contents = (read(path, name) for name in ("package.json", *(f"dist/{name}" for name in FILES)))
        found = json.loads(package)
        if found["name"] != "onnxruntime-web":
            raise ValueError(f"it is the package {found['name']}")
        return WebRuntime(str(found["version"]), dict(zip(FILES, contents, strict=True)))
    except (OSError, ValueError, KeyError, TypeError, EOFError, tarfile.TarError) as error:
        raise InputError(
            f"{path} is no npm package of onnxruntime-web with the files {' and '.join(FILES)} ({error}). Run "
            f"`{COMMAND}` and give --onnxruntime_web the file that it writes."
        ) from error


def _read_folder(path: Path, name: str) -> bytes:
    return (path / name).read_bytes()


def _read_tarball(path: Path, name: str) -> bytes:
    with tarfile.open(path) as archive:
        member = archive.extractfile(f"package/{name}")
        if member is None:
            raise ValueError(f"package/{name} is no file")
        return member.read()


def cached_tarball() -> Path:
    """Where the tarball lies in the user's cache folder, once it was downloaded."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return folder / "hf_denseseg" / f"onnxruntime-web-{VERSION}.tgz"


def _download(path: Path) -> None:
    """Let npm put the tarball into the cache folder.

    Raises:
        InputError: npm is not installed or cannot download it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        words = [*COMMAND.split(), "--silent", "--pack-destination", str(path.parent)]
        subprocess.run(words, check=True, capture_output=True, timeout=NPM_SECONDS)
    except (OSError, subprocess.SubprocessError) as error:
        reason = "npm is not installed" if isinstance(error, FileNotFoundError) else "npm could not download it"
        raise InputError(
            f"--format web needs onnxruntime-web {VERSION}, and {reason}. Where there is a network run `{COMMAND}`, "
            "and give --onnxruntime_web the file that it writes."
        ) from error
