"""Several matrices in one launch: bit for bit what each gives alone.

Memory that a kernel is to write holds NaN before, so a program that takes itself for another member's is seen.
"""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmmpq_kernels import cpu, gemv, native, together, tuning
from tests.kernels.matrices import Case, relative_error
from tests.kernels.test_products import TOLERANCE, uninitialized_memory_is_nan  # noqa: F401  (used by every test here)

needs_a_compiler = pytest.mark.skipif(native.load().problem is not None, reason=str(native.load().problem))
on_the_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="matrices of these tests are on the GPU")


@st.composite
def sets(draw: st.DrawFn, *, most_rows: int) -> list[Case]:
    """Two to four matrices with one input: rows that fill no block, any widths, scales, zeros and bias."""
    num_k, group_size = draw(st.integers(1, 400)), draw(st.sampled_from([32, 64, 128]))
    rows, dtype = draw(st.integers(1, most_rows)), draw(st.sampled_from([torch.float16, torch.bfloat16]))
    most_runs = min(2, -(-num_k // group_size))
    seed = draw(st.integers(0, 2**16))
    return [
        Case(
            rows=rows,
            shape=(draw(st.sampled_from([1, 2, 15, 16, 17, 31, 32, 33, 70])), num_k),
            widths=tuple(
                sorted(draw(st.lists(st.sampled_from([2, 3, 4, 8]), min_size=1, max_size=most_runs, unique=True)))
            ),
            group_size=group_size,
            dtype=dtype,
            eight_bit=draw(st.booleans()),
            symmetric=draw(st.booleans()),
            has_bias=draw(st.booleans()),
            seed=seed + place,
        )
        for place in range(draw(st.integers(2, 4)))
    ]


@st.composite
def cuts(draw: st.DrawFn) -> gemv.GemvConfig:
    block_n, block_c, split = draw(st.sampled_from([16, 32])), draw(st.sampled_from([4, 16])), draw(st.integers(1, 3))
    return gemv.GemvConfig(block_n=block_n, block_c=block_c, split=split, num_warps=4)


@settings(max_examples=25, deadline=None)
@given(cases=sets(most_rows=together.MOST_ROWS), configs=st.lists(cuts(), min_size=4, max_size=4))
def test_one_launch_gives_the_bits_of_several(cases, configs):
    members, x, configs = [case.operands() for case in cases], cases[0].x(), configs[: len(cases)]
    found = together.multiply(x, members, configs)
    for y, operands, config in zip(found, members, configs, strict=True):
        assert y.dtype == x.dtype
        assert torch.equal(y, gemv.multiply(x, operands, config))
        assert relative_error(y, x, operands) < TOLERANCE[x.dtype]


def test_rows_one_past_whole_words_of_zeros():
    """Of each member: where the zeros of a later run begin hangs on its own rows."""
    config = gemv.GemvConfig(block_n=32, block_c=16, split=1, num_warps=4)
    cases = [
        Case(rows=1, shape=(num_n, 320), widths=widths, group_size=32, seed=num_n)
        for num_n, widths in ((1, (2, 3)), (33, (3, 4, 8)), (65, (2, 4)))
    ]
    members, x = [case.operands() for case in cases], cases[0].x()
    for y, operands in zip(together.multiply(x, members, [config] * 3), members, strict=True):
        assert relative_error(y, x, operands) < TOLERANCE[x.dtype]


@pytest.mark.parametrize(("kernel", "split"), [("gemv_together_kernel", 1), ("add_splits_together_kernel", 2)])
def test_tuples_hold_no_tuples(monkeypatch, kernel, split):
    """Triton 3.6 compiles no tuples within tuples of constants: a later one, and the interpreter, do not mind."""
    seen = []

    class Recorder:
        def __getitem__(self, grid):
            return lambda *arguments, **constants: seen.extend([*arguments, *constants.values()])

    for name in ("gemv_together_kernel", "add_splits_together_kernel"):
        monkeypatch.setattr(together, name, Recorder() if name == kernel else {(3 * split,): lambda *_, **__: None})
    config = gemv.GemvConfig(block_n=16, block_c=4, split=split, num_warps=4)
    cases = [Case(rows=1, shape=(8, 256), widths=widths, group_size=32) for widths in ((2, 4), (3,), (4,))]
    together.multiply(cases[0].x(), [case.operands() for case in cases], [config] * 3)
    tuples = [one for one in seen if isinstance(one, tuple)]
    assert len(tuples) > 3
    assert not any(isinstance(entry, tuple) for one in tuples for entry in one)


@pytest.mark.skipif(torch.cuda.is_available(), reason="watches the interpreter")
def test_no_program_works_for_two_members(monkeypatch):
    """It would give the right bits, late."""
    from triton.runtime.interpreter import interpreter_builder

    def watch(name):
        inner, seen = getattr(together, name), []

        def call(*arguments):
            seen.append(interpreter_builder.grid_idx[0])
            return inner(*arguments)

        monkeypatch.setattr(together, name, call)
        return seen

    tiles, blocks = watch("_multiply_tile"), watch("_add_block")
    config = gemv.GemvConfig(block_n=16, block_c=2, split=2, num_warps=4)
    cases = [Case(rows=1, shape=(rows, 256), widths=(4,), group_size=32, seed=rows) for rows in (33, 16, 1)]
    together.multiply(cases[0].x(), [case.operands() for case in cases], [config] * 3)
    assert tiles == list(range(2 * (3 + 1 + 1)))
    assert blocks == list(range(3))


@on_the_cpu
@needs_a_compiler
@settings(max_examples=60, deadline=None)
@given(cases=sets(most_rows=cpu.MOST_ROWS))
def test_one_call_of_the_loops_gives_the_bits_of_several(cases):
    members, x = [case.operands() for case in cases], cases[0].x()
    found = cpu.multiply_together(x, members)
    for y, operands in zip(found, members, strict=True):
        assert y.dtype == x.dtype
        assert torch.equal(y, cpu.multiply(x, operands))
        assert relative_error(y, x, operands) < TOLERANCE[x.dtype]


@on_the_cpu
@needs_a_compiler
def test_threads_share_the_rows_of_all_members(monkeypatch):
    monkeypatch.setattr(cpu, "THREAD_WEIGHTS", 1)
    cases = [Case(rows=6, shape=(rows, 256), widths=(2, 4), group_size=32, seed=rows) for rows in (41, 3, 1, 20)]
    members, x = [case.operands() for case in cases], cases[0].x()
    wanted = [cpu.multiply(x, operands) for operands in members]
    for num_threads in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda num=num_threads: num)
        assert all(map(torch.equal, cpu.multiply_together(x, members), wanted))


def test_launch_figures_cut_each_member_as_alone():
    """As much as one of the members would be split alone, whatever the others are."""
    cases = [Case(rows=1, shape=(rows, 512), widths=(4,), group_size=64, seed=rows) for rows in (40, 24)]
    members, x = [case.operands() for case in cases], cases[0].x()
    for y, operands in zip(tuning.multiply_together(x, members), members, strict=True):
        assert torch.equal(y, tuning.multiply("gemv", x, operands))


def test_what_cannot_share_a_launch_is_refused():
    good = Case(rows=1, shape=(8, 256), widths=(4,), group_size=32)
    config = gemv.GemvConfig(block_n=16, block_c=4, split=1, num_warps=4)
    for change, said in [
        ({"group_size": 64}, "groups of 32 and 64, a launch takes one size"),
        ({"shape": (8, 128)}, "128 and 256 columns"),
        ({"group_size": 24}, "not a multiple of 32"),
    ]:
        other = dataclasses.replace(good, **change)
        with pytest.raises(ValueError, match=said):
            together.multiply(good.x(), [good.operands(), other.operands()], [config] * 2)
    many = dataclasses.replace(good, widths=(2, 3, 4, 8)).operands()
    with pytest.raises(ValueError, match="12 runs of widths together, at most 8"):
        together.multiply(good.x(), [many] * 3, [config] * 3)
    with pytest.raises(ValueError, match=r"programs of \[4, 8\] warps"):
        together.multiply(good.x(), [good.operands()] * 2, [config, dataclasses.replace(config, num_warps=8)])
    with pytest.raises(ValueError, match="2 rows of activations given, a shared launch takes 1: launch each"):
        together.multiply(dataclasses.replace(good, rows=2).x(), [good.operands()] * 2, [config] * 2)


@on_the_cpu
@needs_a_compiler
def test_many_rows_are_refused_by_the_loops():
    case = Case(rows=cpu.MOST_ROWS + 1, shape=(8, 64), widths=(4,), group_size=32)
    with pytest.raises(ValueError, match="1 to 16 rows are multiplied straight from the words, 17 given"):
        cpu.multiply_together(case.x(), [case.operands()])


@pytest.mark.gpu
def test_real_sizes_on_a_gpu():
    for widths in ([(3,), (4,), (2, 3)], [(4,), (4,)], [(8,), (2, 4)]):
        cases = [
            Case(rows=1, shape=(4096 // (1 + 3 * (place > 0)), 4096), widths=each, group_size=128, seed=place)
            for place, each in enumerate(widths)
        ]
        members, x = [case.operands() for case in cases], cases[0].x()
        for y, operands in zip(tuning.multiply_together(x, members), members, strict=True):
            assert torch.equal(y, tuning.multiply("gemv", x, operands))
            assert relative_error(y, x, operands) < TOLERANCE[x.dtype]
