"""Counting on the meta device: repeated operations count again, and tensors with values keep them."""

import torch

from hf_denseseg.models.flops import count_operations


def products(times, rows):
    left, right = torch.ones(rows, 4, device="meta"), torch.ones(4, 5, device="meta")
    for _ in range(times):
        assert (left @ right).shape == (rows, 5)


def test_an_operation_counts_as_often_as_it_runs():
    """2 x 4 times 4 x 5 are 40 multiply-adds and 10 numbers; also in a count after the first."""
    for times in (1, 3, 2):
        counts = count_operations(lambda times=times: products(times, 2))
        assert (counts.layer_multiply_adds, counts.activations) == (40 * times, 10 * times)
    assert count_operations(lambda: products(1, 3)).layer_multiply_adds == 60


def test_numbers_on_the_cpu_keep_their_values():
    """Sizes may be computed there; only tensors of the meta device have a shape but no values."""
    seen = []
    count_operations(lambda: seen.extend(torch.arange(4) for _ in range(2)))
    assert [each.tolist() for each in seen] == [[0, 1, 2, 3]] * 2


def test_a_result_with_several_tensors_keeps_their_types():
    seen = []
    count_operations(lambda: seen.extend(torch.ones(3, 4, device="meta").max(dim=1) for _ in range(2)))
    assert [(each.values.dtype, each.indices.dtype) for each in seen] == [(torch.float32, torch.int64)] * 2
