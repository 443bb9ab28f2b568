"""Deformable attention of an encoder and a decoder in float32 and bfloat16, against plain torch.

    kernels benchmark hf-denseseg/ms-deform-attn --version 1

Sizes: the encoder and the 900 queries of Deformable DETR for an image of 640x640 pixels, 8 heads of 32 channels, 4
levels, 4 points.
"""

import torch
from kernels.benchmark import Benchmark
from torch.nn import functional as F

SHAPES = [80, 80, 40, 40, 20, 20, 10, 10]  # height and width of each level
HEADS, CHANNELS, POINTS, QUERIES = 8, 32, 4, 900
TOKENS = sum(height * width for height, width in zip(SHAPES[::2], SHAPES[1::2], strict=True))


def plain(
    value: torch.Tensor, offsets: torch.Tensor, logits: torch.Tensor, reference_points: torch.Tensor
) -> torch.Tensor:
    """Softmax, sampling locations and one `grid_sample` per level, as models of transformers run without a kernel."""
    batch, queries, heads, levels, points = logits.shape
    weights = logits.flatten(3).softmax(-1).view(logits.shape)
    out, start = 0.0, 0
    for level, (height, width) in enumerate(zip(SHAPES[::2], SHAPES[1::2], strict=True)):
        size = offsets.new_tensor([width, height])
        locations = reference_points[:, :, None, level, None] + offsets[:, :, :, level] / size  # (B, Q, M, P, 2)
        image = value[:, start : start + height * width].permute(0, 2, 3, 1)  # (B, M, D, H * W)
        image = image.reshape(batch * heads, CHANNELS, height, width)
        grid = (2 * locations - 1).transpose(1, 2).reshape(batch * heads, queries, points, 2)
        read = F.grid_sample(image, grid.to(image), align_corners=False)  # (B * M, D, Q, P)
        weight = weights[:, :, :, level].transpose(1, 2).reshape(batch * heads, 1, queries, points)
        out = out + (read * weight).sum(3).view(batch, heads * CHANNELS, queries).transpose(1, 2)
        start += height * width
    return out


class DeformableAttention(Benchmark):
    """Each `benchmark_` method is timed; the `verify_` method of the same name is compared with `self.out`."""

    seed = 0

    def prepare(self, queries: int, dtype: torch.dtype, gradients: bool = False) -> None:
        """Make the inputs; offsets, logits and reference points are float32 as the kernel wants them."""
        reference = torch.rand(1, queries, len(SHAPES) // 2, 2, device=self.device)
        shape = (1, queries, HEADS, len(SHAPES) // 2, POINTS)
        self.inputs = [
            torch.randn(1, TOKENS, HEADS, CHANNELS, device=self.device, dtype=dtype).requires_grad_(gradients),
            (2 * torch.randn(*shape, 2, device=self.device)).requires_grad_(gradients),
            torch.randn(shape, device=self.device).requires_grad_(gradients),
        ]
        self.reference = reference

    def gradient(self, out: torch.Tensor) -> torch.Tensor:
        """Gradient of the sum of the squares, with respect to the values."""
        return torch.autograd.grad(out.float().square().sum(), self.inputs)[0]

    def forward(self) -> torch.Tensor:
        """The kernel's output."""
        return self.kernel.ms_deform_attn(*self.inputs, self.reference, SHAPES)

    def setup_encoder_float32(self) -> None:
        """One query for every position."""
        self.prepare(TOKENS, torch.float32)

    def benchmark_encoder_float32(self) -> None:
        """Forward."""
        self.out = self.forward()

    def verify_encoder_float32(self) -> torch.Tensor:
        """The same in plain torch."""
        return plain(*self.inputs, self.reference)

    def setup_encoder_bfloat16(self) -> None:
        """Values in bfloat16."""
        self.prepare(TOKENS, torch.bfloat16)

    def benchmark_encoder_bfloat16(self) -> None:
        """Forward."""
        self.out = self.forward().float()

    def verify_encoder_bfloat16(self) -> torch.Tensor:
        """Plain torch in float32: coordinates in bfloat16 would be wrong by half a pixel."""
        return plain(self.inputs[0].float(), *self.inputs[1:], self.reference)

    def setup_decoder_float32(self) -> None:
        """900 queries."""
        self.prepare(QUERIES, torch.float32)

    def benchmark_decoder_float32(self) -> None:
        """Forward."""
        self.out = self.forward()

    def verify_decoder_float32(self) -> torch.Tensor:
        """The same in plain torch."""
        return plain(*self.inputs, self.reference)

    def setup_encoder_float32_backward(self) -> None:
        """With gradients."""
        self.prepare(TOKENS, torch.float32, gradients=True)

    def benchmark_encoder_float32_backward(self) -> None:
        """Forward and backward."""
        self.out = self.gradient(self.forward())

    def verify_encoder_float32_backward(self) -> torch.Tensor:
        """The same in plain torch."""
        return self.gradient(plain(*self.inputs, self.reference))

    def setup_encoder_bfloat16_backward(self) -> None:
        """With gradients, values in bfloat16."""
        self.prepare(TOKENS, torch.bfloat16, gradients=True)

    def benchmark_encoder_bfloat16_backward(self) -> None:
        """Forward and backward."""
        self.out = self.gradient(self.forward()).float()

    def verify_encoder_bfloat16_backward(self) -> torch.Tensor:
        """Plain torch in float32."""
        value, self.inputs[0] = self.inputs[0], self.inputs[0].detach().float().requires_grad_()
        out = self.gradient(plain(*self.inputs, self.reference))
        self.inputs[0] = value
        return out
