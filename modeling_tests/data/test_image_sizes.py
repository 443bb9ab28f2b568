"""Sizes of resized images."""

import math

from hf_denseseg.data.image_sizes import fit_factor, scaled_size


def test_halves_are_rounded_up_and_no_side_vanishes():
    assert scaled_size((683, 512), 0.5) == (342, 256)
    assert scaled_size((5, 3), 0.5) == (3, 2)
    assert scaled_size((1, 2000), 0.01) == (1, 20)


def test_the_side_that_reaches_its_limit_first_decides():
    assert fit_factor((50, 100), short=25, long=100) == 0.5
    assert fit_factor((100, 50), short=25, long=20) == 0.2
    assert fit_factor((100, 50), short=100, long=math.inf) == 2
