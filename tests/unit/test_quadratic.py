"""Edges of the quadratic solver: nothing to choose, nothing to gain, no room, no time, and a hand on the keyboard."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import solver_bench as bench

from llmmpq.allocate import shift
from llmmpq.allocate.program import narrow, reduce_program
from llmmpq.allocate.quadratic import Program, _carried, solve_program
from llmmpq.allocate.relax import relax
from llmmpq.allocate.search import anneal, cheapest_start
from llmmpq.allocate.shift import make_convex
from llmmpq.errors import InfeasibleBudgetError


def make_program(sizes, *, gram=None, linear=None, constant=0.0, costs=None, limits=()) -> Program:
    num_options = sum(sizes)
    return Program(
        sizes=tuple(sizes),
        gram_OO=np.zeros((num_options, num_options)) if gram is None else np.asarray(gram, dtype=np.float64),
        linear_O=np.zeros(num_options) if linear is None else np.asarray(linear, dtype=np.float64),
        constant=constant,
        costs_KO=np.asarray([] if costs is None else costs, dtype=np.int64).reshape(len(limits), num_options),
        limits=tuple(limits),
    )


def random_program(num_units: int, num_options: int, *, seed: int = 0, average: float = 0.4) -> Program:
    random = np.random.default_rng(seed)
    total = num_units * num_options
    factor = random.standard_normal((total, total)) + 0.3 * random.standard_normal((1, total))
    factor *= np.tile(3.0 ** -np.arange(num_options), num_units)[:, None]
    costs = np.tile(np.arange(1, num_options + 1), num_units) * np.repeat(random.integers(1, 9, num_units), num_options)
    low, high = costs[::num_options].sum(), costs[num_options - 1 :: num_options].sum()
    return make_program(
        (num_options,) * num_units,
        gram=factor @ factor.T / total,
        costs=[costs],
        limits=(int(low + average * (high - low)),),
    )


def solve(program: Program, **changes):
    return solve_program(program, **({"target_gap": 0.0, "time_limit_s": 60.0} | changes))


def test_one_unit():
    solved = solve(make_program([3], gram=np.diag([9.0, 4.0, 1.0]), costs=[[1, 2, 3]], limits=[2]))
    assert (solved.choice, solved.loss, solved.status) == ((1,), 4.0, "optimal")


def test_one_option_each():
    solved = solve(make_program([1, 1], gram=[[1.0, 0.5], [0.5, 2.0]], constant=1.0, costs=[[3, 4]], limits=[7]))
    assert (solved.choice, solved.loss, solved.bound, solved.gap) == ((0, 0), 5.0, 5.0, 0.0)


def test_no_limits_at_all():
    solved = solve(make_program([2, 2], gram=np.diag([4.0, 1.0, 1.0, 4.0])))
    assert (solved.choice, solved.proven) == ((1, 0), True)


def test_zero_gram_is_a_knapsack():
    solved = solve(make_program([2, 2], linear=[5.0, 1.0, 4.0, 1.0], costs=[[1, 3, 1, 3]], limits=[4]))
    assert (solved.choice, solved.loss, solved.proven) == ((1, 0), 5.0, True)


def test_nothing_to_choose_between_takes_the_first():
    gram = np.ones((6, 6))
    solved = solve(make_program([3, 3], gram=gram, costs=[[2, 2, 2, 2, 2, 2]], limits=[4]))
    assert (solved.choice, solved.loss, solved.proven) == ((0, 0), 4.0, True)


def test_limit_exactly_the_smallest():
    program = random_program(6, 4, average=0.0)
    solved = solve(program)
    assert solved.choice == (0,) * 6
    assert solved.proven


def test_limit_that_does_not_bind_gives_the_unlimited_optimum():
    bound = random_program(6, 4, average=1.0)
    free = make_program(bound.sizes, gram=bound.gram_OO)
    assert solve(bound).loss == pytest.approx(solve(free).loss, rel=1e-12)


def test_huge_costs_are_kept_to_the_last_unit():
    large = 2**50
    gram = [[4.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 0.0], [1.0, 0.0, 4.0, 0.0], [0.0, 0.0, 0.0, 1.0]]
    costs = [[large, large + 1, large, large + 1]]
    assert solve(make_program([2, 2], gram=gram, costs=costs, limits=[2 * large])).choice == (0, 0)
    assert sum(solve(make_program([2, 2], gram=gram, costs=costs, limits=[2 * large + 1])).choice) == 1
    assert solve(make_program([2, 2], gram=gram, costs=costs, limits=[2 * large + 2])).choice == (1, 1)


def test_costs_beyond_exact_arithmetic_are_refused():
    with pytest.raises(ValueError, match="larger units"):
        make_program([1, 1], costs=[[2**53, 1]], limits=[2**53])


def test_slightly_negative_eigenvalues_are_mended():
    program = random_program(8, 4)
    gram = program.gram_OO - 1e-13 * np.eye(32)
    assert solve(make_program(program.sizes, gram=gram, costs=program.costs_KO, limits=program.limits)).proven


def test_infeasible_names_the_limit_and_the_least_that_works():
    with pytest.raises(InfeasibleBudgetError, match="limit 1 is 3, but the smallest choice costs 4"):
        solve(make_program([2, 2], costs=[[1, 1, 1, 1], [2, 5, 2, 5]], limits=[9, 3]))


def test_limits_that_can_only_be_met_apart():
    with pytest.raises(InfeasibleBudgetError, match="not all together"):
        solve(make_program([2, 2], costs=[[1, 3, 1, 3], [3, 1, 3, 1]], limits=[3, 3]))


def test_no_time_still_gives_a_choice_and_an_honest_gap():
    program = random_program(40, 4)
    hurried, patient = solve(program, time_limit_s=0.01), solve(program)
    assert program.fits(hurried.choice)
    assert hurried.status == "time limit"
    assert 0.0 < hurried.gap < np.inf
    assert hurried.bound <= patient.loss * (1 + 1e-9)
    assert patient.loss <= hurried.loss


def test_target_gap_ends_the_search():
    solved = solve(random_program(30, 4), target_gap=0.2)
    assert 0.0 < solved.gap <= 0.2
    assert solved.status == "gap"


@pytest.mark.parametrize("calls", [1, 3])
def test_interrupt_returns_the_best_so_far(calls):
    program = random_program(30, 4)
    heard = []

    def interrupt(loss: float, gap: float) -> None:
        heard.append(loss)
        if len(heard) == calls:
            raise KeyboardInterrupt

    solved = solve(program, on_progress=interrupt)
    assert solved.status == "interrupted"
    assert program.fits(solved.choice)
    assert solved.loss == pytest.approx(heard[-1])
    assert solved.bound <= solve(program).loss * (1 + 1e-9)


def test_a_good_start_is_not_lost():
    program = random_program(25, 4)
    best = solve(program)
    assert solve(program, starts=[best.choice], time_limit_s=0.0).loss <= best.loss * (1 + 1e-12)


def test_equal_input_gives_an_equal_answer():
    first, second = solve(random_program(20, 5)), solve(random_program(20, 5))
    assert first == second


@pytest.mark.parametrize(("num_units", "seed"), [(12, 0), (12, 1)])
def test_equal_to_scip(num_units, seed):
    pytest.importorskip("pyscipopt", reason="SCIP is installed with the dev extra, on Linux")
    program = bench.draw_program(num_units, bits=(2.0, 3.0, 4.0, 8.0), average=3.0, seed=seed)
    loss, status = bench.solve_with_scip(program, time_limit_s=120.0)
    assert status in ("optimal", "gaplimit")
    assert solve(program).loss == pytest.approx(loss, rel=1e-6)


def test_an_inverse_that_updates_spoilt_is_seen_and_made_anew(monkeypatch):
    random = np.random.default_rng(0)
    factor = random.standard_normal((60, 60)) * np.repeat(10.0 ** -np.arange(6), 10)
    gram = factor.T @ factor + 1e-6 * np.diag(np.diag(factor.T @ factor))
    units, weights = np.arange(60) // 3, np.full(60, 0.3)
    monkeypatch.setattr(shift, "COLUMNS_AT_A_TIME", 3)
    step, spoilt = shift.Shifter._step, []

    def spoil_once(self, group, **settings):
        step(self, group, **settings)
        if not spoilt:
            spoilt.append(self._drift(30))
            self.inverse_LL *= 1.1
            assert self._drift(30) > shift.DRIFT

    monkeypatch.setattr(shift.Shifter, "_step", spoil_once)
    shifter = shift.Shifter(gram.copy(), live_L=np.arange(60), active=np.full(60, True), unit_of_N=units)
    assert shifter.sweep(weight_N=weights, barrier=1e-3)
    assert spoilt[0] < 1e-6
    assert shifter._drift(0) < 1e-4


def test_the_relaxed_point_goes_on_with_what_is_left():
    whole = reduce_program(make_program((4, 4, 4)))
    part = narrow(whole, whole.allowed_UW)
    allowed = whole.allowed_UW.copy()
    allowed[0, 1:] = False  # settled
    allowed[1, 3] = False
    allowed[2, 0] = False
    smaller = narrow(whole, allowed)
    point = np.array([[0.0, 1.0, 0.0, 0.0], [0.1, 0.6, 0.0, 0.3], [1.0, 0.0, 0.0, 0.0]])
    relaxed = SimpleNamespace(point_BN=point.reshape(1, -1))
    carried = _carried(part, relaxed, smaller).reshape(smaller.reduced.num_units, -1)
    np.testing.assert_allclose(carried, [[0.1, 0.9, 0.0], [1.0, 0.0, 0.0]])


def test_a_relaxation_that_has_settled_ends_before_its_passes_are_over():
    reduced = reduce_program(make_program((4,) * 6, gram=random_program(6, 4).gram_OO))
    convex = make_convex(
        reduced, constant=0.0, matrix_NN=reduced.pair_NN + 10 * np.eye(reduced.num_slots), change_N=reduced.self_N
    )
    point = np.tile([1.0, 0.0, 0.0, 0.0], 6)[None]
    allowed, prices = reduced.allowed_UW.reshape(1, -1), np.zeros((1, len(reduced.limits)))
    few, many = (
        relax(convex, allowed_BN=allowed, point_BN=point, prices_BK=prices, penalty=1.0, sweeps=sweeps)
        for sweeps in (2000, 10**9)
    )
    np.testing.assert_array_equal(few.point_BN, many.point_BN)
    assert few.bound_B == many.bound_B


def test_annealing_takes_prices_of_whole_limits_whatever_the_unit_of_costs():
    small = random_program(30, 5)
    large = replace(small, costs_KO=small.costs_KO * 10**6, limits=tuple(10**6 * limit for limit in small.limits))
    first, second = (
        anneal(
            reduced := reduce_program(program),
            picked_U=cheapest_start(reduced),
            prices_K=np.array([reduced.loss(cheapest_start(reduced))]),
            sweeps=20,
            seed=0,
            stop=lambda: False,
        )
        for program in (small, large)
    )
    np.testing.assert_array_equal(first, second)
    assert small.costs_KO[0, first].sum() > 1.2 * small.costs_KO[0, ::5].sum()  # not the cheapest everywhere
