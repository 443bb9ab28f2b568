"""The learned table of absolute positions, and how similar its entries are (IJCV 2024, Figure 10)."""

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from hf_denseseg.inference.introspection.attention import Size


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


def position_table(model: PreTrainedModel) -> tuple[torch.Tensor, Size] | None:
    """The learned table of absolute positions `(1, extra + h*w, C)` and its grid (h, w); None if there is none.

    It is the parameter called `position_embeddings`; the grid is that of the training images, `image_size`.
    """
    for name, parameter in model.named_parameters():
        if name.endswith("position_embeddings") and parameter.ndim == 3:
            side = model.config.image_size  # one side of a square, or (height, width)
            height, width = (side, side) if isinstance(side, int) else side
            return parameter, (height // model.config.patch_size, width // model.config.patch_size)
    return None
