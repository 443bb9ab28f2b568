"""Class names for classification and detection, where there are no label maps."""

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
    """Class names in the order of their ids, with license and citation of the data.

    Args:
        name: short name of the dataset.
        classes: one name per class, all different.
        license: license of the data.
        citation: reference to cite.

    Raises:
        InputError: there is no class, or a name is used twice.
    """

    name: str
    classes: tuple[str, ...]
    license: str = ""
    citation: str = ""

    def __post_init__(self) -> None:
        duplicates = sorted({each for each in self.classes if self.classes.count(each) > 1})
        if not self.classes or duplicates:
            problem = f"duplicate names: {', '.join(duplicates[:3])}" if duplicates else "there is no class"
            raise InputError(f"Classes of {self.name!r}: {problem}. Give every class a unique name.")

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
        """All fields as plain JSON values."""
        return {
            "name": self.name,
            "classes": list(self.classes),
            "license": self.license,
            "citation": self.citation,
        }


def read_names(path: Path, keys: Sequence[str] | None) -> ClassNames:
    """Read a file of names for classes that are identified by a key, such as the synset folders of ImageNet.

    JSON: a table `{"n01440764": "tench"}` or a list in the order of the keys; either may also be the value of
    `classes` in a table with `name`, `license` and `citation`. Text: one class per line, either all as
    `n01440764 tench, Tinca tinca` or all as names only, in the order of the keys. Classes of the same name (ImageNet
    has two cranes) get their key appended in brackets.

    Args:
        path: the file.
        keys: keys in the order of the ids; None when classes are plain numbers. The file then determines how many
            classes there are, because a split may have no image of the last ones.

    Raises:
        InputError: the file cannot be read, or does not have one name for every key.
    """
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else _lines(text, set(keys or ()))
    except (OSError, ValueError) as error:
        raise InputError(f"Class names {path} cannot be read: {error}. Fix or remove the file.") from error
    table = content if isinstance(content, Mapping) and "classes" in content else {"classes": content}
    given = table["classes"]
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
        raise InputError(f"{path} names {count} classes, but the data has {len(keys)}. Give one name for each.")
    if "licence" in table:  # the spelling that older versions of this package wrote
        table = {"license": table["licence"], **table}
    extra = {key: str(table[key]) for key in ("license", "citation") if key in table}
    return ClassNames(str(table.get("name", path.parent.name)), tuple(make_unique(names, keys)), **extra)


def make_unique(names: Sequence[str], keys: Sequence[str]) -> list[str]:
    """Append the key in brackets to every name that occurs more than once."""
    return [name if names.count(name) == 1 else f"{name} ({key})" for name, key in zip(names, keys, strict=True)]


def _lines(text: str, keys: set[str]) -> Any:
    """Parse text into a table key -> name if every line starts with a key, otherwise into a list of names."""
    parts = [line.strip().partition(" ") for line in text.splitlines() if line.strip()]
    if parts and all(first in keys and rest for first, _, rest in parts):
        return {first: rest.strip() for first, _, rest in parts}
    return ["".join(part) for part in parts]
