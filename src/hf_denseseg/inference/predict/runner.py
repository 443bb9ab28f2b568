"""Go through pictures and videos with a model: each result whole, nothing twice, whatever stops it and whoever helps.

The record of a picture is written after its files and says what it was made from. A run that is started again, with
any number of processes, makes only what has no such record.
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

from hf_denseseg.errors import InputError, RunError
from hf_denseseg.files import atomic_path, write_atomic
from hf_denseseg.inference.predict.inputs import MAX_PIXELS, Found, Item, Source, items_of
from hf_denseseg.inference.predict.predictor import Labeller
from hf_denseseg.inference.predict.processes import Processes

# Kind of file -> folder and ending; what is not named here belongs to `shown`.
PLACES = {
    "mask": ("masks", ".png"),
    "overlay": ("overlays", ".jpg"),
    "confidence": ("confidence", ".png"),
    "probabilities": ("probabilities", ".npz"),
    "drawn": ("drawn", ".jpg"),
}


@dataclass
class Outcome:
    """Number labelled now, number that was done before, what was left out, and seconds without loading the model."""

    made: int = 0
    kept: int = 0
    failed: list[dict[str, str]] = field(default_factory=list)
    seconds: float = 0.0


def label_all(
    labeller: Labeller,
    found: Found,
    output: Path,
    every: int = 1,
    max_pixels: int = MAX_PIXELS,
    processes: Processes | None = None,
) -> Outcome:
    """Label everything and write `results.json`; the files are the same for any number of processes.

    Args:
        labeller: the model.
        found: what to label; all processes must find the same, and see the same `output`.
        output: folder to write.
        every: of a video each `every`-th frame is labelled.
        max_pixels: larger pictures are left out.
        processes: those that share the work; None looks for a launcher's.

    Raises:
        InputError: a stream is to be shared between processes, or they found different pictures.
        RunError: a result cannot be written.
    """
    processes = processes or Processes.launched()
    _check_shareable(found.sources, processes)
    started, made_from = time.perf_counter(), labeller.fingerprint()
    rows: list[tuple[int, int, bool, dict[str, Any]]] = []
    failed: dict[int, str] = {}
    # tqdm draws on terminals only; elsewhere the closing line of the command is all.
    bar = tqdm(desc="predict", unit="image", disable=None if processes.rank == 0 else True)
    for number, source in _share(found.sources, processes):
        try:
            for item in items_of(source, every, max_pixels, (processes.rank, processes.count)):
                record, is_new = _record_of(labeller, source, item, output, made_from)
                rows.append((number, item.number, is_new, record))
                bar.update()
        except KeyboardInterrupt:
            if source.kind != "stream":  # a camera has no other end
                raise
        except InputError as error:
            failed[number] = str(error) if source.origin in str(error) else f"{source.origin}: {error}"
            if source.kind == "image" or processes.rank == 0:  # a video fails in all processes
                tqdm.write(f"left out: {failed[number]}", file=sys.stderr)
    bar.close()
    outcome = Outcome()
    gathered = processes.gather((rows, failed))
    everything = sorted((row for each, _ in gathered for row in each), key=lambda row: row[:2])
    reasons = dict(sorted((number, reason) for _, each in gathered for number, reason in each.items()))
    outcome.made = sum(row[2] for row in everything)
    outcome.kept = len(everything) - outcome.made
    outcome.failed = found.failed + [
        {"source": found.sources[number].origin, "reason": reason} for number, reason in reasons.items()
    ]
    if processes.rank == 0:
        records = [row[3] for row in everything]
        more = labeller.finish(records, output)
        results = {**labeller.description(), **more, "images": records, "failed": outcome.failed}
        write_atomic(output / "results.json", json.dumps(results, indent=1) + "\n")
    outcome.seconds = time.perf_counter() - started
    return outcome


def _check_shareable(sources: list[Source], processes: Processes) -> None:
    """Refuse to share what would be shared wrongly."""
    if processes.count == 1:
        return
    if any(source.kind == "stream" for source in sources):
        raise InputError("A stream cannot be shared between processes. Start one alone, without a launcher.")
    seen = hashlib.sha256(json.dumps([(source.name, source.origin) for source in sources]).encode()).hexdigest()
    if len(set(processes.gather(seen))) > 1:
        raise InputError("The processes found different pictures. Give all machines the same files at the same paths.")


def _share(sources: list[Source], processes: Processes) -> Iterator[tuple[int, Source]]:
    """Sources this process looks at: its share of the pictures by their bytes, and all videos for their frames."""
    pictures = [number for number, source in enumerate(sources) if source.kind == "image"]
    mine = {pictures[k] for k in processes.deal([_bytes_of(sources[number]) for number in pictures])}
    for number, source in enumerate(sources):
        if source.kind != "image" or number in mine:
            yield number, source


def _bytes_of(source: Source) -> int:
    try:
        return source.state()["source_size"]
    except InputError:
        return 0  # it is reported when its turn comes


def place_of(kind: str, name: str) -> str:
    """Path of a file of a kind below the output folder."""
    folder, ending = PLACES.get(kind, ("shown", f"_{kind}.png"))
    return f"{folder}/{name}{ending}"


def _record_of(
    labeller: Labeller, source: Source, item: Item, output: Path, made_from: dict[str, Any]
) -> tuple[dict[str, Any], bool]:
    """The record of one picture, and whether it was made now."""
    made_from = {**made_from, "source": source.origin, **source.state()}
    path = output / "records" / f"{item.name}.json"
    record = None if source.kind == "stream" else _finished(path, output, labeller.kinds, made_from)
    if record is not None:
        return record, False
    image = item.read()
    size = [image.height, image.width]
    try:
        labelled = labeller.label(image, item.name)
    except (InputError, RunError):
        raise
    except (RuntimeError, ValueError) as error:  # one pixel, say, fails deep inside many models
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{source.origin} ({size[0]}x{size[1]}) is not for this model: {reason}") from error
    places = {kind: place_of(kind, item.name) for kind in labelled.files}
    for kind, save in labelled.files.items():
        with atomic_path(output / places[kind]) as aside:
            save(aside)
    record = {"id": item.name, "source": source.origin, **item.facts, "size": size, **places, **labelled.facts}
    write_atomic(path, json.dumps({**record, "made_from": made_from}, indent=1) + "\n")
    return record, True


def _finished(path: Path, output: Path, kinds: tuple[str, ...], made_from: dict[str, Any]) -> dict[str, Any] | None:
    """A record whose files are all there and were made from the same picture in the same way."""
    try:
        record = json.loads(path.read_text())
        same = record.pop("made_from") == made_from and all((output / record[kind]).exists() for kind in kinds)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # none yet, or not written by us
    wanted = {key: value for key, value in record.items() if key not in PLACES or key in kinds}
    return wanted if same else None
