"""Tables of embedded images: Parquet or WebDataset shards in a folder, and datasets on the hub."""

import json
import re
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from hf_denseseg.data.labels import CHECKED_ROWS, LabelSpec
from hf_denseseg.data.reading.images import read_label
from hf_denseseg.data.shards.manifest import check_shards, check_task, read_manifest
from hf_denseseg.data.shards.packed_rows import PackedRows
from hf_denseseg.data.sources.benchmarks.layouts import NAMES
from hf_denseseg.data.splits import resolve_split
from hf_denseseg.errors import InputError, RunError

SHARD_FORMATS = {".parquet": "parquet", ".tar": "webdataset", ".arrow": "arrow"}
# Column names of published datasets, tried in this order.
_KNOWN_COLUMNS = {
    "image": ("image", "pixel_values", "jpg", "jpeg", "image.jpg", "image.png", "img", "webp"),
    "label": (
        *("label", "labels", "annotation", "annotations", "semantic_segmentation", "mask", "segmentation_mask"),
        *("semantic_mask", "seg", "png", "label.png", "seg.png", "mask.png", "cls"),
    ),
    "id": ("id", "__key__", "image_id", "file_name", "filename"),
}


def import_datasets() -> Any:
    """The `datasets` library.

    Raises:
        InputError: it is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            "This needs the library `datasets`, which is not installed. Run `pip install 'hf-denseseg[train]'`."
        ) from error
    return datasets


def find_shards(folder: Path) -> dict[str, list[Path]]:
    """Split -> Parquet, Arrow or tar files in the folder or its subfolders.

    The split is the prefix of the file name (`train-00000-of-00002.parquet`) or, if the name is only a number, the
    name of the subfolder.
    """
    shards: dict[str, list[Path]] = {}
    for path in sorted((*folder.glob("*"), *folder.glob("*/*"))):
        if path.suffix in SHARD_FORMATS:
            prefix = re.sub(r"[-_.]?\d*(-of-\d+)?$", "", path.stem)
            shards.setdefault(prefix or path.parent.name, []).append(path)
    return shards


def saved_splits(folder: Path) -> dict[str, Path]:
    """Split -> folder of what `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote; empty if it is none.

    Raises:
        InputError: its list of splits cannot be read.
    """
    table, single = folder / "dataset_dict.json", folder / "state.json"
    if single.is_file() and (folder / "dataset_info.json").is_file():
        return {"train": folder}
    if not table.is_file():
        return {}
    try:
        return {str(name): folder / str(name) for name in json.loads(table.read_text(encoding="utf-8"))["splits"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{table} cannot be read ({error!r}). Save the dataset again.") from error


def open_table(
    name: str,
    split: str,
    *,
    columns: Mapping[str, str] | None = None,
    revision: str | None = None,
    streaming: bool = False,
    images: tuple[str, ...] = ("image", "label"),
) -> Any:
    """Open shards or a hub dataset as a table with the columns `image`, `label` (images still encoded) and `id`.

    Args:
        name: folder of shards or of `save_to_disk`, or hub id.
        split: name of the split; `val` and `validation` are the same.
        columns: `{"image": ..., "label": ..., "id": ...}`; usual names are found without it.
        revision: of a hub dataset.
        streaming: read sequentially instead of storing an indexed copy in the cache of `datasets`.
        images: columns that hold images.

    Raises:
        InputError: no such dataset, split or column.
        RunError: the hub cannot be reached.
    """
    datasets = import_datasets()
    try:
        if saved := saved_splits(Path(name)):
            found = resolve_split(split, sorted(saved), name)
            table = _load_saved(saved[found])
            table = table.to_iterable_dataset() if streaming else table
        elif Path(name).is_dir():
            # Not `load_dataset(folder)`: it takes a word such as "test" anywhere in the path as the split.
            shards = find_shards(Path(name))
            found = resolve_split(split, sorted(shards), name)
            if manifest := read_manifest(Path(name), found):
                check_task(
                    Path(name), manifest, "semantic-segmentation" if "label" in images else "image-classification"
                )
                check_shards(Path(name), manifest)
                if streaming:
                    return PackedRows(Path(name), manifest)
            files = [str(path) for path in shards[found]]
            form = SHARD_FORMATS[shards[found][0].suffix]
            table = datasets.load_dataset(form, data_files={found: files}, split=found, streaming=streaming)
        else:
            found = resolve_split(split, datasets.get_dataset_split_names(name, revision=revision), name)
            table = datasets.load_dataset(name, split=found, revision=revision, streaming=streaming)
    except InputError:
        raise
    except ConnectionError as error:
        raise RunError(
            f"Dataset {name!r} is not a local folder, and the hub cannot be reached ({error}). Check the path or the "
            "network, or download it first with `hf download --repo-type dataset`."
        ) from error
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
        raise InputError(
            f"Dataset {name!r} is a loading script, which `datasets` no longer runs. Try the converted copy with "
            "revision='refs/convert/parquet', or convert it to Parquet."
        ) from error
    except (OSError, ValueError) as error:
        raise InputError(
            f"Dataset {name!r} cannot be opened: {str(error).splitlines()[0]} Check its name, "
            "revision and access permissions."
        ) from error
    return _with_known_columns(table, name, dict(columns or {}), images)


def _load_saved(folder: Path) -> Any:
    """What `Dataset.save_to_disk` wrote."""
    try:
        table = import_datasets().load_from_disk(str(folder)).with_format(None)  # it may be saved
        if set(table.features) != set(table.data.column_names):
            raise ValueError("dataset_info.json names other columns")
        return table
    except (TypeError, LookupError, AttributeError, ValueError, OSError) as error:  # whatever its JSON files lead to
        raise InputError(
            f"{folder} is damaged, or was not written by save_to_disk ({error!r}). Save it again."
        ) from error


def check_encoding(table: Any, spec: LabelSpec, name: str) -> None:
    """Read the first label maps and check that the specification covers their ids: encodings are never guessed.

    Raises:
        InputError: there are ids that `spec` does not name, or every pixel is ignored.
    """
    ignored = spec.ignore_index
    classes = np.zeros(ignored + 1, dtype=np.int64)
    for row in islice(table.rows_of_this_process() if isinstance(table, PackedRows) else table, CHECKED_ROWS):
        try:
            classes += np.bincount(read_label(row["label"], spec, row["id"]).ravel(), minlength=ignored + 1)
        except InputError as error:
            raise InputError(f"{name} does not fit its label specification. {error}") from error
    if classes.any() and not classes[:ignored].any():
        raise InputError(
            f"All labels of the first {CHECKED_ROWS} rows of {name} are ignored by the specification {spec.name!r}. "
            "Fix its `raw_to_train` or `raw_void`."
        )


def _with_known_columns(table: Any, name: str, columns: dict[str, str], images: tuple[str, ...]) -> Any:
    """Rename the columns to `image`, `label`, `id`, drop the others, keep the images encoded."""
    from datasets import Image as ImageColumn

    present = list(table.column_names or next(iter(table)))
    if wrong := set(columns) - set(_KNOWN_COLUMNS):
        raise InputError(f"`columns` has the unknown keys {sorted(wrong)}; it takes image, label and id.")
    for key, known in _KNOWN_COLUMNS.items():
        columns.setdefault(key, next((column for column in known if column in present), ""))
        if columns[key] not in present and (key != "id" or columns[key]):
            raise InputError(
                f"{name} has no {key} column {columns[key] or '(none of the usual names)'!r}; its columns are "
                f"{', '.join(present)}. Give `columns`, such as columns={{'image': 'photo', 'label': 'mask'}}."
            )
    if not columns["id"]:
        del columns["id"]
    table = table.remove_columns([column for column in present if column not in columns.values()])
    renamed = {column: key for key, column in columns.items() if column != key}
    table = table.rename_columns(renamed) if renamed else table
    for key in images:
        table = table.cast_column(key, ImageColumn(decode=False))
    if "id" not in columns:
        table = table.map(lambda row, index: {"id": f"{index:08d}"}, with_indices=True)
    return table


def find_table(name: str, layout: str, hint: Callable[[Path], str] | None = None) -> str:
    """Resolve a dataset name to a folder of shards or a hub id.

    Args:
        name: what was given as the dataset.
        layout: the folder layout that was expected first, for the message.
        hint: says what a folder that is none is nearest to.

    Raises:
        InputError: it is neither.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not find_shards(folder) and not saved_splits(folder):
            nearest = f" {hint(folder)}" if hint else ""
            raise InputError(f"{folder} holds no dataset: neither {layout}, nor Parquet or tar shards.{nearest}")
        return str(folder)
    if folder.exists():
        raise InputError(
            f"{folder} is a file. Give the folder that holds the dataset (unpack an export), or a benchmark's archive."
        )
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        raise InputError(
            f"Dataset {name!r}: there is no such folder, and it is not a hub id (owner/name). Without data of your "
            f"own, use 'synthetic'. Names of benchmarks: {', '.join(NAMES)}."
        )
    return name
