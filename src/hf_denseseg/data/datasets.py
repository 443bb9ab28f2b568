"""One loader for all sources: embedded scenes, a folder of pairs, Parquet or WebDataset shards, a hub data set.

Rows are always `image` (RGB picture), `label` ((H, W) uint8, train ids and 255) and `id` (text).
"""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from hf_denseseg.data.labels import LabelSpec
from hf_denseseg.data.reading import check_same_size, read_image, read_label
from hf_denseseg.data.synthetic import SYNTHETIC_SPEC, parse_name, render_scene
from hf_denseseg.errors import InputError

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm"}
SPEC_FILES = ("classes.json", "labels.json", "labels.yaml", "labels.yml", "classes.yaml")
LABEL_FOLDERS = ("labels", "masks", "annotations")
SPLIT_ALIASES = (("train", "training"), ("val", "validation", "valid", "dev"), ("test", "testing"))


class SegmentationData(NamedTuple):
    """Rows (a `datasets` data set) and what their labels mean."""

    dataset: Any
    spec: LabelSpec


def load_segmentation(
    name_or_path: str | Path,
    split: str,
    *,
    spec: LabelSpec | str | Path | None = None,
    columns: Mapping[str, str] | None = None,
    revision: str | None = None,
    streaming: bool = False,
    limit: int | None = None,
) -> SegmentationData:
    """Load the pairs of one split.

    Args:
        name_or_path: `"synthetic"` (also `"synthetic:500"` for 500 training pictures, `"synthetic@512x1024"` for one
            size), a folder of pairs (`<split>/images` + `<split>/labels`, or `images/<split>` + `labels/<split>`),
            a folder of Parquet or tar shards, or the id of a hub data set.
        split: `"train"`, `"val"` (`"validation"` is the same), `"test"`, or the name of a folder.
        spec: label specification or its file; looked for beside the data (`classes.json`, `labels.yaml`) when None.
        columns: `{"image": ..., "label": ..., "id": ...}`, names of the columns of shards and hub data sets.
        revision: commit, tag or branch of a hub data set.
        streaming: read in order without storing, as an iterable data set.
        limit: use the first so many pairs.

    Returns:
        The data set, whose rows are decoded when they are asked for, and its label specification.

    Raises:
        InputError: something given cannot be used; the message names it and the way out.
        RunError: the hub cannot be reached.
    """
    given = None if spec is None else spec if isinstance(spec, LabelSpec) else LabelSpec.from_file(spec)
    name = str(name_or_path)
    if name.split(":")[0].split("@")[0] == "synthetic":
        rows, decode = _synthetic_rows(name, split), RenderScenes(name)
        return SegmentationData(_table(rows, decode, streaming, limit), given or SYNTHETIC_SPEC)
    folder = Path(name).expanduser()
    if folder.is_dir():
        found = find_pairs(folder, split)
        if found is not None:
            known = given or find_spec(folder)
            return SegmentationData(_table(found, DecodePairs(known), streaming, limit), known)
    elif folder.exists():
        raise InputError(f"{folder} is a file. Give the folder that holds the data set.")
    raise InputError(f"Data set {name!r}: no such folder.")


class DecodePairs:
    """Batched row transform: encoded pictures and label maps -> `image`, `label`, `id`."""

    def __init__(self, spec: LabelSpec) -> None:
        self.spec = spec

    def __call__(self, batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        """Decode every pair of the batch, in whatever form the picture columns are."""
        rows: dict[str, list[Any]] = {"image": [], "label": [], "id": []}
        for image, label, name in zip(batch["image"], batch["label"], batch["id"], strict=True):
            picture, ids = read_image(image), read_label(label, self.spec)
            check_same_size(picture, ids, name)
            rows["image"].append(picture)
            rows["label"].append(ids)
            rows["id"].append(name)
        return rows


class RenderScenes:
    """Batched row transform: numbers of embedded scenes -> `image`, `label`, `id`."""

    def __init__(self, name: str) -> None:
        self.size = parse_name(name).size

    def __call__(self, batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        """Draw every scene of the batch."""
        scenes = [render_scene(name.split("-")[0], int(name.split("-")[1]), self.size) for name in batch["id"]]
        return {
            "image": [image for image, _ in scenes],
            "label": [label for _, label in scenes],
            "id": list(batch["id"]),
        }


def find_spec(folder: Path) -> LabelSpec:
    """Read the label specification that lies beside the data.

    Raises:
        InputError: there is none, or it is not valid.
    """
    for name in SPEC_FILES:
        if (folder / name).is_file():
            return LabelSpec.from_file(folder / name)
    raise InputError(
        f"No label specification in {folder} (looked for {', '.join(SPEC_FILES)}). Write one, at least "
        '{"classes": ["road", ...]} in the order of the ids, or give `spec`.'
    )


def find_pairs(folder: Path, split: str) -> dict[str, list[Any]] | None:
    """Pair the pictures and label maps of a split by their names; None when the folder has no such layout.

    Raises:
        InputError: the split is missing or empty, or a picture or a label map has no partner.
    """
    layouts = _layouts(folder)
    if not layouts:
        return None
    name = resolve_split(split, sorted(layouts), str(folder))
    images_folder, labels_folder = layouts[name]
    images, labels = _pictures(images_folder), _pictures(labels_folder)
    if not images:
        raise InputError(f"Split {name!r} is empty: no pictures in {images_folder}.")
    for these, others, what, where in (
        (images, labels, "label map", labels_folder),
        (labels, images, "picture", images_folder),
    ):
        alone = [these[key] for key in these if key not in others]
        if alone:
            more = f" (and {len(alone) - 1} more)" if len(alone) > 1 else ""
            raise InputError(
                f"{alone[0]}{more} has no {what} of the same name in {where}. Add it, or take the file out."
            )
    ids = sorted(images)
    return {"image": [str(images[key]) for key in ids], "label": [str(labels[key]) for key in ids], "id": ids}


def resolve_split(split: str, available: list[str], where: str) -> str:
    """Find the split among the available ones, `val` and `validation` being the same.

    Raises:
        InputError: there is no such split.
    """
    same = next((group for group in SPLIT_ALIASES if split in group), (split,))
    for name in (split, *same):
        if name in available:
            return name
    near = difflib.get_close_matches(split, available, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise InputError(f"{where} has no split {split!r}; available: {', '.join(available) or 'none'}.{hint}")


def _layouts(folder: Path) -> dict[str, tuple[Path, Path]]:
    """Split -> (folder of pictures, folder of label maps), for both layouts."""
    layouts = {}
    for child in sorted(path for path in folder.iterdir() if path.is_dir()):
        for name in LABEL_FOLDERS:
            if (child / "images").is_dir() and (child / name).is_dir():
                layouts[child.name] = (child / "images", child / name)
            if child.name == "images" and (folder / name).is_dir():
                for part in sorted(path for path in child.iterdir() if path.is_dir()):
                    layouts[part.name] = (part, folder / name / part.name)
    return layouts


def _pictures(folder: Path) -> dict[str, Path]:
    """Path below `folder` without ending -> file, for every picture."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in paths}


def _synthetic_rows(name: str, split: str) -> dict[str, list[Any]]:
    counts = parse_name(name).counts
    split = resolve_split(split, sorted(counts), "The embedded data set")
    return {"id": [f"{split}-{index:05d}" for index in range(counts[split])]}


def _table(rows: dict[str, list[Any]], decode: Any, streaming: bool, limit: int | None) -> Any:
    """Rows as a data set that decodes when asked."""
    from datasets import Dataset, Features, Image, Value

    if limit is not None:
        rows = {key: values[:limit] for key, values in rows.items()}
    features = Features({key: Value("string") if key == "id" else Image(decode=False) for key in rows})
    table = Dataset.from_dict(rows, features=features)
    if streaming:
        return table.to_iterable_dataset().map(decode, batched=True, batch_size=1)
    return table.with_transform(decode)
