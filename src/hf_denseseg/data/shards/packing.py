"""Pack a dataset into shards that embed the encoded images byte for byte, with a manifest next to them.

Rows are in a fixed random order, so that every shard is a random sample of the split. A packing that was killed
continues where it stopped, and ends with the same bytes.
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from hf_denseseg.data.reading.references import read_reference
from hf_denseseg.data.shards.manifest import Manifest, Shard, checksum, is_intact, read_manifest
from hf_denseseg.data.shards.tables import import_datasets
from hf_denseseg.errors import InputError
from hf_denseseg.files import atomic_path, check_output_folder, write_atomic

FORMS = {"parquet": ".parquet", "webdataset": ".tar"}
_ROW_GROUP = 16  # rows that a reader holds in memory at a time
_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8"


def pack(
    data: Any,
    folder: str | Path,
    split: str,
    *,
    form: str = "parquet",
    rows_per_shard: int = 500,
    task: str = "semantic-segmentation",
    command: Sequence[str] = ("denseseg", "data", "pack"),
    progress: bool = False,
) -> list[Path]:
    """Write a split as shards, with the class names or label specification and the manifest next to them.

    Encoded images and label maps are copied byte for byte (labels keep their raw ids or colors). Everything else is
    stored as PNG: embedded scenes, and label maps in other formats such as `.mat`, the latter with the raw ids of the
    specification.

    Args:
        data: what `load_segmentation`, `load_classification` or `load_detection` returned, not streaming.
        folder: output folder; receives `<split>-00000-of-0000N.parquet` (or `.tar`), `<split>.manifest.json`, and
            `labels.json` (or `classes.json`, if the labels are not images).
        split: prefix of the file names; `train+val` becomes `train_val`.
        form: `"parquet"` or `"webdataset"` (tar).
        rows_per_shard: images per file.
        task: name of the task, recorded in the manifest.
        command: command line that packs the same split again, recorded in the manifest.
        progress: show a progress bar on a terminal.

    Returns:
        Paths of the shards.

    Raises:
        InputError: the folder holds other shards, an id occurs twice, or a file cannot be read.
        RunError: the disk is full; complete shards are kept.
    """
    if form not in FORMS or rows_per_shard < 1:
        raise InputError(f"form {form!r}, rows_per_shard {rows_per_shard}: give {' or '.join(FORMS)}, and at least 1.")
    folder, split = check_output_folder(folder), split.replace("+", "_")
    rows = EncodedRows(data)
    order = np.random.default_rng(0).permutation(len(rows))  # always the same: a second run writes the same shards
    ids = [rows.ids[index] for index in order]
    _check_ids(ids, form)
    digest = hashlib.sha256("\n".join(ids).encode()).hexdigest()
    manifest = Manifest(form, task, split, tuple(command), len(rows), rows_per_shard, digest)
    for half_written in (*folder.glob(f".{split}-*-of-*"), *folder.glob(f".{split}.manifest-*")):
        half_written.unlink()  # left by a run that was killed
    known = _known_shards(folder, manifest)
    _write_names(folder, data.spec)
    write = _write_parquet if form == "parquet" else _write_tar
    for number in tqdm(range(manifest.count), desc="shards", disable=None if progress else True):
        file = f"{split}-{number:05d}-of-{manifest.count:05d}{FORMS[form]}"
        indices = order[manifest.shard_rows(number)]
        if file not in known or not is_intact(folder, known[file]):
            with atomic_path(folder / file) as aside, aside.open("wb") as content:
                write(rows, indices.tolist(), content)
            shard = Shard(file, len(indices), (folder / file).stat().st_size, checksum(folder / file))
            if known.get(file, shard) != shard:
                raise InputError(
                    f"{folder / file} was written with other content than before: the source has changed since. "
                    "Pack the complete split into another folder."
                )
            known[file] = shard
        # Rewritten after each shard: whatever the manifest lists is complete, so a killed run can continue from it.
        manifest = replace(manifest, shards=tuple(known[key] for key in sorted(known)))
        manifest.write(folder)
    return [folder / shard.file for shard in manifest.shards]


def _known_shards(folder: Path, manifest: Manifest) -> dict[str, Shard]:
    """File -> shard of an earlier run with the same arguments, unfinished or with damaged shards.

    Raises:
        InputError: the folder holds shards of this split that were packed with other arguments.
    """
    there = read_manifest(folder, manifest.split)
    if there is None:
        return {}
    if replace(there, shards=(), command=()) != replace(manifest, shards=(), command=()):
        raise InputError(
            f"{folder} holds {there.rows} rows of {there.split!r} that were packed differently ({there.form}, "
            f"{there.rows_per_shard} rows per shard, {there.task}). Give another folder, or delete them."
        )
    return {shard.file: shard for shard in there.shards}


def _check_ids(ids: list[str], form: str) -> None:
    seen: set[str] = set()
    if twice := next((name for name in ids if name in seen or seen.add(name)), None):  # type: ignore[func-returns-value]
        raise InputError(f"The id {twice!r} occurs twice. Give every row a unique id.")
    if form == "webdataset" and (dotted := next((name for name in ids if "." in name.rpartition("/")[2]), None)):
        raise InputError(
            f"The id {dotted!r} contains a dot, where WebDataset cuts off the row's name. Rename the files, or pack "
            "as parquet."
        )


def _write_names(folder: Path, spec: Any) -> None:
    """Write `labels.json` (label specification) or `classes.json` (names), one for all splits of a folder."""
    path = folder / ("labels.json" if hasattr(spec, "raw_to_train") else "classes.json")
    content = spec.to_dict()
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        if "licence" in before:  # the key of older files
            before["license"] = before.pop("licence")
        if before != content:
            raise InputError(
                f"{path} describes other labels. Only splits of the same dataset can share a folder; give another one."
            )
    write_atomic(path, json.dumps(content, indent=1) + "\n")


class EncodedRows:
    """Rows of a dataset with images as bytes.

    Args:
        data: a `datasets` table that decodes rows on access, and its specification.

    Raises:
        InputError: the dataset is a stream, or its labels were never published.
    """

    def __init__(self, data: Any) -> None:
        datasets = import_datasets()
        if not isinstance(data.dataset, datasets.Dataset):
            raise InputError("A stream cannot be packed, since its length is unknown. Load it without streaming.")
        self.data = data
        self.stored = data.dataset.with_format(None)
        self.ids: list[str] = self.stored["id"][:]
        self.rendered = "image" not in self.stored.column_names  # embedded scenes: drawn on access, no encoded form
        if not self.rendered and "label" in self.stored.column_names and self.stored[0]["label"] is None:
            raise InputError(
                "The labels of this split were never published; there is nothing to train or evaluate on."
            )
        features = {} if self.rendered else dict(self.stored.features)
        first = data.dataset[0]
        self.has_maps = isinstance(first.get("label"), np.ndarray)
        features |= {"image": datasets.Image(), "id": datasets.Value("string")}
        if "label" in first:
            features["label"] = (
                datasets.Image() if self.has_maps else datasets.ClassLabel(names=list(data.spec.classes))
            )
        self.features = datasets.Features({key: features[key] for key in sorted(features)})
        self.image_ending = "jpg" if self[0]["image"].startswith(_JPEG) else "image.png"

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Columns of one row, with images as encoded bytes."""
        row = dict((self.data.dataset if self.rendered else self.stored)[index])
        row["image"] = as_png(row["image"]) if self.rendered else bytes_of(row["image"])
        if self.has_maps:
            content = b"" if self.rendered else bytes_of(row["label"])
            if not content.startswith(_PNG):  # rendered, or another format: store the raw ids as PNG
                decoded = row if self.rendered else self.data.dataset[index]
                content = as_png(self.data.spec.decode(np.asarray(decoded["label"])))
            row["label"] = content
        return row


def bytes_of(source: Any) -> bytes:
    """Encoded bytes of an image column: embedded, or read from its path or reference."""
    content = source.get("bytes")
    return content if content is not None else read_reference(source["path"])


def as_png(image: Image.Image | np.ndarray) -> bytes:
    """Content of a PNG file."""
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _write_parquet(rows: EncodedRows, indices: Sequence[int], content: BinaryIO) -> None:
    """Write a Parquet file in small row groups, uncompressed (images already are), with a checksum per page."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = rows.features.arrow_schema  # its metadata marks the image columns for `datasets`
    images = ["image", "label"] if rows.has_maps else ["image"]
    with pq.ParquetWriter(content, schema, compression="none", use_dictionary=False, write_page_checksum=True) as file:
        for first in range(0, len(indices), _ROW_GROUP):
            group = [rows[index] for index in indices[first : first + _ROW_GROUP]]
            for row in group:
                # No path: `datasets` drops the bytes of an image whose path exists.
                row.update({key: {"bytes": row[key], "path": None} for key in images})
            file.write_table(pa.Table.from_pylist(group, schema=schema))


def _write_tar(rows: EncodedRows, indices: Sequence[int], content: BinaryIO) -> None:
    """Write a tar with WebDataset's member names; owner and time are constant, so that the bytes are reproducible."""
    with tarfile.open(fileobj=content, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for index in indices:
            row = rows[index]
            for ending, value in _members(row, rows.image_ending):
                member = tarfile.TarInfo(f"{row['id']}.{ending}")
                member.size, member.mode = len(value), 0o644
                archive.addfile(member, io.BytesIO(value))


def _members(row: dict[str, Any], image_ending: str) -> Iterator[tuple[str, bytes]]:
    """Extension and content: the image, `label.png` (label map) or `cls` (class id), `json` (all other columns)."""
    # One extension for all rows, that of the first image: readers expect the same columns in every row, and they tell
    # the image format from the content.
    yield image_ending, row["image"]
    label = row.get("label")
    if label is not None:
        yield ("label.png", label) if isinstance(label, bytes) else ("cls", str(label).encode())
    others = {key: value for key, value in row.items() if key not in ("image", "label", "id")}
    if others:
        yield "json", json.dumps(others, sort_keys=True).encode()
