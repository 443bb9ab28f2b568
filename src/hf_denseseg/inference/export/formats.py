"""The formats of exported models, and how each is written from a `torch.export` program."""

import importlib.metadata
import importlib.util
import platform
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.export import ExportedProgram

from hf_denseseg.errors import InputError
from hf_denseseg.inference.export.programs import without_garbage_collection

LARGEST_PROTOBUF = 2**31 - 2**20  # bytes of weights that one ONNX file holds


@dataclass(frozen=True)
class Format:
    """One format.

    Args:
        name: value of `--format`.
        file: name of the model's file.
        write: writes a program to a path, given its input and output names; returns facts for `export.json`.
        extra: of this package, with what the format needs; None needs nothing.
        modules: what has to be installed.
        dynamic: whether batch, height and width may stay free.
        tracing: gives a context in which the program is traced.
    """

    name: str
    file: str
    write: Callable[[ExportedProgram, Path, str, tuple[str, ...]], dict[str, Any]]
    extra: str | None = None
    modules: tuple[str, ...] = ()
    dynamic: bool = True
    tracing: Callable[[], AbstractContextManager[None]] = nullcontext

    def check_installed(self) -> None:
        """Refuse a format whose packages are not installed.

        Raises:
            InputError: it names the extra that brings them.
        """
        missing = [name for name in self.modules if importlib.util.find_spec(name) is None]
        if missing:
            raise InputError(
                f"--format {self.name} needs {' and '.join(missing)}: pip install 'hf-denseseg[{self.extra}]'."
            )

    def versions(self) -> dict[str, str]:
        """Version of each package that the format needs."""
        return {name: importlib.metadata.version(name) for name in self.modules}


def write_torch(
    program: ExportedProgram, path: Path, input_name: str, output_names: tuple[str, ...]
) -> dict[str, Any]:
    """Write a `torch.export` program; `torch.export.load` opens it."""
    torch.export.save(program, path)
    return {}


def write_onnx(program: ExportedProgram, path: Path, input_name: str, output_names: tuple[str, ...]) -> dict[str, Any]:
    """Write an ONNX model.

    `transformers.exporters.OnnxExporter` (transformers 5.24) calls the same `torch.onnx.export`, but takes a
    `PreTrainedModel` with its own forward, so normalization and argmax cannot be part of the graph, and its fixes
    change nothing in these models.
    """
    from onnx_ir.passes import common
    from onnxscript import optimizer

    if any("split" in str(node.target) or "chunk" in str(node.target) for node in program.graph.nodes):
        # onnxscript folds splits of constant sizes only (0.7.2): those of symbolic sizes become slices.
        program = program.run_decompositions({torch.ops.aten.split_with_sizes.default: _slices})
    with warnings.catch_warnings(), redirect_stdout(StringIO()), without_garbage_collection():
        warnings.simplefilter("ignore")
        converted = torch.onnx.export(
            program,
            args=(),
            kwargs={},
            input_names=[input_name],
            output_names=list(output_names),
            dynamo=True,
            verbose=False,
            optimize=False,
        )
    assert converted is not None  # `dynamo=True` returns a program
    # Of the optimizer what changes the file. Its rewrites are left to the runtimes, which make their own: one of them
    # compares all pairs of nodes.
    common.InlinePass()(converted.model)
    optimizer.fold_constants(converted.model)
    optimizer.remove_unused_nodes(converted.model)
    common.CommonSubexpressionEliminationPass()(converted.model)
    weights = sum(each.numel() * each.element_size() for each in program.state_dict.values())
    converted.save(path, external_data=weights > LARGEST_PROTOBUF)
    return {"opset": converted.model.opset_imports[""]}


def write_openvino(
    program: ExportedProgram, path: Path, input_name: str, output_names: tuple[str, ...]
) -> dict[str, Any]:
    """Write OpenVINO's XML and, beside it, the weights, through ONNX, with all weights in float32."""
    with TemporaryDirectory() as folder:
        facts = write_onnx(program, Path(folder) / "model.onnx", input_name, output_names)
        convert_to_openvino(Path(folder) / "model.onnx", path)
    return facts


def convert_to_openvino(source: Path, path: Path) -> None:
    """Convert an ONNX model; 8-bit layers stay what they are."""
    import openvino

    openvino.save_model(openvino.convert_model(source), path, compress_to_fp16=False)


def write_aoti(program: ExportedProgram, path: Path, input_name: str, output_names: tuple[str, ...]) -> dict[str, Any]:
    """Write machine code for this kind of processor, by AOTInductor, which needs a C++ compiler."""
    torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    return {"processor": platform.machine()}


def write_executorch(
    program: ExportedProgram, path: Path, input_name: str, output_names: tuple[str, ...]
) -> dict[str, Any]:
    """Write an ExecuTorch program for XNNPACK, with the corrections of transformers' exporter (5.24 or newer)."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    with executorch_patches():
        lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()
    with path.open("wb") as file:
        lowered.write_to_file(file)
    return {"delegate": "xnnpack"}


@contextmanager
def executorch_patches() -> Iterator[None]:
    """transformers' replacements of operations that ExecuTorch cannot hold, such as `detach` in channels last."""
    from transformers.exporters.exporter_executorch import apply_patches

    with apply_patches("executorch"), apply_patches("executorch.xnnpack"):
        yield


def _slices(values: torch.Tensor, sizes: list[int], dim: int = 0) -> list[torch.Tensor]:
    """`split_with_sizes` as slices."""
    parts, start = [], 0
    for size in sizes:
        parts.append(values.narrow(dim, start, size))
        start = start + size
    return parts


FORMATS = {
    each.name: each
    for each in (
        Format("torch", "model.pt2", write_torch),
        Format("onnx", "model.onnx", write_onnx, "onnx", ("onnx", "onnxscript", "onnxruntime")),
        Format("openvino", "openvino_model.xml", write_openvino, "openvino", ("onnx", "onnxscript", "openvino")),
        Format("aoti", "model.pt2", write_aoti),
        Format(
            "executorch",
            "model.pte",
            write_executorch,
            "executorch",
            ("executorch",),
            dynamic=False,
            tracing=executorch_patches,
        ),
        Format("transformers_js", "onnx/model.onnx", write_onnx, "onnx", ("onnx", "onnxscript", "onnxruntime")),
        Format("web", "model.onnx", write_onnx, "onnx", ("onnx", "onnxscript", "onnxruntime")),
    )
}
