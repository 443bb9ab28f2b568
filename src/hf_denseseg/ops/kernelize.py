"""Run the deformable attention of any transformers model on our kernel."""

import functools
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from torch import Tensor, nn

from hf_denseseg.errors import InputError, RunError
from hf_denseseg.ops.kernel_loading import find_kernel

Model = TypeVar("Model", bound=nn.Module)
LAYER = "MultiScaleDeformableAttention"  # the name under which transformers and the kernels hub know the layer
FUNCTION = "multi_scale_deformable_attention"  # what Mask2Former and OneFormer call instead of a layer


def kernelize_deformable_attention(model: Model) -> Model:
    """Replace the sampling step in Deformable DETR, RT-DETR, Grounding DINO and their relatives, for CPU and CUDA.

    Uses the mapping of the kernels library, as `from_pretrained(..., use_kernels=True)` does for the kernels that
    transformers knows, none of which is for the CPU. Training and `torch.compile` keep working. Weights are unchanged,
    and saving is not affected. Mask2Former and OneFormer have no such layer: the function that they call is replaced
    in their modules, for all of their models in this process.

    Args:
        model: a model of transformers with deformable attention, on the device it will run on.

    Returns:
        The same model.

    Raises:
        InputError: if the model has no deformable attention that transformers lets others replace.
        RunError: if there is no kernel for its device, with the reasons.
    """
    layers = [module for module in model.modules() if type(module).__name__ == LAYER]
    owners = [sys.modules[each] for each in {type(module).__module__ for module in model.modules()}]
    callers = [owner for owner in owners if hasattr(owner, FUNCTION)]
    if not layers and not callers:
        raise InputError(f"{type(model).__name__} has no {LAYER} layer; models such as Deformable DETR have.")
    device = next(model.parameters()).device.type
    search = find_kernel(device)
    if search.kernel is None:
        raise RunError(f"there is no deformable-attention kernel for {device}: {search.reasons()}.")
    for owner in callers:
        _replace_function(owner)
    if not layers:
        return model
    kernels: Any = importlib.import_module("kernels")
    for layer_class in {type(layer) for layer in layers}:
        kernels.replace_kernel_forward_from_hub(layer_class, LAYER)
    assert search.kernel.__file__ is not None
    repository = kernels.LocalLayerRepository(Path(search.kernel.__file__).parent, layer_name=LAYER)
    with kernels.use_kernel_mapping({LAYER: {device: repository}}, inherit_mapping=False):
        return kernels.kernelize(model, mode=kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE, device=device)


def _replace_function(owner: ModuleType) -> None:
    """Let a module's function run on the kernel where there is one for the device of its values."""
    plain: Callable[..., Tensor] = getattr(owner, FUNCTION)
    if hasattr(plain, "__wrapped__"):  # replaced before
        return

    @functools.wraps(plain)
    def attend(value: Tensor, shapes: Any, sampling_locations: Tensor, attention_weights: Tensor) -> Tensor:
        kernel = find_kernel(value.device.type).kernel
        if kernel is None:
            return plain(value, shapes, sampling_locations, attention_weights)
        sizes = [int(size) for shape in shapes for size in shape]
        return kernel.sample(value, sampling_locations, attention_weights, sizes)

    setattr(owner, FUNCTION, attend)
