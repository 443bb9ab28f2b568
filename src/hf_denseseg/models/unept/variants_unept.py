"""The published variants of UN-EPT: two backbones, and two sets of loss weights."""

from collections.abc import Sequence
from typing import Any

OUTPUT_STRIDE = 8
"""Input pixels per query of the decoder, along each axis."""

VARIANTS: dict[str, dict[str, Any]] = {
    "unept-resnet50": {"architectures": ["UneptForSemanticSegmentation"], "backbone_type": "resnet"},
    "unept-deit-base": {"architectures": ["UneptForSemanticSegmentation"], "backbone_type": "deit"},
}
"""Published variants (Tables 1 to 4 of the paper): name -> task class and configuration fields."""

_LOSS_WEIGHTS = {"code": (0.8, 1.0, 5.0, 0.6), "paper": (1.0, 1.5, 3.0, 0.7)}  # training script; Sec. 3.2 (Eq. 7)


def weights_of(given: str | Sequence[float]) -> Sequence[float]:
    """Return the weights of coarse, refined, boundary and direction loss.

    Args:
        given: `"code"` (released training script), `"paper"` (Sec. 3.2), or the four numbers.

    Raises:
        ValueError: another name, or not four numbers from 0 up.
    """
    weights = _LOSS_WEIGHTS.get(given, ()) if isinstance(given, str) else given
    if len(weights) != 4 or min(weights) < 0:
        raise ValueError(f"`loss_weights` is {given!r}; give 'code', 'paper' or four numbers from 0 up.")
    return weights


__all__ = ["OUTPUT_STRIDE", "VARIANTS", "weights_of"]
