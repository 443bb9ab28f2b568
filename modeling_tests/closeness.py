"""When two results are the same but for rounding.

BLAS and the vectorised kernels of torch round by the alignment of the memory and by the instruction set: weights that
were loaded from a file lie elsewhere than those they were saved from, and a crop or a batch of another size takes
another path through the same sum. Outputs of two copies of a model, or of two such runs, therefore differ in their
last bits on some processors and not on others. What is only copied (weights, counts, labels, files) can be compared
bit for bit.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

# Share of the largest absolute value: 8 steps of float32 at that value, and 4 steps of the short types.
TOLERANCES = {
    torch.float64: 1e-14,
    torch.float32: 1e-6,
    torch.float16: 4 * torch.finfo(torch.float16).eps,
    torch.bfloat16: 4 * torch.finfo(torch.bfloat16).eps,
}


def assert_same_outputs(found: Any, expected: Any, name: str = "output") -> None:
    """Compare what two copies of a model answered: tensors, or tuples, lists, dictionaries, ModelOutputs of tensors.

    Floating tensors agree to 1e-6 of the largest absolute value of `expected` (float32; see `TOLERANCES` for others),
    integers and booleans bit for bit; shape and type are the same. The module's docstring says why no closer.
    """
    if isinstance(expected, torch.Tensor):
        assert isinstance(found, torch.Tensor), f"{name}: {type(found).__name__} instead of a tensor"
        _assert_same_tensor(found.detach(), expected.detach(), name)
    elif isinstance(expected, Mapping):
        assert list(found) == list(expected), f"{name}: {list(found)} instead of {list(expected)}"
        for key in expected:
            assert_same_outputs(found[key], expected[key], f"{name}[{key!r}]")
    elif isinstance(expected, Sequence) and not isinstance(expected, str):
        assert len(found) == len(expected), f"{name}: {len(found)} entries instead of {len(expected)}"
        for number, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_same_outputs(one, other, f"{name}[{number}]")
    else:
        assert found == expected, f"{name}: {found!r} instead of {expected!r}"


def _assert_same_tensor(found: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    kinds = [(tuple(each.shape), each.dtype) for each in (found, expected)]
    assert kinds[0] == kinds[1], f"{name}: shape and type are {kinds[0]} instead of {kinds[1]}"
    if not expected.dtype.is_floating_point:
        different = int((found != expected).sum())
        assert not different, f"{name}: {different} of {expected.numel()} integers differ"
        return
    finite = expected.isfinite()
    assert torch.equal(finite, found.isfinite()), f"{name}: infinite or no number at other places"
    assert torch.equal(found[~finite].nan_to_num(), expected[~finite].nan_to_num()), f"{name}: other infinities"
    if not finite.any():
        return
    wanted = expected[finite].double()
    difference, largest = float((found[finite].double() - wanted).abs().max()), float(wanted.abs().max())
    allowed = TOLERANCES[expected.dtype] * largest
    assert difference <= allowed, (
        f"{name}: the largest difference is {difference:.3g}, {difference / largest if largest else torch.inf:.3g} of "
        f"the largest value {largest:.3g}; allowed is {allowed:.3g}"
    )


def assert_highest(ids: Any, scores: Any, axis: int = 0, margin: float = 1e-5) -> None:
    """Every pixel has the class of the highest score; of scores that are equal but for rounding either may win.

    Args:
        ids: integers, tensor or array.
        scores: the scores of the classes along `axis`, tensor or array.
        margin: share of the largest absolute score by which the chosen one may lie below the highest.
    """
    scores = np.moveaxis(np.asarray(scores, dtype=np.float64), axis, 0)
    ids = np.asarray(ids)
    assert ids.shape == scores.shape[1:], f"classes of shape {ids.shape} for scores of {scores.shape[1:]}"
    chosen = np.take_along_axis(scores, ids[None].astype(np.int64), axis=0)[0]
    below = scores.max(0) - chosen
    wrong = below > margin * np.abs(scores).max()
    assert not wrong.any(), (
        f"{int(wrong.sum())} of {ids.size} pixels have another class than the best one, "
        f"which is better by up to {below.max():.3g}"
    )
