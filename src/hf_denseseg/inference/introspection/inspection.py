"""The internals of a model: attention of picked points, feature maps, similarity of the position embeddings.

The SETR paper shows these (IJCV 2024, Figures 7 and 10 to 14, Appendix A). Nothing here knows a family: the grid of
tokens follows from their number and the aspect ratio of the image, attention is read where modules return it, features
are the model's `hidden_states` and the outputs of the parts of its `decode_head`. In a model of two streams only
attention is traced: what convolutions carry from place to place is not in the rollout.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_denseseg.data.reading.pixels import as_tensor
from hf_denseseg.errors import InputError
from hf_denseseg.inference.introspection.attention import AttentionReader, LayerAttention
from hf_denseseg.inference.introspection.features import DecoderReader, SpatialReader, layer_maps
from hf_denseseg.inference.introspection.positions import position_table
from hf_denseseg.inference.introspection.refinement import can_refine
from hf_denseseg.inference.preprocessing import Preprocessing, resized
from hf_denseseg.models.channels import image_channels

KINDS = ("attention", "features", "positions", "refinement")
SIDE = 32  # sides of an inspected image are multiples of it (and of the patch), so that no stage rounds them


@dataclass(frozen=True)
class ShowSettings:
    """Which figures of a model's internals to make.

    Args:
        kinds: some of `KINDS`.
        points: picked points (x, y) in pixels of the image, from its upper left corner; empty is its center.
        layers: layers shown, counted from 1; empty is all for features, four for attention.
        size: longest side in pixels of the image that the model is run on. Memory grows with its fourth power.

    Raises:
        InputError: `size` is less than 32 pixels.
    """

    kinds: tuple[str, ...]
    points: tuple[tuple[float, float], ...] = ()
    layers: tuple[int, ...] = ()
    size: int = 512

    def __post_init__(self) -> None:
        if self.size < SIDE:
            raise InputError(f"Show size is {self.size} pixels; at least {SIDE} are needed (the default is 512).")

    def to_dict(self) -> dict[str, Any]:
        """Values as JSON holds them."""
        return json.loads(json.dumps(asdict(self)))


@dataclass
class Inspection:
    """What one run of a model showed; empty where it shows nothing.

    Args:
        attention: one entry per layer.
        features: `(C, h, w)` after each layer.
        spatial: `(C, h, w)` after the stages of a convolution stream beside the layers.
        decoder: `(C, h, w)` after each part of the decode head, in the order they run in.
    """

    attention: list[LayerAttention] = field(default_factory=list)
    features: list[torch.Tensor] = field(default_factory=list)
    spatial: dict[str, torch.Tensor] = field(default_factory=dict)
    decoder: dict[str, torch.Tensor] = field(default_factory=dict)


@torch.no_grad()
def inspect_model(
    model: PreTrainedModel,
    pixel_values: torch.Tensor,
    points: Sequence[tuple[float, float]] = ((0.5, 0.5),),
    kinds: Sequence[str] = KINDS,
) -> Inspection:
    """Run a model once and read its internals; afterwards it is as before.

    Args:
        model: segmentation model in eval mode.
        pixel_values: `(1, 3, H, W)`, normalized; `inspection_view` gives a size that fits.
        points: picked points (x, y) as fractions of width and height, from 0 to less than 1.
        kinds: what is wanted, some of `KINDS`; the rest stays empty.
    """
    size = (pixel_values.shape[-2], pixel_values.shape[-1])
    reader, found = AttentionReader(size, points), Inspection()
    readers = (SpatialReader(model), DecoderReader(model)) if "features" in kinds else ()
    hooks = [hook for each in readers for hook in each.hooks]
    implementation = model.config._attn_implementation
    try:
        if "attention" in kinds:
            # Only attention that is written out has weights to show.
            model.set_attn_implementation("eager")
            hooks += [module.register_forward_hook(reader) for module in model.modules()]
        outputs = model(pixel_values=pixel_values, output_hidden_states="features" in kinds)
    finally:
        model.set_attn_implementation(implementation)
        for hook in hooks:
            hook.remove()
    found.attention = reader.layers if reader.uniform else []
    found.spatial, found.decoder = (each.maps for each in readers) if readers else ({}, {})
    layers = getattr(model.config, "num_hidden_layers", None)
    found.features = layer_maps(outputs.hidden_states or (), size, layers)
    return found


def check_showable(model: PreTrainedModel, settings: ShowSettings) -> None:
    """Check with a small blank image whether a model can show what is asked for.

    Raises:
        InputError: it cannot, or it has no such layer.
    """
    weight = next(model.parameters(), None)
    if weight is None:  # an exported model
        raise InputError("An exported model does not show its internals. Give the checkpoint, or leave out --show.")
    side = _view_unit(model)
    found = inspect_model(model, weight.new_zeros(1, image_channels(model.config), 2 * side, 3 * side))
    counts = {"attention": len(found.attention), "features": len(found.features)}
    possible = [kind for kind, count in counts.items() if count]
    possible += ["positions"] if position_table(model) else []
    possible += ["refinement"] if can_refine(model) else []
    reasons = {
        "attention": "not every layer attends from all patches to all patches of one grid",
        "features": "its layers give no maps",
        "positions": "its encoder learns no table of positions",
        "refinement": "it refines no boundaries",
    }
    for kind in settings.kinds:
        if kind not in possible:
            able = f"It can show: {', '.join(possible)}." if possible else "It can show nothing; leave out --show."
            raise InputError(f"{type(model).__name__} cannot show {kind}: {reasons[kind]}. {able}")
    last = min((counts[kind] for kind in settings.kinds if kind in counts), default=0)
    for layer in settings.layers:
        if last and not 1 <= layer <= last:
            raise InputError(f"Layer {layer} does not exist. {type(model).__name__} has layers 1 to {last}.")


def inspection_view(
    image: torch.Tensor, model: PreTrainedModel, size: int, preprocessing: Preprocessing
) -> torch.Tensor:
    """Resize and normalize an image that a model is inspected on.

    Args:
        image: `(C, H, W)` uint8 or uint16.
        model: decides device, dtype and the multiple that both sides are rounded down to.
        size: longest side in pixels; smaller images are not enlarged.
        preprocessing: of the checkpoint.

    Returns:
        `(1, C, h, w)`, normalized; sides are at least one multiple.
    """
    unit, weight = _view_unit(model), next(model.parameters())
    factor = min(size / max(image.shape[-2:]), 1)
    view = [max(int(side * factor) // unit, 1) * unit for side in image.shape[-2:]]
    pixels = as_tensor(resized(image.to(weight.device), (view[0], view[1])))  # type: ignore[arg-type]
    return preprocessing.normalize(pixels, weight.dtype)[None]


def _view_unit(model: PreTrainedModel) -> int:
    patch = getattr(model.config, "patch_size", None)
    return math.lcm(SIDE, patch) if isinstance(patch, int) else SIDE
