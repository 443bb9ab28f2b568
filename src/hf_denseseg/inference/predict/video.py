"""Frames of video files and streams, and videos made of images, through PyAV (the extra `video`)."""

import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from PIL import Image

from hf_denseseg.errors import InputError
from hf_denseseg.files import atomic_path

SCHEMES = ("rtsp", "rtmp", "http", "https", "udp", "tcp", "srt")
PATIENCE = (30.0, 60.0)  # seconds that a stream may take to be opened, and to send more


@dataclass(frozen=True)
class Frame:
    """One frame, converted only if it is read.

    Args:
        number: its place in the video, from 0.
        seconds: when it is shown; None if the video does not say.
        rate: frames a second of the video, as `"30000/1001"`.
        read: gives it as an upright RGB image.
    """

    number: int
    seconds: float | None
    rate: str
    read: Callable[[], Image.Image]


def is_address(text: str) -> bool:
    """Whether a text is the address of a stream, such as `rtsp://HOST/PATH`."""
    return text.partition("://")[0].lower() in SCHEMES and "://" in text


def read_frames(origin: str, frame_stride: int, max_pixels: int) -> Iterator[Frame]:
    """Decode a video from its beginning.

    Args:
        origin: file, address or `-` for standard input.
        frame_stride: every N-th frame is given, from the first on.
        max_pixels: larger frames are refused.

    Raises:
        InputError: PyAV is missing, there is no video in it, its frames are too large, or it breaks off; frames
            before that have been given.
    """
    av = require_av()
    count, end, promised = 0, 0.0, 0.0
    source: Any = sys.stdin.buffer if origin == "-" else origin
    try:
        with av.open(source, timeout=PATIENCE) as container:
            if not container.streams.video:
                raise InputError(f"{origin} holds no video. Give a file with a video track.")
            stream = container.streams.video[0]
            promised = _promised_seconds(stream)
            rate = stream.average_rate or stream.guessed_rate or Fraction(25)
            for frame in container.decode(stream):
                if frame.width * frame.height > max_pixels:
                    raise InputError(
                        f"The frames of {origin} have {frame.height}x{frame.width} pixels, more than {max_pixels}. "
                        f"If you trust it, give --max_pixels {frame.width * frame.height}."
                    )
                if count % frame_stride == 0:
                    yield Frame(count, frame.time, str(rate), _reader(frame))
                count += 1
                end = max(end, float((count - 1) / rate if frame.time is None else frame.time) + float(1 / rate))
    except (av.FFmpegError, OSError) as error:
        raise InputError(
            f"{origin} cannot be read beyond frame {count} ({error}). Copy or record it again."
        ) from error
    if not count:
        raise InputError(f"{origin} holds no frame that can be read. Copy or record it again.")
    # The last frame may be shown longer, and players leave out what an edit list cuts: up to a second is no fault.
    if promised - end > 1:
        raise InputError(f"{origin} breaks off after {end:.1f} of {promised:.1f} seconds. Copy or record it again.")


def _promised_seconds(stream: Any) -> float:
    """When a video ends as its header says; 0 if it does not."""
    if stream.duration:
        return float((stream.duration + (stream.start_time or 0)) * stream.time_base)
    found = re.fullmatch(r"(\d+):(\d+):(\d+\.?\d*)", stream.metadata.get("DURATION", ""))  # Matroska
    return sum(float(part) * unit for part, unit in zip(found.groups(), (3600, 60, 1), strict=True)) if found else 0.0


def _reader(frame: Any) -> Callable[[], Image.Image]:
    def read() -> Image.Image:
        image = frame.to_image()
        # Phones store frames sideways with an angle, which is counterclockwise like Pillow's.
        return image.rotate(frame.rotation, expand=True) if frame.rotation else image

    return read


def write_video(images: Iterable[Path], path: Path, rate: Fraction) -> None:
    """Make an H.264 video (MP4, without sound) of image files, all shown at the size of the first.

    The same files give the same bytes on every machine.

    Args:
        images: files in their order; one at least.
        path: video to write.
        rate: frames a second.

    Raises:
        RunError: the disk is full or the folder cannot be written.
    """
    av = require_av()
    codec, options = "mpeg4", {"threads": "1"}
    if "libx264" in av.codecs_available:
        codec, options = "libx264", {"threads": "1", "x264-params": "cpu-independent=1"}
    # The index comes first: a browser shows the video while it loads.
    with atomic_path(path) as aside, av.open(str(aside), "w", options={"movflags": "faststart"}) as container:
        stream = None
        for file in images:
            with Image.open(file) as image:
                if stream is None:
                    stream = container.add_stream(codec, rate=rate, options=options)
                    # Colors are stored for 2x2 pixels, so an odd last row or column is left out.
                    stream.width, stream.height = (max(side // 2 * 2, 2) for side in image.size)
                    stream.pix_fmt = "yuv420p"
                    box = (0, 0, stream.width, stream.height)
                    size = image.size
                shown = image if image.size == size else image.resize(size)
                for packet in stream.encode(av.VideoFrame.from_image(shown.crop(box))):
                    container.mux(packet)
        assert stream is not None
        for packet in stream.encode():
            container.mux(packet)


def require_av() -> Any:
    """PyAV, or the way to install it.

    Raises:
        InputError: it is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise InputError("Videos and streams need PyAV. Install it: pip install 'hf-denseseg[video]'.") from error
    return av
