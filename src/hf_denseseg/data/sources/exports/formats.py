"""All export formats in one table: to recognize a folder, to list them, and to name the nearest one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hf_denseseg.data.sources.exports import coco_maps, label_studio, labelme, png_masks, supervisely, yolo
from hf_denseseg.data.sources.exports.scenes import ExportFormat
from hf_denseseg.data.sources.folder_options import FolderOptions
from hf_denseseg.data.sources.folders import Listing, merge_listings
from hf_denseseg.data.sources.official import format_description
from hf_denseseg.data.splits import resolve_split

FORMATS = (
    *(png_masks.CVAT, png_masks.ROBOFLOW, coco_maps.FORMAT, yolo.FORMAT, supervisely.FORMAT, label_studio.FORMAT),
    labelme.FORMAT,
)


class Export(NamedTuple):
    """A folder that is an export.

    Args:
        folder: that was given.
        format: of the export.
        splits: split -> its files.
    """

    folder: Path
    format: ExportFormat
    splits: dict[str, Any]

    def list_splits(self, names: Sequence[str], options: FolderOptions) -> Listing:
        """List the images and label maps of splits, joined.

        Raises:
            InputError: no such split, an option without meaning for the format, or files that cannot be read.
        """
        what = f"{self.folder} ({self.format.name})"
        options.refuse_others(self.format.options, what)
        parts = {}
        for name in names:
            # `train` is enough where there is one `train2017`.
            near = [each for each in self.splits if each.startswith(name) and each[len(name) :].isdigit()]
            found = near[0] if len(near) == 1 and name not in self.splits else name
            found = resolve_split(found, sorted(self.splits), what)
            parts[name] = self.format.read(self.folder, self.splits[found], self.splits, options)
        return merge_listings(parts)


def recognize_export(folder: Path) -> Export | None:
    """Recognize an export by the names and heads of its files; None if the folder is none.

    An only split has the name `train`, whatever the tool calls it, unless it is one to evaluate.
    """
    folder = folder.absolute()
    for each in FORMATS if folder.is_dir() else ():
        if splits := each.find(folder):
            (name, files), *others = splits.items()
            if not others and not name.lower().startswith(("train", "val", "test")):
                splits = {"train": files}
            return Export(folder, each, splits)
    return None


def describe_exports() -> str:
    """Describe every export format: how it is recognized, its splits, what it can say and what not."""
    parts = []
    for each in FORMATS:
        keys = f"keys: {', '.join(each.options)}" if each.options else "no keys"
        lines = [f"recognized by: {each.recognized_by}", f"splits: {each.splits}", each.says, keys]
        parts.append(format_description(f"{each.name}: export of an annotation tool", lines))
    return "\n\n".join(parts)
