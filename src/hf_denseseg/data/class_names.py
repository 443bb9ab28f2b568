"""Names of the classes of images or objects, for tasks without a label map."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_denseseg.data.labels import Color, color_wheel
from hf_denseseg.errors import InputError

NAME_FILES = ("classes.json", "classes.txt")


@dataclass(frozen=True)
class ClassNames:
    """Names in the order of the ids, and where the data come from.

    Args:
        name: short name of the data.
        classes: one name per class, all different.
        license: license of the data.
        citation: reference to cite.

    Raises:
        InputError: no class, or a name that stands twice.
    """

    name: str
    classes: tuple[str, ...]
    license: str = ""
    citation: str = ""

    def __post_init__(self) -> None:
        twice = sorted({each for each in self.classes if self.classes.count(each) > 1})
        if not self.classes or twice:
            problem = f"the names {', '.join(twice[:3])} stand twice" if twice else "there is no class"
            raise InputError(f"Classes of {self.name!r}: {problem}. Give every class a name of its own.")

    @property
    def num_labels(self) -> int:
        """Number of classes."""
        return len(self.classes)

    @property
    def id2label(self) -> dict[int, str]:
        """Id -> name, as in a model's configuration."""
        return dict(enumerate(self.classes))

    @property
    def label2id(self) -> dict[str, int]:
        """Name -> id, as in a model's configuration."""
        return {name: index for index, name in enumerate(self.classes)}

    @property
    def palette(self) -> tuple[Color, ...]:
        """One color per class."""
        return color_wheel(len(self.classes))

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        return {
            "name": self.name,
            "classes": list(self.classes),
            "license": self.license,
            "citation": self.citation,
        }


def read_names(path: Path, keys: Sequence[str] | None) -> ClassNames:
    """Read the names that a file gives to classes that are known by a key, such as the folders of ImageNet.

    JSON: `{"n01440764": "tench"}`, a list in the order of the keys, or one of the two as `classes` beside `name`,
    `license` and `citation`. Text: a line `n01440764 tench, Tinca tinca` for each, or names in the order of the keys.
    Of equal names (ImageNet has two cranes) each gets its key in brackets.

    Args:
        path: the file.
        keys: in the order of the ids; None where classes are known by numbers, of which a split may lack the last.

    Raises:
        InputError: the file cannot be read, or does not name every key.
    """
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else _lines(text, set(keys or ()))
    except (OSError, ValueError) as error:
        raise InputError(f"Class names {path} cannot be read: {error}. Fix the file or take it away.") from error
    beside = content if isinstance(content, Mapping) and "classes" in content else {"classes": content}
    given = beside["classes"]
    if keys is None:
        keys = [str(number) for number in range(len(given))] if isinstance(given, Mapping | list) else []
    if isinstance(given, Mapping):
        missing = [key for key in keys if key not in given]
        if missing:
            raise InputError(
                f"{path} has no name for {', '.join(missing[:3])} ({len(missing)} of {len(keys)} classes). Add them."
            )
        names = [str(given[key]) for key in keys]
    elif isinstance(given, list) and len(given) == len(keys):
        names = [str(name) for name in given]
    else:
        count = len(given) if isinstance(given, list) else 0
        raise InputError(f"{path} names {count} classes, the data has {len(keys)}. Give one name for each.")
    if "licence" in beside:  # the key of older files
        beside = {"license": beside["licence"], **beside}
    extra = {key: str(beside[key]) for key in ("license", "citation") if key in beside}
    return ClassNames(str(beside.get("name", path.parent.name)), tuple(told_apart(names, keys)), **extra)


def told_apart(names: Sequence[str], keys: Sequence[str]) -> list[str]:
    """The names, of equal ones each with its key in brackets."""
    return [name if names.count(name) == 1 else f"{name} ({key})" for name, key in zip(names, keys, strict=True)]


def _lines(text: str, keys: set[str]) -> Any:
    """Text to a table if every line starts with a key, else to a list."""
    parts = [line.strip().partition(" ") for line in text.splitlines() if line.strip()]
    if parts and all(first in keys and rest for first, _, rest in parts):
        return {first: rest.strip() for first, _, rest in parts}
    return ["".join(part) for part in parts]
