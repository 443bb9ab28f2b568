"""The label map of UN-EPT before and after its boundary refinement."""

import inspect

import torch
from transformers import PreTrainedModel

from hf_denseseg.models.one_logit import two_logits
from hf_denseseg.visualization.refinement import Refinement


def can_refine(model: PreTrainedModel) -> bool:
    """Whether a model refines boundaries."""
    asked = "output_refined_logits" in inspect.signature(model.forward).parameters
    return asked and getattr(model.config, "use_spatial_branch", True)


@torch.no_grad()
def inspect_refinement(model: PreTrainedModel, pixel_values: torch.Tensor) -> Refinement:
    """Run a model once on `(1, 3, H, W)`, normalized; the maps are on the CPU."""
    outputs = model(pixel_values=pixel_values, output_refined_logits=True)
    maps = (two_logits(each)[0] for each in (outputs.coarse_logits, outputs.refined_logits))
    coarse, refined = (each.argmax(0).cpu() for each in maps)
    return Refinement(coarse, refined, outputs.refinement_offsets[0].cpu())
