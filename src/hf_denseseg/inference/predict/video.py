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
TIMEOUTS = (30.0, 60.0)  # seconds: for a stream to open, and for its next packet


@dataclass(frozen=True)
class Frame:
    """One frame; it is converted only when it is read.

    Args:
        number: its position in the video, from 0.
        seconds: its presentation time; None if the video has no timestamps.
        rate: frames per second of the video, as `"30000/1001"`.
        read: converts it into an upright RGB image.
    """

    number: int
    seconds: float | None
    rate: str
    read: Callable[[], Image.Image]


def is_address(text: str) -> bool:
    """Whether a text is the address of a stream, such as `rtsp://HOST/PATH`."""
    return text.partition("://")[0].lower() in SCHEMES and "://" in text


def read_frames(origin: str, frame_stride: int, max_pixels: int) -> Iterator[Frame]:
    """Decode a video.

    Args:
        origin: file, address or `-` for standard input.
        frame_stride: every N-th frame is yielded, beginning with the first.
        max_pixels: larger frames are refused.

    Raises:
        InputError: PyAV is missing, there is no video track, its frames are too large, or it is truncated; the frames
            before that point have been yielded.
    """
    av = require_av()
    count, end, declared = 0, 0.0, 0.0
    source: Any = sys.stdin.buffer if origin == "-" else origin
    try:
        with av.open(source, timeout=TIMEOUTS) as container:
            if not container.streams.video:
                raise InputError(f"{origin} has no video track. Give a file with one.")
            stream = container.streams.video[0]
            declared = _declared_seconds(stream)
            rate = stream.average_rate or stream.guessed_rate or Fraction(25)
            for frame in container.decode(stream):
                if frame.width * frame.height > max_pixels:
                    raise InputError(
                        f"The frames of {origin} have {frame.height}x{frame.width} pixels, more than {max_pixels}. "
                        f"If you trust it, give --max_pixels {frame.width * frame.height}."
                    )
                if count % frame_stride == 0:
                    yield Frame(count, frame.time, str(Fraction(rate.numerator, rate.denominator)), _reader(frame))
                count += 1
                end = max(end, float((count - 1) / rate if frame.time is None else frame.time) + float(1 / rate))
    except (av.FFmpegError, OSError) as error:
        raise InputError(
            f"{origin} cannot be read beyond frame {count} ({error}). Copy or record it again."
        ) from error
    if not count:
        raise InputError(f"{origin} has no readable frame. Copy or record it again.")
    # The last frame may be shown longer, and an edit list may cut frames: up to a second is not a fault.
    if declared - end > 1:
        raise InputError(f"{origin} is truncated after {end:.1f} of {declared:.1f} seconds. Copy or record it again.")


def _declared_seconds(stream: Any) -> float:
    """End of a video according to its header; 0 if the header does not give it."""
    if stream.duration:
        return float((stream.duration + (stream.start_time or 0)) * stream.time_base)
    found = re.fullmatch(r"(\d+):(\d+):(\d+\.?\d*)", stream.metadata.get("DURATION", ""))  # Matroska
    return sum(float(part) * unit for part, unit in zip(found.groups(), (3600, 60, 1), strict=True)) if found else 0.0


def _reader(frame: Any) -> Callable[[], Image.Image]:
    def read() -> Image.Image:
        image = frame.to_image()
        # Phones store frames sideways with an angle of rotation, counterclockwise as in Pillow.
        return image.rotate(frame.rotation, expand=True) if frame.rotation else image

    return read


def write_video(images: Iterable[Path], path: Path, rate: Fraction) -> None:
    """Make an H.264 video (MP4, without sound) of image files, all shown at the size of the first.

    With one version of PyAV the same files give the same bytes; the encoder does not depend on the processor.

    Args:
        images: files in order, at least one.
        path: video to write.
        rate: frames per second.

    Raises:
        RunError: the disk is full or the folder cannot be written.
    """
    av = require_av()
    codec, options = "mpeg4", {"threads": "1"}
    if "libx264" in av.codecs_available:
        codec, options = "libx264", {"threads": "1", "x264-params": "cpu-independent=1"}
    # "faststart" puts the index first, so that browsers play the video while it loads.
    with atomic_path(path) as aside, av.open(str(aside), "w", options={"movflags": "faststart"}) as container:
        stream = None
        for file in images:
            with Image.open(file) as image:
                if stream is None:
                    stream = container.add_stream(codec, rate=rate, options=options)
                    # yuv420p stores colors for 2x2 pixels, so an odd last row or column is left out.
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
    """Import PyAV, or say how to install it.

    Raises:
        InputError: it is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise InputError("Videos and streams need PyAV. Install it: pip install 'hf-denseseg[video]'.") from error
    return av
