"""What the spread of measured products is told by: deviations, directions and the next option, on matrices made up."""

import numpy as np
import pytest
from products import spread_table

BITS = np.tile([2.0, 3.0], 4)
LINEAR, BLOCK = np.repeat(np.arange(4), 2), np.repeat([0, 1], 4)


def rows(gram: np.ndarray) -> list[tuple[float, ...]]:
    return list(spread_table(gram, linear_O=LINEAR, block_O=BLOCK, bits_O=BITS))


def test_options_without_products_lie_in_as_many_directions_as_there_are():
    for bits, norm, sigma, within, between, largest, mean, following, directions in rows(4.0 * np.eye(8)):
        assert bits in (2.0, 3.0)
        assert (norm, sigma, within, between, largest, mean) == pytest.approx((4.0, 0.0, 0.0, 0.0, 0.0, 0.0))
        assert directions == pytest.approx(4.0)
        assert following == 0.0 if bits == 2.0 else np.isnan(following)


def test_products_in_a_block_and_between_blocks_are_told_apart():
    gram = np.eye(8)
    gram[0, 2] = gram[2, 0] = 0.5  # linears 0 and 1 at 2 bits, of one block
    gram[0, 4] = gram[4, 0] = -0.3  # linears 0 and 2 at 2 bits, of two blocks
    gram[0, 1] = gram[1, 0] = 0.8  # both options of linear 0
    two, three = rows(gram)
    assert two[3:6] == pytest.approx((np.sqrt(0.25 / 2), np.sqrt(0.09 / 4), 0.5))
    assert two[6] == pytest.approx((2 * 0.5 - 2 * 0.3) / 12)
    assert two[7] == pytest.approx(0.8 / 4)
    assert three[3:7] == pytest.approx((0.0, 0.0, 0.0, 0.0))


def test_norms_are_a_mean_and_a_spread_of_logarithms():
    sizes = np.array([1.0, 1.0, np.e, 1.0, 1.0, 1.0, np.e, 1.0])
    two, three = rows(np.diag(sizes))
    assert two[1:3] == pytest.approx((np.exp(0.5), 0.5))
    assert three[1:3] == pytest.approx((1.0, 0.0))
