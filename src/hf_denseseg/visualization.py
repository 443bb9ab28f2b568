"""Pictures for people: label maps in colour, overlays, legends, grids of results, the inside of a model, curves."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from hf_denseseg.data.labels import LabelSpec
from hf_denseseg.errors import InputError
from hf_denseseg.files import atomic_path

Palette = Sequence[tuple[int, int, int]]
GAP = 6  # pixels between cells
LINE = 20  # height of a line of text
INK = (40, 40, 40)
PAPER = (255, 255, 255)
VOID_COLOR = (0, 0, 0)
PICKED = (255, 0, 0)
# Colour map "viridis", from dark blue through green to yellow: even steps of value look even, in grey and to the
# colour-blind too.
VIRIDIS = (
    (68, 1, 84), (72, 26, 108), (71, 47, 125), (65, 68, 135), (57, 86, 140), (49, 104, 142), (42, 120, 142),
    (35, 136, 142), (31, 152, 139), (34, 168, 132), (53, 183, 121), (84, 197, 104), (122, 209, 81), (165, 219, 54),
    (210, 226, 27), (253, 231, 37),
)  # fmt: skip


def colorize(ids: torch.Tensor | np.ndarray, palette: Palette) -> Image.Image:
    """Paint class ids `(H, W)` with their colours; void and every id beyond the palette are black."""
    table = np.zeros((max(len(palette), 256) + 1, 3), dtype=np.uint8)
    table[: len(palette)] = np.asarray(palette, dtype=np.uint8)
    indices = np.asarray(torch.as_tensor(ids).cpu()).astype(np.int64)
    beyond = (indices < 0) | (indices >= len(table))
    return Image.fromarray(table[np.where(beyond, len(table) - 1, indices)])


def overlay(
    image: Image.Image | torch.Tensor, ids: torch.Tensor | np.ndarray, palette: Palette, opacity: float = 0.5
) -> Image.Image:
    """Lay the colours of `ids` over a picture of the same size; void pixels stay as they are.

    Args:
        image: PIL picture, or `(3, H, W)` uint8.
        ids: `(H, W)` class ids.
        palette: one colour per class.
        opacity: 0 shows the picture alone, 1 the colours alone.

    Raises:
        InputError: the sizes differ, or `opacity` is outside 0..1.
    """
    picture, ids = _to_pil(image), np.asarray(torch.as_tensor(ids).cpu())
    if not 0 <= opacity <= 1:
        raise InputError(f"Overlay opacity is {opacity}. Give a number from 0 to 1.")
    if ids.shape != (picture.height, picture.width):
        raise InputError(
            f"The label map is {ids.shape[0]}x{ids.shape[1]}, the picture {picture.height}x{picture.width} "
            "(height x width). Segment at the picture's own size."
        )
    blended = Image.blend(picture, colorize(ids, palette), opacity)
    known = Image.fromarray(((ids >= 0) & (ids < len(palette))).astype(np.uint8) * 255)
    return Image.composite(blended, picture, known)


def legend(spec: LabelSpec, width: int = 640) -> Image.Image:
    """Swatches and names of the classes, in as many columns as `width` pixels allow."""
    font = ImageFont.load_default(size=13)
    cell = max(int(font.getlength(name)) for name in spec.classes) + LINE + 2 * GAP
    columns = max(width // cell, 1)
    rows = -(-len(spec.classes) // columns)
    picture = Image.new("RGB", (max(width, cell), rows * LINE + GAP), PAPER)
    draw = ImageDraw.Draw(picture)
    for index, (name, color) in enumerate(zip(spec.classes, spec.palette, strict=True)):
        x, y = index % columns * cell + GAP, index // columns * LINE + GAP
        draw.rectangle((x, y, x + LINE - GAP, y + LINE - GAP), fill=color)
        draw.text((x + LINE, y), name, fill=INK, font=font)
    return picture


def picture_grid(
    rows: Iterable[Sequence[Any]],
    spec: LabelSpec,
    titles: Sequence[str] = ("picture", "truth", "prediction"),
    cell_width: int = 320,
) -> Image.Image:
    """Arrange results in a grid: one row per picture, its label maps beside it in colour, the legend below.

    Args:
        rows: per picture the image (PIL or `(3, H, W)` uint8), then one or more `(H, W)` label maps.
        spec: names and colours.
        titles: heading of each column; surplus ones are not shown.
        cell_width: width of a picture in pixels.
    """
    font = ImageFont.load_default(size=13)
    cells = [[_to_pil(image), *(colorize(ids, spec.palette) for ids in maps)] for image, *maps in rows]
    scaled = [[_fit(cell, cell_width, first=k == 0) for k, cell in enumerate(row)] for row in cells]
    columns = max((len(row) for row in scaled), default=1)
    width = columns * (cell_width + GAP) + GAP
    names = legend(spec, width)
    height = LINE + sum(row[0].height + GAP for row in scaled) + names.height
    grid = Image.new("RGB", (max(width, names.width), height), PAPER)
    draw = ImageDraw.Draw(grid)
    for column, title in enumerate(titles[:columns]):
        draw.text((GAP + column * (cell_width + GAP), 2), title, fill=INK, font=font)
    y = LINE
    for row in scaled:
        for column, cell in enumerate(row):
            grid.paste(cell, (GAP + column * (cell_width + GAP), y))
        y += row[0].height + GAP
    grid.paste(names, (0, y))
    return grid


def heat_map(values: torch.Tensor, size: tuple[int, int] | None = None) -> Image.Image:
    """Paint `(h, w)` values from 0 (dark blue) to 1 (yellow); others count as the nearer of the two.

    Args:
        values: any floating dtype.
        size: (height, width) of the result, values interpolated; None paints one pixel per value.
    """
    values = values.float().cpu().clamp(0, 1)
    if size is not None:
        values = F.interpolate(values[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]
    steps = np.linspace(0, 1, len(VIRIDIS))
    channels = [np.interp(values.numpy(), steps, channel) for channel in np.array(VIRIDIS).T]
    return Image.fromarray(np.stack(channels, axis=-1).round().astype(np.uint8))


def attention_sheet(
    picture: Image.Image,
    points: Sequence[tuple[float, float]],
    layers: Mapping[int, tuple[torch.Tensor, torch.Tensor]],
    rollout: torch.Tensor,
    width: int = 300,
) -> Image.Image:
    """Show how picked points attend (Figures 11, 13 and 14 of the SETR paper).

    For each point the picture with the point in red and the rollout through all layers; then, for each layer, the mean
    of the heads, the rollout up to it, and every head. Each map has its own scale, see `relative_attention`.

    Args:
        picture: what was looked at, any size.
        points: (x, y) as shares of width and height.
        layers: number -> weights `(points, heads, h, w)` and rollout up to there `(points, h, w)`.
        rollout: `(points, h, w)` through all layers of the model.
        width: longest side of a map in pixels.
    """
    rows: list[Sequence[tuple[str, Image.Image]]] = []
    shown = _fit_into(picture.convert("RGB"), width)
    small = ((shown.height - GAP) // 2, (shown.width - GAP) // 2)
    for index, point in enumerate(points):
        x, y = int(point[0] * picture.width), int(point[1] * picture.height)
        rows.append(
            [
                (f"point {x} {y}", _with_dot(shown, point)),
                _attention_tile("rollout, all layers", shown, rollout[index], point),
            ]
        )
        for number, (weights, rolled) in layers.items():
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
    return labelled_rows(rows, heat_scale("smallest", "largest", note))


def relative_attention(weights: torch.Tensor, point: tuple[float, float]) -> tuple[torch.Tensor, float]:
    """Stretch the weights of a picked point to 0..1, from the smallest to the largest.

    Its own patch has no say in that, and is cut at 1: a rollout keeps a large share in place, on the residual path,
    and beside it nothing else would be seen.

    Args:
        weights: `(h, w)`.
        point: (x, y) as shares of width and height.

    Returns:
        `(h, w)`, and the largest weight as a multiple of the mean one, both without the own patch.
    """
    own = torch.zeros_like(weights, dtype=torch.bool)
    own[int(point[1] * weights.shape[0]), int(point[0] * weights.shape[1])] = weights.numel() > 1
    others = weights[~own]
    low, high = others.min(), others.max()
    tiny = torch.finfo(weights.dtype).tiny
    return ((weights - low) / (high - low).clamp(min=tiny)).clamp(0, 1), float(high / others.mean().clamp(min=tiny))


def feature_sheet(picture: Image.Image, groups: Sequence[Mapping[str, Image.Image]], columns: int = 6) -> Image.Image:
    """Show painted features (Figures 7 and 12 of the SETR paper): the picture, then each group from a new line.

    Args:
        picture: what was looked at.
        groups: per group label -> painted features, all of one size.
        columns: most pictures in a line.
    """
    size = next(iter(groups[0].values())).size
    rows: list[Sequence[tuple[str, Image.Image]]] = [[("picture", picture.convert("RGB").resize(size))]]
    for group in groups:
        labelled = list(group.items())
        rows += [labelled[start : start + columns] for start in range(0, len(labelled), columns)]
    return labelled_rows(rows)


def position_sheet(similarity: torch.Tensor, tiles: int = 12, side: int = 72) -> Image.Image:
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
    scale = max(side // max(height, width), 1)
    size = (height * scale, width * scale)
    cells = [
        heat_map((similarity[y, x] + 1) / 2).resize(size[::-1], Image.Resampling.NEAREST)
        for y in rows
        for x in columns
    ]
    margin = 2 * LINE
    mosaic = _mosaic(cells, len(columns), gap=2)
    sheet = Image.new("RGB", (margin + mosaic.width + GAP, LINE + mosaic.height), PAPER)
    sheet.paste(mosaic, (margin, LINE))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=13)
    for index, x in enumerate(columns):
        center = margin + index * (size[1] + 2) + size[1] // 2
        draw.text((center, LINE - 4), str(x + 1), fill=INK, font=font, anchor="mb")
    for index, y in enumerate(rows):
        draw.text(
            (margin - 6, LINE + index * (size[0] + 2) + size[0] // 2), str(y + 1), fill=INK, font=font, anchor="rm"
        )
    title = f"position of the patch in the grid of {height} rows and {width} columns"
    return labelled_rows([[(title, sheet)]], heat_scale("-1", "1", "cosine similarity with every other patch"))


def heat_scale(low: str, high: str, meaning: str) -> Image.Image:
    """The colours of `heat_map` as a strip between the values of its ends, and what they mean."""
    font = ImageFont.load_default(size=13)
    start = int(font.getlength(low)) + GAP
    end = start + 128
    text = f"{high}   ({meaning})"
    scale = Image.new("RGB", (end + 2 * GAP + int(font.getlength(text)), LINE), PAPER)
    draw = ImageDraw.Draw(scale)
    draw.text((0, 2), low, fill=INK, font=font)
    scale.paste(heat_map(torch.linspace(0, 1, end - start).expand(LINE - GAP, -1)), (start, GAP // 2))
    draw.text((end + GAP, 2), text, fill=INK, font=font)
    return scale


def labelled_rows(rows: Sequence[Sequence[tuple[str, Image.Image]]], footer: Image.Image | None = None) -> Image.Image:
    """Arrange pictures of any size in rows, a line of text above each, a footer below all."""
    font = ImageFont.load_default(size=13)
    widths = [[max(picture.width, int(font.getlength(label)) + 1) for label, picture in row] for row in rows]
    heights = [max(picture.height for _, picture in row) for row in rows]
    width = max(GAP + sum(each + GAP for each in row) for row in widths)
    below = footer.height + GAP if footer else 0
    sheet = Image.new(
        "RGB",
        (max(width, footer.width + 2 * GAP if footer else 0), sum(LINE + each + GAP for each in heights) + below),
        PAPER,
    )
    draw, y = ImageDraw.Draw(sheet), 0
    for row, row_widths, height in zip(rows, widths, heights, strict=True):
        x = GAP
        for (label, picture), cell in zip(row, row_widths, strict=True):
            draw.text((x, y + 2), label, fill=INK, font=font)
            sheet.paste(picture, (x, y + LINE))
            x += cell + GAP
        y += LINE + height + GAP
    if footer:
        sheet.paste(footer, (GAP, y))
    return sheet


def picture_sheet(cells: Sequence[tuple[str, Image.Image]], columns: int = 6, side: int = 160) -> Image.Image:
    """Arrange pictures of any size in lines of `columns`, each no larger than `side` pixels, a text above each."""
    scaled = [(text, _fit_into(picture, side)) for text, picture in cells]
    return labelled_rows([scaled[start : start + columns] for start in range(0, len(scaled), columns)])


def save_learning_curve(
    history: Sequence[Mapping[str, Any]], path: str | Path, score: str = "eval_mean_iou", name: str = "mIoU"
) -> None:
    """Draw loss and a score over the steps of a run into a picture file.

    Args:
        history: the Trainer's `log_history`; entries with `loss` and with the score are drawn.
        path: file to write, its ending decides the format.
        score: key of the score, a fraction.
        name: what the score is called.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(
            "The learning curve needs matplotlib, which is not installed. Run `pip install 'hf-denseseg[train]'`."
        ) from error
    figure = Figure(figsize=(8, 4), layout="constrained")
    FigureCanvasAgg(figure)
    loss_axis = figure.add_subplot()
    score_axis = loss_axis.twinx()
    for axis, key, label, color, marker in (
        (loss_axis, "loss", "training loss", "tab:blue", ""),
        (score_axis, score, f"validation {name} in %", "tab:orange", "o"),
    ):
        points = [(entry["step"], entry[key]) for entry in history if entry.get(key) is not None]
        factor = 1 if key == "loss" else 100
        axis.plot([step for step, _ in points], [factor * value for _, value in points], color=color, marker=marker)
        axis.set_ylabel(label, color=color)
        axis.set_ylim(bottom=0)
    loss_axis.set_xlabel("step")
    loss_axis.grid(alpha=0.3)
    with atomic_path(path) as aside:
        figure.savefig(aside, dpi=120)


def _to_pil(image: Image.Image | torch.Tensor) -> Image.Image:
    if isinstance(image, torch.Tensor):
        return Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())
    return image.convert("RGB")


def _fit(picture: Image.Image, width: int, first: bool) -> Image.Image:
    """Scale to a width; label colours by nearest pixel, so that no colour appears that means another class."""
    height = max(round(picture.height * width / picture.width), 1)
    return picture.resize((width, height), Image.Resampling.BILINEAR if first else Image.Resampling.NEAREST)


def _fit_into(picture: Image.Image, side: int) -> Image.Image:
    factor = side / max(picture.size)
    return picture.resize((max(round(picture.width * factor), 1), max(round(picture.height * factor), 1)))


def _mosaic(pictures: Sequence[Image.Image], columns: int, gap: int = GAP) -> Image.Image:
    """Pictures of one size row by row."""
    width, height = pictures[0].size
    lines = -(-len(pictures) // columns)
    mosaic = Image.new("RGB", (columns * (width + gap) - gap, lines * (height + gap) - gap), PAPER)
    for index, each in enumerate(pictures):
        mosaic.paste(each, (index % columns * (width + gap), index // columns * (height + gap)))
    return mosaic


def _attention_tile(
    label: str, picture: Image.Image, weights: torch.Tensor, point: tuple[float, float]
) -> tuple[str, Image.Image]:
    """Weights `(h, w)` over the picture in grey, the picked patch framed in red; its label tells the peak."""
    values, peak = relative_attention(weights, point)
    heat = heat_map(values, (picture.height, picture.width))
    tile = Image.blend(picture.convert("L").convert("RGB"), heat, 0.7)
    high, wide = tile.height / weights.shape[0], tile.width / weights.shape[1]
    x, y = int(point[0] * weights.shape[1]) * wide, int(point[1] * weights.shape[0]) * high
    ImageDraw.Draw(tile).rectangle((x, y, x + wide - 1, y + high - 1), outline=PICKED, width=2)
    return f"{label} (peak {peak:.3g}x)", tile


def _with_dot(picture: Image.Image, point: tuple[float, float]) -> Image.Image:
    """A copy with a red dot, ringed in white, at (x, y) given as shares of the sides."""
    marked = picture.copy()
    x, y = point[0] * picture.width, point[1] * picture.height
    for radius, color in ((5, PAPER), (4, PICKED)):
        ImageDraw.Draw(marked).ellipse((x - radius, y - radius, x + radius, y + radius), fill=color)
    return marked
