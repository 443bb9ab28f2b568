"""A page on which people try a checkpoint: upload, mask and overlay, table, and the switches of the test protocol."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_denseseg.data.reading.pixels import RGB_BYTES
from hf_denseseg.errors import InputError, RunError
from hf_denseseg.inference.predict.segmentation import SegmentationPredictor
from hf_denseseg.inference.serving.service import ImageService, settings_of
from hf_denseseg.models.auto.tasks import IMAGE_CLASSIFICATION, SEMANTIC_SEGMENTATION
from hf_denseseg.models.one_logit import class_names

MAX_UPLOAD = "30mb"
SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
WAITING = 64  # requests in the queue; later ones are told that the server is busy


def build_app(service: ImageService, title: str, examples: Sequence[str] = ()) -> Any:
    """The page as `gradio.Blocks`.

    Args:
        service: the checkpoint.
        title: heading.
        examples: paths of images to offer.

    Raises:
        InputError: gradio is not installed.
    """
    gradio = _gradio()
    segments = service.task == SEMANTIC_SEGMENTATION
    # Gradio deletes files of this folder that are older than an hour, once an hour.
    with gradio.Blocks(title=title, delete_cache=(3600, 3600)) as app:
        gradio.Markdown(f"# {title}")
        with gradio.Row():
            with gradio.Column():
                image = _upload(gradio, service)
                controls = _segmentation_controls(gradio) if segments else _object_controls(gradio, service.task)
                run = gradio.Button("Predict", variant="primary")
            with gradio.Column():
                outputs = []
                if service.task != IMAGE_CLASSIFICATION:
                    outputs.append(gradio.Image(label="Overlay" if segments else "Objects", format="png"))
                if segments:
                    outputs.append(gradio.File(label="Mask (class ids, as `denseseg predict` writes it)"))
                headers = ["color", "class", "% of pixels", "mean probability"] if segments else ["class", "score"]
                kinds = ["html", "str", "number", "number"] if segments else ["str", "number"]
                outputs.append(gradio.Dataframe(headers=headers, datatype=kinds, label="Classes"))
        if examples:
            gradio.Examples([[path] for path in examples], inputs=[image])

        def predict(path: str | None, *values: Any) -> list[Any]:
            if not path:
                raise gradio.Error("Choose an image first.")
            options = _segmentation_options(*values) if segments else _object_options(service.task, *values)
            Path(app.GRADIO_CACHE).mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(dir=app.GRADIO_CACHE))
            try:
                served = service.predict(path, folder, **options)
            except (InputError, RunError) as error:
                raise gradio.Error(str(error)) from error
            files = [str(served.files[kind]) for kind in ("overlay", "mask", "drawn") if kind in served.files]
            return [*files, [_cells(row, service.predictor) for row in served.rows]]

        run.click(predict, [image, *controls], outputs, api_name="predict", concurrency_limit=1)
    return app.queue(max_size=WAITING)


def launch(
    checkpoint: str,
    title: str | None = None,
    examples: Sequence[str] = (),
    device: str | None = None,
    **options: Any,
) -> Any:
    """Serve the page of a checkpoint; `options` are those of `gradio.Blocks.launch`.

    Raises:
        InputError: gradio is not installed, or the checkpoint cannot be used.
    """
    _gradio()
    service = ImageService(checkpoint, device)
    path = Path(checkpoint)
    name = path.parent.name if path.name == "model" else path.name  # a run's model is called after the run
    app = build_app(service, title or name, examples)
    app.launch(max_file_size=MAX_UPLOAD, show_error=True, **options)
    return app


def _gradio() -> Any:
    try:
        import gradio
    except ImportError as error:
        raise InputError("The page needs gradio. Install it: pip install 'hf-denseseg[app]'.") from error
    return gradio


def _upload(gradio: Any, service: ImageService) -> Any:
    """The component that takes an image; it hands the file on as it is."""
    if service.predictor.pixel_format != RGB_BYTES:  # a browser cannot show it
        return gradio.File(label="Image", file_count="single")
    return gradio.Image(type="filepath", image_mode=None, label="Image", sources=["upload", "clipboard"])


def _segmentation_controls(gradio: Any) -> list[Any]:
    with gradio.Accordion("Test protocol (default: the checkpoint's)", open=False):
        return [
            gradio.Number(0, label="Sliding window in pixels (0: as saved)", precision=0, minimum=0),
            gradio.CheckboxGroup([str(scale) for scale in SCALES], label="Scales to average (none: as saved)"),
            gradio.Checkbox(False, label="Average with the flipped image"),
            gradio.Slider(0, 1, 0, step=0.05, label="Leave pixels below this probability uncolored"),
        ]


def _segmentation_options(window: float, scales: list[str], flip: bool, least: float) -> dict[str, Any]:
    settings = settings_of(int(window or 0), [float(scale) for scale in scales], flip)
    return {"settings": settings, "least_confidence": least}


def _object_controls(gradio: Any, task: str) -> list[Any]:
    if task == IMAGE_CLASSIFICATION:
        return []
    return [gradio.Slider(0, 1, 0.5, step=0.05, label="Minimum score of an object")]


def _object_options(task: str, *values: float) -> dict[str, Any]:
    return {} if task == IMAGE_CLASSIFICATION else {"threshold": values[0]}


def _cells(row: dict[str, Any], predictor: Any) -> list[Any]:
    """A row of the table; the first column of a segmentation is a square in the color of the overlay."""
    if not isinstance(predictor, SegmentationPredictor):
        return [row["label"], round(row["score"], 3)]
    red, green, blue = predictor.palette[class_names(predictor.model.config).index(row["class"])]
    square = f'<span style="background: rgb({red}, {green}, {blue})">&emsp;</span>'
    return [square, row["class"], round(100 * row["fraction"], 2), round(row["score"], 3)]


__all__ = ["build_app", "launch"]
