"""Run the deformable attention of any transformers model on our kernel."""

import importlib
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from hf_denseseg.errors import InputError, RunError
from hf_denseseg.ops.kernel_loading import find_kernel

Model = TypeVar("Model", bound=nn.Module)
LAYER = "MultiScaleDeformableAttention"  # the name under which transformers and the kernels hub know the layer


def kernelize_deformable_attention(model: Model) -> Model:
    """Replace the sampling step in Deformable DETR, RT-DETR, Grounding DINO and their relatives, for CPU and CUDA.

    Uses the mapping of the kernels library, as `from_pretrained(..., use_kernels=True)` does for the kernels that
    transformers knows, none of which is for the CPU. Training and `torch.compile` keep working. Weights are unchanged,
    and saving is not affected.

    Args:
        model: a model of transformers with `MultiScaleDeformableAttention` layers, on the device it will run on.

    Returns:
        The same model.

    Raises:
        InputError: if the model has no such layer.
        RunError: if there is no kernel for its device, with the reasons.
    """
    layers = [module for module in model.modules() if type(module).__name__ == LAYER]
    if not layers:
        raise InputError(f"{type(model).__name__} has no {LAYER} layer; models such as Deformable DETR have.")
    device = next(model.parameters()).device.type
    search = find_kernel(device)
    if search.kernel is None:
        raise RunError(f"there is no deformable-attention kernel for {device}: {search.reasons()}.")
    kernels: Any = importlib.import_module("kernels")
    for layer_class in {type(layer) for layer in layers}:
        kernels.replace_kernel_forward_from_hub(layer_class, LAYER)
    assert search.kernel.__file__ is not None
    repository = kernels.LocalLayerRepository(Path(search.kernel.__file__).parent, layer_name=LAYER)
    with kernels.use_kernel_mapping({LAYER: {device: repository}}, inherit_mapping=False):
        return kernels.kernelize(model, mode=kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE, device=device)
