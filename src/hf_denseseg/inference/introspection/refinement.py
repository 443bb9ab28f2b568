"""The label map of UN-EPT before and after its boundary refinement."""

import inspect

import torch
from transformers import PreTrainedModel

from hf_denseseg.visualization.refinement import Refinement


def can_refine(model: PreTrainedModel) -> bool:
    """Whether a model has a refinement to show."""
    return "output_refined_logits" in inspect.signature(model.forward).parameters


@torch.no_grad()
def look_at_refinement(model: PreTrainedModel, pixel_values: torch.Tensor) -> Refinement:
    """Run a model once on `(1, 3, H, W)`, normalised; on the CPU afterwards."""
    outputs = model(pixel_values=pixel_values, output_refined_logits=True)
    coarse, refined = (each[0].argmax(0).cpu() for each in (outputs.coarse_logits, outputs.refined_logits))
    return Refinement(coarse, refined, outputs.refinement_offsets[0].cpu())
