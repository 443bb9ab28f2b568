"""Figures of what a segmenter classifies pixels by: class tokens as a matrix, pixel features in a plane."""

import importlib.util
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from hf_denseseg.data.labels import LabelSpec
from hf_denseseg.errors import InputError
from hf_denseseg.visualization.label_maps import legend
from hf_denseseg.visualization.layout import GAP, INK, PAPER, heat_map, heat_scale, labeled_rows

PROJECTIONS = {"pca": "", "umap": "umap", "tsne": "sklearn"}  # name -> module that it needs
MATRIX_SIDE = 1000  # pixels of the matrix, if that leaves 12 to 40 for a class
PLANE_SIDE = 900  # longest side of the plane of features in pixels
SMOOTH = 3  # factor by which dots are drawn larger, to be smooth when they are scaled down


def check_projection(name: str) -> None:
    """Refuse a projection whose package is not installed.

    Raises:
        InputError: it is not.
    """
    if PROJECTIONS[name] and importlib.util.find_spec(PROJECTIONS[name]) is None:
        raise InputError(
            f"--projection {name} needs umap-learn, which is not installed. Run `pip install 'hf-denseseg[umap]'`, or "
            "take --projection pca."
        )


def project(features: torch.Tensor, name: str = "pca", seed: int = 0) -> tuple[torch.Tensor, float | None]:
    """Bring features into a plane.

    Args:
        features: `(n, C)`, n at least 2.
        name: one of `PROJECTIONS`: `pca` (the two directions of most variance; the largest score of each counts as
            positive), or `umap` and `tsne` with the defaults of umap-learn and scikit-learn.
        seed: of `umap` and `tsne`.

    Returns:
        `(n, 2)` float64, and the fraction of the variance that the plane holds (`pca` only).
    """
    points = features.double() - features.double().mean(0)
    if name == "pca":
        left, values, _ = torch.linalg.svd(points, full_matrices=False)
        scores = F.pad(left[:, :2] * values[:2], (0, 2 - min(2, len(values))))
        largest = scores.gather(0, scores.abs().argmax(0, keepdim=True))
        fraction = values[:2].square().sum() / values.square().sum().clamp(min=torch.finfo(values.dtype).tiny)
        return scores * torch.where(largest < 0, -1.0, 1.0), float(fraction)
    if name == "umap":
        from umap import UMAP

        method = UMAP(n_neighbors=min(15, len(points) - 1), random_state=seed, n_jobs=1)
    else:
        from sklearn.manifold import TSNE

        method = TSNE(perplexity=min(30.0, (len(points) - 1) / 3), random_state=seed)
    return torch.from_numpy(np.asarray(method.fit_transform(points.float().numpy()))).double(), None


def class_matrix(shades: torch.Tensor, texts: np.ndarray, classes: Sequence[str]) -> Image.Image:
    """Draw a square table with a row and a column per class, both named.

    Args:
        shades: `(K, K)`, from 0 (dark blue) to 1 (yellow).
        texts: `(K, K)`, written where a cell is wide enough.
        classes: their names.
    """
    cell = min(max(MATRIX_SIDE // len(classes), 12), 40)
    font = ImageFont.load_default(size=min(cell - 2, 13))
    margin = max(int(font.getlength(name)) for name in classes) + 2 * GAP
    side = cell * len(classes)
    matrix = Image.new("RGB", (margin + side, margin + side), PAPER)
    matrix.paste(heat_map(shades).resize((side, side), Image.Resampling.NEAREST), (margin, margin))
    draw = ImageDraw.Draw(matrix)
    for index, name in enumerate(classes):
        middle = margin + index * cell + cell // 2
        draw.text((margin - GAP, middle), name, fill=INK, font=font, anchor="rm")
        column = Image.new("RGB", (margin, cell), PAPER)
        ImageDraw.Draw(column).text((GAP, cell // 2), name, fill=INK, font=font, anchor="lm")
        matrix.paste(column.rotate(90, expand=True), (middle - cell // 2, 0))
    if cell >= 32:
        for (i, j), text in np.ndenumerate(texts):
            color = INK if shades[i, j] > 0.6 else PAPER
            place = (margin + j * cell + cell // 2, margin + i * cell + cell // 2)
            draw.text(place, text, fill=color, font=font, anchor="mm")
    return matrix


def token_figure(confidence: torch.Tensor, classes: Sequence[str]) -> Image.Image:
    """Draw the dependencies between classes (Figure 6 of the HFGD paper): a row and a column per class, both named.

    Colors go from the smallest to the largest value; values are written where a cell is wide enough.

    Args:
        confidence: `(K, K)` of `token_confidence`.
        classes: their names.
    """
    low, high = float(confidence.min()), float(confidence.max())
    scaled = (confidence - low) / max(high - low, torch.finfo(confidence.dtype).tiny)
    texts = np.vectorize(lambda value: f"{value:.3f}".removeprefix("0"), otypes=[str])(confidence.numpy())
    matrix = class_matrix(scaled, texts, classes)
    mean = float(confidence.diagonal().mean())
    title = f"what the classifier predicts (columns) for each class token (rows); mean of the diagonal {mean:.3f}"
    scale = heat_scale(f"{low:.3g}", f"{high:.3g}", "softmax of the products of the tokens, bias left out")
    return labeled_rows([[(title, matrix)]], scale)


def feature_figure(
    samples: Mapping[int, torch.Tensor], spec: LabelSpec, title: str, projection: str = "pca", seed: int = 0
) -> tuple[Image.Image, float | None]:
    """Draw features in a plane, dots in the colors of their classes (Figure 4 of the HFGD paper).

    Each class is named at its median, and in the legend. Dots come in an order that favours no class.

    Args:
        samples: train id -> `(n, C)` features.
        spec: names and colors.
        title: line above; the projection is added to it.
        projection: see `project`.
        seed: see `project`.

    Returns:
        The figure, and the fraction of the variance that the plane holds (`pca` only).
    """
    plane, variance = project(torch.cat(list(samples.values())), projection, seed)
    # (n,): class of each row of `plane`
    owners = torch.tensor(list(samples)).repeat_interleave(torch.tensor([len(each) for each in samples.values()]))
    border, radius = 30, 3 * SMOOTH
    low, high = plane.amin(0), plane.amax(0)
    # One scale for both directions; the second goes up.
    scale = (PLANE_SIDE - 2 * border) / (high - low).max().clamp(min=torch.finfo(plane.dtype).tiny)
    width, height = (int(length) + 2 * border for length in ((high - low) * scale).round())
    places = torch.stack([plane[:, 0] - low[0], high[1] - plane[:, 1]], dim=1) * scale + border
    canvas = Image.new("RGB", (width * SMOOTH, height * SMOOTH), PAPER)
    draw = ImageDraw.Draw(canvas)
    for index in torch.randperm(len(plane), generator=torch.Generator().manual_seed(0)).tolist():
        x, y = (places[index] * SMOOTH).tolist()
        color = spec.palette[int(owners[index])]
        edge = tuple(channel * 7 // 10 for channel in color)
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color, outline=edge)
    canvas = canvas.resize((width, height), Image.Resampling.LANCZOS)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=16)
    for k in samples:
        x, y = places[owners == k].median(0).values.tolist()
        draw.text((x, y), spec.classes[k], fill=INK, font=font, anchor="mm", stroke_width=3, stroke_fill=PAPER)
    title += f", {projection}" + ("" if variance is None else f" ({100 * variance:.0f} % of the variance)")
    shown = LabelSpec(spec.name, tuple(spec.classes[k] for k in samples), tuple(spec.palette[k] for k in samples))
    return labeled_rows([[(title, canvas)]], legend(shown, PLANE_SIDE)), variance
