"""What the comparisons of outputs let pass, and what not."""

import pytest
import torch

from closeness import assert_highest, assert_same_outputs

EXPECTED = {"logits": torch.tensor([1.0, -200.0, 0.0]), "ids": torch.tensor([3, 4]), "maps": (torch.ones(2, 2), None)}


@pytest.mark.parametrize("dtype, step", [(torch.float32, 1e-6), (torch.bfloat16, 2.0**-5), (torch.float64, 1e-14)])
def test_a_difference_counts_by_the_largest_value(dtype, step):
    expected = torch.tensor([0.0, -64.0], dtype=dtype)
    assert_same_outputs(torch.tensor([0.9 * 64 * step, -64.0], dtype=dtype), expected)
    with pytest.raises(AssertionError, match="output: the largest difference is .* of the largest value 64; allowed"):
        assert_same_outputs(torch.tensor([1.1 * 64 * step, -64.0], dtype=dtype), expected)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"logits": torch.tensor([1.0, -200.0, 0.001])}, r"output\['logits'\]: the largest difference is 0.001"),
        ({"logits": torch.tensor([1.0, -200.0, torch.nan])}, "no number at other places"),
        ({"logits": EXPECTED["logits"].double()}, "float64"),
        ({"logits": EXPECTED["logits"][None]}, r"\(1, 3\)"),
        ({"ids": torch.tensor([3, 5])}, "1 of 2 integers differ"),
        ({"maps": (torch.ones(2, 2),)}, "1 entries instead of 2"),
        ({"maps": (torch.ones(2, 2), torch.ones(1))}, "instead of None"),
        ({"more": None}, "'more'"),
    ],
)
def test_what_differs_is_named(change, message):
    assert_same_outputs(dict(EXPECTED), EXPECTED)
    with pytest.raises(AssertionError, match=message):
        assert_same_outputs(EXPECTED | change, EXPECTED)


def test_infinities_have_to_be_the_same():
    expected = torch.tensor([torch.inf, torch.nan, 1.0])
    assert_same_outputs(expected.clone(), expected)
    with pytest.raises(AssertionError, match="other infinities"):
        assert_same_outputs(torch.tensor([-torch.inf, torch.nan, 1.0]), expected)


def test_of_equal_scores_either_class_may_win_but_no_lower_one():
    scores = torch.tensor([[1.0, 0.0], [1.0 + 1e-7, 1.0], [0.5, 0.0]])
    for ids in ([0, 1], [1, 1]):
        assert_highest(torch.tensor(ids), scores)
    with pytest.raises(AssertionError, match="1 of 2 pixels .* up to 0.5"):
        assert_highest(torch.tensor([2, 1]), scores)
