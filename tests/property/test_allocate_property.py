"""The allocator against brute force: optimal, within the budget to the byte, and monotone in it."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmmpq.allocate.budget import avg_bits_to_nbytes
from llmmpq.allocate.problem import Problem, Unit, build_problem
from llmmpq.allocate.solve import solve, to_plan, uniform
from llmmpq.records import LinearSpec, Scheme, Sensitivity

WIDTHS = (2, 3, 4, 8)
quick = settings(deadline=None, max_examples=60)


@st.composite
def problems(draw, max_units: int = 5) -> Problem:
    """As the records allow them: bytes rise and losses fall within a unit, over very different magnitudes."""
    units = []
    for number in range(draw(st.integers(1, max_units))):
        count = draw(st.integers(1, 4))
        unit_nbytes = draw(st.sampled_from([1, 4, 64]))
        nbytes = sorted(draw(st.sets(st.integers(1, 60), min_size=count, max_size=count)))
        magnitude = 10.0 ** draw(st.integers(-6, 2))
        losses = sorted(draw(st.sets(st.integers(0, 10**6), min_size=count, max_size=count)), reverse=True)
        spec = LinearSpec(
            name=f"layers.{number}.up", shape=(8, 8), dtype="F32", block=number, role="up", fused_set=str(number)
        )
        units.append(
            Unit(
                members=(spec,),
                schemes=tuple(Scheme(bits=bits, group_size=8) for bits in WIDTHS[:count]),
                nbytes=tuple(unit_nbytes * size for size in nbytes),
                losses=tuple(magnitude * loss for loss in losses),
            )
        )
    return Problem(units=tuple(units))


def brute_force(problem: Problem, budget: int) -> float:
    """The least loss of all choices that fit."""
    return min(
        sum(unit.losses[option] for unit, option in zip(problem.units, choice, strict=True))
        for choice in itertools.product(*(range(len(unit.losses)) for unit in problem.units))
        if sum(unit.nbytes[option] for unit, option in zip(problem.units, choice, strict=True)) <= budget
    )


def draw_budget(data, problem: Problem) -> int:
    return data.draw(st.integers(problem.smallest_nbytes, problem.largest_nbytes + 10), label="budget")


@quick
@given(st.data(), problems())
def test_no_choice_within_the_budget_is_better(data, problem):
    budget = draw_budget(data, problem)
    solution = solve(problem, budget, time_limit_s=10.0)
    best = brute_force(problem, budget)
    assert solution.loss <= best * (1 + 1e-9) + 1e-12
    assert solution.gap <= 1.01e-6  # HiGHS's bound may stay a millionth below, and rounding adds to that


@quick
@given(st.data(), problems(max_units=12))
def test_the_budget_holds_to_the_byte_and_the_figures_are_those_of_the_choice(data, problem):
    budget = draw_budget(data, problem)
    for solution in (solve(problem, budget, time_limit_s=10.0), uniform(problem, budget)):
        assert len(solution.choice) == len(problem.units)
        chosen = list(zip(problem.units, solution.choice, strict=True))
        assert all(0 <= option < len(unit.losses) for unit, option in chosen)
        assert solution.nbytes == sum(unit.nbytes[option] for unit, option in chosen) <= budget
        assert solution.loss == pytest.approx(sum(unit.losses[option] for unit, option in chosen))


@quick
@given(st.data(), problems(max_units=12))
def test_more_bytes_never_lose_more(data, problem):
    budgets = sorted(data.draw(st.lists(st.integers(problem.smallest_nbytes, problem.largest_nbytes), min_size=2)))
    losses = [solve(problem, budget, time_limit_s=10.0).loss for budget in budgets]
    for less, more in itertools.pairwise(losses):
        assert more <= less * (1 + 1e-9) + 1e-12


@quick
@given(st.data(), problems(max_units=10))
def test_never_worse_than_one_width_everywhere(data, problem):
    budget = draw_budget(data, problem)
    assert solve(problem, budget, time_limit_s=10.0).loss <= uniform(problem, budget).loss * (1 + 1e-9) + 1e-12


@quick
@given(st.data(), problems(max_units=8))
def test_the_order_of_the_units_does_not_change_the_loss(data, problem):
    budget = draw_budget(data, problem)
    shuffled = Problem(units=tuple(data.draw(st.permutations(problem.units))))
    one, two = (solve(p, budget, time_limit_s=10.0) for p in (problem, shuffled))
    assert two.loss == pytest.approx(one.loss, rel=1e-9, abs=1e-12)
    assert solve(problem, budget, time_limit_s=10.0) == one


@st.composite
def sensitivities(draw) -> Sensitivity:
    """Losses of any shape: not falling, equal, zero."""
    specs = []
    for block in range(draw(st.integers(1, 2))):
        for role, fused in (("q", "q+k"), ("k", "q+k"), ("o", "o")):
            shape = (draw(st.integers(1, 40)), draw(st.integers(1, 40)))
            specs.append(
                LinearSpec(
                    name=f"layers.{block}.{role}",
                    shape=shape,
                    dtype="F32",
                    block=block,
                    role=role,
                    fused_set=f"layers.{block}.{fused}",
                )
            )
    group_size = draw(st.integers(1, 50))
    options = {spec.name: tuple(Scheme(bits=bits, group_size=group_size) for bits in WIDTHS) for spec in specs}
    loss = st.one_of(st.integers(0, 20).map(lambda tenths: tenths / 10), st.floats(1e-9, 10.0))
    losses = {spec.name: tuple(draw(st.lists(loss, min_size=4, max_size=4))) for spec in specs}
    return Sensitivity(linears=tuple(specs), options=options, losses=losses, num_tokens=1, digest="")


@quick
@given(st.data(), sensitivities(), st.booleans())
def test_plans_from_measurements_are_optimal_whatever_the_losses(data, sensitivity, fuse):
    """Dropping dominated options must not drop the answer; members of a fused set agree; pins hold."""
    names = [spec.name for spec in sensitivity.linears]
    pinned = data.draw(st.sampled_from(names))
    pins = data.draw(st.sampled_from([{}, {pinned: 3}]))
    problem = build_problem(sensitivity, pins=pins, fuse=fuse)
    budget = draw_budget(data, problem)
    plan = to_plan(problem, solve(problem, budget, time_limit_s=10.0), method="additive", budget={})
    assert plan.nbytes <= budget
    sets: dict[str, list[str]] = {}
    for spec in sensitivity.linears:
        sets.setdefault(spec.fused_set if fuse else spec.name, []).append(spec.name)
    best = float("inf")
    by_name = {spec.name: spec for spec in sensitivity.linears}
    for widths in itertools.product(range(4), repeat=len(sets)):
        choice = {name: width for width, members in zip(widths, sets.values(), strict=True) for name in members}
        if any(WIDTHS[choice[name]] != bits for name, bits in pins.items()):
            continue
        nbytes = sum(sensitivity.options[name][i].nbytes(by_name[name].shape) for name, i in choice.items())
        if nbytes <= budget:
            best = min(best, sum(sensitivity.losses[name][i] for name, i in choice.items()))
    assert plan.predicted_loss <= best * (1 + 1e-6) + 1e-9
    found = {name: linear.scheme.bits for name, linear in plan.linears.items()}
    for members in sets.values():
        assert len({found[name] for name in members}) == 1
    assert all(found[name] == bits for name, bits in pins.items())
    losses = (sensitivity.losses[name][WIDTHS.index(bits)] for name, bits in found.items())
    assert plan.predicted_loss == pytest.approx(sum(losses))


@quick
@given(st.integers(1, 16_000), st.sampled_from([1, 10, 100, 1000]), st.integers(1, 10**13))
def test_a_budget_in_bits_is_exact(numerator, denominator, num_weights):
    if numerator > 16 * denominator:
        numerator = 16 * denominator
    nbytes = avg_bits_to_nbytes(numerator / denominator, num_weights)
    assert 8 * denominator * nbytes <= numerator * num_weights < 8 * denominator * (nbytes + 1)
