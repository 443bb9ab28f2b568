"""The learning curve of a run, drawn with matplotlib."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_denseseg.errors import InputError
from hf_denseseg.files import atomic_path


def save_learning_curve(
    history: Sequence[Mapping[str, Any]], path: str | Path, score: str = "eval_mean_iou", name: str = "mIoU"
) -> None:
    """Draw loss and a score over the steps of a run into an image file.

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
        axis.axhline(0, color="none")  # the margin at the top is a part of the range from 0
        axis.set_ylim(bottom=0)
    loss_axis.set_xlabel("step")
    loss_axis.grid(alpha=0.3)
    with atomic_path(path) as aside:
        figure.savefig(aside, dpi=120)
