"""A folder of images and label maps: its splits, its image-label pairs and its label specification."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hf_denseseg.data.labels import LabelSpec
from hf_denseseg.data.reading.images import Fault
from hf_denseseg.data.reading.references import describe_reference
from hf_denseseg.data.reading.suffixes import image_suffixes
from hf_denseseg.data.splits import resolve_split
from hf_denseseg.errors import InputError

SPEC_FILES = ("classes.json", "labels.json", "labels.yaml", "labels.yml", "classes.yaml")
LABEL_FOLDERS = ("labels", "masks", "annotations", "ann_dir")
IMAGE_FOLDERS = ("images", "img_dir")
MASK_SUFFIXES = ("_mask", "-mask", "_gt", "-gt", "_labelIds", "_label", "_seg")


class NoLabelSpecError(InputError):
    """A folder of pairs has no label specification."""


def spec_beside(folder: Path) -> LabelSpec | None:
    """Read the label specification in the dataset folder; None if there is none."""
    files = (folder / name for name in SPEC_FILES)
    return next((LabelSpec.from_file(file) for file in files if file.is_file()), None)


def find_spec(folder: Path) -> LabelSpec:
    """Read the label specification in the dataset folder.

    Raises:
        NoLabelSpecError: there is none.
        InputError: it is invalid.
    """
    if (spec := spec_beside(folder)) is not None:
        return spec
    raise NoLabelSpecError(
        f"No label specification in {folder} (searched for {', '.join(SPEC_FILES)}). Write one, at least "
        '{"classes": ["road", ...]} in the order of the ids, or give one as --label_spec (in Python `spec`); '
        "`denseseg data check` proposes one."
    )


class Pairs(NamedTuple):
    """Files of one split, as references for `references.read_reference`.

    Args:
        images: id -> image; in a folder, the id is the path relative to it, without suffix.
        labels: id -> label map.
        images_place: where the images are, for messages.
        labels_place: where the label maps are; empty if this split has none.
    """

    images: dict[str, str]
    labels: dict[str, str]
    images_place: str
    labels_place: str

    def unpaired_files(self) -> list[tuple[str, str]]:
        """Images without a label map and label maps without an image: (file, message) for each."""
        unpaired = []
        for these, others, what, where in (
            (self.images, self.labels, "label map", self.labels_place),
            (self.labels, self.images, "image", self.images_place),
        ):
            for key, reference in these.items():
                if key not in others and where:
                    file = describe_reference(reference)
                    unpaired.append(
                        (file, f"{file} has no {what} of the same name in {where}. Add it, or remove the file.")
                    )
        return unpaired

    def rows(self) -> dict[str, list[Any]]:
        """Columns `image`, `label` (None where there are no label maps) and `id`, in the order of the ids.

        Raises:
            InputError: a file has no counterpart.
        """
        if unpaired := self.unpaired_files():
            more = (
                f" {len(unpaired) - 1} more files have no counterpart; `denseseg data check` lists them."
                if len(unpaired) > 1
                else ""
            )
            raise InputError(unpaired[0][1] + more)
        ids = sorted(self.images)
        return {
            "image": [self.images[key] for key in ids],
            "label": [self.labels.get(key) for key in ids],
            "id": ids,
        }


class Listing(NamedTuple):
    """Files of one split.

    Args:
        pairs: images and label maps; only images if the labels of the split were not published.
        spec: what the ids in these label maps mean.
        notes: unusual properties that may be intended, such as missing images.
        has_labels: whether the split has published labels.
        faults: entries that cannot be used.
    """

    pairs: Pairs
    spec: LabelSpec
    notes: list[str]
    has_labels: bool
    faults: Sequence[Fault] = ()


def merge_listings(listings: Mapping[str, Listing]) -> Listing:
    """Merge several splits, as for `train+val`.

    Raises:
        InputError: their label maps have different encodings, or only some of them have label maps.
    """
    first, *others = listings.values()
    if any((each.spec, each.has_labels) != (first.spec, first.has_labels) for each in others):
        raise InputError(
            f"The label maps of {' and '.join(listings)} differ in encoding, or not all splits have labels. "
            "Combine only splits whose labels have the same encoding."
        )
    pairs = merge_pairs({split: each.pairs for split, each in listings.items()})
    notes = [note for each in listings.values() for note in each.notes]
    faults = [fault for each in listings.values() for fault in each.faults]
    return Listing(pairs, first.spec, notes, first.has_labels, faults)


def has_pairs(folder: Path, mask_suffix: str | None = None) -> bool:
    """Whether the folder has a layout of pairs, see `list_pairs`."""
    return folder.is_dir() and bool(_layouts(folder, mask_suffix))


def list_pairs(folder: Path, split: str, mask_suffix: str | None = None) -> Pairs:
    """List the images and label maps of a split.

    The layouts are `<split>/images` and `<split>/labels`, `images/<split>` and `labels/<split>` (also `img_dir` and
    `ann_dir`), `images` and `labels` without splits, and label maps beside their images, told by the end of their
    names. A folder without splits is `train`.

    Args:
        folder: of the dataset.
        split: name of a split.
        mask_suffix: what the name of a label map has more than that of its image; None finds the usual ones.

    Raises:
        InputError: the split does not exist or has no images, or two files of it have one name.
    """
    layouts = _layouts(folder, mask_suffix)
    name = resolve_split(split, sorted(layouts), str(folder))
    images_folder, labels_folder = layouts[name]
    images = _images(images_folder, deep=images_folder != labels_folder)
    if not images:
        raise InputError(f"Split {name!r} is empty: no images in {images_folder}. Add images, or give another split.")
    if images_folder == labels_folder:
        suffix = mask_suffix or _found_suffix(images, images)
        labels = {key: file for key, file in images.items() if key.endswith(suffix)}
        images = {key: file for key, file in images.items() if key not in labels}
    else:
        labels = _images(labels_folder)
        suffix = mask_suffix or ("" if set(labels) & set(images) else _found_suffix(images, labels))
    if suffix:
        labels = {key.removesuffix(suffix) if key.endswith(suffix) else key: file for key, file in labels.items()}
    place = f"{labels_folder} (names end in {suffix})" if suffix else str(labels_folder)
    return Pairs(images, labels, str(images_folder), place)


def list_splits(folder: Path, mask_suffix: str | None = None) -> list[str]:
    """Names of the splits of a folder of pairs."""
    return sorted(_layouts(folder, mask_suffix))


def merge_pairs(parts: Mapping[str, Pairs]) -> Pairs:
    """Merge several splits; if an id occurs in more than one of them, all ids are prefixed with their split.

    Args:
        parts: split -> its files.
    """
    if len(parts) == 1:
        return next(iter(parts.values()))
    seen = [key for each in parts.values() for key in each.images]
    shared = len(set(seen)) < len(seen)
    images: dict[str, str] = {}
    labels: dict[str, str] = {}
    for split, each in parts.items():
        front = f"{split}/" if shared else ""
        images.update({front + key: file for key, file in each.images.items()})
        labels.update({front + key: file for key, file in each.labels.items()})
    places = (dict.fromkeys(each[kind] for each in parts.values()) for kind in (2, 3))
    return Pairs(images, labels, *(" and ".join(map(str, place)) for place in places))


def _layouts(folder: Path, mask_suffix: str | None) -> dict[str, tuple[Path, Path]]:
    """Split -> (folder of images, folder of label maps), for all layouts."""
    layouts, children = {}, sorted(path for path in folder.iterdir() if path.is_dir())
    for child in children:
        for name in LABEL_FOLDERS:
            if (child / "images").is_dir() and (child / name).is_dir():
                layouts[child.name] = (child / "images", child / name)
            if child.name in IMAGE_FOLDERS and (folder / name).is_dir():
                for part in sorted(path for path in child.iterdir() if path.is_dir()):
                    layouts[part.name] = (part, folder / name / part.name)
    if layouts:
        return layouts
    for name in LABEL_FOLDERS:
        if (folder / "images").is_dir() and (folder / name).is_dir():
            return {"train": (folder / "images", folder / name)}
    if _has_masks_beside(folder, mask_suffix):
        return {"train": (folder, folder)}
    return {child.name: (child, child) for child in children if _has_masks_beside(child, mask_suffix)}


def _has_masks_beside(folder: Path, mask_suffix: str | None) -> bool:
    keys = {path.stem for path in folder.iterdir() if path.suffix.lower() in image_suffixes()}
    if mask_suffix:
        return any(key.endswith(mask_suffix) for key in keys)
    return bool(_found_suffix(keys, keys))


def _found_suffix(images: Collection[str], labels: Collection[str]) -> str:
    """The first of the usual ends of mask names that leads from a label map to an image; empty if none does."""
    for suffix in MASK_SUFFIXES:
        if any(key.endswith(suffix) and key.removesuffix(suffix) in images for key in labels):
            return suffix
    return ""


def _images(folder: Path, deep: bool = True) -> dict[str, str]:
    """Path relative to `folder`, without suffix -> file, for every image."""
    found: dict[str, str] = {}
    for path in sorted(folder.rglob("*") if deep else folder.glob("*")):
        if path.suffix.lower() in image_suffixes():
            key = path.relative_to(folder).with_suffix("").as_posix()
            if key in found:
                raise InputError(
                    f"{found[key]} and {path} have one name, by which images and label maps are paired. Rename or "
                    "remove one of them."
                )
            found[key] = str(path)
    return found
