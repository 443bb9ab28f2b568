"""Propose a label specification from the label maps of a folder: what their ids and colors can only mean."""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from tqdm.auto import tqdm

from hf_denseseg.data.ignore_index import IGNORE_INDEX, LARGEST_ID, MOST_CLASSES_IN_BYTES
from hf_denseseg.data.labels import Color, LabelSpec, equal_channels, id_ranges
from hf_denseseg.data.reading.images import palette_of, read_raw_label
from hf_denseseg.data.shards.tables import open_table, saved_splits
from hf_denseseg.data.sources.folders import has_pairs, list_pairs, merge_pairs
from hf_denseseg.data.splits import split_names
from hf_denseseg.errors import InputError
from hf_denseseg.files import write_atomic

MOST_COLORS = 256
SMOOTHED = 32  # more ids than this beside 0 and 255 are their mixtures, if these two cover SMOOTHED_FRACTION
SMOOTHED_FRACTION = 0.95
BINARY = ("background", "foreground")


class Proposal(NamedTuple):
    """A label specification that fits the files.

    Args:
        values: keys of a label specification file; empty if none fits.
        reasons: what was found in the files, and what is left to do.
    """

    values: dict[str, Any]
    reasons: list[str]

    def to_yaml(self) -> str:
        """The file, one key per line and the reasons above them."""
        lines = [f"# {reason}" for reason in self.reasons]
        for key, value in self.values.items():
            lines.append(f"{key}: {yaml.safe_dump(value, default_flow_style=True, sort_keys=False).strip()}")
        return "\n".join([*lines, ""])


class Survey:
    """Counts of what label maps hold before a specification gives it a meaning.

    Attributes:
        ids: raw id -> pixels.
        colors: color -> pixels, of maps with three channels that differ.
        forms: "ids", "palette", "gray" (three equal channels) or "color" -> number of maps.
        palettes: of the palette images.
    """

    def __init__(self) -> None:
        self.ids: Counter[int] = Counter()
        self.colors: Counter[Color] = Counter()
        self.forms: Counter[str] = Counter()
        self.palettes: list[np.ndarray] = []

    def add(self, source: Any) -> None:
        """Count the pixels of a label map; one that cannot be read is left to the check."""
        try:
            raw = read_raw_label(source)
        except InputError:
            return
        form = "ids"
        if raw.ndim == 3:
            form = "gray" if equal_channels(raw) else "color"
        elif (palette := palette_of(source)) is not None:
            form = "palette"
            self.palettes.append(palette)
        self.forms[form] += 1
        if form != "color":
            values, counts = np.unique(raw[..., 0] if raw.ndim == 3 else raw, return_counts=True)
            self.ids.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
        elif len(self.colors) <= MOST_COLORS:
            values, counts = np.unique(raw.reshape(-1, 3), axis=0, return_counts=True)
            found = (tuple(color) for color in values.tolist())
            self.colors.update(dict(zip(found, counts.tolist(), strict=True)))


def propose_spec(
    name: str, split: str, current: LabelSpec | None = None, limit: int | None = None, mask_suffix: str | None = None
) -> Proposal | None:
    """Propose a specification for a folder of pairs, or of `save_to_disk`.

    Args:
        name: folder; of other sources nothing is proposed.
        split: whose label maps are read.
        current: the specification that is there; its names are kept where their number fits.
        limit: read only this many label maps.
        mask_suffix: as for `list_pairs`.

    Returns:
        None if the current specification fits what the maps hold, or `name` is no folder of pairs with label maps.
    """
    sources = _label_maps(Path(name).expanduser(), split, mask_suffix)
    survey = Survey()
    for source in tqdm(sources[:limit], desc="label maps", disable=None):
        survey.add(source)
    if not survey.forms or (current is not None and _fits(survey, current)):
        return None
    return describe(survey, current)


def _label_maps(folder: Path, split: str, mask_suffix: str | None) -> Sequence[Any]:
    """Label maps of a folder of pairs or of `save_to_disk`."""
    if folder.is_dir() and saved_splits(folder):
        return open_table(str(folder), split)["label"]
    if not has_pairs(folder, mask_suffix):
        return []
    pairs = merge_pairs({part: list_pairs(folder, part, mask_suffix) for part in split_names(split)})
    return [pairs.labels[key] for key in sorted(pairs.labels)]


def describe(survey: Survey, current: LabelSpec | None = None) -> Proposal:
    """The specification that the counts of label maps ask for; arguments as for `propose_spec`."""
    colored = survey.forms["color"]
    if colored and colored < survey.forms.total():
        return Proposal({}, [f"{colored} of {survey.forms.total()} label maps are colored and the others hold ids."])
    if len(survey.colors) > MOST_COLORS:
        reason = f"The label maps hold more than {MOST_COLORS} colors: save them as PNG, without smoothing."
        return Proposal({}, [reason])
    if colored:
        return _of_colors(survey, current)
    edges = survey.ids[0] + survey.ids[IGNORE_INDEX]
    if len(survey.ids) > SMOOTHED and SMOOTHED_FRACTION * survey.ids.total() < edges < survey.ids.total():
        reason = "The label maps are 0 and 255 with mixtures at edges: save them as PNG, without smoothing."
        return Proposal({}, [reason])
    return _of_ids(survey, current)


def offer(proposal: Proposal | None, path: Path | None) -> str:
    """What a check says of a proposed specification, which is written if there is a path.

    Raises:
        InputError: there is none to write, or the file exists.
    """
    if path is None:
        shown = proposal.to_yaml() if proposal else ""
        return f"\nA label specification (--write_spec FILE writes it):\n{shown}"
    if proposal is None or not proposal.values:
        reason = " ".join(proposal.reasons) if proposal else "what is there fits, or the data is no folder of pairs."
        raise InputError(f"--write_spec: there is no label specification to propose. {reason}")
    if path.exists():
        raise InputError(f"--write_spec: {path} exists. Give another file, or move it away.")
    write_atomic(path, proposal.to_yaml())
    return f"Written: {path}. Name its classes, and check again with --label_spec {path}."


def _fits(survey: Survey, spec: LabelSpec) -> bool:
    """Whether a specification gives every id and color a meaning, and the maps more than one class."""
    known = set(np.flatnonzero(spec.table != spec.ignore_index - 1).tolist())
    if spec.color_to_raw is not None and survey.forms["gray"]:
        return survey.forms.total() == survey.forms["gray"] and all((k,) * 3 in spec.color_to_raw for k in survey.ids)
    black_and_white = set(survey.ids) == {0, IGNORE_INDEX} and spec.table[IGNORE_INDEX] == spec.ignore_index
    return (
        spec.num_labels > 1
        and set(survey.ids) <= known
        and set(survey.colors) <= set(spec.color_to_raw or ())
        and not black_and_white
    )


def _of_colors(survey: Survey, current: LabelSpec | None) -> Proposal:
    colors = [list(color) for color in sorted(survey.colors)]
    names = _names(range(len(colors)), current)
    reasons = [
        f"The label maps hold {len(colors)} colors. Name the classes; a color that is no class is called `void` in",
        "`colors`, and taken out of `classes` and `palette`.",
    ]
    return Proposal({"classes": names, "palette": colors, "colors": dict(zip(names, colors, strict=True))}, reasons)


def _of_ids(survey: Survey, current: LabelSpec | None) -> Proposal:
    found, reasons = sorted(survey.ids), []
    if survey.forms["gray"]:
        reasons.append("The label maps have three equal channels, which are read as ids.")
    if found in ([0, IGNORE_INDEX], [IGNORE_INDEX]):
        reasons.append("The label maps hold 0 and 255 only. One logit for both: config_overrides: {num_labels: 1}.")
        names = _names(range(2), current, BINARY)
        return Proposal({"classes": names, "raw_to_train": {0: 0, IGNORE_INDEX: 1}}, reasons)
    # 255 is a class if there are larger ids.
    top = max((raw for raw in found if raw != LARGEST_ID), default=0)
    void = [raw for raw in found if raw == LARGEST_ID or raw == top == IGNORE_INDEX]
    void = void if len(void) < len(found) else []
    ids = [raw for raw in found if raw not in void]
    if void:
        reasons.append(f"{' and '.join(map(str, void))} is taken for ignored pixels.")
    if ids[0] > 0:
        reasons.append(f"The ids begin at {ids[0]}; there is no 0.")
    whole = list(range(ids[0], ids[-1] + 1))
    if 1 < len(whole) <= 2 * len(ids) and whole != ids:
        absent = id_ranges(np.array([raw for raw in whole if raw not in survey.ids]))
        reasons.append(f"The ids {absent} do not occur; they are taken for rare classes.")
        ids = whole
    default = [IGNORE_INDEX if len(ids) <= MOST_CLASSES_IN_BYTES else LARGEST_ID]
    values: dict[str, Any] = {"classes": _names(ids, current)}
    if ids != list(range(len(ids))):
        values["raw_to_train"] = {raw: train for train, raw in enumerate(ids)}
    if void and void != default:
        values["raw_void"] = void
    if len(survey.palettes) == survey.forms.total() and _are_equal(survey.palettes) and ids[-1] < 256:
        values["palette"] = survey.palettes[0][ids].tolist()
        reasons.append("The label maps are palette images, whose colors are kept.")
    if len(ids) > MOST_CLASSES_IN_BYTES:
        reasons.append(f"{len(ids)} classes: label maps have 16 bits, and 65535 marks ignored pixels.")
    if len(ids) == 1:
        return Proposal({}, [*reasons, f"Apart from ignored pixels there is one id, {ids[0]}: nothing to learn."])
    return Proposal(values, [*reasons, "Name the classes."])


def _names(ids: Iterable[int], current: LabelSpec | None, default: tuple[str, ...] = ()) -> list[str]:
    """The names that are there, if they are as many; the only one is the foreground's."""
    ids = list(ids)
    if current is not None and current.num_labels == len(ids):
        return list(current.classes)
    if current is not None and current.num_labels == 1 and len(ids) == 2:
        return [BINARY[0], *current.classes]
    return list(default) or [f"class_{raw}" for raw in ids]


def _are_equal(palettes: list[np.ndarray]) -> bool:
    return all(np.array_equal(each, palettes[0]) for each in palettes)


__all__ = ["Proposal", "Survey", "describe", "offer", "propose_spec"]
