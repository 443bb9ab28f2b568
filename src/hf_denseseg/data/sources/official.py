"""Where the official files of a dataset lie that is given by its name, packed or not."""

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
    """Places where a dataset may lie that is given by its name, one after the other.

    Args:
        name: of the dataset, for messages.
        root: folder or archive with the official files, or a folder in which their folder lies; when None that of the
            environment variable DENSESEG_DATA_ROOT, else the current one.
        folders: usual names of the folder.
        archives: names (patterns) of the official archives.

    Raises:
        InputError: the folder that was given does not exist, or an archive is damaged.
    """
    given = root or os.environ.get(ROOT_VARIABLE)
    place = Path(given or ".").expanduser()
    if given and not place.exists():
        raise InputError(f"{place}, given as the folder of {name}, does not exist. Fix data_root or {ROOT_VARIABLE}.")
    inside = [place / folder for folder in folders if (place / folder).is_dir()] if place.is_dir() else []
    for candidate in [*inside, *([place] if given else [])]:
        yield open_tree(candidate, archives)


def described(heading: str, lines: Sequence[str]) -> str:
    """A dataset in a few lines for a terminal: a heading, and what is told of it below, indented."""
    wrapped = [
        textwrap.fill(line, 112, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)
        for line in lines
    ]
    return "\n".join([heading, *wrapped])


def fetch_text(name: str, root: str | Path | None, url: str, license: str, files: str) -> str:
    """What to do when the files are not there."""
    where = Path(root or os.environ.get(ROOT_VARIABLE) or ".").expanduser().absolute()
    return f"{name} is not in {where}. {source_text(url, license, files)}"


def source_text(url: str, license: str, files: str) -> str:
    """Where official files come from; nothing is ever downloaded here."""
    return (
        f"Fetch it yourself from {url} (license: {license}), put {files} (or what they hold, unpacked) into one "
        f"folder, and give that folder as data_root or in {ROOT_VARIABLE}."
    )
