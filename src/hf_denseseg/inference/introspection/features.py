"""Feature maps of the layers and of the parts of the decode head, also as images (IJCV 2024, Figures 7 and 12)."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from hf_denseseg.data.image_sizes import scaled_size
from hf_denseseg.inference.introspection.attention import Size, token_grid

STORED_SIDE = 256  # longest side of a stored feature map; larger ones are averaged down


def feature_image(features: torch.Tensor, size: Size) -> torch.Tensor:
    """Color a feature map: its first three principal components are red, green and blue.

    Offset, scale and rotation of the channels do not change the image. The largest score of each component counts as
    positive, and a component's colors span its 1st to 99th percentile.

    Args:
        features: `(C, h, w)`.
        size: `(height, width)` of the result.

    Returns:
        `(3, height, width)` uint8.
    """
    points = features.detach().double().cpu().flatten(1).T  # (h*w, C)
    points = points - points.mean(0)
    _, vectors = torch.linalg.eigh(points.T @ points)  # ascending
    scores = points @ vectors.flip(-1)[:, :3]  # (h*w, 3), the component of most variance first
    # The sign of an eigenvector is arbitrary.
    largest = scores.gather(0, scores.abs().argmax(0, keepdim=True))
    scores = scores * torch.where(largest < 0, -1.0, 1.0)
    low, high = scores.quantile(torch.tensor([0.01, 0.99], dtype=scores.dtype), dim=0)
    deviation = scores.std(0, correction=0)
    # A component without variance is rounding noise: it stays at the middle of its channel.
    flat = deviation <= 1e-6 * deviation.max()
    scaled = torch.where(flat, 0.5, (scores - low) / (high - low).clamp(min=torch.finfo(scores.dtype).tiny))
    # Maps of one or two channels have fewer components.
    scaled = F.pad(scaled.clamp(0, 1), (0, 3 - scaled.shape[1]), value=0.5)
    colors = scaled.T.reshape(1, 3, *features.shape[-2:]).float()
    colors = F.interpolate(colors, size=size, mode="bilinear", align_corners=False)
    return (colors[0] * 255).round().to(torch.uint8)


def layer_maps(states: Sequence[torch.Tensor], size: Size, layers: int | None) -> list[torch.Tensor]:
    """The hidden states after each layer as maps; empty if one of them is no map and fits no grid.

    Args:
        states: `(1, N, C)` or `(1, C, h, w)`; what enters the first layer may stand in front.
        size: (height, width) of the image.
        layers: number of layers (or stages); None if the model's configuration does not say.
    """
    if layers is None and len(states) > 1 and states[0].shape == states[1].shape:  # layers keep the shape
        states = states[1:]
    if layers is not None and len(states) == layers + 1:
        states = states[1:]
    maps = []
    for state in states:
        if state.ndim == 3:
            grid = token_grid(state.shape[1], size)
            if grid is None:
                return []
            state = state[:, -grid[0] * grid[1] :].transpose(1, 2).unflatten(2, grid)  # (1, N, C) -> (1, C, h, w)
        maps.append(_reduced(state))
    return maps


class DecoderReader:
    """Forward hooks that read the maps of the parts of `decode_head`, in the order they run in.

    Of a list of parts each member is read. For PUP these are the paper's U1 to U5, apart from `norm`, but upsampled
    only for the figure. Parts without weights (dropout) are left out, and so is a norm right behind a part that is
    shown.
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
        def read(module: nn.Module, args: tuple, output: object) -> None:
            if not isinstance(output, torch.Tensor) or output.ndim != 4:
                return
            norm = all(parameter.ndim == 1 for parameter in module.parameters())
            if not (norm and args and args[0] is self._last):
                self.maps[name] = _reduced(output)
            self._last = output

        return read


class SpatialReader:
    """Forward hooks that read the maps of a convolution stream beside the layers, if a model has one.

    These are of the modules in its `spatial_stages()`, such as DSCT's (BMVC 2021, Figure 4).
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.maps: dict[str, torch.Tensor] = {}
        stages: dict[str, nn.Module] = getattr(model, "spatial_stages", dict)()
        self.hooks = [stage.register_forward_hook(self._reader(name)) for name, stage in stages.items()]

    def _reader(self, name: str) -> Callable:
        def read(module: nn.Module, args: tuple, output: tuple[torch.Tensor, ...]) -> None:
            self.maps[name] = _reduced(output[0])

        return read


def _reduced(features: torch.Tensor) -> torch.Tensor:
    """`(1, C, H, W)` -> `(C, h, w)` on the CPU, averaged down to `STORED_SIDE`. A copy: ReLUs work in place."""
    size = (features.shape[-2], features.shape[-1])
    smaller = scaled_size(size, min(STORED_SIDE / max(size), 1))
    return F.adaptive_avg_pool2d(features.float(), smaller)[0].cpu()
