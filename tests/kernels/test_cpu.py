"""The compiled loops for CPUs against float64 and the reference."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings

from llmmpq_kernels import cpu, native
from llmmpq_kernels.operands import MisfitError
from tests.kernels.matrices import MIXES, Case, cases, relative_error, weights_of

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="matrices of these tests are on the GPU")
needs_a_compiler = pytest.mark.skipif(native.load().problem is not None, reason=str(native.load().problem))
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@needs_a_compiler
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("widths", MIXES, ids=str)
def test_products_equal_the_reference(widths, group_size):
    for rows in (1, 2, 3, 4, 7, cpu.MOST_ROWS + 1):
        case = Case(
            rows=rows,
            shape=(45, 1000),
            widths=widths,
            group_size=group_size,
            dtype=torch.float32,
            eight_bit=rows % 2 > 0,
        )
        operands, x = case.operands(), case.x()
        assert relative_error(cpu.multiply(x, operands), x, operands) < TOLERANCE[torch.float32]
    assert torch.equal(cpu.dequantize(operands), weights_of(operands))


@needs_a_compiler
@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_products_of_drawn_shapes(case):
    operands, x = case.operands(), case.x()
    y = cpu.multiply(x, operands)
    assert y.dtype == case.dtype
    assert relative_error(y, x, operands) < TOLERANCE[case.dtype]
    assert torch.equal(cpu.dequantize(operands), weights_of(operands))


@needs_a_compiler
def test_threads_change_no_bit(monkeypatch):
    """Rows are shared out, sums are not."""
    monkeypatch.setattr(cpu, "THREAD_WEIGHTS", 1)
    case = Case(rows=3, shape=(41, 256), widths=(2, 4), group_size=32, dtype=torch.float32)
    operands, x = case.operands(), case.x()
    found = []
    for num_threads in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda num=num_threads: num)
        found.append(cpu.multiply(x, operands))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@needs_a_compiler
def test_strided_activations():
    case = Case(rows=6, shape=(33, 96), widths=(4,), group_size=32, dtype=torch.float32)
    operands, x = case.operands(), case.x()
    assert torch.equal(cpu.multiply(x.T.contiguous().T, operands), cpu.multiply(x, operands))


@needs_a_compiler
@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("words", lambda t: t.to("meta"), "words is on meta"),
        ("zeros", lambda t: t.to("meta"), "zeros is on meta"),
        ("words", lambda t: t[:-1], r"words is torch.int32 \[39, 10\], .* needs torch.int32 \[40, 10\]"),
        ("words", lambda t: t.long(), "words is torch.int64"),
        ("scales", lambda t: t.float(), "scales is torch.float32"),
        ("scales", lambda t: t[:, :-1], "scales is"),
        ("zeros", lambda t: t[:-1], "zeros is"),
        ("order", lambda t: t[:-1], "order is"),
        ("order", lambda _: None, "no order is given"),
        ("words", lambda t: t.T.contiguous().T, "words must lie in memory"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_before_they_are_read(name, change, said):
    case = Case(rows=1, shape=(40, 96), widths=(2, 4), group_size=32, dtype=torch.float32)
    operands = case.operands()
    broken = dataclasses.replace(operands, **{name: change(getattr(operands, name))})
    with pytest.raises(MisfitError, match=said):
        cpu.multiply(case.x(), broken)
    with pytest.raises(MisfitError, match="takes 96 columns"):
        cpu.multiply(case.x()[:, :64], operands)
