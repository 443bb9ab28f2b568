"""One call of the kernel, and a model of transformers that runs on it.

pip install kernels transformers
python example.py
"""

from pathlib import Path

import torch
from kernels import (
    LocalLayerRepository,
    Mode,
    get_kernel,
    kernelize,
    replace_kernel_forward_from_hub,
    use_kernel_mapping,
)
from transformers import DeformableDetrConfig, DeformableDetrModel, ResNetConfig
from transformers.models.deformable_detr.modeling_deformable_detr import MultiScaleDeformableAttention

REPOSITORY = "hf-denseseg/ms-deform-attn"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

kernel = get_kernel(REPOSITORY, version=1, backend=DEVICE, trust_remote_code=[REPOSITORY])

# Two levels of 16x16 and 8x8 pixels, 5 queries, 8 heads of 32 channels, 4 points.
value = torch.randn(1, 16 * 16 + 8 * 8, 8, 32, device=DEVICE)
offsets, logits = torch.randn(1, 5, 8, 2, 4, 2, device=DEVICE), torch.randn(1, 5, 8, 2, 4, device=DEVICE)
reference_points = torch.rand(1, 5, 2, 2, device=DEVICE)
print(kernel.ms_deform_attn(value, offsets, logits, reference_points, [16, 16, 8, 8]).shape)  # (1, 5, 256)

backbone = ResNetConfig(
    embedding_size=8,
    hidden_sizes=[8, 16, 32, 64],
    depths=[1, 1, 1, 1],
    out_features=["stage2", "stage3", "stage4"],
)
config = DeformableDetrConfig(backbone_config=backbone, encoder_layers=1, decoder_layers=1, num_queries=10)
model = DeformableDetrModel(config).to(DEVICE).eval()
# transformers does this itself where it finds the version of kernels that it wants.
replace_kernel_forward_from_hub(MultiScaleDeformableAttention, "MultiScaleDeformableAttention")
layer = LocalLayerRepository(Path(kernel.__file__).parent, layer_name="MultiScaleDeformableAttention")
with use_kernel_mapping({"MultiScaleDeformableAttention": {DEVICE: layer}}), torch.no_grad():
    model = kernelize(model, mode=Mode.INFERENCE, device=DEVICE)
    attention = next(module for module in model.modules() if isinstance(module, MultiScaleDeformableAttention))
    print(attention.forward.__func__.__module__)  # that of the kernel
    print(model(torch.randn(1, 3, 64, 64, device=DEVICE)).last_hidden_state.shape)  # (1, 10, 256)
