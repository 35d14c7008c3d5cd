"""Every kernel against float64 and the reference: on a GPU compiled, elsewhere in Triton's interpreter.

Memory that a kernel is to write holds NaN before, so an output it leaves out is seen. The interpreter truncates where
a GPU rounds to bfloat16, hence the wider bound there.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmmpq_kernels import gemm, gemv
from tests.kernels.matrices import MIXES, Case, cases, relative_error, weights_of

# Of 16-bit outputs, and of weights rounded to 16 bits before the product: a few units in the last place of one.
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 1.2e-2}
# The interpreter's time is that of its steps, whatever their size: large blocks, but several of each kind.
GEMV = gemv.GemvConfig(block_n=32, block_c=16, split=1, num_warps=4)
GEMV_SPLIT = gemv.GemvConfig(block_n=32, block_c=8, split=3, num_warps=4)
GEMM = gemm.GemmConfig(block_m=16, block_n=32, block_c=16, split=1, num_warps=4, num_stages=2)
GEMM_SPLIT = gemm.GemmConfig(block_m=16, block_n=32, block_c=8, split=3, num_warps=4, num_stages=2)


@pytest.fixture(autouse=True, scope="module")
def uninitialized_memory_is_nan():
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def check(case: Case, multiply, config) -> None:
    operands, x = case.operands(), case.x()
    y = multiply(x, operands, config)
    assert y.dtype == case.dtype
    assert y.shape == (case.rows, case.shape[0])
    assert relative_error(y, x, operands) < TOLERANCE[case.dtype]


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("widths", MIXES, ids=str)
def test_products_equal_the_reference(widths, group_size):
    """Short last groups, rows and columns that fill no block, both dtypes and both kinds of scale."""
    for place, dtype in enumerate((torch.float16, torch.bfloat16)):
        shape = (41 + 16 * place, 700 - 7 * place)
        case = Case(rows=2 - place, shape=shape, widths=widths, group_size=group_size, dtype=dtype)
        check(case, gemv.multiply, GEMV_SPLIT if place else GEMV)
        case = Case(rows=5, shape=shape, widths=widths, group_size=group_size, dtype=dtype, eight_bit=True)
        check(case, gemm.multiply, GEMM if place else GEMM_SPLIT)


@pytest.mark.parametrize("widths", [(2, 3), (3, 4), (2, 3, 4, 8)], ids=str)
@pytest.mark.parametrize("num_n", [1, 33, 65])
def test_rows_one_past_whole_words_of_zeros(num_n, widths):
    """Zeros of a later run begin after the words of the earlier ones, the last of which holds one zero."""
    case = Case(rows=1, shape=(num_n, 320), widths=widths, group_size=32)
    check(case, gemv.multiply, GEMV)
    check(case, gemm.multiply, GEMM)
    operands = case.operands()
    assert torch.equal(gemm.dequantize(operands, torch.float32, block_c=4), weights_of(operands))


@pytest.mark.parametrize("widths", MIXES, ids=str)
@pytest.mark.parametrize("options", [{}, {"eight_bit": True}, {"symmetric": True}], ids=str)
def test_the_dequantized_matrix_is_the_references_bit_for_bit(widths, options):
    for dtype in (torch.float32, torch.float16):
        operands = Case(rows=1, shape=(37, 520), widths=widths, group_size=64, **options).operands()
        weights = gemm.dequantize(operands, dtype, block_c=4)
        assert torch.equal(weights, weights_of(operands, dtype))


def test_multiplying_by_the_dequantized_matrix():
    case = Case(rows=7, shape=(37, 200), widths=(2, 4), group_size=32, dtype=torch.bfloat16)
    operands, x = case.operands(), case.x()
    y = gemm.multiply_dequantized(x, operands)
    assert relative_error(y, x, operands) < TOLERANCE[torch.bfloat16]


@settings(max_examples=15, deadline=None)
@given(case=cases(most_rows=gemv.MOST_ROWS), split=st.integers(1, 4), block_c=st.sampled_from([2, 4, 16]))
def test_gemv_of_drawn_shapes(case, split, block_c):
    check(case, gemv.multiply, gemv.GemvConfig(block_n=32, block_c=block_c, split=split, num_warps=4))


@settings(max_examples=15, deadline=None)
@given(case=cases(), split=st.integers(1, 4), block_c=st.sampled_from([2, 4, 16]))
def test_gemm_of_drawn_shapes(case, split, block_c):
    config = gemm.GemmConfig(block_m=16, block_n=32, block_c=block_c, split=split, num_warps=4, num_stages=2)
    check(case, gemm.multiply, config)


def test_more_rows_than_registers_are_refused():
    case = Case(rows=gemv.MOST_ROWS + 1, shape=(8, 32), widths=(4,), group_size=32)
    with pytest.raises(ValueError, match="1 to 4 rows, 5 given"):
        gemv.multiply(case.x(), case.operands(), GEMV)


def test_rows_may_lie_apart():
    case = Case(rows=4, shape=(33, 96), widths=(4,), group_size=32)
    operands, wide = case.operands(), case.x()
    x = torch.stack([wide, torch.full_like(wide, torch.nan)], dim=1)[:, 0]
    assert x.stride() == (192, 1)
    for multiply, config in ((gemv.multiply, GEMV_SPLIT), (gemm.multiply, GEMM)):
        assert torch.equal(multiply(x, operands, config), multiply(wide, operands, config))


def test_equal_inputs_give_equal_bits():
    case = Case(rows=3, shape=(40, 500), widths=(2, 3), group_size=32)
    operands, x = case.operands(), case.x()
    for multiply, config in ((gemv.multiply, GEMV_SPLIT), (gemm.multiply, GEMM_SPLIT)):
        assert torch.equal(multiply(x, operands, config), multiply(x, operands, config))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the interpreter
def test_nan_and_infinity_stay_in_their_row():
    case = Case(rows=3, shape=(20, 64), widths=(3,), group_size=32, has_bias=False)
    operands, x = case.operands(), case.x()
    x[1, 5] = torch.inf
    for multiply, config in ((gemv.multiply, GEMV), (gemm.multiply, GEMM)):
        y = multiply(x, operands, config)
        assert y[[0, 2]].isfinite().all()
        assert not y[1].isfinite().any()


@pytest.mark.parametrize("scale", [2.0**-14, 2.0**10])
def test_small_and_large_activations_keep_their_digits(scale):
    """bfloat16 has float32's range: no step between may overflow or vanish."""
    case = Case(rows=2, shape=(24, 256), widths=(2, 3), group_size=32, dtype=torch.bfloat16, has_bias=False)
    operands, x = case.operands(), (case.x().float() * scale * 2.0**30).to(torch.bfloat16)
    for multiply, config in ((gemv.multiply, GEMV_SPLIT), (gemm.multiply, GEMM)):
        assert relative_error(multiply(x, operands, config), x, operands) < TOLERANCE[torch.bfloat16]


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(4096, 14336), (1024, 8192)])
@pytest.mark.parametrize("widths", MIXES, ids=str)
def test_real_sizes_on_a_gpu(widths, shape):
    """With the configurations that run there, and bfloat16 in tensor cores, which the interpreter cannot show."""
    from llmmpq_kernels import tuning

    for rows in (1, 2, 4, 7, 16, 33, 300):
        case = Case(rows=rows, shape=shape, widths=widths, group_size=128, dtype=torch.bfloat16)
        operands, x = case.operands(), case.x()
        for backend in tuning.BACKENDS:
            if tuning.takes(backend, rows):
                y = tuning.multiply(backend, x, operands)
                assert relative_error(y, x, operands) < TOLERANCE[torch.bfloat16], (backend, rows)
