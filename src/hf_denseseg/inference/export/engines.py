"""Runtimes of exported models behind one interface: tensors in, tensors out, on the CPU."""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch


class Engine(Protocol):
    """An exported model, opened by its runtime."""

    def __call__(self, values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run on one input `(B, C, H, W)`; returns the outputs in their order."""


class TorchEngine:
    """A `torch.export` program."""

    def __init__(self, path: Path) -> None:
        self.module = torch.export.load(path).module()

    @torch.no_grad()
    def __call__(self, values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run the program."""
        return tuple(self.module(values))


class OnnxEngine:
    """An ONNX model on ONNX Runtime's CPU provider, with as many threads as torch has."""

    def __init__(self, path: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3  # errors
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.input_name = self.session.get_inputs()[0].name

    def __call__(self, values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run the session."""
        outputs = self.session.run(None, {self.input_name: values.contiguous().cpu().numpy()})
        return tuple(map(torch.from_numpy, outputs))


class OpenVinoEngine:
    """An OpenVINO model on the CPU, computed in float32, with as many threads as torch has."""

    def __init__(self, path: Path) -> None:
        import openvino

        options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        self.compiled = openvino.Core().compile_model(path, "CPU", options)

    def __call__(self, values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run the compiled model."""
        outputs = self.compiled([values.contiguous().cpu().numpy()])
        return tuple(torch.from_numpy(outputs[port].copy()) for port in self.compiled.outputs)


class CompiledEngine:
    """Machine code of AOTInductor."""

    def __init__(self, path: Path) -> None:
        self.run = torch._inductor.aoti_load_package(str(path))

    @torch.no_grad()
    def __call__(self, values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run the code."""
        return tuple(self.run(values))


class ExecutorchEngine:
    """An ExecuTorch program on XNNPACK, for one image after the other."""

    def __init__(self, path: Path) -> None:
        from executorch.runtime import Runtime

        self.program = Runtime.get().load_program(path)  # the method does not keep it alive
        self.method = self.program.load_method("forward")

    def __call__(self, values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run the method; its outputs lie in memory that the next run uses."""
        images = values.contiguous().cpu().split(1)
        parts = [[each.clone() for each in self.method.execute([image])] for image in images]
        return tuple(torch.cat(each) for each in zip(*parts, strict=True))


ENGINES: dict[str, Callable[[Path], Engine]] = {
    "torch": TorchEngine,
    "onnx": OnnxEngine,
    "openvino": OpenVinoEngine,
    "aoti": CompiledEngine,
    "executorch": ExecutorchEngine,
    "transformers_js": OnnxEngine,
    "web": OnnxEngine,
}
