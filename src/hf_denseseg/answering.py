"""Classify pictures on disk, or find objects in them: answers as JSON, objects drawn over the pictures."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from hf_denseseg.checkpoints import load_image_processor, load_trained_model
from hf_denseseg.data.coco import encode_mask
from hf_denseseg.data.labels import color_wheel
from hf_denseseg.data.reading import read_image
from hf_denseseg.detection_pictures import draw_objects
from hf_denseseg.errors import InputError
from hf_denseseg.files import atomic_path, write_atomic

NAMED_CLASSES = 5


@dataclass
class Answerer:
    """A checkpoint for classification, detection or instance segmentation, ready to look at pictures.

    Args:
        checkpoint: folder or hub id.
        task: what it was trained for.
        model: in eval mode, on its device.
        processor: its image processor.
        threshold: objects with a lower score are left out.
    """

    checkpoint: str
    task: str
    model: Any
    processor: Any
    threshold: float

    @classmethod
    def load(cls, checkpoint: str, task: str, device: str | None = None, threshold: float = 0.5) -> "Answerer":
        """Load a checkpoint.

        Args:
            checkpoint: folder or hub id.
            task: `"image-classification"`, `"object-detection"` or `"instance-segmentation"`.
            device: torch device; None takes CUDA if there is one.
            threshold: objects with a lower score are left out.

        Raises:
            InputError: no checkpoint for the task, no image processor, no such device, or a threshold outside 0..1.
            RunError: a hub id without a network.
        """
        if not 0 <= threshold <= 1:
            raise InputError(f"--threshold is {threshold}. Give a score from 0 to 1.")
        model: Any = load_trained_model(checkpoint, task)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            model = model.to(device)
        except (RuntimeError, AssertionError) as error:
            raise InputError(f"Device {device!r} cannot be used ({str(error).splitlines()[0]}). Try cpu.") from error
        return cls(checkpoint, task, model, load_image_processor(checkpoint), threshold)

    def answer(self, image: Image.Image) -> tuple[list[dict[str, Any]], Image.Image | None]:
        """Look at one RGB picture.

        Returns:
            Answers, best first: `label`, `score` and, of objects, `box` (left, top, right, bottom in pixels) and
            perhaps `segmentation` (RLE); and the picture with the objects drawn, None for a classifier.
        """
        inputs = self.processor(images=[image], return_tensors="pt")
        used = {key: inputs[key].to(self.model.device) for key in ("pixel_values", "pixel_mask") if key in inputs}
        names = self.model.config.id2label
        if self.task == "image-classification":
            with torch.no_grad():
                scores = self.model(pixel_values=used["pixel_values"]).logits[0].float().softmax(-1)
            best = scores.topk(min(NAMED_CLASSES, len(scores)))
            pairs = zip(best.values.tolist(), best.indices.tolist(), strict=True)
            return [{"label": names[index], "score": score} for score, index in pairs], None
        with torch.no_grad():
            outputs = self.model(**used)
        with_masks = self.task == "instance-segmentation"
        post_process = self.processor.post_process_object_detection
        if with_masks:
            post_process = self.processor.post_process_detections_with_masks
        found = post_process(outputs, threshold=self.threshold, target_sizes=[(image.height, image.width)])[0]
        classes, scores, boxes = (found[key].tolist() for key in ("labels", "scores", "boxes"))
        masks = [mask.cpu().numpy() for mask in found["masks"]] if with_masks else None
        answers: list[dict[str, Any]] = [
            {"label": names[k], "score": score, "box": box}
            for k, score, box in zip(classes, scores, boxes, strict=True)
        ]
        for answer, mask in zip(answers, masks or (), strict=False):
            answer["segmentation"] = encode_mask(mask)
        texts = [f"{answer['label']} {100 * answer['score']:.0f} %" for answer in answers]
        palette = color_wheel(len(names))
        return answers, draw_objects(image, boxes, texts, [palette[k] for k in classes], masks)

    def fingerprint(self, source: Path) -> dict[str, Any]:
        """What the answers to a picture depend on; while it is unchanged they need not be given again."""
        folder = Path(self.checkpoint)
        written = [path.stat().st_mtime_ns for path in folder.iterdir()] if folder.is_dir() else []
        return {
            "checkpoint": self.checkpoint,
            "checkpoint_modified": max(written, default=0),
            "threshold": self.threshold,
            "source": str(source),
            "source_modified": source.stat().st_mtime_ns,
        }


def answer_all(answerer: Answerer, pictures: dict[str, Path], output: Path) -> tuple[int, int, list[dict[str, str]]]:
    """Look at all pictures and write `results.json`.

    Returns:
        Number answered now, number that was done before, and `{"source", "reason"}` of each that was left out.
    """
    records, failed, skipped = [], [], 0
    for name, source in tqdm(pictures.items(), desc="predict", unit="picture", disable=None):
        try:
            record = _finished(answerer, name, source, output)
            skipped += record is not None
            records.append(record or _answer_one(answerer, name, source, output))
        except InputError as error:
            failed.append({"source": str(source), "reason": str(error)})
            tqdm.write(f"left out: {error}", file=sys.stderr)
    results = {
        "checkpoint": answerer.checkpoint,
        "task": answerer.task,
        "pictures": [{key: value for key, value in record.items() if key != "made_from"} for record in records],
        "failed": failed,
    }
    write_atomic(output / "results.json", json.dumps(results, indent=1) + "\n")
    return len(records) - skipped, skipped, failed


def _finished(answerer: Answerer, name: str, source: Path, output: Path) -> dict[str, Any] | None:
    path = output / "records" / f"{name}.json"
    if not path.exists():
        return None
    record = json.loads(path.read_text())
    drawn = record.get("drawn")
    whole = drawn is None or (output / drawn).exists()
    return record if whole and record["made_from"] == answerer.fingerprint(source) else None


def _answer_one(answerer: Answerer, name: str, source: Path, output: Path) -> dict[str, Any]:
    """Look at one picture and write its files; the record comes last and says that they are whole."""
    made_from = answerer.fingerprint(source)
    image = read_image(source)
    answers, drawn = answerer.answer(image)
    record: dict[str, Any] = {"source": str(source), "size": [image.height, image.width], "answers": answers}
    if drawn is not None:
        record["drawn"] = f"drawn/{name}.jpg"
        with atomic_path(output / record["drawn"]) as aside:
            drawn.save(aside, quality=90)
    write_atomic(output / "records" / f"{name}.json", json.dumps(record | {"made_from": made_from}, indent=1) + "\n")
    return record
