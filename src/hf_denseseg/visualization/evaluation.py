"""Pictures of an evaluation: one picture's answer beside its truth, and what was confused with what."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from hf_denseseg.data.labels import VOID
from hf_denseseg.visualization.class_features import class_matrix
from hf_denseseg.visualization.label_maps import colorize
from hf_denseseg.visualization.layout import PICKED, VOID_COLOR, Palette, fit_width, heat_scale, labelled_rows

CELL_WIDTH = 300  # pixels of each part of a strip


def error_map(image: torch.Tensor, label: torch.Tensor, prediction: torch.Tensor) -> Image.Image:
    """Wrong pixels in red over the darkened picture in grey; void is black.

    Args:
        image: `(3, H, W)` uint8.
        label: `(H, W)` class ids and 255.
        prediction: `(H, W)` class ids.
    """
    grey = image.float().mean(0).mul(0.5).to(torch.uint8).cpu().numpy()
    picture = np.stack([grey] * 3, axis=-1)
    true = label.cpu().numpy()
    picture[prediction.cpu().numpy() != true] = PICKED
    picture[true == VOID] = VOID_COLOR
    return Image.fromarray(picture)


def answer_strip(image: torch.Tensor, label: torch.Tensor, prediction: torch.Tensor, palette: Palette) -> Image.Image:
    """Picture, truth, prediction and mistakes side by side; arguments as for `error_map`."""
    parts = {
        "picture": Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy()),
        "truth": colorize(label, palette),
        "prediction": colorize(prediction, palette),
        "mistakes": error_map(image, label, prediction),
    }
    row = []
    for title, part in parts.items():
        # Label colours by nearest pixel, so that no colour appears that means another class.
        kind = Image.Resampling.NEAREST if title in ("truth", "prediction") else Image.Resampling.BOX
        row.append((title, fit_width(part, CELL_WIDTH, kind)))
    return labelled_rows([row])


def confusion_picture(matrix: torch.Tensor, classes: Sequence[str]) -> Image.Image:
    """Draw a confusion matrix: in each row the shares of a class's pixels, in percent where a cell is wide enough.

    Args:
        matrix: `(C, C)` counts, rows = truth.
        classes: their names.
    """
    shares = matrix / matrix.sum(1, keepdim=True).clamp(min=1)
    texts = np.vectorize(lambda share: f"{100 * share:.0f}" if share >= 0.005 else "", otypes=[str])(shares.numpy())
    note = (
        "share of the pixels of the true class (row) that are taken for a class (column); colours by its square root"
    )
    sheet = class_matrix(shares.sqrt(), texts, classes)
    return labelled_rows([[("truth in rows, prediction in columns", sheet)]], heat_scale("0", "1", note))
