"""Write any dataset with label maps in the plain layout: `<split>/images`, `<split>/labels` and `classes.json`."""

import io
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image
from tqdm.auto import tqdm

from hf_denseseg.data.labels import LabelSpec, SegmentationData
from hf_denseseg.data.reading.references import file_name
from hf_denseseg.data.reading.suffixes import image_suffixes
from hf_denseseg.data.segmentation import Rows, load_segmentation
from hf_denseseg.data.shards.packing import as_png, bytes_of
from hf_denseseg.errors import InputError
from hf_denseseg.files import check_output_folder, write_atomic

_SOURCE_FILE = "source.json"


def convert(
    name: str, output: str | Path, splits: Sequence[str], progress: bool = False, **source: Any
) -> dict[str, int]:
    """Write splits of a dataset as images and label maps of train ids.

    The files are collected in a hidden folder beside `output`, which is renamed at the end. A conversion that was
    killed goes on with the files that are there.

    Args:
        name: as for `load_segmentation`.
        output: folder to write; it must not exist, or be empty.
        splits: names of the splits; each becomes a folder.
        progress: show a progress bar on a terminal.
        source: further arguments of `load_segmentation`.

    Returns:
        Split -> number of pairs.

    Raises:
        InputError: the folder holds files, or a split cannot be read; then nothing is written.
        RunError: the disk is full.
    """
    output = Path(output).absolute()
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise InputError(f"{output} exists and is not an empty folder. Give another folder, or remove it.")
    parts = {split: load_segmentation(name, split, **source) for split in splits}
    spec = _plain(next(iter(parts.values())).spec)
    for split, data in parts.items():
        if data.spec.classes != spec.classes:
            raise InputError(f"Splits {splits[0]} and {split} of {name} have other classes. Convert them one by one.")
    aside = _start(output, {"name": str(Path(name).absolute()), "splits": list(splits), "source": repr(source)})
    try:
        for split, data in parts.items():
            _write_split(data, aside / split, split, progress)
    except InputError:
        shutil.rmtree(aside)
        raise
    write_atomic(aside / "classes.json", json.dumps(spec.to_dict(), indent=1, ensure_ascii=False) + "\n")
    (aside / _SOURCE_FILE).unlink()
    if output.is_dir():
        output.rmdir()
    os.replace(aside, output)
    return {split: len(data.dataset) for split, data in parts.items()}


def _plain(spec: LabelSpec) -> LabelSpec:
    """The same classes with train ids in the files."""
    about = {key: getattr(spec, key) for key in ("categories", "source_url", "license", "citation")}
    return LabelSpec(spec.name, spec.classes, spec.palette, **about)


def _start(output: Path, description: dict[str, Any]) -> Path:
    """The folder in which files are collected; what another conversion left there is removed."""
    check_output_folder(output.parent)
    aside = output.parent / f".{output.name}.unfinished"
    text = json.dumps(description)
    try:
        known = (aside / _SOURCE_FILE).read_text(encoding="utf-8") == text
    except OSError:
        known = False
    if not known:
        shutil.rmtree(aside, ignore_errors=True)
        write_atomic(aside / _SOURCE_FILE, text)
    return aside


def _write_split(data: SegmentationData, folder: Path, split: str, progress: bool) -> None:
    for index in tqdm(range(len(data.dataset)), desc=split, disable=None if progress else True):
        stored = _stored(data.dataset, index)
        key = PurePosixPath(str(stored["id"]))
        if key.is_absolute() or ".." in key.parts:
            raise InputError(f"The id {str(key)!r} cannot be the name of a file. Rename the image.")
        label = folder / "labels" / f"{key}.png"
        if label.exists():  # written after its image
            continue
        if stored.get("label", "") is None:
            raise InputError(f"The labels of {split} were never published. Convert the other splits, with --split.")
        row = data.dataset[index]
        suffix, content = _encoded(stored.get("image"), row["image"])
        write_atomic(folder / "images" / f"{key}{suffix}", content)
        write_atomic(label, as_png(row["label"]))


def _stored(dataset: Any, index: int) -> dict[str, Any]:
    """A row with its image and label map as they are stored."""
    if isinstance(dataset, Rows):
        return {key: values[index] for key, values in dataset.rows.items()}
    return dict(dataset.with_format(None)[index])


def _encoded(source: Any, image: Any) -> tuple[str, bytes]:
    """Suffix and content of an image file: as it is stored where there is a file, else a PNG."""
    if source is not None:
        source = source if isinstance(source, dict) else {"path": source, "bytes": None}
        path, content = source["path"], bytes_of(source)
        suffix = Path(file_name(path)).suffix if path else _suffix_of(content)
        if suffix.lower() in image_suffixes():
            return suffix, content
    return ".png", as_png(image)


def _suffix_of(content: bytes) -> str:
    with Image.open(io.BytesIO(content)) as image:
        return {"JPEG": ".jpg", "PNG": ".png"}.get(image.format or "", f".{image.format}".lower())


__all__ = ["convert"]
