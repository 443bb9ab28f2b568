"""What is exported: a model as tensors in, tensors out."""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import padding as timm_padding
from torch import nn
from transformers import PreTrainedModel

from hf_denseseg.inference.preprocessing import Preprocessing
from hf_denseseg.inference.sliding_window import Size, align_corners_of, class_logits

CLASS_MAP_DTYPES = (torch.uint8, torch.uint16, torch.int32)


class Logits(nn.Module):
    """Normalized `pixel_values (B, C, H, W)` float32 in, the model's `logits` out, at its own resolution."""

    input_name: str = "pixel_values"
    output_names: tuple[str, ...] = ("logits",)

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model: PreTrainedModel = model

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run the model."""
        outputs = self.model(pixel_values=pixel_values)
        return tuple(outputs[name] for name in self.output_names)


class Detections(Logits):
    """As `Logits`, with the boxes and the number of anchors of each level of a detector, for images of one size."""

    output_names = ("logits", "pred_boxes", "anchors_per_level")


class PixelLogits(Logits):
    """As `Logits`, at the size of `pixel_values`, for libraries that do not resize as the model means it."""

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run the model and resize."""
        (logits,) = super().forward(pixel_values)
        size, align_corners = pixel_values.shape[-2:], align_corners_of(self.model)
        return (F.interpolate(logits, size=size, mode="bilinear", align_corners=align_corners),)


class ClassMap(nn.Module):
    """`image (B, C, H, W)` uint8 in, `class_map (B, H, W)` out, the class of every pixel.

    Normalization, the resize of the logits to the image and the argmax are part of it, as in `segment` with the whole
    image and one view.

    Args:
        model: segmentation model.
        preprocessing: of the checkpoint.
        threshold: of a model with one logit.
        resize: what images are resized by first, bytes to bytes; None leaves them as they are.
    """

    input_name, output_names = "image", ("class_map",)

    def __init__(
        self, model: PreTrainedModel, preprocessing: Preprocessing, threshold: float, resize: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.model: PreTrainedModel = model
        self.preprocessing, self.resize = preprocessing, resize
        self.align_corners = align_corners_of(model)
        self.shift = float(torch.logit(torch.tensor(threshold, dtype=torch.float64)))
        self.dtype = class_map_dtype(model.config.num_labels or 0)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Normalize, run the model, resize, choose."""
        dtype = next(self.model.parameters()).dtype
        size = image.shape[-2:]
        if self.resize is not None:
            image = self.resize(image)
        logits = class_logits(self.model, self.preprocessing.normalize(image, dtype))
        logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=self.align_corners)
        logits = logits.contiguous()  # ExecuTorch takes the argmax of no other order in memory
        if self.shift:  # above the threshold: the logit is above its logit
            return ((logits[:, 1] > self.shift).to(self.dtype),)
        return (logits.argmax(1).to(self.dtype),)


Program = Logits | ClassMap


def class_map_dtype(num_labels: int) -> torch.dtype:
    """The smallest dtype that holds every class id: uint8, above 256 classes uint16."""
    return next(dtype for dtype in CLASS_MAP_DTYPES if num_labels <= torch.iinfo(dtype).max + 1)


def example_input(program: Program, channels: int, batch: int, size: Size, seed: int = 0) -> torch.Tensor:
    """A random input `(batch, channels, height, width)` of a program: bytes, or normalized values."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, channels, *size)
    if isinstance(program, ClassMap):
        return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return torch.randn(shape, generator=generator)


@contextmanager
def plain_operators() -> Iterator[None]:
    """Deformable attention in plain torch, so that a program needs neither this package nor its kernels."""
    before = os.environ.get("DENSESEG_MSDA")
    os.environ["DENSESEG_MSDA"] = "reference"
    try:
        yield
    finally:
        del os.environ["DENSESEG_MSDA"]
        if before is not None:
            os.environ["DENSESEG_MSDA"] = before


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Graphs are many small objects that live on: to look for garbage among them takes a sixth of the tracing."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def whole_number_padding() -> Iterator[None]:
    """TensorFlow's padding in timm's layers without fractions and maxima, which nested over layers end no tracing."""
    before = timm_padding.get_same_padding
    timm_padding.get_same_padding = same_padding
    try:
        yield
    finally:
        timm_padding.get_same_padding = before


def same_padding(x: int, kernel_size: int, stride: int, dilation: int) -> Any:
    """Pixels that timm's function of this form adds to a side of `x`, so that the output has `ceil(x / stride)`.

    `(ceil(x / stride) - 1) * stride >= x - stride`, so that the sum is negative for kernels below a stride only.
    """
    extent = (kernel_size - 1) * dilation + 1
    added = ((x + stride - 1) // stride - 1) * stride + extent - x
    return added if extent >= stride else torch.sym_max(added, 0)
