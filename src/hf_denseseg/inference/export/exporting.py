"""Export a checkpoint into a folder that holds all that running it needs."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch.export import Dim, ExportedProgram

from hf_denseseg import __version__
from hf_denseseg.errors import InputError, RunError
from hf_denseseg.inference.export.byte_resize import ByteResize
from hf_denseseg.inference.export.engines import ENGINES, Engine
from hf_denseseg.inference.export.exported_model import ExportedModel
from hf_denseseg.inference.export.formats import FORMATS, Format, convert_to_openvino
from hf_denseseg.inference.export.int8 import check_int8, quantize
from hf_denseseg.inference.export.programs import (
    ClassMap,
    Detections,
    Logits,
    PixelLogits,
    Program,
    example_input,
    plain_operators,
    whole_number_padding,
    without_garbage_collection,
)
from hf_denseseg.inference.export.record import write_record
from hf_denseseg.inference.export.transformers_js import check_segformer, write_segformer
from hf_denseseg.inference.export.verification import verify
from hf_denseseg.inference.preprocessing import Preprocessing, view_size
from hf_denseseg.inference.settings import InferenceSettings, saved_file
from hf_denseseg.inference.sliding_window import Size
from hf_denseseg.models.auto.pretrained import load_image_processor, load_trained_model
from hf_denseseg.models.auto.tasks import INSTANCE_SEGMENTATION, OBJECT_DETECTION, SEMANTIC_SEGMENTATION
from hf_denseseg.models.channels import check_statistics, image_channels

# Files of a checkpoint that inference reads.
KEPT = ("config.json", "preprocessor_config.json", "inference_settings.json", "labels.json")
TRACED = (128, 160)  # of the images that a program of any size is traced with
VERIFIED = ((1, (96, 128)), (2, TRACED), (3, (161, 97)), (1, (193, 225)))  # batch and size


class Request(NamedTuple):
    """What to export.

    Args:
        checkpoint: folder or hub id.
        task: of the checkpoint.
        format: of the exported model.
        with_argmax: bytes in, class map out.
        size: of the only images that it takes; None is any.
        int8: weights and activations of 8 bits.
    """

    checkpoint: str
    task: str
    format: Format
    with_argmax: bool = False
    size: Size | None = None
    int8: bool = False

    @property
    def dynamic(self) -> bool:
        """Whether the batch may stay free, and without `size` height and width too."""
        return self.format.dynamic and self.task != OBJECT_DETECTION

    @property
    def shapes(self) -> list[tuple[int, Size]]:
        """Batch and size of the inputs that the export is verified on."""
        return [(batch if self.dynamic else 1, self.size or size) for batch, size in VERIFIED]


def load_program(request: Request) -> Program:
    """Load the checkpoint and wrap it as the program that is exported.

    Raises:
        InputError: the checkpoint cannot be used, or cannot be exported like this.
    """
    _check_request(request)
    model = load_trained_model(request.checkpoint, request.task)
    if request.format.name == "transformers_js":
        check_segformer(request.checkpoint, request.task, model.config, request.with_argmax)
        return PixelLogits(model).eval()
    if request.task == OBJECT_DETECTION:
        # torch.onnx assumes another order in memory for what `sdpa` returns than the views behind it (2.14).
        model.set_attn_implementation("eager")
        return Detections(model).eval()
    if not request.with_argmax:
        return Logits(model).eval()
    processor = load_image_processor(request.checkpoint)
    check_statistics(processor, model.config, request.checkpoint)
    preprocessing, settings = Preprocessing.from_image_processor(processor), InferenceSettings.load(request.checkpoint)
    if preprocessing.pixel_format.pixel_range != "uint8":
        raise InputError(
            f"--with_argmax takes images of 8 bits; those of {request.checkpoint} have other values. Leave it out."
        )
    whole = InferenceSettings(base_size=settings.base_size or preprocessing.base_size)
    if whole.base_size and not request.size:
        raise InputError(
            f"{request.checkpoint} resizes images, to a size that depends on theirs. Give the --size of the images, "
            "or leave --with_argmax out."
        )
    resize = None
    if (size := request.size) and (resized := view_size(size, 1.0, whole)) != size:
        resize = ByteResize(size, resized)
    return ClassMap(model, preprocessing, settings.threshold, resize).eval()


def _check_request(request: Request) -> None:
    """Refuse what cannot be exported, before anything is loaded.

    Raises:
        InputError: it says why.
    """
    task, name = request.task, request.format.name
    if request.int8:
        check_int8(name, task)
    if task == INSTANCE_SEGMENTATION:
        raise InputError(
            "Mask R-CNN cannot be exported: the number of regions that its second stage runs on depends on the image. "
            "RetinaNet (object-detection) can."
        )
    if request.with_argmax and task != SEMANTIC_SEGMENTATION:
        raise InputError(f"--with_argmax is for {SEMANTIC_SEGMENTATION}; this checkpoint is for {task}. Leave it out.")
    if request.size is None and not request.dynamic:
        whose = "An exported detector" if task == OBJECT_DETECTION else f"A program in the format {name}"
        raise InputError(f"{whose} takes images of one size only. Give it: --size H W.")


@torch.no_grad()  # attention lays its output out otherwise with gradients, and views of it would not fit
def export(request: Request, program: Program, folder: Path) -> dict[str, Any]:
    """Export a program into an empty folder, and verify it there.

    Args:
        request: what to export.
        program: see `load_program`.
        folder: to write the model and the files of the checkpoint that running it needs into.

    Returns:
        The content of `export.json`, but for the checksums.

    Raises:
        RunError: the model cannot be exported, or what was exported differs from it.
    """
    channels, chosen = image_channels(program.model.config), request.format
    with chosen.tracing():
        exported = trace(program, channels, request.size, request.dynamic)
    path = folder / chosen.file
    path.parent.mkdir(exist_ok=True)
    try:
        facts = chosen.write(exported, path, program.input_name, program.output_names)
    except Exception as error:  # the kinds are open-ended: each converter has its own
        raise RunError(
            f"--format {chosen.name} cannot hold this model ({_reason(error)}); nothing was written. Give another "
            "--format."
        ) from error
    written = list(path.parent.iterdir())
    checked = verify(program, ENGINES[chosen.name](path), channels, request.shapes)
    _copy_files(request, program, folder)
    return {
        "task": request.task,
        "format": chosen.name,
        "file": chosen.file,
        "with_argmax": request.with_argmax,
        "size": list(request.size) if request.size else None,
        "channels": channels,
        "input": program.input_name,
        "outputs": list(program.output_names),
        "model_bytes": sum(each.stat().st_size for each in written),
        "parameters": program.model.num_parameters(),
        **facts,
        "verified": checked,
        "versions": {
            "hf_denseseg": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            **chosen.versions(),
        },
    }


def export_int8(
    request: Request, program: Program, folder: Path, score: Callable[[ExportedModel], float]
) -> dict[str, Any]:
    """Export a program as ONNX, verify it, quantize it, and bring it into its format in an empty folder.

    Args:
        request: what to export.
        program: see `load_program`.
        folder: see `export`.
        score: see `quantize`.

    Returns:
        As `export`; `verified` is about the model before it was quantized.
    """
    chosen, aside = request.format, folder.parent / "float32"
    aside.mkdir()
    record = export(request._replace(format=FORMATS["onnx"]), program, aside)
    write_record(aside, record)
    path = folder / chosen.file
    path.parent.mkdir(exist_ok=True)

    def convert(source: Path) -> Engine:
        convert_to_openvino(source, path) if chosen.name == "openvino" else shutil.copyfile(source, path)
        engine = ENGINES[chosen.name](path)
        for batch, size in request.shapes:  # 8-bit operators of a runtime may fit in one size only
            engine(example_input(program, record["channels"], batch, size))
        return engine

    facts = quantize(aside, request.task, score, convert)
    size = sum(each.stat().st_size for each in path.parent.iterdir())
    _copy_files(request, program, folder)
    return {
        **record,
        **{"format": chosen.name, "file": chosen.file, "int8": facts, "model_bytes": size},
        "versions": record["versions"] | chosen.versions(),
    }


def trace(program: Program, channels: int, size: Size | None, any_batch: bool = True) -> ExportedProgram:
    """The program as a graph, for images of one size or of any, and for any batch or for one image.

    Raises:
        RunError: torch cannot export it; the message says why.
    """
    # A batch of 2: torch.export makes constants of sizes 0 and 1.
    example = example_input(program, channels, 2 if any_batch else 1, size or TRACED)
    free = ((0,) if any_batch else ()) + (() if size else (2, 3))
    try:
        with plain_operators(), whole_number_padding(), without_garbage_collection():
            return torch.export.export(program, (example,), dynamic_shapes=(dict.fromkeys(free, Dim.AUTO),))
    except Exception as error:  # the kinds are open-ended: the model's own code at this size, or torch's exporter
        which = f"{size[0]}x{size[1]} pixels" if size else "any size"
        fix = "" if size else " Give --size if it has one size only."
        raise RunError(
            f"{type(program.model).__name__} cannot be exported for images of {which} ({_reason(error)}); nothing was "
            f"written.{fix}"
        ) from error


def _reason(error: BaseException) -> str:
    """First line of the error that was raised first."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _copy_files(request: Request, program: Program, folder: Path) -> None:
    """Copy what inference reads; a class map needs neither a protocol nor a resized image any more."""
    for name in KEPT:
        if (source := saved_file(request.checkpoint, name)) is not None:
            shutil.copyfile(source, folder / name)
    if request.with_argmax:
        (folder / "inference_settings.json").unlink(missing_ok=True)
        processor = load_image_processor(str(folder))
        processor.do_resize = False
        processor.save_pretrained(folder)
    if request.format.name == "transformers_js":
        write_segformer(folder, request.checkpoint, program.model.config)
