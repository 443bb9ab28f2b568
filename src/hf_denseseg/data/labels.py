"""What the ids of a label map mean: names, colors, raw id -> train id and back, void, license, citation."""

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from hf_denseseg.errors import InputError

CHECKED_ROWS = 32  # of a table, whose ids are compared with a specification
IGNORE_INDEX = 255
_UNKNOWN = 254  # marks raw ids that the specification does not name, inside the lookup table only
_MAX_RAW = 65535
_ALIASES = {"raw_void_id": "raw_void", "color_to_raw": "colors", "licence": "license", "url": "source_url"}
_INFORMATION = ("image_size", "pixel_share", "description", "num_")  # beginnings of keys that are read by people only

Color = tuple[int, int, int]


@dataclass(frozen=True)
class LabelSpec:
    """Names, colors and encoding of the classes of a dataset.

    Labels are mapped once, at load; after that only 0..num_labels-1 and 255 (void) exist.

    Args:
        name: short name of the labelling, such as `"camvid-11"`.
        classes: names in the order of the train ids; at most 254.
        palette: one (r, g, b) per class; made up when empty.
        raw_to_train: id in the file -> train id; several may share one. When empty, the raw ids count up from 0 in the
            order of `classes`, leaving out the ids of `raw_void`.
        raw_void: ids in the file that mean void; 255 means void too, unless `raw_to_train` names it.
        color_to_raw: (r, g, b) -> raw id, for masks saved as color images; None refuses such masks.
        categories: category -> names of its classes, each class in one category at most; empty when there are none.
        source_url: where the data come from.
        license: license of the data.
        citation: reference to cite.

    Raises:
        InputError: names, colors and ids contradict each other.
    """

    name: str
    classes: tuple[str, ...]
    palette: tuple[Color, ...] = ()
    raw_to_train: Mapping[int, int] = field(default_factory=dict)
    raw_void: tuple[int, ...] = (IGNORE_INDEX,)
    color_to_raw: Mapping[Color, int] | None = None
    categories: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    source_url: str = ""
    license: str = ""
    citation: str = ""

    def __post_init__(self) -> None:
        raw_void = tuple(int(raw) for raw in self.raw_void)
        classes = tuple(str(name) for name in self.classes)
        free = [raw for raw in range(len(classes) + len(raw_void)) if raw not in raw_void]
        raw_to_train = {int(raw): int(train) for raw, train in self.raw_to_train.items()}
        values = {
            "classes": classes,
            "raw_void": raw_void,
            "raw_to_train": raw_to_train or dict(zip(free, range(len(classes)), strict=False)),
            "palette": tuple(_color(color) for color in self.palette) or color_wheel(len(classes)),
            "categories": {str(key): tuple(str(name) for name in names) for key, names in self.categories.items()},
        }
        if self.color_to_raw is not None:
            values["color_to_raw"] = {_color(color): int(raw) for color, raw in self.color_to_raw.items()}
        for key, value in values.items():
            object.__setattr__(self, key, value)
        self._check()

    def _check(self) -> None:
        count = len(self.classes)
        grouped = [name for names in self.categories.values() for name in names]
        problem = ""
        if not 1 <= count <= 254:
            problem = f"{count} classes; 1 to 254 are possible"
        elif len(set(self.classes)) < count:
            problem = f"the class names {sorted({c for c in self.classes if self.classes.count(c) > 1})} occur twice"
        elif len(self.palette) != count:
            problem = f"{len(self.palette)} colors in `palette` for {count} classes; give one per class, or none"
        elif wrong := {raw: train for raw, train in self.raw_to_train.items() if not 0 <= train < count}:
            problem = f"`raw_to_train` {wrong} leads outside 0..{count - 1}; list void ids in `raw_void` instead"
        elif both := set(self.raw_void) & set(self.raw_to_train):
            problem = f"the raw ids {sorted(both)} are void and a class; take them out of `raw_void` or `raw_to_train`"
        elif wrong_raw := [raw for raw in (*self.raw_void, *self.raw_to_train) if not 0 <= raw <= _MAX_RAW]:
            problem = f"the raw ids {wrong_raw} are outside 0..{_MAX_RAW}"
        elif lost := [raw for raw in (self.color_to_raw or {}).values() if self.table[raw] == _UNKNOWN]:
            problem = f"`colors` leads to the raw ids {sorted(set(lost))}, which are neither a class nor void"
        elif odd := {name for name in grouped if name not in self.classes or grouped.count(name) > 1}:
            problem = f"`categories` names {sorted(odd)}, which are no classes, or in two categories"
        if problem:
            raise InputError(f"Label specification {self.name!r}: {problem}.")

    @property
    def num_labels(self) -> int:
        """Number of classes, void not counted."""
        return len(self.classes)

    @property
    def void(self) -> int:
        """Train id of void."""
        return IGNORE_INDEX

    @property
    def id2label(self) -> dict[int, str]:
        """Train id -> class name, as in a model's configuration."""
        return dict(enumerate(self.classes))

    @property
    def label2id(self) -> dict[str, int]:
        """Class name -> train id, as in a model's configuration."""
        return {name: index for index, name in enumerate(self.classes)}

    @cached_property
    def table(self) -> np.ndarray:
        """Raw id -> train id for every 16-bit raw id, uint8; 254 where the specification says nothing."""
        table = np.full(_MAX_RAW + 1, _UNKNOWN, dtype=np.uint8)
        table[[IGNORE_INDEX, *self.raw_void]] = IGNORE_INDEX
        for raw, train in self.raw_to_train.items():
            table[raw] = train
        return table

    @cached_property
    def _byte_table(self) -> bytes:
        return self.table[:256].tobytes()

    @cached_property
    def inverse_table(self) -> np.ndarray:
        """Train id -> raw id, `(256,)`; the smallest raw id of a class, the first `raw_void` for void."""
        void = self.raw_void[0] if self.raw_void else IGNORE_INDEX
        table = np.full(256, void, dtype=np.uint16 if max(void, *self.raw_to_train) > 255 else np.uint8)
        for raw in sorted(self.raw_to_train, reverse=True):
            table[self.raw_to_train[raw]] = raw
        return table

    def encode(self, raw: np.ndarray) -> np.ndarray:
        """Map raw ids `(H, W)` to train ids and 255, uint8.

        Raises:
            InputError: `raw` holds ids that the specification does not name.
        """
        if raw.dtype != np.uint8 and raw.size and (raw.min() < 0 or raw.max() > _MAX_RAW):
            raise InputError(f"Raw ids {raw.min()}..{raw.max()} are outside 0..{_MAX_RAW}: this is not a label map.")
        if raw.dtype == np.uint8:  # translating bytes takes a third of the time of indexing
            train = np.frombuffer(bytearray(raw.tobytes().translate(self._byte_table)), np.uint8).reshape(raw.shape)
        else:
            train = self.table[raw]
        unknown = train == _UNKNOWN
        if unknown.any():
            ids, counts = np.unique(raw[unknown], return_counts=True)
            listed = ", ".join(str(raw_id) for raw_id in ids[:8]) + (", ..." if len(ids) > 8 else "")
            raise InputError(
                f"Raw ids {listed} ({counts.sum() / raw.size:.1%} of the pixels) are not in the label specification "
                f"{self.name!r} (known: {id_ranges(np.flatnonzero(self.table != _UNKNOWN))}). "
                "Add them to `raw_to_train` or `raw_void`."
            )
        return train

    def encode_colors(self, rgb: np.ndarray) -> np.ndarray:
        """Map a color mask `(H, W, 3)` uint8 to train ids and 255, uint8.

        Raises:
            InputError: the specification has no `colors`, or lacks some of those in the mask.
        """
        if self.color_to_raw is None:
            raise InputError(
                "The mask is a color image and the label specification has no `colors`. Add `colors` "
                "(class name -> [r, g, b]), or save the mask with one byte a pixel."
            )
        keys = np.array([_pack(np.array(color)) for color in self.color_to_raw], dtype=np.int32)
        raws = np.array(list(self.color_to_raw.values()), dtype=np.int64)
        order = np.argsort(keys)
        packed = _pack(rgb.astype(np.int32))
        place = np.searchsorted(keys[order], packed).clip(max=len(keys) - 1)
        unknown = keys[order][place] != packed
        if unknown.any():
            colors = np.unique(rgb[unknown], axis=0)[:4].tolist()
            raise InputError(
                f"Colors {colors} ({unknown.mean():.1%} of the pixels) are not in `colors` of the label "
                f"specification {self.name!r}. Add them, and save masks without JPEG compression or smoothing."
            )
        return self.table[raws[order][place]]

    def decode(self, train: np.ndarray) -> np.ndarray:
        """Map train ids back to raw ids (uint8, or uint16 beyond 255); void becomes the first void id."""
        return self.inverse_table[train]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values; `from_dict` reads it back."""
        colors = self.color_to_raw
        return {
            "name": self.name,
            "classes": list(self.classes),
            "palette": [list(color) for color in self.palette],
            "raw_to_train": {str(raw): train for raw, train in self.raw_to_train.items()},
            "raw_void": list(self.raw_void),
            "colors": None if colors is None else [[list(color), raw] for color, raw in colors.items()],
            "categories": {category: list(names) for category, names in self.categories.items()},
            "source_url": self.source_url,
            "license": self.license,
            "citation": self.citation,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], name: str = "labels") -> "LabelSpec":
        """Build a specification from the keys of a file; `classes` alone is enough.

        Args:
            values: the fields of this class; also `raw_void_id`, `colors` (class name or `void` -> [r, g, b]),
                or an `id2label` table in place of `classes`.
            name: used when `values` has no name.

        Raises:
            InputError: unknown keys, or values that contradict each other.
        """
        if values and all(str(key).isdigit() for key in values):
            values = {"id2label": values}
        given = {_ALIASES.get(key, key): value for key, value in values.items()}
        known = [f.name for f in fields(cls) if f.name != "color_to_raw"] + ["colors", "id2label"]
        for key in given:
            if key not in known and not key.startswith(_INFORMATION):
                near = difflib.get_close_matches(key, known, n=1)
                raise InputError(
                    f"Label specification {name!r} has the unknown key {key!r}"
                    + (f"; did you mean {near[0]!r}?" if near else f". Known keys: {', '.join(sorted(known))}.")
                )
        id2label = given.get("id2label")
        if id2label is not None:
            ordered = sorted((int(raw), str(label)) for raw, label in id2label.items())
            given.setdefault("classes", [label for _, label in ordered])
            given.setdefault("raw_to_train", {raw: train for train, (raw, _) in enumerate(ordered)})
        if not isinstance(given.get("classes"), (list, tuple)):
            raise InputError(f"Label specification {name!r} needs `classes`, a list of the class names.")
        try:
            void = given.get("raw_void", IGNORE_INDEX)
            spec = cls(
                name=str(given.get("name", name)),
                classes=tuple(given["classes"]),
                palette=tuple(given.get("palette") or ()),
                raw_to_train={int(raw): train for raw, train in (given.get("raw_to_train") or {}).items()},
                raw_void=(void,) if isinstance(void, int) else tuple(void),
                categories=dict(given.get("categories") or {}),
                source_url=str(given.get("source_url", "")),
                license=str(given.get("license", "")),
                citation=str(given.get("citation", "")),
            )
            return spec if given.get("colors") is None else spec._with_colors(given["colors"])
        except InputError:
            raise
        except (TypeError, AttributeError, KeyError, ValueError) as error:
            raise InputError(f"Label specification {name!r} has a value of the wrong form: {error}.") from error

    def _with_colors(self, colors: Any) -> "LabelSpec":
        """The same specification with a color table: {class or "void": rgb}, or a list of [rgb, raw id]."""
        if isinstance(colors, Mapping):
            raw_of = {name: int(self.inverse_table[train]) for name, train in self.label2id.items()}
            raw_of.setdefault("void", int(self.inverse_table[IGNORE_INDEX]))
            if unknown := [name for name in colors if name not in raw_of]:
                raise InputError(f"`colors` of {self.name!r} names {unknown}, which are no classes (nor `void`).")
            colors = [(rgb, raw_of[name]) for name, rgb in colors.items()]
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return LabelSpec(**{**values, "color_to_raw": {_color(rgb): raw for rgb, raw in colors}})

    @classmethod
    def from_file(cls, path: str | Path) -> "LabelSpec":
        """Read a YAML or JSON file, see `from_dict`.

        Raises:
            InputError: the file is missing, not readable as YAML or JSON, or no valid specification.
        """
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
            values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
        except OSError as error:
            raise InputError(f"Label specification {path} cannot be read: {error.strerror}.") from error
        except (ValueError, yaml.YAMLError) as error:
            raise InputError(f"Label specification {path} is not valid YAML or JSON: {error}.") from error
        if isinstance(values, list):
            values = {"classes": values}
        if not isinstance(values, Mapping):
            raise InputError(f"Label specification {path} must be a table with the key `classes`.")
        try:
            return cls.from_dict(values, name=path.stem)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error


def color_wheel(count: int) -> tuple[Color, ...]:
    """Colors that differ clearly: the bits of the class number spread over the high bits of r, g, b (VOC's rule)."""
    colors = []
    for number in range(1, count + 1):
        rgb = [0, 0, 0]
        for bit in range(24):
            rgb[bit % 3] |= (number >> bit & 1) << (7 - bit // 3)
        colors.append((rgb[0], rgb[1], rgb[2]))
    return tuple(colors)


def _color(value: Any) -> Color:
    color = tuple(int(channel) for channel in value)
    if len(color) != 3 or not all(0 <= channel <= 255 for channel in color):
        raise InputError(f"Color {list(value)} must be three numbers 0..255.")
    return color


def _pack(rgb: np.ndarray) -> np.ndarray:
    """(..., 3) -> one number per color."""
    return (rgb[..., 0] << 16) | (rgb[..., 1] << 8) | rgb[..., 2]


def id_ranges(ids: np.ndarray) -> str:
    """Sorted ids in words: 0, 1, 2, 5 -> "0-2, 5"."""
    runs = np.split(ids, np.flatnonzero(np.diff(ids) > 1) + 1)
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs if len(run))


class SegmentationData(NamedTuple):
    """Rows (a `datasets` dataset) and what their labels mean."""

    dataset: Any
    spec: LabelSpec
