"""Predict images, videos and streams: files per image, a journal, and `results.json`.

Several processes can share the images, and an interrupted run continues.
"""

import hashlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hf_denseseg.data.reading.pixels import height_width
from hf_denseseg.errors import InputError, RunError
from hf_denseseg.files import atomic_path, write_atomic
from hf_denseseg.inference.predict.inputs import MAX_PIXELS, Found, Item, Source, items_of
from hf_denseseg.inference.predict.journal import Entry, Journal, Key
from hf_denseseg.inference.predict.predictor import Predictor
from hf_denseseg.inference.predict.processes import Processes
from hf_denseseg.inference.predict.runner import Work, run

JOURNAL = "journal"  # folder below the output folder
# Kind of file -> folder and extension; other kinds go to `shown`.
PLACES = {
    "mask": ("masks", ".png"),
    "overlay": ("overlays", ".jpg"),
    "confidence": ("confidence", ".png"),
    "probabilities": ("probabilities", ".npz"),
    "drawn": ("drawn", ".jpg"),
}


@dataclass
class Outcome:
    """Summary of a run.

    Args:
        predicted: number of images predicted now.
        kept: number of images predicted by an earlier run.
        failed: `{"source", "reason"}` of what was left out.
        seconds: duration without loading the model.
    """

    predicted: int = 0
    kept: int = 0
    failed: list[dict[str, str]] = field(default_factory=list)
    seconds: float = 0.0


def run_prediction(
    predictor: Predictor,
    found: Found,
    output: Path,
    frame_stride: int = 1,
    max_pixels: int = MAX_PIXELS,
    processes: Processes | None = None,
) -> Outcome:
    """Predict everything and write `results.json`; the files are the same for any number of processes.

    Args:
        predictor: the model.
        found: images, videos and streams; all processes must find the same, and see the same `output`.
        output: folder to write.
        frame_stride: every N-th frame of a video is predicted.
        max_pixels: larger images are left out.
        processes: those that share the work; None asks the launcher, if there is one.

    Raises:
        InputError: several processes and a stream, or processes that found different images.
        RunError: a result cannot be written.
    """
    processes = processes or Processes.launched()
    _check_shareable(found.sources, processes)
    started = time.perf_counter()
    each = _Predictions(predictor, found.sources, output, frame_stride, max_pixels, processes)
    journal = Journal(output / JOURNAL, {}, processes.rank)
    if processes.rank == 0:
        journal.prepare()
    processes.gather(None)  # a barrier: no process reads or writes before the journal is prepared
    known = {entry.key: entry for entry in journal.read()}
    rows: list[tuple[tuple[int, int], bool, Entry]] = []  # (number of source and frame, whether new, entry)
    # tqdm draws on terminals only; elsewhere the last line of the command is the only output.
    bar = tqdm(desc="predict", unit="image", disable=None if processes.rank == 0 else True)
    for entry, is_new in run(each.work(), each.predict, journal, known, each.is_intact):
        rows.append((each.order[entry.key], is_new, entry))
        bar.update()
    bar.close()
    journal.close()
    gathered = processes.gather((rows, each.failed))
    # In the order of the sources, so that the files are the same for any number of processes.
    all_rows = sorted((row for part, _ in gathered for row in part), key=lambda row: row[0])
    reasons = dict(sorted((number, reason) for _, failed in gathered for number, reason in failed.items()))
    outcome = Outcome(predicted=sum(is_new for _, is_new, _ in all_rows))
    outcome.kept = len(all_rows) - outcome.predicted
    outcome.failed = found.failed + [
        {"source": found.sources[number].origin, "reason": reason} for number, reason in reasons.items()
    ]
    if processes.rank == 0:
        records = [each.wanted(entry.record) for _, _, entry in all_rows]
        journal.compact([entry for _, _, entry in all_rows])
        of_all = predictor.finish(records, output)
        results = {**predictor.description(), **of_all, "images": records, "failed": outcome.failed}
        results["passed_over"] = dict(found.passed_over)
        write_atomic(output / "results.json", json.dumps(results, indent=1) + "\n")
    outcome.seconds = time.perf_counter() - started
    return outcome


class _Predictions:
    """The images of this process as `Work`, and the function that predicts them and writes their files.

    Attributes:
        order: key of an image -> number of its source, and its position there.
        failed: number of a source -> why it was left out, a video from that frame on.
    """

    def __init__(
        self,
        predictor: Predictor,
        sources: list[Source],
        output: Path,
        frame_stride: int,
        max_pixels: int,
        processes: Processes,
    ) -> None:
        self.predictor, self.sources, self.output = predictor, sources, output
        self.frame_stride, self.max_pixels, self.processes = frame_stride, max_pixels, processes
        self.order: dict[Key, tuple[int, int]] = {}
        self.failed: dict[int, str] = {}
        self._stopped = False
        text = json.dumps(predictor.fingerprint(), sort_keys=True)
        self._settings = hashlib.sha256(text.encode()).hexdigest()[:16]

    def work(self) -> Iterator[Work]:
        """One image at a time; sources that cannot be read are reported and left out."""
        for number, source in self._own_sources():
            try:
                yield from self._work_of(number, source)
            except KeyboardInterrupt:
                if source.kind != "stream":  # Ctrl-C is the normal end of a stream
                    raise
            except InputError as error:
                self._leave_out(number, error)

    def _work_of(self, number: int, source: Source) -> Iterator[Work]:
        process = (self.processes.rank, self.processes.count)
        pixel_format = self.predictor.pixel_format
        for item in items_of(source, self.frame_stride, self.max_pixels, process, pixel_format):
            self.order[item.name] = (number, item.number)
            state = {"settings": self._settings, "source": source.origin, **source.state()}
            yield Work([item.name], [None if source.kind == "stream" else state], (number, source, item))
            # Set while this item was predicted: its source failed, or Ctrl-C ended the stream.
            if number in self.failed or self._stopped:
                self._stopped = False
                return

    def predict(self, images: tuple[int, Source, Item]) -> list[dict[str, Any]]:
        """The record of one image; an empty list if the model cannot take it."""
        number, source, item = images
        try:
            return [self._record_of(source, item)]
        except InputError as error:
            self._leave_out(number, error)
        except KeyboardInterrupt:
            if source.kind != "stream":
                raise
            self._stopped = True
        return []

    def _record_of(self, source: Source, item: Item) -> dict[str, Any]:
        image = item.read()
        size = list(height_width(image))
        try:
            prediction = self.predictor.predict(image, item.name)
        except (InputError, RunError):
            raise
        except (RuntimeError, ValueError) as error:  # many models fail inside torch on a 1x1 image, for example
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(
                f"{source.origin} ({size[0]}x{size[1]}) cannot be predicted by this model: {reason}"
            ) from error
        endings = prediction.endings
        places = {kind: place_of(kind, item.name, endings.get(kind)) for kind in prediction.files}
        for kind, save in prediction.files.items():
            with atomic_path(self.output / places[kind]) as aside:
                save(aside)
        return {"id": item.name, "source": source.origin, **item.facts, "size": size, **places, **prediction.facts}

    def is_intact(self, record: dict[str, Any]) -> bool:
        """Whether an earlier record has all the files that are wanted now, and they exist."""
        return all(kind in record and (self.output / record[kind]).exists() for kind in self.predictor.kinds)

    def wanted(self, record: dict[str, Any]) -> dict[str, Any]:
        """A record without the paths of files that an earlier run wrote and this one does not ask for."""
        return {key: value for key, value in record.items() if key not in PLACES or key in self.predictor.kinds}

    def _leave_out(self, number: int, error: InputError) -> None:
        source = self.sources[number]
        self.failed[number] = str(error) if source.origin in str(error) else f"{source.origin}: {error}"
        if source.kind == "image" or self.processes.rank == 0:  # all processes read all videos
            tqdm.write(f"left out: {self.failed[number]}", file=sys.stderr)

    def _own_sources(self) -> Iterator[tuple[int, Source]]:
        """Sources of this process: images assigned by their file sizes, and all videos, whose frames are shared."""
        images = [number for number, source in enumerate(self.sources) if source.kind == "image"]
        mine = {images[k] for k in self.processes.deal([_bytes_of(self.sources[number]) for number in images])}
        for number, source in enumerate(self.sources):
            if source.kind != "image" or number in mine:
                yield number, source


def _bytes_of(source: Source) -> int:
    try:
        return source.state()["source_size"]
    except InputError:
        return 0  # it is reported when it is read


def _check_shareable(sources: list[Source], processes: Processes) -> None:
    """Refuse sources that processes cannot share.

    Raises:
        InputError: a stream, or processes that found different images.
    """
    if processes.count == 1:
        return
    if any(source.kind == "stream" for source in sources):
        raise InputError("A stream cannot be shared between processes. Start a single process, without a launcher.")
    seen = hashlib.sha256(json.dumps([(source.name, source.origin) for source in sources]).encode()).hexdigest()
    if len(set(processes.gather(seen))) > 1:
        raise InputError("The processes found different images. Give all machines the same files at the same paths.")


def place_of(kind: str, name: str, ending: str | None = None) -> str:
    """Path of a file of a kind below the output folder."""
    folder, usual = PLACES.get(kind, ("shown", f"_{kind}.png"))
    return f"{folder}/{name}{ending or usual}"
