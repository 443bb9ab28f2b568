"""Segmentation data from any source: embedded scenes, folder of pairs, Parquet or WebDataset shards, hub dataset.

Rows are always `image` (PIL in mode RGB, or an array `(H, W, C)` of another `PixelFormat`), `label` ((H, W) train ids
of the specification) and `id` (text).
"""

import importlib.util
import logging
from collections.abc import Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hf_denseseg.data.labels import LabelSpec, SegmentationData
from hf_denseseg.data.reading.archives import is_archive
from hf_denseseg.data.reading.images import read_image, read_label, upright_label
from hf_denseseg.data.reading.pixels import RGB_BYTES, PixelFormat, height_width
from hf_denseseg.data.shards.tables import (
    check_encoding,
    find_shards,
    find_table,
    import_datasets,
    open_table,
    saved_splits,
)
from hf_denseseg.data.sources.benchmarks.encodings import check_revision, compare_encoding
from hf_denseseg.data.sources.benchmarks.layouts import NAMES, find_builtin_spec
from hf_denseseg.data.sources.benchmarks.listing import list_split, open_benchmark, recognize
from hf_denseseg.data.sources.exports.formats import recognize_export
from hf_denseseg.data.sources.exports.nearest import nearest_layout
from hf_denseseg.data.sources.folder_options import NO_OPTIONS, FolderOptions
from hf_denseseg.data.sources.folders import (
    Listing,
    find_spec,
    has_pairs,
    list_pairs,
    list_splits,
    merge_listings,
    merge_pairs,
    spec_beside,
)
from hf_denseseg.data.splits import resolve_split, split_names
from hf_denseseg.data.synthetic.scenes import SYNTHETIC_SPEC, parse_name, render_scene
from hf_denseseg.errors import InputError

logger = logging.getLogger(__name__)
_SHOWN_NOTES = 10


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
    pixel_format: PixelFormat = RGB_BYTES,
    options: FolderOptions = NO_OPTIONS,
) -> SegmentationData:
    """Load the pairs of one split.

    Args:
        name_or_path: name of a benchmark (`"cityscapes"`; `denseseg data list` lists all); `"synthetic"` (also
            `"synthetic:500"` for 500 training images, `"synthetic@512x1024"` for a fixed size); a folder of pairs
            (`<split>/images` + `<split>/labels`, or `images/<split>` + `labels/<split>`), the export of an annotation
            tool, a benchmark in its distributed form (folder or archive), a folder of Parquet or tar shards; or the
            id of a hub dataset.
        split: `"train"`, `"val"` (`"validation"` is the same), `"test"`, the name of a folder, or several of them
            joined: `"train+val"`.
        spec: label specification, its file, or the name of a benchmark; None searches next to the data
            (`classes.json`, `labels.yaml`).
        root: location of the files of a named benchmark: their folder, its parent folder, or an archive; None uses
            the environment variable DENSESEG_DATA_ROOT, or the current folder.
        columns: `{"image": ..., "label": ..., "id": ...}`, names of the columns of shards and hub datasets.
        revision: commit, tag or branch of a hub dataset.
        streaming: read sequentially without storing a copy, as an iterable dataset.
        limit: use only the first `limit` pairs; None uses all.
        pixel_format: channels and range of the images; in all but 8-bit RGB they are `(H, W, C)` arrays.
        options: how the files of a folder become label maps.

    Returns:
        The dataset, whose rows are decoded on access, and its label specification. If the labels of a split are not
        published (test splits of benchmarks), every pixel is ignored.

    Raises:
        InputError: an argument cannot be used; the message names it and the fix.
        RunError: the hub cannot be reached.
    """
    name = str(name_or_path)
    given = _given_spec(spec)
    _check_root(name, root)
    if name.split(":")[0].split("@")[0] == "synthetic":
        options.refuse_others((), name)
        rows, decode = _synthetic_rows(name, split), RenderScenes(name, pixel_format)
        return SegmentationData(_table(rows, decode, streaming, limit), given or SYNTHETIC_SPEC)
    # Files on disk first; what is left is a folder of shards or a hub id.
    if (found := list_source(name, split, spec=spec, root=root, options=options)) is not None:
        for note in found.notes[:_SHOWN_NOTES]:
            logger.warning(note)
        if len(found.notes) > _SHOWN_NOTES:
            logger.warning("%d more notes: `denseseg data check` lists all.", len(found.notes) - _SHOWN_NOTES)
        if found.faults:
            more = f" {len(found.faults) - 1} more faults: `denseseg data check` lists all."
            raise InputError(f"{found.faults[0]}{more if len(found.faults) > 1 else ''}")
        rows = found.pairs.rows()
        return SegmentationData(_table(rows, DecodePairs(found.spec, pixel_format), streaming, limit), found.spec)
    options.refuse_others((), name)
    layout = "pairs of images and label maps, nor an export (`denseseg data list`)"
    source = find_table(name, layout, nearest_layout)
    known = given or _spec_of_table(name, Path(name).expanduser())
    benchmark = find_builtin_spec(spec) if isinstance(spec, str) else None
    if benchmark and not Path(source).is_dir():
        check_revision(source, revision)
    parts = [  # one table per split of `train+val`
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
    return SegmentationData(_decoded(table, DecodePairs(known, pixel_format)), known)


def list_source(
    name: str,
    split: str,
    *,
    spec: LabelSpec | str | Path | None = None,
    root: str | Path | None = None,
    options: FolderOptions = NO_OPTIONS,
) -> Listing | None:
    """Files of a benchmark, an export or a folder of pairs; None for other sources. See `load_segmentation`.

    Raises:
        InputError: the files are missing, or there is no specification of their ids.
    """
    path, given, parts = Path(name).expanduser(), _given_spec(spec), split_names(split)
    builtin = find_builtin_spec(spec) if isinstance(spec, str) else None
    _check_root(name, root)
    if name in NAMES and (root or not path.exists()):
        opened = open_benchmark(name, root)
    elif path.is_dir() or (path.is_file() and is_archive(path)):
        export = recognize_export(path)
        known = given or (spec_beside(path) if path.is_dir() and export is None else None)
        # A specification that is given, or lies beside the pairs, takes precedence over a benchmark's.
        pairs_here = export is None and has_pairs(path, options.mask_suffix)
        custom = pairs_here and known is not None and builtin is None
        opened = None if custom else recognize(path, builtin[0].name if builtin else path.name)
        if opened is None:
            if export is not None:
                listing = export.list_splits(parts, options)
                return listing if given is None else listing._replace(spec=given)
            if not pairs_here:
                return None
            options.refuse_others(("mask_suffix",), f"{path} (pairs of images and label maps)")
            pairs = merge_pairs({part: list_pairs(path, part, options.mask_suffix) for part in parts})
            if not pairs.labels:
                raise InputError(f"{path}: there are no label maps in {pairs.labels_place}. {nearest_layout(path)}")
            return Listing(pairs, known or find_spec(path), [], True)
    else:
        return None
    options.refuse_others((), f"the benchmark {opened[0].name}")
    found = merge_listings({part: list_split(*opened, part) for part in parts})
    if given is None or (builtin is not None and ":" not in str(spec)):
        return found  # a name without a variant (`cityscapes:train_ids`): the files decide the encoding
    return found._replace(spec=given)


def splits_of(name: str, root: str | Path | None = None, options: FolderOptions = NO_OPTIONS) -> list[str]:
    """Names of the splits of a dataset on this machine; arguments as for `load_segmentation`.

    Raises:
        InputError: the splits cannot be listed.
    """
    path = Path(name).expanduser()
    if name.split(":")[0].split("@")[0] == "synthetic":
        return sorted(parse_name(name).counts)
    if name in NAMES and (root or not path.exists()):
        return sorted(open_benchmark(name, root)[0].splits)
    if (export := recognize_export(path)) is not None:
        return sorted(export.splits)
    if has_pairs(path, options.mask_suffix) and spec_beside(path) is not None:
        return list_splits(path, options.mask_suffix)
    if path.exists() and (path.is_dir() or is_archive(path)) and (found := recognize(path, path.name)) is not None:
        return sorted(found[0].splits)
    if has_pairs(path, options.mask_suffix):
        return list_splits(path, options.mask_suffix)
    if Path(find_table(name, "pairs of images and label maps, nor an export", nearest_layout)).is_dir():
        return sorted(saved_splits(path) or find_shards(path))
    raise InputError(f"The splits of the hub dataset {name} are not listed. Name one.")


def _check_root(name: str, root: str | Path | None) -> None:
    if root and name not in NAMES:
        raise InputError(
            f"data_root is the location of a benchmark given by name ({', '.join(NAMES)}); {name!r} is none of these. "
            "Omit data_root, or give the name of the benchmark as the dataset."
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
        f"Dataset {name!r} is not a local folder, and a hub dataset needs a label specification, since the meaning of "
        "its label ids is never guessed. Give one as --label_spec (in Python `spec`)."
    )


class DecodePairs:
    """Batched row transform: encoded images and label maps -> `image`, `label`, `id`."""

    def __init__(self, spec: LabelSpec, pixel_format: PixelFormat = RGB_BYTES) -> None:
        self.spec = spec
        self.pixel_format = pixel_format

    def __call__(self, batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        """Decode every pair of the batch, whatever the form of its image columns."""
        rows: dict[str, list[Any]] = {"image": [], "label": [], "id": []}
        for image, label, name in zip(batch["image"], batch["label"], batch["id"], strict=True):
            # Embedded images have no path, so messages call them by their id.
            source, image = image, read_image(image, _path(image) or f"{name} (image)", self.pixel_format)
            if label is None:  # not published: ignore every pixel
                ids = np.full(height_width(image), self.spec.ignore_index, self.spec.dtype)
            else:
                ids = read_label(label, self.spec, _path(label) or f"{name} (label)")
                ids = upright_label(ids, image, source, name)
            rows["image"].append(image)
            rows["label"].append(ids)
            rows["id"].append(name)
        return rows


@lru_cache(maxsize=256)
def _cached_scene(split: str, index: int) -> tuple[Image.Image, np.ndarray]:
    return render_scene(split, index)


def _path(source: Any) -> str | None:
    """Path of an encoded image: the source itself, or the `path` of a `{"bytes", "path"}` dict, which may be None."""
    return source.get("path") if isinstance(source, dict) else source


class RenderScenes:
    """Batched row transform: numbers of embedded scenes -> `image`, `label`, `id`."""

    def __init__(self, name: str, pixel_format: PixelFormat = RGB_BYTES) -> None:
        self.size = parse_name(name).size
        self.pixel_format = pixel_format

    def __call__(self, batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        """Draw every scene of the batch."""
        # Scenes of the usual sizes are cached for the next epochs; those of a fixed size could be too large for it.
        render = _cached_scene if self.size is None else partial(render_scene, size=self.size)
        scenes = [render(name.split("-")[0], int(name.split("-")[1])) for name in batch["id"]]
        return {
            "image": [read_image(image, "of the embedded dataset", self.pixel_format) for image, _ in scenes],
            "label": [label for _, label in scenes],
            "id": list(batch["id"]),
        }


def _synthetic_rows(name: str, split: str) -> dict[str, list[Any]]:
    counts = parse_name(name).counts
    names = [resolve_split(part, sorted(counts), "The embedded dataset") for part in split_names(split)]
    return {"id": [f"{part}-{index:05d}" for part in names for index in range(counts[part])]}


class Rows:
    """Minimal indexed dataset for folders of pairs and embedded scenes if `datasets` is not installed."""

    def __init__(self, rows: dict[str, list[Any]], decode: Any) -> None:
        self.rows = rows
        self.decode = decode

    def __len__(self) -> int:
        return len(self.rows["id"])

    def __getitem__(self, index: int) -> dict[str, Any]:
        batch = self.decode({key: [values[index]] for key, values in self.rows.items()})
        return {key: values[0] for key, values in batch.items()}


def _table(rows: dict[str, list[Any]], decode: Any, streaming: bool, limit: int | None) -> Any:
    """Rows as a dataset that decodes on access."""
    if limit is not None:
        rows = {key: values[:limit] for key, values in rows.items()}
    if not streaming and importlib.util.find_spec("datasets") is None:
        return Rows(rows, decode)
    datasets = import_datasets()
    columns = {key: datasets.Value("string") if key == "id" else datasets.Image(decode=False) for key in rows}
    table = datasets.Dataset.from_dict(rows, features=datasets.Features(columns))
    return _decoded(table.to_iterable_dataset() if streaming else table, decode)


def _decoded(table: Any, decode: Any) -> Any:
    """The table with its rows decoded on access."""
    if hasattr(table, "with_transform"):
        return table.with_transform(decode)
    return table.map(decode, batched=True, batch_size=1)
