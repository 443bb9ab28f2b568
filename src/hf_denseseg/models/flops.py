"""Count parameters, multiply-adds and activations of a model on the meta device, where nothing is allocated."""

from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

_ATEN = torch.ops.aten
_LAYERS = {_ATEN.convolution, _ATEN.mm, _ATEN.addmm}
_NORMS = {_ATEN.native_batch_norm, _ATEN._native_batch_norm_legit, _ATEN._native_batch_norm_legit_no_training}
_NORMS |= {_ATEN.cudnn_batch_norm, _ATEN._batch_norm_no_update}


@dataclass
class OperationCounts:
    """Operations of one forward pass.

    Args:
        layer_multiply_adds: of convolutions and linear layers, bias not counted.
        product_multiply_adds: of products between activations (attention).
        norm_outputs: elements that BatchNorms return.
        activations: elements that convolutions, linear layers and products return.
    """

    layer_multiply_adds: int = 0
    product_multiply_adds: int = 0
    norm_outputs: int = 0
    activations: int = 0


@dataclass(frozen=True)
class ModelInfo:
    """Size and cost of a model for one image.

    Args:
        name: published name, or class of the model.
        image_size: (height, width) in pixels.
        parameters: number of parameters.
        multiply_adds: as the paper of the family counts them.
        executed_multiply_adds: of the model as written here, each product counted once.
        activations: elements that convolutions, linear layers and attention products return.
    """

    name: str
    image_size: tuple[int, int]
    parameters: int
    multiply_adds: int
    executed_multiply_adds: int
    activations: int


def _cache_key(value: Any) -> Any:
    """Everything that an operation on the meta device depends on; raises TypeError for what cannot be a key."""
    if isinstance(value, torch.Tensor):
        if not value.is_meta:
            raise TypeError
        return value.shape, value.stride(), value.dtype
    if isinstance(value, list | tuple):
        return tuple(map(_cache_key, value))
    hash(value)
    return type(value), value


def _like(value: Any) -> Any:
    """New tensors of the same shape, strides and dtype; raises TypeError for tensors with values."""
    if isinstance(value, torch.Tensor):
        if not value.is_meta:
            raise TypeError
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    return type(value)(map(_like, value)) if isinstance(value, list | tuple) else value


@cache
def _makes_new_tensors(func: OpOverload) -> bool:
    return not any(each.alias_info for each in (*func._schema.arguments, *func._schema.returns))


_SEEN: dict[Any, tuple[Any, dict[str, int]]] = {}
"""Operation and key of its arguments -> its output, and what it adds to which count."""


@dataclass
class _Counter(TorchDispatchMode):
    """Count operations; the counts of one that was seen before with arguments of the same shapes are reused."""

    counts: OperationCounts = field(default_factory=OperationCounts)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(
        self, func: OpOverload, types: Collection[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not _makes_new_tensors(func):
            return self._count(func, args, kwargs)
        try:
            key = func, _cache_key(args), _cache_key(tuple(kwargs.items()))
        except TypeError:
            return self._count(func, args, kwargs)
        if key not in _SEEN:
            before = vars(self.counts).copy()
            output = self._count(func, args, kwargs)
            added = {name: now - before[name] for name, now in vars(self.counts).items() if now != before[name]}
            with suppress(TypeError):  # the output holds values (an operation without tensors): not reusable
                _SEEN[key] = _like(output), added
            return output
        output, added = _SEEN[key]
        for name, more in added.items():
            setattr(self.counts, name, getattr(self.counts, name) + more)
        return _like(output)

    def _count(self, func: OpOverload, args: tuple, kwargs: dict[str, Any]) -> Any:
        packet = func._overloadpacket
        if packet not in flop_registry and packet not in _NORMS and func is not _ATEN.size.default:
            # Composite operations such as `linear` are counted by their parts.
            with self:
                decomposed = func.decompose(*args, **kwargs)
            if decomposed is not NotImplemented:
                return decomposed
        output = func(*args, **kwargs)
        if packet in _NORMS:
            self.counts.norm_outputs += output[0].numel()
        elif packet in flop_registry:
            operations = flop_registry[packet](*args, **kwargs, out_val=output) // 2
            if packet in _LAYERS:
                self.counts.layer_multiply_adds += operations
            else:
                self.counts.product_multiply_adds += operations
            self.counts.activations += (output[0] if isinstance(output, tuple) else output).numel()
        return output


def count_operations(run: Callable[[], object]) -> OperationCounts:
    """Count what `run()` computes; use modules and tensors on the meta device."""
    counter = _Counter()
    with torch.no_grad(), counter:
        run()
    return counter.counts


def count_forward(model: nn.Module, image_size: tuple[int, int], channels: int = 3) -> OperationCounts:
    """Count one forward pass of `model` (on the meta device) over one image of (height, width) pixels."""
    pixel_values = torch.empty(1, channels, *image_size, device="meta")
    return count_operations(lambda: model.eval()(pixel_values=pixel_values))
