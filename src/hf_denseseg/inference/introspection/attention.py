"""What goes on inside a model: attention of picked points, features of the layers, likeness of the positions.

The SETR paper shows these (IJCV 2024, Figures 7 and 10 to 14, Appendix A). Nothing here knows a family: the grid of
tokens follows from their number and the shape of the picture, attention is read where modules hand it out, features
are the model's `hidden_states` and what the parts of its `decode_head` give. In a model of two streams only attention
is traced: what convolutions carry from place to place is not in the rollout.
"""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms.v2.functional import resize
from transformers import PreTrainedModel

from hf_denseseg.data.image_sizes import scaled_size
from hf_denseseg.errors import InputError
from hf_denseseg.inference.introspection.refinement import can_refine
from hf_denseseg.inference.preprocessing import Preprocessing

KINDS = ("attention", "features", "positions", "refinement")
SIDE = 32  # sides of a picture looked into are multiples of it (and of the patch): no stage of an encoder rounds them
STORED_SIDE = 256  # longest side of a stored feature map; larger ones are averaged down
EXTRA_TOKENS = 2  # at most so many tokens besides the patches: class token, distillation token

Size = tuple[int, int]


@dataclass(frozen=True)
class ShowSettings:
    """Which pictures of a model's inside to make.

    Args:
        kinds: some of `KINDS`.
        points: picked points (x, y) in pixels of the picture, from its upper left corner; empty is its centre.
        layers: layers shown, counted from 1; empty is all for features, four for attention.
        size: longest side in pixels at which the model looks. Memory grows with its fourth power.

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
class LayerAttention:
    """How picked points attend in one layer.

    Args:
        heads: `(points, heads, h, w)` share of attention that each head gives to each patch.
        rollout: `(points, h, w)` attention traced back from this layer to the patches of the picture.
    """

    heads: torch.Tensor
    rollout: torch.Tensor


@dataclass
class Inspection:
    """What one look into a model gave; empty where it shows nothing.

    Args:
        attention: one entry per layer.
        features: `(C, h, w)` after each layer.
        decoder: `(C, h, w)` after each part of the decode head, in the order of their work.
    """

    attention: list[LayerAttention] = field(default_factory=list)
    features: list[torch.Tensor] = field(default_factory=list)
    decoder: dict[str, torch.Tensor] = field(default_factory=dict)


def position_similarity(table: torch.Tensor, grid: Size) -> torch.Tensor:
    """Cosine similarity of the position embedding of each patch with all others (Figure 10).

    Args:
        table: `(1, extra + h*w, C)` or without the leading 1; entries before the last h*w are left out.
        grid: (h, w) of the patches.

    Returns:
        `(h, w, h, w)` from -1 to 1; the first two name the patch, the last two the one it is compared with.
    """
    height, width = grid
    patches = F.normalize(table.detach().float().flatten(0, -2)[-height * width :], dim=-1)
    return (patches @ patches.T).clamp(-1, 1).view(height, width, height, width)


def attention_rollout(attentions: Iterable[torch.Tensor]) -> torch.Tensor:
    """Trace attention back through all layers: the product of 0.5 A + 0.5 I, rows summing to 1 (Abnar, Zuidema 2020).

    Args:
        attentions: `(N, N)` or `(heads, N, N)` of each layer, first layer first; heads are averaged.

    Returns:
        `(N, N)`: how much of each token of the picture (column) is in each token of the last layer (row).
    """
    rollout = None
    for attention in attentions:
        rollout = _roll(rollout, attention)
    if rollout is None:
        raise InputError("Rollout needs the attention of at least one layer.")
    return rollout


def _roll(rollout: torch.Tensor | None, attention: torch.Tensor) -> torch.Tensor:
    """Go on by one layer; half of a token comes past the attention, on the residual path."""
    mean = attention.float().flatten(0, -3).mean(0) if attention.ndim > 2 else attention.float()
    mixed = mean / 2 + torch.eye(len(mean), device=mean.device) / 2
    mixed = mixed / mixed.sum(-1, keepdim=True)
    return mixed if rollout is None else mixed @ rollout


def feature_picture(features: torch.Tensor, size: Size) -> torch.Tensor:
    """Paint a feature map: its first three principal components are red, green and blue.

    Offset, scale and rotation of the channels do not change the picture. The largest score of each component counts as
    positive, and a component's colours span its 1st to 99th percentile.

    Args:
        features: `(C, h, w)`.
        size: `(height, width)` of the picture.

    Returns:
        `(3, height, width)` uint8.
    """
    points = features.detach().double().cpu().flatten(1).T  # (h*w, C)
    points = points - points.mean(0)
    _, vectors = torch.linalg.eigh(points.T @ points)  # ascending
    scores = points @ vectors.flip(-1)[:, :3]
    largest = scores.gather(0, scores.abs().argmax(0, keepdim=True))
    scores = scores * torch.where(largest < 0, -1.0, 1.0)
    low, high = scores.quantile(torch.tensor([0.01, 0.99], dtype=scores.dtype), dim=0)
    deviation = scores.std(0, correction=0)
    # A component without variance is rounding noise: it stays at the middle of its channel.
    flat = deviation <= 1e-6 * deviation.max()
    scaled = torch.where(flat, 0.5, (scores - low) / (high - low).clamp(min=torch.finfo(scores.dtype).tiny))
    scaled = F.pad(scaled.clamp(0, 1), (0, 3 - scaled.shape[1]), value=0.5)
    colors = scaled.T.reshape(1, 3, *features.shape[-2:]).float()
    colors = F.interpolate(colors, size=size, mode="bilinear", align_corners=False)
    return (colors[0] * 255).round().to(torch.uint8)


def position_table(model: PreTrainedModel) -> tuple[torch.Tensor, Size] | None:
    """The learned table of absolute positions `(1, extra + h*w, C)` and its grid (h, w); None if there is none.

    It is the parameter called `position_embeddings`; the grid is that of the training picture, `image_size`.
    """
    for name, parameter in model.named_parameters():
        if name.endswith("position_embeddings") and parameter.ndim == 3:
            side = model.config.image_size
            height, width = (side, side) if isinstance(side, int) else side
            return parameter, (height // model.config.patch_size, width // model.config.patch_size)
    return None


def token_grid(length: int, size: Size) -> Size | None:
    """Grid (h, w) of a sequence of tokens: as many patches, apart from extra leading tokens, in the picture's shape.

    Args:
        length: number of tokens.
        size: (height, width) of the picture, multiples of the patch.

    Returns:
        None if no grid fits. Two never do, except for a handful of tokens.
    """
    common = math.gcd(*size)
    height, width = size[0] // common, size[1] // common
    for patches in range(length, max(length - EXTRA_TOKENS, 1) - 1, -1):
        factor = math.isqrt(patches // (height * width))
        if factor and factor**2 * height * width == patches:
            return factor * height, factor * width
    return None


class _AttentionReader:
    """Forward hook that reads the attention of picked points where a module gives `(tokens, weights)`.

    Only the rows of the points are kept, so that no more than one layer's weights are in memory. `uniform` turns false
    when some attention does not go from all tokens to all tokens of one grid (windows, reduced keys, several grids).
    """

    def __init__(self, size: Size, points: Sequence[tuple[float, float]]) -> None:
        self.size = size
        self.points = points
        self.layers: list[LayerAttention] = []
        self.uniform = True
        self._seen: torch.Tensor | None = None
        self._rollout: torch.Tensor | None = None

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if not isinstance(output, tuple) or len(output) < 2:
            return
        tokens, weights = output[:2]
        if not isinstance(tokens, torch.Tensor) or not isinstance(weights, torch.Tensor):
            return
        # Convolution blocks give pairs too, but of maps. A module may hand on the weights of the one inside it.
        if tokens.ndim != 3 or weights.ndim != 4 or weights is self._seen:
            return
        self._seen = weights
        length = weights.shape[-1]
        grid = token_grid(length, self.size)
        known = self._rollout is None or len(self._rollout) == length
        if grid is None or weights.shape[0] != 1 or weights.shape[-2] != length or not known:
            self.uniform = False
        if self.uniform and grid is not None:
            self._keep(weights[0], grid)

    def _keep(self, weights: torch.Tensor, grid: Size) -> None:
        self._rollout = _roll(self._rollout, weights)
        extra = weights.shape[-1] - grid[0] * grid[1]
        rows = [extra + int(y * grid[0]) * grid[1] + int(x * grid[1]) for x, y in self.points]
        heads = weights[:, rows, extra:].transpose(0, 1)  # (heads, points, h*w) -> (points, heads, h*w)
        rollout = self._rollout[rows, extra:]
        self.layers.append(LayerAttention(heads.float().cpu().unflatten(-1, grid), rollout.cpu().unflatten(-1, grid)))


@torch.no_grad()
def inspect_model(
    model: PreTrainedModel,
    pixel_values: torch.Tensor,
    points: Sequence[tuple[float, float]] = ((0.5, 0.5),),
    kinds: Sequence[str] = KINDS,
) -> Inspection:
    """Look once into a model at work; afterwards it is as before.

    Args:
        model: segmentation model in eval mode.
        pixel_values: `(1, 3, H, W)`, normalised; `picture_view` gives a size that fits.
        points: picked points (x, y) as shares of width and height, from 0 to less than 1.
        kinds: what is wanted, some of `KINDS`; the rest stays empty.
    """
    size = (pixel_values.shape[-2], pixel_values.shape[-1])
    reader, found = _AttentionReader(size, points), Inspection()
    decoder = _DecoderReader(model) if "features" in kinds else None
    hooks = decoder.hooks if decoder else []
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
    found.decoder = decoder.maps if decoder else {}
    found.features = _layer_maps(outputs.hidden_states or (), size)
    return found


def _layer_maps(states: Sequence[torch.Tensor], size: Size) -> list[torch.Tensor]:
    """The hidden states after each layer as maps; empty if one of them is no map and fits no grid."""
    # Our models put what enters the first layer in front; it has the shape of what comes out. Where the first two
    # differ these are stages.
    if len(states) > 1 and states[0].shape == states[1].shape:
        states = states[1:]
    maps = []
    for state in states:
        if state.ndim == 3:
            grid = token_grid(state.shape[1], size)
            if grid is None:
                return []
            state = state[:, -grid[0] * grid[1] :].transpose(1, 2).unflatten(2, grid)
        maps.append(_reduced(state))
    return maps


class _DecoderReader:
    """Forward hooks that read the maps of the parts of `decode_head`, lists opened, in the order of their work.

    For PUP the paper's U1 to U5 are these, apart from `norm`: up-sampled when they are shown instead of before. Left
    out are parts without weights (dropout), and a norm right behind a part that is shown.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.maps: dict[str, torch.Tensor] = {}
        self.hooks = []
        self._last: torch.Tensor | None = None
        head = getattr(model, "decode_head", nn.Module())
        for name, part in head.named_children():
            inside = part.named_children() if isinstance(part, nn.ModuleList) else [("", part)]
            for number, each in inside:
                if any(True for _ in each.parameters()):
                    self.hooks.append(each.register_forward_hook(self._reader(f"{name}.{number}".rstrip("."))))

    def _reader(self, name: str) -> Callable:
        def read(module: nn.Module, args: tuple, output: Any) -> None:
            if not isinstance(output, torch.Tensor) or output.ndim != 4:
                return
            norm = all(parameter.ndim == 1 for parameter in module.parameters())
            if not (norm and args and args[0] is self._last):
                self.maps[name] = _reduced(output)
            self._last = output

        return read


def _reduced(features: torch.Tensor) -> torch.Tensor:
    """`(1, C, H, W)` -> `(C, h, w)` on the CPU, averaged down to `STORED_SIDE`. A copy: ReLUs work in place."""
    size = (features.shape[-2], features.shape[-1])
    smaller = scaled_size(size, min(STORED_SIDE / max(size), 1))
    return F.adaptive_avg_pool2d(features.float(), smaller)[0].cpu()


def check_showable(model: PreTrainedModel, settings: ShowSettings) -> None:
    """Try on a small blank picture whether a model can show what is wanted.

    Raises:
        InputError: it cannot, or it has no such layer.
    """
    side = _view_unit(model)
    weight = next(model.parameters())
    found = inspect_model(model, weight.new_zeros(1, 3, 2 * side, 3 * side))
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


def picture_view(image: torch.Tensor, model: PreTrainedModel, size: int, preprocessing: Preprocessing) -> torch.Tensor:
    """Make a picture ready to be looked into.

    Args:
        image: `(3, H, W)` uint8.
        model: decides device, dtype and the multiple that both sides are rounded down to.
        size: longest side in pixels; smaller pictures are not enlarged.
        preprocessing: of the checkpoint.

    Returns:
        `(1, 3, h, w)`, normalised; sides are at least one multiple.
    """
    unit, weight = _view_unit(model), next(model.parameters())
    factor = min(size / max(image.shape[-2:]), 1)
    view = [max(int(side * factor) // unit, 1) * unit for side in image.shape[-2:]]
    image = resize(image.to(weight.device), view, antialias=True)
    return preprocessing.normalize(image, weight.dtype)[None]


def _view_unit(model: PreTrainedModel) -> int:
    patch = getattr(model.config, "patch_size", None)
    return math.lcm(SIDE, patch) if isinstance(patch, int) else SIDE


def spread_layers(count: int, shown: int = 4) -> tuple[int, ...]:
    """Numbers of at most `shown` layers from the first to the last (1, 9, 17, 24 of 24, as in Figure 7)."""
    shown = min(shown, count)
    return tuple(1 + -(-index * (count - 1) // max(shown - 1, 1)) for index in range(shown))


def relative_points(points: Sequence[tuple[float, float]], size: Size, name: str) -> list[tuple[float, float]]:
    """Turn picked points into shares of the picture's sides; no point is the centre.

    Args:
        points: (x, y) in pixels.
        size: (height, width) of the picture.
        name: how to call the picture in messages.

    Raises:
        InputError: a point lies outside.
    """
    height, width = size
    for x, y in points:
        if not (0 <= x < width and 0 <= y < height):
            raise InputError(
                f"Point {x:g} {y:g} lies outside {name}, which is {width} wide and {height} high. "
                f"Give x from 0 to {width - 1} and y from 0 to {height - 1}."
            )
    return [(x / width, y / height) for x, y in points] or [(0.5, 0.5)]
