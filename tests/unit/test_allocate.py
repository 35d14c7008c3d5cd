"""Budgets, problems and plans: what is promised to the byte, and how what cannot be met is named."""

import random
import re
from fractions import Fraction

import pytest

from llmmpq.allocate.budget import avg_bits_to_nbytes, describe
from llmmpq.allocate.problem import Problem, Unit, build_problem, match_pins
from llmmpq.allocate.solve import check_feasible, solve, to_plan, uniform
from llmmpq.errors import InfeasibleBudgetError, RecipeError
from llmmpq.records import LinearSpec, Scheme, Sensitivity

WIDTHS = (2, 3, 4, 8)
ROLES = {
    "self_attn.q_proj": ((64, 64), "self_attn.q+k+v"),
    "self_attn.k_proj": ((32, 64), "self_attn.q+k+v"),
    "self_attn.v_proj": ((32, 64), "self_attn.q+k+v"),
    "self_attn.o_proj": ((64, 64), "self_attn.o_proj"),
    "mlp.up_proj": ((96, 64), "mlp.gate+up"),
    "mlp.gate_proj": ((96, 64), "mlp.gate+up"),
    "mlp.down_proj": ((64, 96), "mlp.down_proj"),
}


def specs_of(num_blocks: int = 2) -> tuple[LinearSpec, ...]:
    return tuple(
        LinearSpec(
            name=f"model.layers.{block}.{role}",
            shape=shape,
            dtype="BF16",
            block=block,
            role=role.rpartition(".")[2],
            fused_set=f"model.layers.{block}.{fused}",
        )
        for block in range(num_blocks)
        for role, (shape, fused) in ROLES.items()
    )


def sensitivity_of(specs=None, *, widths=WIDTHS, losses=None, options=None) -> Sensitivity:
    """Losses that fall with the width, and differ between linears."""
    specs = specs_of() if specs is None else specs
    options = options or {spec.name: tuple(Scheme(bits=bits, group_size=32) for bits in widths) for spec in specs}
    losses = losses or {
        spec.name: tuple((1 + number) * 4.0**-scheme.bits for scheme in options[spec.name])
        for number, spec in enumerate(specs)
    }
    return Sensitivity(linears=specs, options=options, losses=losses, num_tokens=1, digest="")


def problem_of(*units: tuple[tuple[int, ...], tuple[float, ...]]) -> Problem:
    """Units of given bytes and losses; the schemes stand for nothing."""
    return Problem(
        units=tuple(
            Unit(
                members=(
                    LinearSpec(name=f"l{number}", shape=(8, 8), dtype="F32", block=0, role="l", fused_set=f"l{number}"),
                ),
                schemes=tuple(Scheme(bits=bits, group_size=8) for bits in WIDTHS[: len(nbytes)]),
                nbytes=nbytes,
                losses=losses,
            )
            for number, (nbytes, losses) in enumerate(units)
        )
    )


def widths_of(plan) -> dict[str, int]:
    return {name: linear.scheme.bits for name, linear in plan.linears.items()}


def plan_for(problem: Problem, nbytes: int):
    return to_plan(problem, solve(problem, nbytes, time_limit_s=10.0), method="additive", budget={})


# Budgets


@pytest.mark.parametrize("avg_bits", [3.3, 2.1, 3.5, 2.7, 4, 4.0, 0.1, 15.999, 3.1415926535, 1e-05, 2.675])
@pytest.mark.parametrize("num_weights", [1, 8, 1000, 6_476_005_376, 10**15 + 7])
def test_a_budget_is_the_decimal_that_was_typed(avg_bits, num_weights):
    exact = Fraction(str(avg_bits)) * num_weights / 8
    found = avg_bits_to_nbytes(avg_bits, num_weights)
    assert isinstance(found, int)
    assert found <= exact < found + 1


def test_decimals_are_not_doubles():
    assert avg_bits_to_nbytes(3.3, 80) == 33
    assert avg_bits_to_nbytes(0.7, 80) == 7  # 0.7 * 80 / 8 is 6.999... in doubles
    assert avg_bits_to_nbytes(4.35, 800) == 435


def test_budgets_are_described_as_flags():
    assert describe({"kind": "avg_bits", "value": 3.3}) == "--avg-bits 3.3"
    assert describe({"kind": "bits", "value": 4}) == "--bits 4"


# Problems


def test_units_count_bytes_as_the_schemes_do():
    sensitivity = sensitivity_of()
    problem = build_problem(sensitivity, pins={}, fuse=False)
    assert [unit.name for unit in problem.units] == [spec.name for spec in sensitivity.linears]
    for unit, spec in zip(problem.units, sensitivity.linears, strict=True):
        assert unit.members == (spec,)
        assert unit.schemes == sensitivity.options[spec.name]
        assert unit.nbytes == tuple(scheme.nbytes(spec.shape) for scheme in unit.schemes)
        assert unit.losses == sensitivity.losses[spec.name]
    assert problem.num_weights == sum(spec.num_weights for spec in sensitivity.linears)
    assert problem.smallest_nbytes == sum(unit.nbytes[0] for unit in problem.units)
    assert problem.largest_nbytes == sum(unit.nbytes[-1] for unit in problem.units)


def test_a_fused_set_is_one_unit_with_the_sums_of_its_members():
    sensitivity = sensitivity_of()
    problem = build_problem(sensitivity, pins={}, fuse=True)
    assert [unit.name.removeprefix("model.layers.") for unit in problem.units] == [
        f"{block}.{name}"
        for block in (0, 1)
        for name in ("self_attn.q+k+v", "self_attn.o_proj", "mlp.gate+up", "mlp.down_proj")
    ]
    qkv = problem.units[0]
    assert [member.role for member in qkv.members] == ["q_proj", "k_proj", "v_proj"]
    for position, scheme in enumerate(qkv.schemes):
        assert qkv.nbytes[position] == sum(scheme.nbytes(member.shape) for member in qkv.members)
        assert qkv.losses[position] == sum(sensitivity.losses[member.name][position] for member in qkv.members)


def test_options_that_cost_more_and_lose_no_less_are_dropped():
    specs = specs_of(1)[:1]
    losses = {specs[0].name: (0.5, 0.5, 0.1, 0.2)}
    (unit,) = build_problem(sensitivity_of(specs, losses=losses), pins={}, fuse=False).units
    assert [scheme.bits for scheme in unit.schemes] == [2, 4]
    assert unit.losses == (0.5, 0.1)


def test_options_that_lose_only_a_little_less_are_kept():
    specs = specs_of(1)[:1]
    losses = {specs[0].name: (0.5, 0.4999, 0.4998, 0.4997)}
    (unit,) = build_problem(sensitivity_of(specs, losses=losses), pins={}, fuse=False).units
    assert unit.losses == losses[specs[0].name]


def test_a_linear_that_loses_nothing_takes_the_smallest_width():
    specs = specs_of(1)
    sensitivity = sensitivity_of(specs)
    sensitivity.losses[specs[3].name] = (0.0,) * 4
    problem = build_problem(sensitivity, pins={}, fuse=False)
    assert widths_of(plan_for(problem, problem.largest_nbytes * 2))[specs[3].name] == 2


def test_options_in_any_order_are_matched_by_width():
    specs = specs_of(1)[:2]
    plain = build_problem(sensitivity_of(specs), pins={}, fuse=True)
    sensitivity = sensitivity_of(specs)
    name = specs[1].name
    sensitivity.options[name] = sensitivity.options[name][::-1]
    sensitivity.losses[name] = sensitivity.losses[name][::-1]
    assert build_problem(sensitivity, pins={}, fuse=True) == plain


def test_a_fused_set_chooses_among_the_widths_all_members_have():
    """A pin adds its width to the pinned linear's options alone."""
    specs = specs_of(1)[:3]
    options = {spec.name: tuple(Scheme(bits=bits, group_size=32) for bits in (2, 3, 4)) for spec in specs}
    options[specs[0].name] += (Scheme(bits=8, group_size=32),)
    (unit,) = build_problem(sensitivity_of(specs, options=options), pins={}, fuse=True).units
    assert [scheme.bits for scheme in unit.schemes] == [2, 3, 4]


def test_a_pin_outside_the_widths_of_the_other_members_of_a_fused_set():
    """--widths 2,3,4 --fuse --pin '*q_proj=8': either the set takes 8, or the conflict is named."""
    specs = specs_of(1)[:3]
    options = {spec.name: tuple(Scheme(bits=bits, group_size=32) for bits in (2, 3, 4)) for spec in specs}
    options[specs[0].name] += (Scheme(bits=8, group_size=32),)
    sensitivity = sensitivity_of(specs, options=options)
    try:
        units = build_problem(sensitivity, pins={"*.q_proj": 8}, fuse=True).units
    except (InfeasibleBudgetError, RecipeError):
        return
    assert [scheme.bits for scheme in units[0].schemes] == [8]


# Pins


@pytest.mark.parametrize(
    ("pins", "expected"),
    [
        ({"model.layers.1.mlp.down_proj": 8}, {"model.layers.1.mlp.down_proj": 8}),
        ({"layers.1.mlp.down_proj": 8}, {"model.layers.1.mlp.down_proj": 8}),
        ({"down_proj": 8}, {"model.layers.0.mlp.down_proj": 8, "model.layers.1.mlp.down_proj": 8}),
        ({"*down_proj": 8, "layers.0.*": 4}, None),
        ({"layers.0.*": 4, "*down_proj": 8}, None),
    ],
)
def test_pins_match_whole_names_or_their_ends(pins, expected):
    specs = specs_of()
    found = match_pins(specs, pins)
    if expected is not None:
        assert found == expected
        return
    last = list(pins.values())[-1]
    assert found["model.layers.0.mlp.down_proj"] == last  # later patterns win
    assert found["model.layers.1.mlp.down_proj"] == 8
    assert found["model.layers.0.self_attn.q_proj"] == 4
    assert "model.layers.1.self_attn.q_proj" not in found


def test_a_pin_does_not_match_half_a_name():
    assert match_pins(specs_of(), {"layers.1.*": 4}).keys() == {s.name for s in specs_of() if s.block == 1}
    with pytest.raises(RecipeError):
        match_pins(specs_of(), {"proj": 4})


def test_pins_are_case_sensitive():
    with pytest.raises(RecipeError):
        match_pins(specs_of(), {"*Down_proj": 4})


def test_a_pin_that_matches_nothing():
    with pytest.raises(RecipeError, match=r"pin 'no\.such' matches no linear.*model\.layers\.0\.self_attn\.q_proj"):
        build_problem(sensitivity_of(), pins={"*": 4, "no.such": 4}, fuse=False)


@pytest.mark.parametrize("fuse", [False, True])
def test_a_pin_is_kept_at_every_budget(fuse):
    problem = build_problem(sensitivity_of(), pins={"layers.0.mlp.down_proj": 8, "*.1.self_attn.o_proj": 2}, fuse=fuse)
    for share in (0.0, 0.3, 0.6, 1.0):
        budget = int(problem.smallest_nbytes + share * (problem.largest_nbytes - problem.smallest_nbytes))
        for plan in (
            plan_for(problem, budget),
            to_plan(problem, uniform(problem, budget), method="uniform", budget={}),
        ):
            widths = widths_of(plan)
            assert widths["model.layers.0.mlp.down_proj"] == 8
            assert widths["model.layers.1.self_attn.o_proj"] == 2


def test_a_pin_holds_although_a_smaller_width_loses_less():
    specs = specs_of(1)[:1]
    losses = {specs[0].name: (0.1, 0.2, 0.3, 0.4)}
    problem = build_problem(sensitivity_of(specs, losses=losses), pins={"*": 8}, fuse=False)
    assert widths_of(plan_for(problem, problem.largest_nbytes)) == {specs[0].name: 8}


def test_a_pin_on_one_member_holds_for_the_fused_set():
    problem = build_problem(sensitivity_of(), pins={"layers.0.self_attn.k_proj": 3}, fuse=True)
    widths = widths_of(plan_for(problem, problem.largest_nbytes))
    assert {widths[f"model.layers.0.self_attn.{role}_proj"] for role in "qkv"} == {3}
    assert {widths[f"model.layers.1.self_attn.{role}_proj"] for role in "qkv"} == {8}


def test_conflicting_pins_in_a_fused_set_are_named():
    pins = {"layers.1.self_attn.q_proj": 4, "layers.1.self_attn.v_proj": 8}
    with pytest.raises(InfeasibleBudgetError, match=r"model\.layers\.1\.self_attn\.q\+k\+v .*\[4, 8\]"):
        build_problem(sensitivity_of(), pins=pins, fuse=True)
    build_problem(sensitivity_of(), pins=pins, fuse=False)


# Solutions


def test_beyond_the_largest_plan_all_take_their_best():
    problem = build_problem(sensitivity_of(), pins={}, fuse=False)
    solution = solve(problem, problem.largest_nbytes + 10**9, time_limit_s=10.0)
    assert solution.nbytes == problem.largest_nbytes
    assert solution.gap == 0.0
    assert solve(problem, problem.largest_nbytes, time_limit_s=10.0) == solution


def test_at_the_smallest_budget_all_take_the_smallest():
    problem = build_problem(sensitivity_of(), pins={}, fuse=False)
    solution = solve(problem, problem.smallest_nbytes, time_limit_s=10.0)
    assert solution.choice == (0,) * len(problem.units)
    assert solution.nbytes == problem.smallest_nbytes


def test_one_byte_less_is_one_step_less():
    problem = problem_of(((100, 200), (9.0, 1.0)), ((100, 200), (5.0, 1.0)))
    assert solve(problem, 300, time_limit_s=10.0).choice == (1, 0)
    assert solve(problem, 299, time_limit_s=10.0).choice == (0, 0)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e-6, 1.0, 1e12])
def test_greed_by_loss_per_byte_is_not_enough(scale):
    """The first unit's step is the best per byte, but leaves no room for the two others."""
    steps = ((0, 51), (60.0 * scale, 0.0)), ((0, 50), (50.0 * scale, 0.0)), ((0, 50), (50.0 * scale, 0.0))
    solution = solve(problem_of(*steps), 100, time_limit_s=10.0)
    assert solution.choice == (0, 1, 1)
    assert solution.loss == pytest.approx(60.0 * scale)
    assert (solution.nbytes, solution.gap) == (100, 0.0)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e-6, 1.0, 1e12])
def test_the_size_of_the_losses_does_not_matter(scale):
    problem = problem_of(
        *(
            ((10, 20, 30), (scale * a, scale * b, scale * c))
            for a, b, c in ((9, 5, 1), (8, 3, 2), (7, 6, 1), (10, 2, 1))
        )
    )
    assert (
        solve(problem, 80, time_limit_s=10.0).choice
        == solve(
            problem_of(
                *(((10, 20, 30), v) for v in ((9.0, 5.0, 1.0), (8.0, 3.0, 2.0), (7.0, 6.0, 1.0), (10.0, 2.0, 1.0)))
            ),
            80,
            time_limit_s=10.0,
        ).choice
    )


def test_small_losses_beside_large_ones_are_still_decided():
    """Losses of 8 bits are a millionth of those of 2: the solver's tolerance must not blur the choice among them."""
    fine = [((10, 20), ((1 + k) * 1e-9, k * 1e-10)) for k in range(6)]
    problem = problem_of(((10, 20), (1.0, 1e-9)), *fine)
    solution = solve(problem, problem.smallest_nbytes + 30, time_limit_s=10.0)
    gains = sorted(range(6), key=lambda k: fine[k][1][0] - fine[k][1][1])[-2:]
    assert solution.choice == (1, *(int(k in gains) for k in range(6)))


def test_equal_input_gives_an_equal_plan():
    problem = build_problem(sensitivity_of(specs_of(6)), pins={}, fuse=False)
    budget = (problem.smallest_nbytes + problem.largest_nbytes) // 2
    one, two = (solve(problem, budget, time_limit_s=10.0) for _ in range(2))
    assert one == two


def test_a_time_limit_still_gives_a_plan_within_the_budget_and_its_gap():
    rng = random.Random(0)
    units = []
    for _ in range(300):
        sizes = sorted(rng.sample(range(10**6, 10**7), 4))
        units.append((tuple(sizes), tuple(sorted((rng.random() for _ in range(4)), reverse=True))))
    problem = problem_of(*units)
    budget = (problem.smallest_nbytes + problem.largest_nbytes) // 2
    hurried = solve(problem, budget, time_limit_s=1e-6)
    assert hurried.nbytes <= budget
    # Polished: no single step up fits any more.
    assert not any(
        unit.losses[option] < unit.losses[chosen]
        and hurried.nbytes - unit.nbytes[chosen] + unit.nbytes[option] <= budget
        for unit, chosen in zip(problem.units, hurried.choice, strict=True)
        for option in range(4)
    )
    assert hurried.gap >= 0
    proven = solve(problem, budget, time_limit_s=10.0)
    assert proven.loss <= hurried.loss
    assert proven.gap < 1e-3
    # The gap is a promise: no plan is better than loss * (1 - gap).
    assert proven.loss >= hurried.loss * (1 - hurried.gap) - 1e-9


def test_uniform_is_the_widest_width_that_fits():
    problem = build_problem(sensitivity_of(), pins={}, fuse=False)
    for position, bits in enumerate(WIDTHS):
        size = sum(unit.nbytes[position] for unit in problem.units)
        for budget, expected in ((size, bits), (size - 1, WIDTHS[max(position - 1, 0)])):
            plan = to_plan(problem, uniform(problem, budget), method="uniform", budget={})
            assert set(widths_of(plan).values()) == {expected}


def test_plans_are_in_the_order_of_the_model_and_say_what_they_cost():
    sensitivity = sensitivity_of(specs_of(3))
    problem = build_problem(sensitivity, pins={}, fuse=True)
    solution = solve(problem, problem.largest_nbytes * 2 // 3, time_limit_s=10.0)
    budget = {"kind": "avg_bits", "value": 3.0, "nbytes": 1}
    plan = to_plan(problem, solution, method="additive", budget=budget)
    assert plan.linears.keys() == {spec.name for spec in sensitivity.linears}
    blocks = [linear.block for linear in plan.linears.values()]
    assert blocks == sorted(blocks)
    for spec in sensitivity.linears:
        linear = plan.linears[spec.name]
        assert (linear.shape, linear.block, linear.role) == (spec.shape, spec.block, spec.role)
    assert plan.nbytes == solution.nbytes
    assert plan.predicted_loss == solution.loss
    assert plan.optimality_gap == solution.gap
    assert plan.budget == budget


# What cannot be met


@pytest.mark.parametrize(("pins", "fuse"), [({}, False), ({}, True), ({"*down_proj": 8}, False), ({"*": 4}, True)])
@pytest.mark.parametrize("group_size", [8, 32, 100])
def test_the_figure_named_is_the_smallest_that_works(pins, fuse, group_size):
    specs = specs_of()
    options = {spec.name: tuple(Scheme(bits=bits, group_size=group_size) for bits in WIDTHS) for spec in specs}
    problem = build_problem(sensitivity_of(specs, options=options), pins=pins, fuse=fuse)
    budget = {"kind": "avg_bits", "value": 0.5}
    with pytest.raises(InfeasibleBudgetError) as caught:
        check_feasible(problem, avg_bits_to_nbytes(0.5, problem.num_weights), budget)
    message = str(caught.value)
    assert message.startswith("--avg-bits 0.5 cannot be met")
    assert f"{problem.smallest_nbytes:,} bytes" in message
    assert ("pins" in message) == bool(pins)
    needed = float(re.search(r"Raise --avg-bits to ([\d.]+) or more", message)[1])
    check_feasible(problem, avg_bits_to_nbytes(needed, problem.num_weights), budget)
    with pytest.raises(InfeasibleBudgetError):
        check_feasible(problem, avg_bits_to_nbytes(round(needed - 0.002, 3), problem.num_weights), budget)


def test_the_smallest_plan_is_feasible_to_the_byte():
    problem = build_problem(sensitivity_of(), pins={}, fuse=False)
    check_feasible(problem, problem.smallest_nbytes, {"kind": "avg_bits", "value": 2.0})
    with pytest.raises(InfeasibleBudgetError):
        check_feasible(problem, problem.smallest_nbytes - 1, {"kind": "avg_bits", "value": 2.0})


def test_a_linear_with_one_useful_option_is_not_called_pinned():
    """Unreached linears keep one option once the dominated ones are dropped; nobody pinned them."""
    specs = specs_of(1)
    sensitivity = sensitivity_of(specs)
    sensitivity.losses[specs[0].name] = (0.0,) * 4
    problem = build_problem(sensitivity, pins={}, fuse=False)
    with pytest.raises(InfeasibleBudgetError) as caught:
        check_feasible(problem, 10, {"kind": "avg_bits", "value": 1.0})
    assert "pin" not in str(caught.value)


def test_the_overhead_named_is_that_of_scales_and_zeros():
    specs = specs_of(1)[:1]
    problem = build_problem(sensitivity_of(specs), pins={}, fuse=False)
    # 64 x 64 in groups of 32: 2 groups of 16 + 2 bits for each row's 64 codes.
    with pytest.raises(InfeasibleBudgetError, match=r"scales and zeros take 0\.56 of them"):
        check_feasible(problem, 10, {"kind": "avg_bits", "value": 1.0})
