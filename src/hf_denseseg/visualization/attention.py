"""Figures of attention, features and position embeddings."""

from collections.abc import Mapping, Sequence

import torch
from PIL import Image, ImageDraw, ImageFont

from hf_denseseg.visualization.layout import (
    GAP,
    INK,
    LINE,
    PAPER,
    PICKED,
    fit_into,
    heat_map,
    heat_scale,
    labeled_rows,
)


def attention_figure(
    image: Image.Image,
    points: Sequence[tuple[float, float]],
    layers: Mapping[int, tuple[torch.Tensor, torch.Tensor]],
    rollout: torch.Tensor,
    width: int = 300,
) -> Image.Image:
    """Show how picked points attend (Figures 11, 13 and 14 of the SETR paper).

    For each point the image with the point in red and the rollout through all layers; then, for each layer, the mean
    of the heads, the rollout up to it, and every head. Each map has its own scale, see `relative_attention`.

    Args:
        image: what the model was run on, any size.
        points: (x, y) as fractions of width and height.
        layers: number -> weights `(points, heads, h, w)` and rollout up to there `(points, h, w)`.
        rollout: `(points, h, w)` through all layers of the model.
        width: longest side of a map in pixels.
    """
    rows: list[Sequence[tuple[str, Image.Image]]] = []
    shown = fit_into(image.convert("RGB"), width)
    # Heads stand in two rows beside the image, together as high as it.
    small = ((shown.height - GAP) // 2, (shown.width - GAP) // 2)
    for index, point in enumerate(points):
        x, y = int(point[0] * image.width), int(point[1] * image.height)
        rows.append(
            [
                (f"point {x} {y}", _with_dot(shown, point)),
                _attention_tile("rollout, all layers", shown, rollout[index], point),
            ]
        )
        for number, (weights, rolled) in layers.items():
            # (heads, h, w) of this point
            heads = [heat_map(relative_attention(head, point)[0], small) for head in weights[index]]
            rows.append(
                [
                    _attention_tile(
                        f"layer {number}, mean of {len(heads)} heads", shown, weights[index].mean(0), point
                    ),
                    _attention_tile(f"rollout, layers 1 to {number}", shown, rolled[index], point),
                    (f"layer {number}, heads 1 to {len(heads)} row by row", _mosaic(heads, -(-len(heads) // 2))),
                ]
            )
    note = "weight in each map by itself, without the picked patch (red); peak: the largest as a multiple of the mean"
    return labeled_rows(rows, heat_scale("smallest", "largest", note))


def relative_attention(weights: torch.Tensor, point: tuple[float, float]) -> tuple[torch.Tensor, float]:
    """Stretch the weights of a picked point to 0..1, from the smallest to the largest.

    Its own patch does not count in that, and is cut at 1: a rollout keeps a large part of the weight in place, on the
    residual path, and beside it nothing else would be seen.

    Args:
        weights: `(h, w)`.
        point: (x, y) as fractions of width and height.

    Returns:
        `(h, w)`, and the largest weight as a multiple of the mean one, both without the own patch.
    """
    own = torch.zeros_like(weights, dtype=torch.bool)
    own[int(point[1] * weights.shape[0]), int(point[0] * weights.shape[1])] = weights.numel() > 1
    others = weights[~own]
    low, high = others.min(), others.max()
    tiny = torch.finfo(weights.dtype).tiny
    return ((weights - low) / (high - low).clamp(min=tiny)).clamp(0, 1), float(high / others.mean().clamp(min=tiny))


def feature_figure(image: Image.Image, groups: Sequence[Mapping[str, Image.Image]], columns: int = 6) -> Image.Image:
    """Show colored feature maps (Figures 7 and 12 of the SETR paper): the image, then each group from a new row.

    Args:
        image: what the model was run on.
        groups: per group label -> colored feature map, all of one size.
        columns: most maps in a row.
    """
    size = next(iter(groups[0].values())).size
    rows: list[Sequence[tuple[str, Image.Image]]] = [[("image", image.convert("RGB").resize(size))]]
    for group in groups:
        cells = list(group.items())
        rows += [cells[start : start + columns] for start in range(0, len(cells), columns)]
    return labeled_rows(rows)


def position_figure(similarity: torch.Tensor, tiles: int = 12, side: int = 72) -> Image.Image:
    """Show the cosine similarity of position embeddings as tiles (Figure 10 of the SETR paper).

    Args:
        similarity: `(h, w, h, w)`; the first two name the patch of a tile.
        tiles: most tiles in a row and in a column; of a finer grid evenly spaced ones are shown.
        side: longest side of a tile in pixels; a finer grid takes a pixel per patch.
    """
    height, width = similarity.shape[:2]
    rows, columns = (
        sorted({round(k * (length - 1) / max(tiles - 1, 1)) for k in range(tiles)}) for length in (height, width)
    )
    scale = max(side // max(height, width), 1)  # whole pixels per patch, so that all patches look equally large
    size = (height * scale, width * scale)
    cells = [
        heat_map((similarity[y, x] + 1) / 2).resize(size[::-1], Image.Resampling.NEAREST)
        for y in rows
        for x in columns
    ]
    margin = 2 * LINE
    mosaic = _mosaic(cells, len(columns), gap=2)
    numbered = Image.new("RGB", (margin + mosaic.width + GAP, LINE + mosaic.height), PAPER)
    numbered.paste(mosaic, (margin, LINE))
    draw, font = ImageDraw.Draw(numbered), ImageFont.load_default(size=13)
    for index, x in enumerate(columns):
        center = margin + index * (size[1] + 2) + size[1] // 2
        draw.text((center, LINE - 4), str(x + 1), fill=INK, font=font, anchor="mb")
    for index, y in enumerate(rows):
        draw.text(
            (margin - 6, LINE + index * (size[0] + 2) + size[0] // 2), str(y + 1), fill=INK, font=font, anchor="rm"
        )
    title = f"position of the patch in the grid of {height} rows and {width} columns"
    return labeled_rows([[(title, numbered)]], heat_scale("-1", "1", "cosine similarity with every other patch"))


def _mosaic(tiles: Sequence[Image.Image], columns: int, gap: int = GAP) -> Image.Image:
    """Images of one size row by row."""
    width, height = tiles[0].size
    lines = -(-len(tiles) // columns)
    mosaic = Image.new("RGB", (columns * (width + gap) - gap, lines * (height + gap) - gap), PAPER)
    for index, each in enumerate(tiles):
        mosaic.paste(each, (index % columns * (width + gap), index // columns * (height + gap)))
    return mosaic


def _attention_tile(
    label: str, image: Image.Image, weights: torch.Tensor, point: tuple[float, float]
) -> tuple[str, Image.Image]:
    """Weights `(h, w)` over the image in gray, the picked patch framed in red; the label says the peak."""
    values, peak = relative_attention(weights, point)
    heat = heat_map(values, (image.height, image.width))
    tile = Image.blend(image.convert("L").convert("RGB"), heat, 0.7)
    high, wide = tile.height / weights.shape[0], tile.width / weights.shape[1]
    x, y = int(point[0] * weights.shape[1]) * wide, int(point[1] * weights.shape[0]) * high
    ImageDraw.Draw(tile).rectangle((x, y, x + wide - 1, y + high - 1), outline=PICKED, width=2)
    return f"{label} (peak {peak:.3g}x)", tile


def _with_dot(image: Image.Image, point: tuple[float, float]) -> Image.Image:
    """A copy with a red dot, ringed in white, at (x, y) given as fractions of the sides."""
    marked = image.copy()
    x, y = point[0] * image.width, point[1] * image.height
    for radius, color in ((5, PAPER), (4, PICKED)):
        ImageDraw.Draw(marked).ellipse((x - radius, y - radius, x + radius, y + radius), fill=color)
    return marked
