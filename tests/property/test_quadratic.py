"""The quadratic solver against brute force: optimal, within every limit to the unit, and with bounds that hold."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmmpq.allocate.quadratic import Program, solve_program
from llmmpq.errors import InfeasibleBudgetError

NO_HURRY = 60.0


@st.composite
def programs(draw, *, most_units: int = 5, most_options: int = 5) -> Program:
    """Gram matrices of any rank and correlation, linear terms of either sign, one or two limits, tight or loose."""
    sizes = tuple(draw(st.lists(st.integers(1, most_options), min_size=1, max_size=most_units)))
    return build(
        sizes,
        seed=draw(st.integers(0, 2**32 - 1)),
        rank=draw(st.integers(0, sum(sizes) + 2)),
        correlation=draw(st.sampled_from([0.0, 0.3, 0.9])),
        linear=draw(st.sampled_from([0.0, 0.0, 0.3, 3.0])),
        num_limits=draw(st.integers(1, 2)),
        tightness=draw(st.sampled_from([0.0, 0.1, 0.4, 0.7, 1.0])),
        magnitude=draw(st.sampled_from([1e-9, 1.0, 1e4])),
    )


def build(sizes, *, seed, rank, correlation, linear, num_limits, tightness, magnitude) -> Program:
    random = np.random.default_rng(seed)
    num_options = sum(sizes)
    position = np.concatenate([np.arange(size) for size in sizes])
    factor = random.standard_normal((num_options, rank)) + correlation * 3 * random.standard_normal((1, rank))
    factor *= (2.0**-position * np.exp(0.5 * random.standard_normal(num_options)))[:, None]
    costs = np.stack([random.integers(0, 20, num_options) + 7 * position for _ in range(num_limits)]).astype(np.int64)
    starts = np.cumsum([0, *sizes[:-1]])
    low = np.minimum.reduceat(costs, starts, axis=1).sum(axis=1)
    high = np.maximum.reduceat(costs, starts, axis=1).sum(axis=1)
    return Program(
        sizes=tuple(sizes),
        gram_OO=magnitude * factor @ factor.T,
        linear_O=magnitude * linear * random.standard_normal(num_options),
        constant=magnitude * linear * random.standard_normal(),
        costs_KO=costs,
        limits=tuple(int(limit) for limit in np.floor(low + tightness * (high - low))),
    )


def brute_force(program: Program) -> float:
    """The least loss over every choice that fits; inf where none does."""
    choices = np.array(list(itertools.product(*(range(size) for size in program.sizes))))
    picked = choices + program.starts
    fits = np.ones(len(picked), dtype=bool)
    for cost, limit in zip(program.costs_KO, program.limits, strict=True):
        fits &= cost[picked].sum(axis=1) <= limit
    loss = program.constant + program.linear_O[picked].sum(axis=1)
    for first, second in itertools.product(range(picked.shape[1]), repeat=2):
        loss = loss + program.gram_OO[picked[:, first], picked[:, second]]
    return float(loss[fits].min()) if fits.any() else np.inf


def magnitude_of(program: Program) -> float:
    return float(np.abs(program.gram_OO).max() + np.abs(program.linear_O).max() + abs(program.constant))


def check_against_brute_force(program: Program) -> None:
    best = brute_force(program)
    if best == np.inf:
        with pytest.raises(InfeasibleBudgetError, match="limit"):
            solve_program(program, target_gap=0.0, time_limit_s=NO_HURRY)
        return
    solved = solve_program(program, target_gap=0.0, time_limit_s=NO_HURRY)
    rounding = 1e-12 * magnitude_of(program)
    assert program.fits(solved.choice)
    assert solved.loss == pytest.approx(program.loss(solved.choice), rel=1e-12, abs=rounding)
    assert solved.proven
    assert solved.status == "optimal"
    assert solved.gap == 0.0
    assert solved.bound <= best + 1e-9 * abs(best) + rounding
    assert solved.loss <= best + 2e-9 * abs(best) + rounding


@settings(deadline=None, max_examples=120)
@given(programs())
def test_no_choice_within_the_limits_is_better(program):
    check_against_brute_force(program)


@pytest.mark.parametrize("seed", range(80))
def test_seven_units_of_five_options(seed):
    random = np.random.default_rng(1000 + seed)
    check_against_brute_force(
        build(
            (5,) * 7,
            seed=seed,
            rank=int(random.choice([1, 2, 5, 20, 40])),
            correlation=float(random.choice([0.0, 0.3, 0.9])),
            linear=float(random.choice([0.0, 0.3, 3.0])),
            num_limits=int(random.integers(1, 3)),
            tightness=float(random.uniform(0.05, 0.9)),
            magnitude=float(random.choice([1e-9, 1.0, 1e4])),
        )
    )


@settings(deadline=None, max_examples=25)
@given(st.data(), programs())
def test_bounds_hold_when_the_search_stops_early(data, program):
    best = brute_force(program)
    if best == np.inf:
        return
    solved = solve_program(
        program,
        target_gap=data.draw(st.sampled_from([0.0, 0.01, 0.3])),
        time_limit_s=data.draw(st.sampled_from([0.0, 0.01, NO_HURRY])),
    )
    rounding = 1e-12 * magnitude_of(program)
    assert program.fits(solved.choice)
    assert solved.bound <= best + 1e-9 * abs(best) + rounding
    assert solved.loss >= best - 1e-9 * abs(best) - rounding
    assert solved.gap >= 0.0
    assert solved.loss - solved.bound <= solved.gap * abs(solved.loss) + 2e-9 * abs(solved.loss) + rounding


@settings(deadline=None, max_examples=20)
@given(programs(most_units=4), st.integers(0, 40))
def test_more_room_never_costs_loss(program, room):
    if brute_force(program) == np.inf:
        return
    wider = Program(
        sizes=program.sizes,
        gram_OO=program.gram_OO,
        linear_O=program.linear_O,
        constant=program.constant,
        costs_KO=program.costs_KO,
        limits=tuple(limit + room for limit in program.limits),
    )
    before = solve_program(program, target_gap=0.0, time_limit_s=NO_HURRY)
    after = solve_program(wider, target_gap=0.0, time_limit_s=NO_HURRY)
    assert after.loss <= before.loss + 2e-9 * abs(before.loss) + 1e-12 * magnitude_of(program)
