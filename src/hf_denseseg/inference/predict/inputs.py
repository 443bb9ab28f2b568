"""Find the images, videos and streams to predict, and read them image by image."""

import glob
import importlib.util
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from hf_denseseg.data.reading.georeferenced import Raster, is_georeferenced
from hf_denseseg.data.reading.images import read_image
from hf_denseseg.data.reading.pixels import RGB_BYTES, PixelFormat, Pixels
from hf_denseseg.data.reading.rasters import raster_size
from hf_denseseg.data.reading.suffixes import image_suffixes
from hf_denseseg.errors import InputError
from hf_denseseg.inference.predict.video import is_address, read_frames

VIDEOS = {".mp4", ".mov", ".mkv", ".avi", ".webm", ".m4v", ".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".y4m"}
logger = logging.getLogger(__name__)

MAX_PIXELS = 178_956_970  # above it Pillow, too, refuses an image as a decompression bomb


@dataclass(frozen=True)
class Source:
    """An image, a video file or a stream.

    Args:
        name: of its results, without extension.
        origin: path, address (`rtsp://...`) or `-` for standard input.
        kind: `"image"`, `"video"` or `"stream"`.
    """

    name: str
    origin: str
    kind: str = "image"

    def state(self) -> dict[str, Any]:
        """Size and modification time of the file; results made from another state are out of date. Empty for a stream.

        Raises:
            InputError: the file is gone or cannot be read.
        """
        if self.kind == "stream":
            return {}
        try:
            found = os.stat(self.origin)
        except OSError as error:
            raise InputError(
                f"{self.origin} cannot be read: {error.strerror}. Check its path and permissions."
            ) from error
        return {"source_size": found.st_size, "source_modified": found.st_mtime_ns}


@dataclass(frozen=True)
class Item:
    """One image, or one frame of a video.

    Args:
        name: of its results, without extension.
        number: position in its source.
        read: opens the image with the channels and range of the checkpoint.
        facts: further values for its record, such as the time of a frame.
    """

    name: str
    number: int
    read: Callable[[], Pixels | Raster]
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass
class Found:
    """What the inputs hold.

    Args:
        sources: in the order they were given.
        failed: `{"source", "reason"}` of what could not be read.
        passed_over: suffix -> number of files of folders that are neither images nor videos by their suffix.
    """

    sources: list[Source]
    failed: list[dict[str, str]]
    passed_over: Counter[str] = field(default_factory=Counter)

    def describe_passed_over(self) -> str:
        """`", passed over 3 .txt, 1 .xml files"`; empty if there are none."""
        kinds = ", ".join(f"{count} {suffix or 'suffixless'}" for suffix, count in self.passed_over.most_common())
        return f", passed over {kinds} files" if kinds else ""


def find_sources(inputs: list[str], output: Path) -> Found:
    """Find images and videos of files, folders, globs, lists (`@FILE`), addresses and standard input (`-`).

    Folders are searched recursively; a subfolder that may not be read, and a missing file of a list, go to `failed`.

    Args:
        inputs: as given on the command line.
        output: files inside this folder are left out.

    Raises:
        InputError: an input does not exist, or holds no image or video.
    """
    found = Found([], [])
    candidates: dict[str, tuple[str, str, str]] = {}
    for given in inputs:
        if given == "-" or is_address(given):
            name = "stdin" if given == "-" else Path(given.partition("://")[2].split("?")[0]).stem or "stream"
            candidates.setdefault(given, (name, given, "stream"))
            continue
        files = list(_files_of(given, output, found))
        if not files and not any(row["source"].startswith(given.removeprefix("@")) for row in found.failed):
            raise InputError(
                f"There is no image at {given}{found.describe_passed_over()}. Give a file, a folder with images or "
                f"videos (.jpg, .png, .tif, {', '.join(sorted(VIDEOS))} ...), a glob, @FILE with one path per line, "
                "an address such as rtsp://HOST/PATH, or - for standard input."
            )
        for file in files:
            candidates.setdefault(os.path.realpath(file[1]), file)  # each file once, also through links
    found.sources = _named(list(candidates.values()))
    return found


def _named(candidates: list[tuple[str, str, str]]) -> list[Source]:
    """Sources with unique names; the frames of a video go to a folder of its name, so that must be unused too."""
    folders = {parent.as_posix() for name, _, kind in candidates for parent in Path(name).parents}
    taken: set[str] = set()
    sources = []
    for name, origin, kind in candidates:
        # A second file of a name gets its suffix (a_png), further ones also a number (a_png_2).
        used = taken if kind == "image" else taken | folders
        suffix = Path(origin).suffix[1:]
        if name in used and suffix:
            name = f"{name}_{suffix}"
        number, free = 2, name
        while free in used:
            free, number = f"{name}_{number}", number + 1
        taken.add(free)
        sources.append(Source(free, origin, kind))
    return sources


def _files_of(given: str, output: Path, found: Found) -> Iterator[tuple[str, str, str]]:
    """Name, path and kind of each file of an input."""
    inside = os.path.realpath(output)
    for path, name in _paths_of(given, found.failed):
        real, suffix = os.path.realpath(path), path.suffix.lower()
        if real == inside or real.startswith(inside + os.sep):
            continue
        if os.path.isdir(given) and suffix not in image_suffixes() | VIDEOS:  # any other file was named by the user
            found.passed_over[suffix] += 1
        else:
            kind = "video" if suffix in VIDEOS else "image"
            yield name.with_suffix("").as_posix(), str(path), kind


def _paths_of(given: str, failed: list[dict[str, str]]) -> Iterator[tuple[Path, Path]]:
    """Each file, and the path that its results are named after."""
    folder = Path(given)
    if given.startswith("@") and not folder.exists():
        for path in _listed(Path(given[1:])):
            inside = not path.is_absolute() and ".." not in path.parts
            if path.is_file():
                yield path, path if inside else Path(path.name)
            else:
                failed.append({"source": str(path), "reason": f"{path}, named in {given[1:]}, is not a file."})
    elif folder.is_dir():

        def refuse(error: OSError) -> None:
            reason = f"Folder {error.filename} cannot be read: {error.strerror}. Change its permissions."
            failed.append({"source": str(error.filename), "reason": reason})

        walked = [Path(at, file) for at, _, files in os.walk(folder, onerror=refuse) for file in files]
        for path in sorted(walked):
            yield path, path.relative_to(folder)
    else:
        paths = [folder] if folder.exists() else sorted(map(Path, glob.glob(given, recursive=True)))
        yield from ((path, Path(path.name)) for path in paths if path.is_file())


def _listed(path: Path) -> list[Path]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"List {path} cannot be read ({error}). Give @FILE with one path per line.") from error
    return [Path(line.strip()) for line in lines if line.strip()]


def items_of(
    source: Source,
    frame_stride: int = 1,
    max_pixels: int = MAX_PIXELS,
    process: tuple[int, int] = (0, 1),
    pixel_format: PixelFormat = RGB_BYTES,
) -> Iterator[Item]:
    """The image of a source, or the frames of a video that this process has to predict.

    Args:
        source: where they come from.
        frame_stride: every N-th frame of a video is read, beginning with the first.
        max_pixels: a larger image is refused before it is decoded.
        process: rank of this process and number of processes; frames are assigned in turn.
        pixel_format: channels and range of the checkpoint's images.

    Raises:
        InputError: a video for a checkpoint of other images than 8-bit RGB, or one that cannot be read or is
            truncated; the frames before that point are yielded.
    """
    if source.kind == "image":
        yield Item(source.name, 0, lambda: read_input_image(source.origin, max_pixels, pixel_format))
        return
    if pixel_format != RGB_BYTES:
        raise InputError(
            f"{source.origin} is a video, whose frames have three channels of 8 bits, but the checkpoint takes images "
            f"with num_channels {pixel_format.num_channels} and pixel_range {pixel_format.shown_range}. Leave it out."
        )
    for frame in read_frames(source.origin, frame_stride, max_pixels):
        if frame.number // frame_stride % process[1] == process[0]:
            facts = {"frame": frame.number, "seconds": frame.seconds, "frame_rate": frame.rate}
            yield Item(f"{source.name}/{frame.number:06d}", frame.number, frame.read, facts)


def read_input_image(
    path: str, max_pixels: int = MAX_PIXELS, pixel_format: PixelFormat = RGB_BYTES
) -> Pixels | Raster:
    """Read an image with `read_image`, unless its header declares too large a size; open a georeferenced one.

    Raises:
        InputError: missing, empty, damaged, not an image, more than `max_pixels`, or not of `pixel_format`.
    """
    with _pillows_limit_lifted():
        try:
            with Image.open(path) as opened:
                width, height = opened.size
        except (OSError, SyntaxError, ValueError):
            height, width = raster_size(Path(path)) or (0, 0)  # else `read_image` explains what is wrong
        if width * height > max_pixels:
            raise InputError(
                f"Image {path} declares {height}x{width} pixels, more than {max_pixels} (it may be a decompression "
                f"bomb). If you trust it, give --max_pixels {width * height}."
            )
        if is_georeferenced(path):
            if importlib.util.find_spec("rasterio") is not None:
                return Raster.open(path, pixel_format)
            logger.warning("The georeference of %s is not kept: pip install 'hf-denseseg[geo]' for that.", path)
        return read_image(path, pixel_format=pixel_format)


@contextmanager
def _pillows_limit_lifted() -> Iterator[None]:
    """Only `max_pixels` limits the size here, whether it is above or below Pillow's limit."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit
