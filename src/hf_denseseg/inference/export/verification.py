"""An exported model against the model that it was made from."""

import copy
from typing import Any

import torch

from hf_denseseg.errors import RunError
from hf_denseseg.inference.export.engines import Engine
from hf_denseseg.inference.export.programs import ClassMap, Detections, Program, example_input, plain_operators
from hf_denseseg.inference.sliding_window import Size
from hf_denseseg.models.one_logit import two_logits

LEAST_AGREEMENT = 0.9999  # of the argmax
LARGEST_ERROR = 1e-4  # of the spread of the outputs, where the model itself is exact
PROPOSED = 0.05  # score above which RetinaNet proposes an object
TIMES_MODEL_ERROR = 20.0  # the same rounding in another order
OTHERWISE = "Give another --format, or report it with the versions of torch and of the runtime."


@torch.no_grad()
def verify(program: Program, engine: Engine, channels: int, shapes: list[tuple[int, Size]]) -> list[dict[str, Any]]:
    """Compare an exported model with its program at several batch and image sizes.

    Errors are judged against a run in float64 and relative to the spread (standard deviation) of the outputs: large
    logits have large rounding errors. Pixels that the program itself gives another class in float64 are ties, which
    count neither way.

    Args:
        program: the model as exported, see `programs`.
        engine: the exported model.
        channels: of the images.
        shapes: batch and `(height, width)` of each comparison.

    Returns:
        Agreement and errors of each shape, for `export.json`.

    Raises:
        RunError: the two differ.
    """
    exact = copy.deepcopy(program).double()
    rows = []
    for number, (batch, size) in enumerate(shapes):
        values = example_input(program, channels, batch, size, seed=number)
        with plain_operators():
            expected, ideal = program(values), exact(values if isinstance(program, ClassMap) else values.double())
        try:
            found = engine(values)
        except Exception as error:  # the kinds are open-ended: each runtime has its own
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise RunError(
                f"The exported model does not run on {batch} images of {size[0]}x{size[1]} pixels ({reason}); nothing "
                "was written. Give --size for one size; a newer torch may export all."
            ) from error
        row = {
            "batch": batch,
            "height": size[0],
            "width": size[1],
            **_compare(program, expected, found, ideal),
        }
        _check(row)
        rows.append(row)
    return rows


def _compare(
    program: Program,
    expected: tuple[torch.Tensor, ...],
    found: tuple[torch.Tensor, ...],
    ideal: tuple[torch.Tensor, ...],
) -> dict[str, Any]:
    """Agreement of the first output's classes, and errors of all floating outputs relative to their spread."""
    if [each.shape for each in expected] != [each.shape for each in found]:
        raise RunError(
            f"The exported model returns {[tuple(each.shape) for each in found]} instead of "
            f"{[tuple(each.shape) for each in expected]}; nothing was written. {OTHERWISE}"
        )
    classes = [_classes(program, each[0]) for each in (expected, found, ideal)]
    clear = classes[0] == classes[2]
    row: dict[str, Any] = {"agreement": ((classes[0] == classes[1]) | ~clear).double().mean().item()}
    for name, values in (("error", found), ("model_error", expected)):
        pairs = [(a.double(), b) for a, b in zip(values, ideal, strict=True) if a.is_floating_point()]
        if pairs:
            row[name] = max(float((a - b).abs().max() / b.std()) for a, b in pairs)
    return row


def _classes(program: Program, output: torch.Tensor) -> torch.Tensor:
    """The chosen classes; of a detector, whose logits are independent, those it proposes."""
    return output.sigmoid() > PROPOSED if isinstance(program, Detections) else chosen_classes(output)


def chosen_classes(output: torch.Tensor) -> torch.Tensor:
    """The classes that logits choose; those of a class map as they are."""
    return two_logits(output).argmax(1) if output.is_floating_point() else output.long()


def _check(row: dict[str, Any]) -> None:
    """Refuse an exported model that differs.

    Raises:
        RunError: it says by how much.
    """
    where = f"at batch {row['batch']}, {row['height']}x{row['width']} pixels"
    if not row["agreement"] >= LEAST_AGREEMENT:
        raise RunError(
            f"The exported model agrees with the model on {100 * row['agreement']:.3f} % of the classes {where}, at "
            f"least {100 * LEAST_AGREEMENT} % are needed; nothing was written. {OTHERWISE}"
        )
    limit = max(LARGEST_ERROR, TIMES_MODEL_ERROR * row.get("model_error", 0.0))
    if not row.get("error", 0.0) <= limit:
        raise RunError(
            f"The exported model is off by {row['error']:.1e} of the spread of its outputs {where}, at most "
            f"{limit:.1e} is allowed (the model itself: {row['model_error']:.1e}); nothing was written. {OTHERWISE}"
        )
