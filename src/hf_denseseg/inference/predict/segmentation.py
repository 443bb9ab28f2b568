"""Segment images with a checkpoint: label maps, overlays, probabilities, and figures of the model's internals."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from hf_denseseg.data.class_order import class_order
from hf_denseseg.data.image_sizes import scaled_size
from hf_denseseg.data.labels import LabelSpec, color_wheel
from hf_denseseg.data.reading.georeferenced import Georeference, Raster
from hf_denseseg.data.reading.pixels import PixelFormat, Pixels, as_shown, as_tensor, height_width
from hf_denseseg.errors import InputError, RunError
from hf_denseseg.files import atomic_path
from hf_denseseg.inference.export.exported_model import ExportedModel, load_model
from hf_denseseg.inference.introspection.attention import relative_points, spread_layers
from hf_denseseg.inference.introspection.features import feature_image
from hf_denseseg.inference.introspection.inspection import ShowSettings, check_showable, inspect_model, inspection_view
from hf_denseseg.inference.introspection.positions import position_similarity, position_table
from hf_denseseg.inference.introspection.refinement import inspect_refinement
from hf_denseseg.inference.large_images import segment_in_columns, segment_in_strips
from hf_denseseg.inference.predict.outputs import (
    KINDS,
    OutputSettings,
    PixelTally,
    nearest_pixels,
    save_ids,
    write_overlay_videos,
    write_table,
)
from hf_denseseg.inference.predict.predictor import Prediction, checkpoint_state
from hf_denseseg.inference.preprocessing import Preprocessing
from hf_denseseg.inference.segmentation import choose_classes, class_probabilities, segment_with_confidence, tempered
from hf_denseseg.inference.settings import InferenceSettings, check_threshold
from hf_denseseg.models.auto.pretrained import load_image_processor
from hf_denseseg.models.channels import check_statistics
from hf_denseseg.models.one_logit import class_names
from hf_denseseg.visualization.attention import attention_figure, feature_figure, position_figure
from hf_denseseg.visualization.label_maps import overlay
from hf_denseseg.visualization.refinement import refinement_figure

logger = logging.getLogger(__name__)

FEATURE_SIDE = 200  # longest edge of a drawn feature map in pixels
LONGEST_JPEG = 65_500
REDUCED_SIDE = 4096  # longest edge in pixels of the overlay of a raster that is read window by window
LARGEST_SCORES = 2**32  # bytes of the float32 scores of all classes at full size, for --write probabilities


@dataclass
class SegmentationPredictor:
    """A segmentation checkpoint, and everything that determines its output; see `load`."""

    checkpoint: str
    model: Any
    preprocessing: Preprocessing
    settings: InferenceSettings
    outputs: OutputSettings
    palette: tuple[tuple[int, int, int], ...]
    spec: LabelSpec | None = None
    show: ShowSettings | None = None
    tiling_announced: bool = False

    @classmethod
    def load(
        cls,
        checkpoint: str,
        settings: dict[str, Any],
        device: str | None = None,
        outputs: OutputSettings | None = None,
        label_spec: str | None = None,
        show: ShowSettings | None = None,
    ) -> "SegmentationPredictor":
        """Load a checkpoint for inference.

        Args:
            checkpoint: folder or hub id.
            settings: inference settings that replace those saved with the checkpoint.
            device: torch device; None uses CUDA if available.
            outputs: what is written for each image; None: a label map and an overlay.
            label_spec: file with colors and raw ids; None uses the checkpoint's `labels.json`, or assigns colors.
            show: figures of the model's internals to make for each image, if any.

        Raises:
            InputError: not a segmentation checkpoint, no image processor, no such device, different numbers of
                colors and classes, unknown raw ids, or internals that the model cannot show.
            RunError: a hub id without a network.
        """
        outputs = outputs or OutputSettings()
        model: Any = load_model(checkpoint)
        processor = load_image_processor(checkpoint)
        check_statistics(processor, model.config, checkpoint)
        preprocessing = Preprocessing.from_image_processor(processor)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            model = model.to(device)
        except (RuntimeError, AssertionError) as error:
            raise InputError(f"Device {device!r} cannot be used ({str(error).splitlines()[0]}). Try cpu.") from error
        saved = {**InferenceSettings.load(checkpoint).to_dict(), **settings}
        saved["base_size"] = saved["base_size"] or preprocessing.base_size
        classes = class_names(model.config)
        count = len(classes)
        check_threshold(saved["threshold"], model.config.num_labels)
        saved_spec = Path(checkpoint) / "labels.json"
        spec_file = label_spec or (saved_spec if saved_spec.exists() else None)
        spec = LabelSpec.from_file(spec_file) if spec_file else None
        palette = spec.palette if spec else color_wheel(count)
        if len(palette) != count:
            raise InputError(
                f"{spec_file} names {len(palette)} classes, {checkpoint} predicts {count}. "
                "Give the label specification of its dataset."
            )
        given = spec if label_spec else None
        if given and class_order(classes, given.classes, checkpoint, str(label_spec)) is not None:
            raise InputError(
                f"{label_spec} has the classes of {checkpoint} in another order. Put `classes` into the order of "
                f"the checkpoint: {', '.join(classes)}."
            )
        if outputs.raw_ids and spec is None:
            raise InputError(f"{checkpoint} has no labels.json, so raw ids are not known. Give --label_spec FILE.")
        if isinstance(model, ExportedModel):
            model.check_protocol(InferenceSettings.from_dict(saved), needs_probabilities=True)
        if show:
            check_showable(model, show)
        return cls(checkpoint, model, preprocessing, InferenceSettings.from_dict(saved), outputs, palette, spec, show)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of the files that are written for each image."""
        shown = [kind for kind in self.show.kinds if kind != "positions"] if self.show else []
        return (*(kind for word, kind in KINDS.items() if word in self.outputs.write), *shown)

    def description(self) -> dict[str, Any]:
        """Entries of `results.json` on the model and its settings."""
        return {"checkpoint": self.checkpoint, "settings": self.settings.to_dict()}

    def fingerprint(self) -> dict[str, Any]:
        """Everything that the results depend on besides the image."""
        return {
            **checkpoint_state(self.checkpoint),
            "settings": self.settings.to_dict(),
            "palette": [list(color) for color in self.palette],
            "raw_ids": self.spec.inverse_table.tolist() if self.spec and self.outputs.raw_ids else None,
            "tile_above_pixels": self.outputs.tile_above_pixels,
            **({"show": self.show.to_dict()} if self.show else {}),
        }

    @property
    def pixel_format(self) -> PixelFormat:
        """Channels and range of the images."""
        return self.preprocessing.pixel_format

    def predict(self, image: Pixels | Raster, name: str) -> Prediction:
        """Segment an image, and draw the overlay onto what a figure shows of it.

        A raster above `tile_above_pixels` is read window by window, and its overlay is a reduced one.

        Raises:
            InputError: too large for the outputs, or a picked point lies outside the image.
            RunError: the device runs out of memory.
        """
        height, width = height_width(image)
        place = image.georeference if isinstance(image, Raster) else None
        if isinstance(image, Raster) and height * width <= self.outputs.tile_above_pixels:
            image = image.load()
        if "overlays" in self.outputs.write and max(height, width) > LONGEST_JPEG and not isinstance(image, Raster):
            raise InputError(
                f"an overlay of {height}x{width} pixels cannot be a JPEG (at most {LONGEST_JPEG} pixels "
                "per side). Take overlays out of --write, or cut the image into tiles."
            )
        try:
            figures = self.inspect(image, name)
            return self._segment(image, figures, place)
        except torch.OutOfMemoryError as error:
            raise RunError(
                f"{name} ({height}x{width}) does not fit into the memory of the device. "
                "Give --test_crop_size, a smaller --test_base_size or --accumulation_device cpu (with --show: a "
                "smaller --show_size), and run again."
            ) from error

    def _segment(
        self, image: Pixels | Raster, figures: dict[str, Image.Image], place: Georeference | None
    ) -> Prediction:
        size, write = height_width(image), self.outputs.write
        shown = Image.new("RGB", (1, 1))
        if "overlays" in write:
            shown = as_shown(image.reduced(REDUCED_SIDE) if isinstance(image, Raster) else image)
        rows, columns = (nearest_pixels(*sides) for sides in ((shown.height, size[0]), (shown.width, size[1])))
        tally = PixelTally(len(self.palette))
        raw = self.spec.inverse_table if self.spec and self.outputs.raw_ids else None
        wide = len(self.palette) > 256 if raw is None else raw.dtype != np.uint8
        written_ids = np.empty(size, np.uint16 if wide else np.uint8)  # (H, W)
        confidence_map = np.empty(size if "confidence" in write else (0, 0), np.uint8)
        scores: list[np.ndarray] = []
        # Strips of rows fill these one after the other; a small image is a single strip.
        for (top, left), ids, confidence, scores in self._strips(image):  # noqa: B007
            tally.add(ids, confidence)
            bottom, right = top + len(ids), left + ids.shape[1]
            written_ids[top:bottom, left:right] = ids if raw is None else raw[ids]
            if confidence_map.size:
                confidence_map[top:bottom, left:right] = np.rint(confidence * 255)
            if "overlays" in write:  # in place: the model has no more use for these pixels
                y, x = np.searchsorted(rows, (top, bottom)).tolist(), np.searchsorted(columns, (left, right)).tolist()
                drawn = ids[rows[slice(*y)] - top][:, columns[slice(*x)] - left]
                box = (x[0], y[0], x[1], y[1])
                if drawn.size:
                    shown.paste(overlay(shown.crop(box), drawn, self.palette), box)
        writers: dict[str, Callable[[Path], object]] = {
            "mask": lambda path: save_ids(path, written_ids, self.palette, raw, place),
            "overlay": partial(shown.save, quality=90),
            "confidence": lambda path: Image.fromarray(confidence_map).save(path),
            "probabilities": lambda path: np.savez_compressed(path, probabilities=scores[0]),
            **{kind: figure.save for kind, figure in figures.items()},
        }
        facts: dict[str, Any] = {"classes": tally.rows(class_names(self.model.config))}
        facts |= {} if place is None else {"georeference": place.to_dict()}
        files = {kind: writers[kind] for kind in self.kinds}
        return Prediction(facts, files, {} if place is None else {"mask": ".tif"})

    def _strips(
        self, image: Pixels | Raster
    ) -> Iterator[tuple[tuple[int, int], np.ndarray, np.ndarray, list[np.ndarray]]]:
        """Each strip: first row and column, class ids and their probabilities `(rows, w)`; the scores of all classes.

        The list holds one `(C, H, W)` array if probabilities are written, else nothing.
        """
        height, width = height_width(image)
        pixels = height * width
        all_classes = "probabilities" in self.outputs.write
        if all_classes and (needed := 4 * pixels * len(self.palette)) > LARGEST_SCORES:
            raise InputError(
                f"the probabilities of all classes of {height}x{width} pixels would take "
                f"{needed / 2**30:.0f} GiB. Take probabilities out of --write, or "
                "cut the image into tiles."
            )
        if pixels > self.outputs.tile_above_pixels and not all_classes:
            if not self.tiling_announced:
                logger.info("Images above %d pixels are segmented in strips of rows.", self.outputs.tile_above_pixels)
                self.tiling_announced = True
            # A PIL image or a raster is cut into windows before it becomes a tensor.
            source = as_tensor(image) if isinstance(image, np.ndarray) else image
            segment: Any = segment_in_columns if isinstance(source, Raster) else segment_in_strips
            for strip in segment(self.model, source, self.settings, self.preprocessing):
                yield (strip.top, strip.left), strip.ids.cpu().numpy(), strip.confidence.cpu().numpy(), []
            return
        image = image.load() if isinstance(image, Raster) else image
        if all_classes:
            plain = replace(self.settings, temperature=1.0)
            scores = class_probabilities(self.model, as_tensor(image), plain, self.preprocessing)
            ids, confidence = choose_classes(scores, self.settings.threshold, self.settings.temperature)
            scores = tempered(scores, self.settings.temperature)
            yield (0, 0), ids.cpu().numpy(), confidence.cpu().numpy(), [scores.half().cpu().numpy()]
        else:
            ids, confidence = segment_with_confidence(self.model, as_tensor(image), self.settings, self.preprocessing)
            yield (0, 0), ids.cpu().numpy(), confidence.cpu().numpy(), []

    def finish(self, records: list[dict[str, Any]], output: Path) -> dict[str, Any]:
        """Write the figure of the position embeddings, the table and the videos, if they were asked for."""
        results: dict[str, Any] = {}
        if self.show and "positions" in self.show.kinds:
            found = position_table(self.model)
            assert found is not None  # `check_showable` has made sure of it
            with atomic_path(output / "shown" / "positions.png") as aside:
                position_figure(position_similarity(*found).cpu()).save(aside)
        if "parquet" in self.outputs.write:
            results["table"] = write_table(records, output)
        if "video" in self.outputs.write:
            results["videos"] = write_overlay_videos(records, output, self.outputs.frame_stride)
        return results

    def inspect(self, image: Pixels | Raster, name: str) -> dict[str, Image.Image]:
        """Figures of the model's internals for one image, by kind; none without `show`.

        Raises:
            InputError: a picked point lies outside the image, which is called `name` in the message.
        """
        kinds = [kind for kind in self.show.kinds if kind != "positions"] if self.show else []
        if self.show is None or not kinds:
            return {}
        height, width = height_width(image)
        image = image.load() if isinstance(image, Raster) else image
        points = relative_points(self.show.points, (height, width), name)
        view = inspection_view(as_tensor(image), self.model, self.show.size, self.preprocessing)
        found = inspect_model(self.model, view, points, kinds)
        figures, shown = {}, as_shown(image)
        if "refinement" in kinds:
            figures["refinement"] = refinement_figure(shown, inspect_refinement(self.model, view), self.palette)
        if "attention" in kinds:
            numbers = self.show.layers or spread_layers(len(found.attention))
            layers = {k: (found.attention[k - 1].heads, found.attention[k - 1].rollout) for k in numbers}
            figures["attention"] = attention_figure(shown, points, layers, found.attention[-1].rollout)
        if "features" in kinds:
            numbers = self.show.layers or range(1, len(found.features) + 1)
            size = scaled_size((height, width), FEATURE_SIDE / max(height, width))
            encoder = {f"layer {k}": found.features[k - 1] for k in numbers}
            spatial = {f"spatial {stage}": each for stage, each in found.spatial.items()}
            decoder = {f"decoder {part}": each for part, each in found.decoder.items()}
            groups = [
                {label: Image.fromarray(feature_image(each, size).permute(1, 2, 0).numpy()) for label, each in maps}
                for maps in (encoder.items(), spatial.items(), decoder.items())
            ]
            figures["features"] = feature_figure(shown, [group for group in groups if group])
        return figures
