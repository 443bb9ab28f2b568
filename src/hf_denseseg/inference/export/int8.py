"""Weights and activations of an ONNX model in 8 bits, by ONNX Runtime's static quantization, per channel.

Ranges of the activations come from calibration images. If the score on these images falls by too much, the layers that
cost most of it, each quantized alone, stay in float32: one, two, four and so on, until it does not.
"""

from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from hf_denseseg.errors import InputError, RunError
from hf_denseseg.inference.export.engines import Engine, OnnxEngine
from hf_denseseg.inference.export.exported_model import ExportedModel, open_export
from hf_denseseg.inference.export.verification import chosen_classes

FORMATS = ("onnx", "openvino", "web", "transformers_js")  # which start from an ONNX model
LAYERS = ("Conv", "MatMul", "Gemm")
IN_FLOAT = ("LayerNormalization", "Softmax")  # cheap, and their ranges are wide
OLDEST_RUNTIME = (1, 32)  # the first that keeps ranges in a file
MOST_LOST = 0.005  # of the main score on the calibration images, a fraction
MOST_INPUTS = 300  # that ranges are taken from
COMPARED_INPUTS = 4  # by which layers are ranked


class _Recorder:
    """An engine that keeps its inputs as files."""

    def __init__(self, engine: Engine, folder: Path) -> None:
        self.engine, self.folder = engine, folder
        self.files: list[Path] = []

    def __call__(self, values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if len(self.files) < MOST_INPUTS:
            self.files.append(self.folder / f"{len(self.files)}.npy")
            np.save(self.files[-1], values.cpu().numpy())
        return self.engine(values)


class _Reader:
    """The recorded inputs, as ONNX Runtime's calibration reads them."""

    def __init__(self, name: str, files: list[Path]) -> None:
        self.name, self.left = name, list(files)

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next input, None at the end."""
        return {self.name: np.load(self.left.pop(0))} if self.left else None

    def __iter__(self) -> "_Reader":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        if (values := self.get_next()) is None:
            raise StopIteration
        return values


def quantize(
    folder: Path, task: str, score: Callable[[ExportedModel], float], convert: Callable[[Path], Engine]
) -> dict[str, Any]:
    """Make a model in int8.

    Args:
        folder: of a verified export in the format onnx.
        task: of the checkpoint.
        score: main score of a model on the calibration images, a fraction; it runs the model on each.
        convert: brings the ONNX model in int8, which is then removed, into its final format, and opens it.

    Returns:
        For `export.json`: number of calibration `inputs`, `layers`, names of those `kept` in float32, the scores
        `before` and `after` on the calibration images, and on these the `agreement` of what `convert` opens with the
        float32 model: the share of the classes that stay the same.

    Raises:
        RunError: the score falls by too much with half of the layers in float32, or the final format cannot run it.
    """
    model = open_export(folder, task)
    path = folder / model.record["file"]
    with TemporaryDirectory(dir=folder.parent) as aside:
        prepared, target = Path(aside) / "prepared.onnx", Path(aside) / "int8.onnx"
        recorder = _Recorder(model.engine, Path(aside))
        model.engine = recorder
        before = score(model)
        prepare(path, prepared)
        layers, kept, ranked = weight_layers(prepared), list[str](), list[str]()
        while True:
            write_int8(prepared, target, recorder.files, [name for name in layers if name not in kept])
            model.engine = OnnxEngine(target)
            after = score(model)
            if before - after <= MOST_LOST:
                break
            if 2 * len(kept) >= len(layers):
                raise RunError(
                    f"int8 loses {100 * (before - after):.2f} points on the calibration images with {len(kept)} of "
                    f"{len(layers)} layers in float32; nothing was written. Give more images with "
                    "--calibration_images, or export without --int8."
                )
            ranked = ranked or _ranked(recorder.engine, prepared, Path(aside) / "one.onnx", recorder.files, layers)
            kept = ranked[: max(2 * len(kept), 1)]
        try:
            agreement = sum(_agreements(recorder.engine, convert(target), recorder.files)) / len(recorder.files)
        except Exception as error:  # the kinds are open-ended: each runtime has its own
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            raise RunError(
                f"The model in int8 does not run there ({reason}); nothing was written. Give another --format, or "
                "leave --int8 out."
            ) from error
    facts = {"inputs": len(recorder.files), "layers": len(layers), "kept": kept}
    return {**facts, "before": before, "after": after, "agreement": agreement}


def prepare(source: Path, target: Path) -> None:
    """Let ONNX Runtime fold what would be quantized apart, such as a BatchNorm after a convolution."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    quant_pre_process(source, target, skip_symbolic_shape=True)


def weight_layers(path: Path) -> list[str]:
    """Names of the nodes with a matrix product or a convolution, from input to output."""
    import onnx

    return [node.name for node in onnx.load(path).graph.node if node.op_type in LAYERS]


def write_int8(source: Path, target: Path, files: list[Path], layers: Sequence[str]) -> None:
    """Quantize these layers, and what lies between them; ranges are computed once and kept beside the source."""
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    graph = onnx.load(source, load_external_data=False).graph
    masks, of_image = _before_softmax(graph.node), _of_image(graph.node, graph.input[0].name)
    names = [
        node.name
        for node in graph.node
        if node.name in of_image
        and (
            node.name in layers if node.op_type in LAYERS else node.op_type not in IN_FLOAT and node.name not in masks
        )
    ]
    quantize_static(
        source,
        target,
        _Reader(graph.input[0].name, files),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        nodes_to_quantize=names if len(layers) > 1 else list(layers),
        calibration_cache_path=source.with_suffix(".ranges"),
    )


def _of_image(nodes: Sequence[Any], input_name: str) -> set[str]:
    """Names of the nodes that depend on the values of the image; coordinates depend on its size, and so do ranges."""
    values, found = {input_name}, set[str]()
    for node in nodes:
        if node.op_type != "Shape" and values.intersection(node.input):
            values.update(node.output)
            found.add(node.name)
    return found


def _before_softmax(nodes: Sequence[Any]) -> set[str]:
    """Names of the nodes between layers and softmax: masks and their sums reach minus infinity, which has no range."""
    producers = {output: node for node in nodes for output in node.output}
    left = [name for node in nodes if node.op_type == "Softmax" for name in node.input]
    found = set[str]()
    while left:
        node = producers.get(left.pop())
        if node is not None and node.op_type not in LAYERS and node.name not in found:
            found.add(node.name)
            left += node.input
    return found


def _ranked(engine: Engine, source: Path, target: Path, files: list[Path], layers: list[str]) -> list[str]:
    """The layers, that first which changes most classes when it alone is quantized."""
    compared, same = files[:: max(len(files) // COMPARED_INPUTS, 1)], {}
    for name in layers:
        write_int8(source, target, files, [name])
        same[name] = sum(_agreements(engine, OnnxEngine(target), compared))
    return sorted(layers, key=lambda name: same[name])


def _agreements(engine: Engine, other: Engine, files: list[Path]) -> Iterator[float]:
    """Of each input, the share of the classes in which two engines agree."""
    for file in files:
        values = torch.from_numpy(np.load(file))
        expected, found = (chosen_classes(each(values)[0]) for each in (engine, other))
        yield (expected == found).double().mean().item()


def check_int8(name: str, task: str) -> None:
    """Refuse int8 where it cannot be made.

    Raises:
        InputError: of another format, of a detector, or without the quantizer.
    """
    if name not in FORMATS:
        raise InputError(
            f"--int8 is for the formats {', '.join(FORMATS)}, not for {name}. Give one of them, or leave --int8 out."
        )
    if task not in ("semantic-segmentation", "image-classification"):
        raise InputError(
            f"--int8 is for segmentation and classification; this checkpoint is for {task}. Leave it out."
        )
    try:
        found = tuple(map(int, version("onnxruntime").split(".")[:2]))
    except PackageNotFoundError:
        found = (0, 0)
    if found < OLDEST_RUNTIME:
        raise InputError("--int8 needs onnxruntime 1.32 or newer: pip install 'hf-denseseg[int8]'.")
