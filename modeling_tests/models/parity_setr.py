"""How to compute, with our SETR, the tensors recorded from the official one."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import hf_denseseg
from hf_denseseg.models.setr.convert_setr import fit_positions

INPUTS = ("pixel_values", "labels", "pos_embed_source")
TOLERANCE, SCALE = 2e-6, "largest"  # of each tensor's largest value


def run_case(folder: Path, config: dict[str, Any], inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Load the official weights of a case, run it, and return what we compute under the recorded names."""
    if "pos_embed_source" in inputs:
        return resize_positions(config, inputs["pos_embed_source"])
    model = hf_denseseg.load_official("setr", folder / "weights.safetensors", folder / "config.json")
    found: dict[str, torch.Tensor] = {}

    def keep_aggregated(module: Any, arguments: Any, maps: list[torch.Tensor]) -> None:
        found.update({f"mla_p_{level}": each for level, each in enumerate(maps)})

    if model.aggregation is not None:
        model.aggregation.register_forward_hook(keep_aggregated)
    pixel_values, labels = inputs["pixel_values"], inputs["labels"]
    outputs = model(pixel_values, labels=labels, output_hidden_states=True)
    found |= {f"block_{index}": each for index, each in enumerate(outputs.hidden_states[1:])}
    found["loss_total"] = outputs.loss
    for index, logits in enumerate((outputs.logits, *outputs.auxiliary_logits)):
        # The official heads return logits at the size of the image.
        upsampled = F.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=False)
        found["logits" if index == 0 else f"aux_logits_{index - 1}"] = upsampled
        name, weight = ("loss_decode", 1) if index == 0 else (f"loss_aux_{index - 1}", config["aux_loss_weight"])
        found[name] = weight * model.loss_function(logits=logits, labels=labels)
    return found


def resize_positions(config: dict[str, Any], table: torch.Tensor) -> dict[str, torch.Tensor]:
    """Run a case of the position table alone, wrapped as a checkpoint would hold it."""
    checkpoint = {"pos_embed": table}
    if config["extra_tokens_in_source"] == 2:
        checkpoint["dist_token"] = torch.zeros(1, 1, table.shape[-1])
    fitted = fit_positions(checkpoint, (config["target_grid"], config["target_grid"]))
    return {"pos_embed_resized": fitted["pos_embed"]}
