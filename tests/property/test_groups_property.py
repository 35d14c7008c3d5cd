"""The choice of wide groups is the best there is: against every assignment."""

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmmpq.quantize.groups import assign_widths


@st.composite
def problems(draw):
    num_groups = draw(st.integers(1, 7))
    num_widths = draw(st.integers(1, min(4, num_groups)))
    cuts = sorted(draw(st.permutations(range(1, num_groups)))[: num_widths - 1])
    counts = [b - a for a, b in zip([0, *cuts], [*cuts, num_groups], strict=True)]
    # Whole numbers: sums are exact, and equal ones are frequent.
    losses = draw(st.lists(st.integers(-5, 20), min_size=num_groups * num_widths, max_size=num_groups * num_widths))
    return np.array(losses, dtype=np.float64).reshape(num_groups, num_widths), counts


@settings(deadline=None, max_examples=200)
@given(problems())
def test_the_total_loss_is_the_least(problem):
    losses, counts = problem
    choice = assign_widths(losses, counts)
    assert [choice.count(width) for width in range(len(counts))] == counts
    slots = [width for width, count in enumerate(counts) for _ in range(count)]
    least = min(losses[np.arange(len(slots)), list(order)].sum() for order in set(permutations(slots)))
    assert losses[np.arange(len(choice)), choice].sum() == least
    assert choice == assign_widths(losses.copy(), list(counts))


@pytest.mark.parametrize("num_widths", [2, 3, 4])
def test_of_equal_groups_the_first_are_wide(num_widths):
    losses = np.tile(np.arange(num_widths, 0, -1.0), (8, 1))
    counts = [8 - 2 * (num_widths - 1), *[2] * (num_widths - 1)]
    choice = assign_widths(losses, counts)
    assert choice[-1] == 0
    assert choice == assign_widths(losses, counts)


def test_two_widths_are_given_to_those_that_gain_most():
    generator = np.random.default_rng(0)
    losses = generator.random((500, 2)) * [2.0, 1.0]
    gains = losses[:, 0] - losses[:, 1]
    choice = assign_widths(losses, [380, 120])
    assert sorted(np.argsort(-gains)[:120]) == [group for group, width in enumerate(choice) if width == 1]


@pytest.mark.parametrize("counts", [[1, 1], [3, 1], [4, -1]])
def test_counts_that_do_not_share_out_the_groups(counts):
    with pytest.raises(ValueError, match="must share out 3 groups"):
        assign_widths(np.zeros((3, 2)), counts)
