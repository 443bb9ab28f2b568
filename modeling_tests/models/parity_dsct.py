"""How the tensors recorded from the official Conformer are found in our DSCT."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

import hf_denseseg

INPUTS = ("pixel_values",)
TOLERANCE = 1e-4  # of each tensor's standard deviation


def run_case(folder: Path, config: dict[str, Any], inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Load the official weights of a case, run it, and return what we compute under the recorded names."""
    model = hf_denseseg.load_official("dsct", folder / "weights.safetensors", folder / "config.json")
    found: dict[str, torch.Tensor] = {}
    watch(model.dsct.encoder, config["stage_end_blocks"], found)
    outputs = model(inputs["pixel_values"])
    found["logits"] = outputs.logits
    found["logits_conv"], found["logits_trans"] = outputs.spatial_logits, outputs.context_logits
    return found


def watch(encoder: nn.Module, stage_ends: list[int], found: dict[str, torch.Tensor]) -> None:
    """Let hooks write the intermediate results into `found`; token tensors are split into class token and patches."""

    def keep(module: nn.Module, name: str, position: int | None = None) -> None:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            found[name] = output if position is None else output[position]

        module.register_forward_hook(hook)

    def keep_tokens(module: nn.Module, name: str, position: int | None = None) -> None:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            tokens = output if position is None else output[position]
            found[f"{name}_cls"], found[f"{name}_patches"] = tokens[:, :1], tokens[:, 1:]

        module.register_forward_hook(hook)

    keep(encoder.stem, "stem")
    keep(encoder.spatial, "spatial_block1", 0)
    keep_tokens(encoder.context, "context_block1")
    keep_tokens(encoder.layernorm, "context_final_norm")
    for index, block in enumerate(encoder.blocks, start=2):
        keep(block.spatial_to_context, f"c2t_block{index}_patches")
        keep(block.context_to_spatial, f"t2c_block{index}")
    for stage, end in enumerate(stage_ends, start=1):
        keep(encoder.blocks[end - 2], f"spatial_stage{stage}", 0)
        keep_tokens(encoder.blocks[end - 2], f"context_stage{stage}", 1)
