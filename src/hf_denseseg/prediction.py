"""Label many pictures on disk: find them, write each result whole, go on where an interrupted run stopped."""

import glob
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor
from tqdm import tqdm

from hf_denseseg.checkpoints import load_image_processor, load_trained_model
from hf_denseseg.data.labels import LabelSpec, color_wheel
from hf_denseseg.data.reading import read_image
from hf_denseseg.errors import InputError, RunError
from hf_denseseg.files import atomic_path, write_atomic
from hf_denseseg.inference import InferenceSettings, Preprocessing, class_probabilities, segment_with_confidence
from hf_denseseg.introspection import (
    ShowSettings,
    check_showable,
    feature_picture,
    inspect_model,
    picture_view,
    position_similarity,
    position_table,
    relative_points,
    spread_layers,
)
from hf_denseseg.refinement import look_at_refinement, refinement_sheet
from hf_denseseg.visualization import attention_sheet, feature_sheet, overlay, position_sheet

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}
FEATURE_SIDE = 200  # longest side of a painted feature map in pixels


def collect_pictures(inputs: list[str], output: Path) -> dict[str, Path]:
    """Find the pictures of files, folders and globs.

    Returns:
        Name of the result (path below the given folder, without ending) -> file; nothing inside `output`.

    Raises:
        InputError: an input does not exist, or there is no picture in it.
    """
    pictures: dict[str, Path] = {}
    taken: set[Path] = set()
    for given in inputs:
        folder = Path(given)
        if folder.is_dir():
            found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
        else:
            found = [folder] if folder.exists() else sorted(map(Path, glob.glob(given, recursive=True)))
            found = [path for path in found if path.is_file()]
        found = [path for path in found if not path.resolve().is_relative_to(output.resolve())]
        if not found:
            raise InputError(
                f"{given} leads to no picture. Give a file, a folder with {', '.join(sorted(SUFFIXES))}, or a glob."
            )
        for path in found:
            if path.resolve() not in taken:
                taken.add(path.resolve())
                pictures[_free_name(path, folder, pictures)] = path
    return pictures


def _free_name(path: Path, folder: Path, taken: dict[str, Path]) -> str:
    """`a/b` for `folder/a/b.jpg`; with its ending, then with a number, if that name is taken."""
    relative = path.relative_to(folder) if folder.is_dir() else Path(path.name)
    name = relative.with_suffix("").as_posix()
    if name in taken:
        name = f"{name}_{path.suffix[1:]}"
    number, free = 2, name
    while free in taken:
        free, number = f"{name}_{number}", number + 1
    return free


@dataclass
class Predictor:
    """A checkpoint with everything that decides its output."""

    checkpoint: str
    model: Any
    preprocessing: Preprocessing
    settings: InferenceSettings
    probabilities: bool
    palette: tuple[tuple[int, int, int], ...]
    show: ShowSettings | None = None

    @classmethod
    def load(
        cls,
        checkpoint: str,
        settings: dict[str, Any],
        device: str | None = None,
        probabilities: bool = False,
        label_spec: str | None = None,
        show: ShowSettings | None = None,
    ) -> "Predictor":
        """Load a checkpoint for inference.

        Args:
            checkpoint: folder or hub id.
            settings: inference settings that replace those saved with the checkpoint.
            device: torch device; None takes CUDA if there is one.
            probabilities: whether the probabilities of all classes are written.
            label_spec: file with the colours; None takes the checkpoint's `labels.json`, or makes them up.
            show: pictures of the model's inside to make for each picture, if any.

        Raises:
            InputError: not a segmentation checkpoint, no image processor, no such device, colours that do not fit, or
                a model that cannot show what `show` asks for.
            RunError: a hub id without a network.
        """
        model: Any = load_trained_model(checkpoint)
        preprocessing = Preprocessing.from_image_processor(load_image_processor(checkpoint))
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            model = model.to(device)
        except (RuntimeError, AssertionError) as error:
            raise InputError(f"Device {device!r} cannot be used ({str(error).splitlines()[0]}). Try cpu.") from error
        saved = {**InferenceSettings.load(checkpoint).to_dict(), **settings}
        saved["base_size"] = saved["base_size"] or preprocessing.base_size
        count = model.config.num_labels
        beside = Path(checkpoint) / "labels.json"
        spec_file = label_spec or (beside if beside.exists() else None)
        palette = LabelSpec.from_file(spec_file).palette if spec_file else color_wheel(count)
        if len(palette) != count:
            raise InputError(f"{spec_file} names {len(palette)} classes, {checkpoint} knows {count}. Give its own.")
        if show:
            check_showable(model, show)
        inference = InferenceSettings.from_dict(saved)
        return cls(checkpoint, model, preprocessing, inference, probabilities, palette, show)

    def fingerprint(self, source: Path) -> dict[str, Any]:
        """What the results of a picture depend on; while it is unchanged they need not be made again."""
        folder = Path(self.checkpoint)
        written = [path.stat().st_mtime_ns for path in folder.iterdir()] if folder.is_dir() else []
        return {
            "checkpoint": self.checkpoint,
            "checkpoint_modified": max(written, default=0),
            "settings": self.settings.to_dict(),
            "palette": [list(color) for color in self.palette],
            "source": str(source),
            "source_modified": source.stat().st_mtime_ns,
            **({"show": self.show.to_dict()} if self.show else {}),
        }

    def predict(self, image: Image.Image) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Class ids and their probability `(H, W)`, and all probabilities `(num_labels, H, W)` float16 if wanted."""
        pixels = pil_to_tensor(image)
        arguments = (self.model, pixels, self.settings, self.preprocessing.mean, self.preprocessing.std)
        if not self.probabilities:
            ids, confidence = segment_with_confidence(*arguments)
            return ids.cpu().numpy(), confidence.cpu().numpy(), None
        scores = class_probabilities(*arguments)
        confidence, ids = scores.max(0)
        return ids.cpu().numpy(), confidence.cpu().numpy(), scores.half().cpu().numpy()

    def look_inside(self, image: Image.Image, name: str) -> dict[str, Image.Image]:
        """The pictures of the model's inside that belong to one picture, by kind; none without `show`.

        Raises:
            InputError: a picked point lies outside the picture, which messages call `name`.
        """
        kinds = [kind for kind in self.show.kinds if kind != "positions"] if self.show else []
        if self.show is None or not kinds:
            return {}
        points = relative_points(self.show.points, (image.height, image.width), name)
        mean, std = self.preprocessing.mean, self.preprocessing.std
        view = picture_view(pil_to_tensor(image), self.model, self.show.size, mean, std)
        found = inspect_model(self.model, view, points, kinds)
        sheets = {}
        if "refinement" in kinds:
            sheets["refinement"] = refinement_sheet(image, look_at_refinement(self.model, view), self.palette)
        if "attention" in kinds:
            numbers = self.show.layers or spread_layers(len(found.attention))
            layers = {k: (found.attention[k - 1].heads, found.attention[k - 1].rollout) for k in numbers}
            sheets["attention"] = attention_sheet(image, points, layers, found.attention[-1].rollout)
        if "features" in kinds:
            numbers = self.show.layers or range(1, len(found.features) + 1)
            factor = FEATURE_SIDE / max(image.size)
            size = (max(round(image.height * factor), 1), max(round(image.width * factor), 1))
            encoder = {f"layer {k}": found.features[k - 1] for k in numbers}
            decoder = {f"decoder {part}": each for part, each in found.decoder.items()}
            groups = [
                {label: Image.fromarray(feature_picture(each, size).permute(1, 2, 0).numpy()) for label, each in maps}
                for maps in (encoder.items(), decoder.items())
            ]
            sheets["features"] = feature_sheet(image, [group for group in groups if group])
        return sheets


def predict_all(
    predictor: Predictor, pictures: dict[str, Path], output: Path
) -> tuple[int, int, list[dict[str, str]]]:
    """Label all pictures and write `results.json`.

    Returns:
        Number labelled now, number that was done before, and `{"source", "reason"}` of each that was left out.
    """
    records, failed, skipped = [], [], 0
    if predictor.show and "positions" in predictor.show.kinds:
        _write_positions(predictor, output / "shown" / "positions.png")
    # tqdm draws on terminals only; elsewhere the closing line of the command is all.
    for name, source in tqdm(pictures.items(), desc="predict", unit="picture", disable=None):
        try:
            record = _finished_record(predictor, name, source, output)
            skipped += record is not None
            records.append(record or _predict_one(predictor, name, source, output))
        except InputError as error:
            failed.append({"source": str(source), "reason": str(error)})
            tqdm.write(f"left out: {error}", file=sys.stderr)
    results = {
        "checkpoint": predictor.checkpoint,
        "settings": predictor.settings.to_dict(),
        "pictures": [{key: value for key, value in record.items() if key != "made_from"} for record in records],
        "failed": failed,
    }
    write_atomic(output / "results.json", json.dumps(results, indent=1) + "\n")
    return len(records) - skipped, skipped, failed


def _files(name: str, output: Path, predictor: Predictor) -> dict[str, Path]:
    files = {"mask": output / "masks" / f"{name}.png", "overlay": output / "overlays" / f"{name}.jpg"}
    if predictor.probabilities:
        files["probabilities"] = output / "probabilities" / f"{name}.npz"
    for kind in predictor.show.kinds if predictor.show else ():
        if kind != "positions":  # they belong to the model, not to a picture
            files[kind] = output / "shown" / f"{name}_{kind}.png"
    return files


def _write_positions(predictor: Predictor, path: Path) -> None:
    found = position_table(predictor.model)
    assert found is not None  # `check_showable` has seen it
    with atomic_path(path) as aside:
        position_sheet(position_similarity(*found).cpu()).save(aside)


def _finished_record(predictor: Predictor, name: str, source: Path, output: Path) -> dict[str, Any] | None:
    """The record of a picture whose files are all there and were made from the same picture in the same way."""
    path = output / "records" / f"{name}.json"
    files = _files(name, output, predictor)
    if not path.exists() or not all(file.exists() for file in files.values()):
        return None
    record = json.loads(path.read_text())
    return record if record["made_from"] == predictor.fingerprint(source) else None


def _predict_one(predictor: Predictor, name: str, source: Path, output: Path) -> dict[str, Any]:
    """Label one picture and write its files; the record comes last and says that they are whole."""
    made_from = predictor.fingerprint(source)
    image = read_image(source)
    try:
        shown = predictor.look_inside(image, source.name)
        ids, confidence, scores = predictor.predict(image)
    except torch.OutOfMemoryError as error:
        raise RunError(
            f"{source} ({image.height}x{image.width}) does not fit into the memory of the device. "
            "Give --crop_size, a smaller --base_size or --accumulation_device cpu, with --show a smaller --show_size, "
            "and run again."
        ) from error
    files = _files(name, output, predictor)
    with atomic_path(files["mask"]) as aside:
        _id_map(ids, predictor.palette).save(aside)
    with atomic_path(files["overlay"]) as aside:
        overlay(image, ids, predictor.palette).save(aside, quality=90)
    if scores is not None:
        with atomic_path(files["probabilities"]) as aside:
            np.savez_compressed(aside, probabilities=scores)
    for kind, picture in shown.items():
        with atomic_path(files[kind]) as aside:
            picture.save(aside)
    names = predictor.model.config.id2label
    record = {
        "source": str(source),
        "size": list(ids.shape),
        **{kind: str(file.relative_to(output)) for kind, file in files.items()},
        "classes": [
            {"class": names[k], "share": float((ids == k).mean()), "score": float(confidence[ids == k].mean())}
            for k in np.unique(ids).tolist()
        ],
        "made_from": made_from,
    }
    write_atomic(output / "records" / f"{name}.json", json.dumps(record, indent=1) + "\n")
    return record


def _id_map(ids: np.ndarray, palette: tuple[tuple[int, int, int], ...]) -> Image.Image:
    if len(palette) > 256:
        return Image.fromarray(ids.astype(np.uint16))
    picture = Image.fromarray(ids.astype(np.uint8))
    picture.putpalette([channel for color in palette for channel in color])
    return picture
