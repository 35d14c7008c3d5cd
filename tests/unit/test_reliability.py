"""Signal and chance in products of a short probe: known for drawn ones, found again, taken out."""

from dataclasses import replace

import numpy as np
import pytest

from llmmpq import measuring
from llmmpq.allocate.problem import build_problem
from llmmpq.allocate.shrink import believed
from llmmpq.allocate.solve import solve_quadratic, to_program
from llmmpq.job import open_job
from llmmpq.measure.reliability import fit_factors, reliability_of
from llmmpq.progress import Silent
from llmmpq.recipe import Recipe
from llmmpq.records import LinearSpec, Quadratic, Reliability, Scheme, Sensitivity
from llmmpq.session import open_session
from tests import tiny

NUM_LINEARS, NUM_BLOCKS = 60, 4
LINEAR_O = np.repeat(np.arange(NUM_LINEARS), 2)
BLOCK_O = LINEAR_O * NUM_BLOCKS // NUM_LINEARS
LEVEL_O = np.tile([2.0, 4.0], NUM_LINEARS)


def drawn(*, num_samples=400, seed=0):
    """True products, their measurement, and that of one half: errors of 2-bit options have much in common, more so in
    a block, those of 4-bit options little."""
    random = np.random.default_rng(seed)
    common, blocks = random.standard_normal((LINEAR_O.size, 40)), random.standard_normal((NUM_BLOCKS, 40))
    common = 0.8 * common + 0.4 * blocks[BLOCK_O]
    common *= np.where(LEVEL_O == 2.0, 0.12, 0.03)[:, None]
    truth = common @ common.T + np.eye(LINEAR_O.size)
    samples = random.standard_normal((num_samples, LINEAR_O.size)) @ np.linalg.cholesky(truth).T
    size = np.sqrt(np.exp(random.standard_normal(LINEAR_O.size)))
    samples, truth = samples * size, truth * np.outer(size, size)
    first = samples[::2]
    return truth, samples.T @ samples / num_samples, first.T @ first / len(first)


def found_in(gram, half, *, half_share=0.5):
    return reliability_of(gram, half, half_share=half_share, linear_O=LINEAR_O, block_O=BLOCK_O, level_O=LEVEL_O)


def as_quadratic(gram, reliability, linear=None):
    return Quadratic(
        gram_OO=gram,
        linear_O=np.zeros(len(gram)) if linear is None else linear,
        constant=0.0,
        base=None,
        base_kl=0.0,
        rounding_kl=None,
        reliability=reliability,
    )


def pair_error(gram, truth):
    scale = np.sqrt(np.diag(truth))
    others = LINEAR_O[:, None] != LINEAR_O
    return float((((gram - truth) / np.outer(scale, scale))[others] ** 2).sum())


@pytest.mark.parametrize("seed", range(3))
def test_shrunk_products_are_nearer_to_the_truth(seed):
    truth, gram, half = drawn(seed=seed)
    shrunk, _ = believed(as_quadratic(gram, found_in(gram, half)))
    assert pair_error(shrunk, truth) < 0.75 * pair_error(gram, truth)


def test_factors_are_those_of_the_truth():
    truth, gram, half = drawn()
    found = found_in(gram, half)
    scale = np.sqrt(np.outer(np.diag(gram), np.diag(gram)))
    across = BLOCK_O[:, None] != BLOCK_O
    within = ~across & (LINEAR_O[:, None] != LINEAR_O)
    for level in (2.0, 4.0):
        at = np.equal(LEVEL_O, level)
        own = np.outer(at, at)
        between = found.across_O[at][0] ** 2
        for pairs, factor in ((across & own, between), (within & own, between + found.within_O[at][0] ** 2)):
            share = float((gram * truth / scale**2)[pairs].sum() / ((gram / scale) ** 2)[pairs].sum())
            assert factor == pytest.approx(share, abs=0.12)
    assert found.across_O[0] > found.across_O[1] + 0.2  # 2 bits against 4
    assert found.within_O[0] > 0.3


def test_halves_of_unequal_length_count_by_their_tokens():
    truth, gram, half = drawn()
    assert np.array_equal(found_in(gram, 2 * gram - half).across_O, found_in(gram, half).across_O)
    random = np.random.default_rng(5)
    samples = random.standard_normal((300, LINEAR_O.size)) @ np.linalg.cholesky(truth).T
    short, rest = samples[:100], samples[100:]
    one = found_in(samples.T @ samples / 300, short.T @ short / 100, half_share=1 / 3)
    other = found_in(samples.T @ samples / 300, rest.T @ rest / 200, half_share=2 / 3)
    np.testing.assert_allclose(one.across_O, other.across_O, atol=0.0051)


def test_the_same_products_in_both_halves_are_believed_and_pure_chance_is_not():
    _, gram, _ = drawn()
    sure = found_in(gram, gram)
    assert (sure.across_O == 1.0).all()
    assert not sure.within_O.any()
    opposite = np.diag(np.diag(gram))  # the first half knows of no products, so the halves agree on none
    none = found_in(gram, opposite)
    assert not none.across_O.any()
    assert not none.within_O.any()


def test_a_level_without_pairs_and_options_without_error_do_no_harm():
    assert fit_factors(np.zeros((2, 2)), np.diag([1.0, 0.0])).tolist() == [0.0, 1.0]
    _, gram, half = drawn()
    for matrix in (gram, half):
        matrix[4], matrix[:, 4] = 0.0, 0.0
    assert np.isfinite(found_in(gram, half).across_O).all()


@pytest.mark.parametrize("seed", range(3))
def test_what_is_believed_is_convex_and_leaves_single_options_alone(seed):
    random = np.random.default_rng(seed)
    factor = random.standard_normal((30, LINEAR_O.size))
    gram = factor.T @ factor
    across = random.uniform(0, 1, LINEAR_O.size)
    reliability = Reliability(
        across_O=across, within_O=np.sqrt(1 - across**2) * random.uniform(0, 1, LINEAR_O.size), block_O=BLOCK_O
    )
    linear = random.standard_normal(LINEAR_O.size)
    shrunk, term = believed(as_quadratic(gram, reliability, linear))
    assert np.linalg.eigvalsh(shrunk)[0] > -1e-10 * np.diag(gram).max()
    np.testing.assert_allclose(np.diag(shrunk) + term, np.diag(gram) + linear)
    assert (np.diag(shrunk) <= np.diag(gram) * (1 + 1e-12)).all()
    one, other = 0, LINEAR_O.size - 1
    assert shrunk[one, other] == pytest.approx(gram[one, other] * across[one] * across[other])
    near = across[0] * across[2] + reliability.within_O[0] * reliability.within_O[2]
    assert shrunk[0, 2] == pytest.approx(gram[0, 2] * near)


def sensitivity_with(reliability):
    """Three linears; by the measured products two narrow options cancel each other."""
    specs = tuple(
        LinearSpec(name=f"layers.{i}.q", shape=(32, 32), dtype="float32", block=i, role="q", fused_set=f"{i}.qkv")
        for i in range(3)
    )
    schemes = (Scheme(bits=2, group_size=32), Scheme(bits=4, group_size=32))
    errors = np.array([[1.0, 0.0], [0.1, 0.0], [-0.9, 0.3], [0.0, 0.1], [0.4, 0.0], [0.1, 0.0]])
    return Sensitivity(
        linears=specs,
        options={spec.name: schemes for spec in specs},
        losses={spec.name: (1.0, 0.01) for spec in specs},
        num_tokens=1,
        digest="",
        quadratic=as_quadratic(errors @ errors.T, reliability),
    )


def test_the_program_and_its_answer_follow_what_is_believed():
    nothing = Reliability(across_O=np.zeros(6), within_O=np.zeros(6), block_O=np.repeat([0, 1, 2], 2))
    picked = {}
    for name, reliability in (("all", None), ("nothing", nothing)):
        sensitivity = sensitivity_with(reliability)
        problem = build_problem(sensitivity, pins={}, fuse=False, with_pairs=True)
        sizes = problem.units[0].nbytes
        budget = 2 * sizes[0] + sizes[1]
        solution = solve_quadratic(problem, budget, target_gap=0.0, time_limit_s=10)
        picked[name] = solution.choice
        rows = [2 * unit + option for unit, option in enumerate(solution.choice)]
        gram = sensitivity.quadratic.gram_OO
        assert solution.loss == pytest.approx(gram[np.ix_(rows, rows)].sum())  # as measured, whatever is believed
        program = to_program(problem, budget)
        assert program.loss(solution.choice) == pytest.approx(
            gram[np.ix_(rows, rows)].sum() if reliability is None else np.diag(gram)[rows].sum()
        )
    assert picked == {"all": (0, 0, 1), "nothing": (1, 0, 0)}


def test_reliability_travels_with_the_measurement():
    reliability = Reliability(across_O=np.linspace(0, 1, 6), within_O=np.full(6, 0.25), block_O=np.repeat([0, 1, 2], 2))
    for known in (reliability, None):
        before = sensitivity_with(known)
        assert before.quadratic is not None
        after = Sensitivity.from_json(before.to_json(), before.quadratic.arrays()).quadratic
        assert after is not None
        if known is None:
            assert after.reliability is None
        else:
            assert after.reliability is not None
            for name in ("across_O", "within_O", "block_O"):
                assert np.array_equal(getattr(after.reliability, name), getattr(known, name))


def test_a_measurement_compares_the_halves_of_each_candidate(tmp_path, monkeypatch):
    """Where the first half says the same as the whole, all is believed; the work folder keeps it."""
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40, encoding="utf-8")
    recipe = Recipe.from_dict({}).override(
        {
            "model": str(tiny.save("llama", tmp_path / "llama")),
            "budget.avg_bits": 3.5,
            "calibration.source": str(text),
            "calibration.tokens": 128,
            "calibration.window": 32,
            "measurement.tokens": 64,
            "quantizer.group_size": 32,
            "quantizer.sweeps": 0,
            "allocation.widths": [2, 4],
            "allocation.layer_only": True,
            "run.device": "cpu",
        }
    )
    finish_ride = measuring.finish_ride

    def finish(*args, **named):
        found = finish_ride(*args, **named)
        assert found.half_CC is not None  # two windows
        return replace(found, half_CC=found.gram_CC)

    monkeypatch.setattr(measuring, "finish_ride", finish)
    with open_job(open_session(recipe), out=tmp_path / "out", work_dir=tmp_path / "work", progress=Silent()) as job:
        found = measuring.measure_pairs(job).quadratic.reliability
        again = measuring.measure_pairs(job).quadratic.reliability  # from the work folder
    assert found.across_O.tolist() == [1.0] * 42
    assert found.block_O.tolist() == [index // 14 for index in range(42)]
    assert np.array_equal(again.across_O, found.across_O)
    assert np.array_equal(again.block_O, found.block_O)


def test_around_a_plan_the_coarser_of_two_options_counts():
    sensitivity = sensitivity_with(None)
    assert measuring._levels(sensitivity.linears, sensitivity.options, None).tolist() == [2, 4] * 3
    assert measuring._levels(sensitivity.linears, sensitivity.options, (0, 1, 1)).tolist() == [2, 2, 2, 4, 2, 4]
