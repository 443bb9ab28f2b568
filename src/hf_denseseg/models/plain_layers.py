"""When two layers may be computed as one: BatchNorm folded into the convolution before it.

A fold reads weights past the modules that own them. That is right only while a module does nothing but what its class
says: offloading replaces `forward` and keeps the weights elsewhere, adapters and quantizers replace the module or its
weights, hooks want to be called.
"""

from typing import cast

import torch
from torch import nn

PLAIN = (nn.Conv2d, nn.BatchNorm2d)


def are_plain(*layers: nn.Module, own: tuple[type[nn.Module], ...] = ()) -> bool:
    """Return whether each layer is exactly of a class in `PLAIN` or `own`, with its own `forward` and plain weights.

    False under hooks, offloading, parametrizations, adapters, and quantized or sharded weights.
    """
    return all(type(layer) in (*PLAIN, *own) and _is_untouched(layer) for layer in layers)


def _is_untouched(layer: nn.Module) -> bool:
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    if "forward" in layer.__dict__ or any(hooks):
        return False
    return all(type(each) in (nn.Parameter, torch.Tensor) for each in layer._parameters.values() if each is not None)


def fold_batch_norm(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[torch.Tensor, torch.Tensor]:
    """Return kernel and bias of one convolution that computes `norm(convolution(x))` with the running statistics.

    norm(W x + b) = (scale * W) x + (beta - (mean - b) * scale), with scale = gamma / sqrt(variance + eps).
    """
    mean, variance = cast(torch.Tensor, norm.running_mean), cast(torch.Tensor, norm.running_var)
    scale = norm.weight * (variance + norm.eps).rsqrt()
    if convolution.bias is not None:
        mean = mean - convolution.bias
    return convolution.weight * scale[:, None, None, None], norm.bias - mean * scale


__all__ = ["PLAIN", "are_plain", "fold_batch_norm"]
