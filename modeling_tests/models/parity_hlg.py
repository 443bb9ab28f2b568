"""How to compute, with our HLG, the tensors recorded from the repaired official one."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import hf_denseseg

INPUTS = ("pixel_values", "labels")
TOLERANCE, SCALE = 1e-5, "largest"  # of each tensor's largest value


def tokens_of(features: torch.Tensor) -> torch.Tensor:
    return features.flatten(2).transpose(1, 2)


def run_case(folder: Path, config: dict[str, Any], inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Load the official weights of a case, run it, and return what we compute under the recorded names."""
    model = hf_denseseg.load_official("hlg", folder / "weights.safetensors", folder / "config.json")
    found: dict[str, torch.Tensor] = {}

    def keep(name, change=lambda features: features):
        return lambda module, arguments, output: found.update({name: change(output)})

    encoder = model.base_model.encoder
    for index, layer in enumerate(encoder.stages[0]):
        layer.register_forward_hook(keep(f"block1_{index}_tokens", tokens_of))
    if "decoder_layer_1" in inputs:
        model.decode_head.layers[1].register_forward_hook(keep("decoder_layer_1", tokens_of))
    outputs = model(inputs["pixel_values"], **({"labels": inputs["labels"]} if "labels" in inputs else {}))
    maps = model.base_model(inputs["pixel_values"], output_feature_maps=True).feature_maps
    found |= {f"stage_{index}": each for index, each in enumerate(maps, start=1)}
    if "labels" in inputs:
        size = inputs["labels"].shape[-2:]
        found["logits"] = F.interpolate(outputs.logits, size=size, mode="bilinear", align_corners=False)
        found["aux_logits"] = outputs.auxiliary_logits
        found["loss_total"] = outputs.loss
        found["loss_decode"] = model.loss_function(logits=outputs.logits, labels=inputs["labels"])
        found["loss_aux"] = 0.4 * model.loss_function(logits=outputs.auxiliary_logits, labels=inputs["labels"])
    elif "logits" in inputs:
        found["logits"] = outputs.logits
    return found
