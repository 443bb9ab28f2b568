"""Files for the evaluation servers of Cityscapes and ADE20K: one label map per image of the split, in one zip.

Both servers take 8-bit PNG files of the image's size with the ids of the official label maps, not train ids. Files are
matched to images by name alone; the folder inside the zip does not matter.

- Cityscapes: `<city>_<sequence>_<frame>*.png`, exactly one per image, as its script
  `evalPixelLevelSemanticLabeling.py` requires; of the ids in its `labels.py` the 19 that are scored.
- ADE20K: the image's name with the extension `.png`, ids 1 to 150, as in the benchmark's development kit.
"""

import io
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from hf_denseseg.data.labels import LabelSpec
from hf_denseseg.data.sources.benchmarks.layouts import get_benchmark
from hf_denseseg.errors import InputError, RunError
from hf_denseseg.files import atomic_path

SHOWN_FAULTS = 10


class Server(NamedTuple):
    """The files that a server expects.

    Args:
        title: name for messages.
        benchmark: name of its dataset.
        id_pattern: regular expression of the ids of its images.
        ending: what follows the id in the names of the files we write.
        free_ending: whether any text may stand between the id and `.png`.
    """

    title: str
    benchmark: str
    id_pattern: str
    ending: str
    free_ending: bool

    @property
    def spec(self) -> LabelSpec:
        """Ids of the official label maps."""
        return get_benchmark(self.benchmark).spec

    @property
    def ids(self) -> set[int]:
        """Ids that a file may hold."""
        return set(self.spec.raw_to_train)

    def accepts(self, file: str, image: str) -> bool:
        """Whether a file of this name (without folders) is the prediction of an image."""
        if self.free_ending:
            return file.startswith(image) and file.endswith(".png")
        return file == f"{image}.png"


SERVERS = {
    "cityscapes": Server("Cityscapes", "cityscapes", r"[a-z-]+_\d{6}_\d{6}", "_gtFine_labelIds.png", True),
    "ade20k": Server("ADE20K", "ade20k", r"ADE_(test|val|train)_\d{8}", ".png", False),
}


def server_for(spec: LabelSpec) -> Server:
    """The server that scores these classes.

    Raises:
        InputError: there is none.
    """
    for server in SERVERS.values():
        if server.spec.name == spec.name and server.spec.classes == spec.classes:
            return server
    titles = " and ".join(server.title for server in SERVERS.values())
    raise InputError(
        f"Submission files are known for {titles}, but the classes are those of {spec.name}. "
        f"Give `--dataset {' or '.join(SERVERS)}`, or write id maps with `denseseg predict --write masks --raw_ids`."
    )


def check_target(path: Path) -> None:
    """Refuse a path that is not a zip, before any work is done.

    Raises:
        InputError: it does not end in .zip.
    """
    if path.suffix != ".zip":
        raise InputError(f"--submission {path}: the server takes a single zip. Give a path that ends in .zip.")


def check_images(server: Server, images: Iterable[str]) -> None:
    """Refuse images whose names the server does not know, before any work is done.

    Raises:
        InputError: ids that are repeated, or do not have the server's form.
    """
    counts = Counter(images)
    faults = [f"{name} occurs {count} times" for name, count in counts.items() if count > 1]
    faults += [f"{name} is not the name of an image" for name in counts if not re.fullmatch(server.id_pattern, name)]
    _refuse(faults, f"The images cannot be submitted to {server.title}", "Use the official files with their names.")


def encode_prediction(server: Server, prediction: np.ndarray) -> bytes:
    """Encode a map `(H, W)` of train ids as a PNG file with the official ids."""
    raw = server.spec.decode(prediction).astype(np.uint8)
    data = io.BytesIO()
    Image.fromarray(raw).save(data, "PNG")
    return data.getvalue()


def validate_submission(path: str | Path, server: str, images: Mapping[str, tuple[int, int]]) -> None:
    """Check a zip, or a folder that will be zipped, as the server will read it.

    Args:
        path: zip file or folder; folders inside it do not matter.
        server: one of `SERVERS`.
        images: id of every image of the split -> its `(height, width)`.

    Raises:
        InputError: an image without a file or with several, files that belong to no image, or a file that is damaged,
            is not an 8-bit gray PNG, differs from its image in size, or holds ids that are not official. All are
            listed.
    """
    path, rule = Path(path), SERVERS[server]
    if path.is_dir():
        names = {each.relative_to(path).as_posix(): each for each in sorted(path.rglob("*")) if each.is_file()}
        faults = _faults(names, lambda name: names[name].read_bytes(), rule, images)
    else:
        try:
            with zipfile.ZipFile(path) as archive:
                members = [name for name in archive.namelist() if not name.endswith("/")]
                faults = _faults(members, archive.read, rule, images)
        except (OSError, zipfile.BadZipFile) as error:
            raise InputError(f"{path} is not a readable zip ({error}). Write it again.") from error
    _refuse(faults, f"{path} would be refused by the server of {rule.title}", "Fix or remove them.")


def pack_submission(folder: Path, path: Path, server: str, images: Mapping[str, tuple[int, int]]) -> None:
    """Check a folder of predictions, and write its zip.

    Args:
        folder: the predictions, one PNG per image.
        path: zip file to write.
        server: one of `SERVERS`.
        images: see `validate_submission`.

    Raises:
        RunError: `validate_submission` found something; no zip is written.
    """
    try:
        validate_submission(folder, server, images)
    except InputError as error:
        raise RunError(str(error)) from error
    with atomic_path(path) as aside, zipfile.ZipFile(aside, "w", zipfile.ZIP_STORED) as archive:
        for file in sorted(folder.glob("*.png")):  # PNG is compressed already
            archive.write(file, file.name)


def _faults(
    files: Iterable[str], read: Callable[[str], bytes], server: Server, images: Mapping[str, tuple[int, int]]
) -> list[str]:
    """What is wrong with the files, one line per fault."""
    files_of: dict[str, list[str]] = {image: [] for image in images}
    faults = []
    for file in files:
        image = _image_of(file.rpartition("/")[2], server, files_of)
        if image is None:
            faults.append(f"{file} belongs to no image of the split")
        else:
            files_of[image].append(file)
            faults += [f"{file} {fault}" for fault in _file_faults(read(file), server, images[image])]
    faults += [f"{image} has no prediction" for image, found in files_of.items() if not found]
    return faults + [f"{each} has several: {', '.join(found)}" for each, found in files_of.items() if len(found) > 1]


def _image_of(file: str, server: Server, images: Mapping[str, list[str]]) -> str | None:
    begin = re.match(server.id_pattern, file)
    image = begin.group() if begin else ""
    return image if image in images and server.accepts(file, image) else None


def _file_faults(data: bytes, server: Server, size: tuple[int, int]) -> list[str]:
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            mode, ids = image.mode, np.asarray(image)
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
        return [f"is not a readable PNG ({error})"]
    if mode != "L" or ids.dtype != np.uint8:
        return [f"has the mode {mode}; it must have one gray channel of 8 bits (mode L)"]
    faults = []
    if ids.shape != size:
        faults.append(f"is {ids.shape[0]}x{ids.shape[1]}, its image {size[0]}x{size[1]} (height x width)")
    if odd := sorted(set(np.flatnonzero(np.bincount(ids.ravel(), minlength=256)).tolist()) - server.ids):
        faults.append(f"holds the ids {odd[:8]}, which are not scored; these may be train ids")
    return faults


def _refuse(faults: list[str], what: str, fix: str) -> None:
    if faults:
        shown = "\n  ".join(faults[:SHOWN_FAULTS])
        more = f"\n  and {len(faults) - SHOWN_FAULTS} more" if len(faults) > SHOWN_FAULTS else ""
        raise InputError(f"{what}. {fix}\n  {shown}{more}")
