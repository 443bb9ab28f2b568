"""Locate the official files of a dataset that is given by name, as archives or unpacked."""

import os
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from hf_denseseg.data.reading.archives import Tree, open_tree
from hf_denseseg.errors import InputError

ROOT_VARIABLE = "DENSESEG_DATA_ROOT"


def official_trees(
    name: str, root: str | Path | None, folders: tuple[str, ...], archives: tuple[str, ...]
) -> Iterator[Tree]:
    """Yield the places where the files of a dataset that is given by name may be.

    Args:
        name: name of the dataset, for messages.
        root: folder or archive with the official files, or its parent folder; when None, the environment variable
            DENSESEG_DATA_ROOT is used, then the current folder.
        folders: usual names of its folder.
        archives: file name patterns of the official archives.

    Raises:
        InputError: the given folder does not exist, or an archive is damaged.
    """
    given = root or os.environ.get(ROOT_VARIABLE)
    place = Path(given or ".").expanduser()
    if given and not place.exists():
        raise InputError(f"{place}, given as the folder of {name}, does not exist. Fix data_root or {ROOT_VARIABLE}.")
    inside = [place / folder for folder in folders if (place / folder).is_dir()] if place.is_dir() else []
    for candidate in [*inside, *([place] if given else [])]:
        yield open_tree(candidate, archives)


def format_description(heading: str, lines: Sequence[str]) -> str:
    """Format the description of a dataset for a terminal: a heading and indented, wrapped lines."""
    wrapped = [
        textwrap.fill(line, 112, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)
        for line in lines
    ]
    return "\n".join([heading, *wrapped])


def fetch_text(name: str, root: str | Path | None, url: str, license: str, files: str) -> str:
    """Message for missing files: where they were searched, and where to get them."""
    where = Path(root or os.environ.get(ROOT_VARIABLE) or ".").expanduser().absolute()
    return f"{name} is not in {where}. {source_text(url, license, files)}"


def source_text(url: str, license: str, files: str) -> str:
    """How to get the official files, which this package never downloads."""
    return (
        f"Download it yourself from {url} (license: {license}), put {files} (packed or unpacked) into one folder, and "
        f"set data_root or {ROOT_VARIABLE} to that folder."
    )
