"""One loader for all sources: embedded scenes, a folder of pairs, Parquet or WebDataset shards, a hub dataset.

Rows are always `image` (RGB image), `label` ((H, W) uint8, train ids and 255) and `id` (text).
"""

import importlib.util
import logging
from collections.abc import Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hf_denseseg.data.labels import IGNORE_INDEX, LabelSpec, SegmentationData
from hf_denseseg.data.reading.archives import is_archive
from hf_denseseg.data.reading.images import check_same_size, read_image, read_label
from hf_denseseg.data.shards.tables import check_encoding, find_table, import_datasets, open_table
from hf_denseseg.data.sources.benchmarks.encodings import check_revision, compare_encoding
from hf_denseseg.data.sources.benchmarks.layouts import NAMES, find_builtin_spec
from hf_denseseg.data.sources.benchmarks.listing import Listing, list_split, merge_listings, open_benchmark, recognize
from hf_denseseg.data.sources.folders import find_spec, has_pairs, list_pairs, merge_pairs, spec_beside
from hf_denseseg.data.splits import resolve_split, split_names
from hf_denseseg.data.synthetic.scenes import SYNTHETIC_SPEC, parse_name, render_scene
from hf_denseseg.errors import InputError

logger = logging.getLogger(__name__)


def load_segmentation(
    name_or_path: str | Path,
    split: str,
    *,
    spec: LabelSpec | str | Path | None = None,
    root: str | Path | None = None,
    columns: Mapping[str, str] | None = None,
    revision: str | None = None,
    streaming: bool = False,
    limit: int | None = None,
) -> SegmentationData:
    """Load the pairs of one split.

    Args:
        name_or_path: name of a benchmark (`"cityscapes"`; `denseseg data list` names all); `"synthetic"` (also
            `"synthetic:500"` for 500 training images, `"synthetic@512x1024"` for one size); a folder of pairs
            (`<split>/images` + `<split>/labels`, or `images/<split>` + `labels/<split>`), folder or archive of a
            benchmark as it was distributed, folder of Parquet or tar shards; or the id of a hub dataset.
        split: `"train"`, `"val"` (`"validation"` is the same), `"test"`, the name of a folder, or several of them
            added up: `"train+val"`.
        spec: label specification, its file, or the name of a benchmark; looked for beside the data (`classes.json`,
            `labels.yaml`) when None.
        root: where the files of a benchmark lie that is given by its name: folder, archive, or a folder in which
            their folder lies; the environment variable DENSESEG_DATA_ROOT, or the current folder, when None.
        columns: `{"image": ..., "label": ..., "id": ...}`, names of the columns of shards and hub datasets.
        revision: commit, tag or branch of a hub dataset.
        streaming: read in order without storing, as an iterable dataset.
        limit: use the first so many pairs.

    Returns:
        The dataset, whose rows are decoded when they are asked for, and its label specification. Where a benchmark
        keeps its labels to itself (test splits), every label is void.

    Raises:
        InputError: something given cannot be used; the message names it and the way out.
        RunError: the hub cannot be reached.
    """
    name = str(name_or_path)
    given = _given_spec(spec)
    _check_root(name, root)
    if name.split(":")[0].split("@")[0] == "synthetic":
        rows, decode = _synthetic_rows(name, split), RenderScenes(name)
        return SegmentationData(_table(rows, decode, streaming, limit), given or SYNTHETIC_SPEC)
    if (found := list_source(name, split, spec=spec, root=root)) is not None:
        for note in found.notes:
            logger.warning(note)
        rows = found.pairs.rows()
        return SegmentationData(_table(rows, DecodePairs(found.spec), streaming, limit), found.spec)
    source = find_table(name, "<split>/images + <split>/labels, nor images/<split> + labels/<split>")
    known = given or _spec_of_table(name, Path(name).expanduser())
    benchmark = find_builtin_spec(spec) if isinstance(spec, str) else None
    if benchmark and not Path(source).is_dir():
        check_revision(source, revision)
    parts = [
        open_table(source, part, columns=columns, revision=revision, streaming=streaming)
        for part in split_names(split)
    ]
    for part in parts:
        if benchmark:
            compare_encoding(part, benchmark[0], known, name)
        check_encoding(part, known, name)
    table = parts[0] if len(parts) == 1 else import_datasets().concatenate_datasets(parts)
    if limit is not None:
        table = table.take(limit) if streaming else table.select(range(min(limit, len(table))))
    return SegmentationData(_decoded(table, DecodePairs(known)), known)


def list_source(
    name: str, split: str, *, spec: LabelSpec | str | Path | None = None, root: str | Path | None = None
) -> Listing | None:
    """Files of a benchmark or of a folder of pairs; None for everything else. Arguments as for `load_segmentation`.

    Raises:
        InputError: the files are not there, or nothing says what their ids mean.
    """
    path, given, parts = Path(name).expanduser(), _given_spec(spec), split_names(split)
    builtin = find_builtin_spec(spec) if isinstance(spec, str) else None
    _check_root(name, root)
    if name in NAMES and (root or not path.exists()):
        opened = open_benchmark(name, root)
    elif path.is_dir() or (path.is_file() and is_archive(path)):
        known = given or (spec_beside(path) if path.is_dir() else None)
        own = has_pairs(path) and known is not None and builtin is None  # its owner says what it is
        opened = None if own else recognize(path, builtin[0].name if builtin else path.name)
        if opened is None:
            if not has_pairs(path):
                return None
            pairs = merge_pairs({part: list_pairs(path, part) for part in parts})
            return Listing(pairs, known or find_spec(path), [], True)
    else:
        return None
    found = merge_listings({part: list_split(*opened, part) for part in parts})
    if given is None or (builtin is not None and ":" not in str(spec)):
        return found  # a bare name leaves it to the files how they are encoded
    return found._replace(spec=given)


def _check_root(name: str, root: str | Path | None) -> None:
    if root and name not in NAMES:
        raise InputError(
            f"data_root says where a benchmark lies that is named ({', '.join(NAMES)}); {name!r} is none of these. "
            "Leave it out, or give the name of the benchmark as the dataset."
        )


def _given_spec(spec: LabelSpec | str | Path | None) -> LabelSpec | None:
    if spec is None or isinstance(spec, LabelSpec):
        return spec
    builtin = find_builtin_spec(spec) if isinstance(spec, str) else None
    return builtin[1] if builtin else LabelSpec.from_file(spec)


def _spec_of_table(name: str, folder: Path) -> LabelSpec:
    if folder.is_dir():
        return find_spec(folder)
    raise InputError(
        f"Dataset {name!r} is no folder here; a hub dataset needs `spec` (label specification), since what its "
        "label ids mean is never guessed."
    )


class DecodePairs:
    """Batched row transform: encoded images and label maps -> `image`, `label`, `id`."""

    def __init__(self, spec: LabelSpec) -> None:
        self.spec = spec

    def __call__(self, batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        """Decode every pair of the batch, in whatever form the image columns are."""
        rows: dict[str, list[Any]] = {"image": [], "label": [], "id": []}
        for image, label, name in zip(batch["image"], batch["label"], batch["id"], strict=True):
            # Embedded images have no path to be called by.
            image = read_image(image, _path(image) or f"{name} (image)")
            if label is None:  # its authors keep it to themselves
                ids = np.full((image.height, image.width), IGNORE_INDEX, np.uint8)
            else:
                ids = read_label(label, self.spec, _path(label) or f"{name} (label)")
                check_same_size(image, ids, name)
            rows["image"].append(image)
            rows["label"].append(ids)
            rows["id"].append(name)
        return rows


@lru_cache(maxsize=256)
def _kept_scene(split: str, index: int) -> tuple[Image.Image, np.ndarray]:
    return render_scene(split, index)


def _path(source: Any) -> str | None:
    """Path of an encoded image, which may be a path, or a row of bytes with or without one."""
    return source.get("path") if isinstance(source, dict) else source


class RenderScenes:
    """Batched row transform: numbers of embedded scenes -> `image`, `label`, `id`."""

    def __init__(self, name: str) -> None:
        self.size = parse_name(name).size

    def __call__(self, batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        """Draw every scene of the batch."""
        # A fixed size can be large; scenes of the usual sizes are kept, since every epoch asks for them again.
        render = _kept_scene if self.size is None else partial(render_scene, size=self.size)
        scenes = [render(name.split("-")[0], int(name.split("-")[1])) for name in batch["id"]]
        return {
            "image": [image for image, _ in scenes],
            "label": [label for _, label in scenes],
            "id": list(batch["id"]),
        }


def _synthetic_rows(name: str, split: str) -> dict[str, list[Any]]:
    counts = parse_name(name).counts
    split = resolve_split(split, sorted(counts), "The embedded dataset")
    return {"id": [f"{split}-{index:05d}" for index in range(counts[split])]}


class Rows:
    """Stands in for an indexed dataset where `datasets` is not installed: folders of pairs and embedded scenes."""

    def __init__(self, rows: dict[str, list[Any]], decode: Any) -> None:
        self.rows = rows
        self.decode = decode

    def __len__(self) -> int:
        return len(self.rows["id"])

    def __getitem__(self, index: int) -> dict[str, Any]:
        batch = self.decode({key: [values[index]] for key, values in self.rows.items()})
        return {key: values[0] for key, values in batch.items()}


def _table(rows: dict[str, list[Any]], decode: Any, streaming: bool, limit: int | None) -> Any:
    """Rows as a dataset that decodes when asked."""
    if limit is not None:
        rows = {key: values[:limit] for key, values in rows.items()}
    if not streaming and importlib.util.find_spec("datasets") is None:
        return Rows(rows, decode)
    datasets = import_datasets()
    columns = {key: datasets.Value("string") if key == "id" else datasets.Image(decode=False) for key in rows}
    table = datasets.Dataset.from_dict(rows, features=datasets.Features(columns))
    return _decoded(table.to_iterable_dataset() if streaming else table, decode)


def _decoded(table: Any, decode: Any) -> Any:
    """The table with its rows decoded when they are asked for."""
    if hasattr(table, "with_transform"):
        return table.with_transform(decode)
    return table.map(decode, batched=True, batch_size=1)
