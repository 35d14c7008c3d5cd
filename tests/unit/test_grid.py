"""Scales and zeros: never worse than plain rounding, storable as they are, and sane where the data is not."""

import pytest
import torch

from llmmpq.errors import CheckpointError
from llmmpq.quantize import grid as module
from llmmpq.quantize.grid import Grid, find_grid
from llmmpq.quantize.rtn import round_to_nearest
from llmmpq.scheme import WIDTHS, Scheme

both = pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
all_widths = pytest.mark.parametrize("bits", WIDTHS)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def on_grid(weight_NK: torch.Tensor, scales_NG: torch.Tensor, zeros_NG: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    group_of = torch.arange(weight_NK.shape[1]) // scheme.group_size
    scales, zeros = scales_NG[:, group_of].double(), zeros_NG[:, group_of].double()
    codes = (torch.round(weight_NK.double() / scales) + zeros).clamp(0, 2**scheme.bits - 1)
    return (codes - zeros) * scales


def group_errors(weight_NK, dequantized_NK, importance_K, scheme: Scheme) -> torch.Tensor:
    error = importance_K.double() * (weight_NK.double() - dequantized_NK).square()
    padding = -weight_NK.shape[1] % scheme.group_size
    return torch.nn.functional.pad(error, (0, padding)).unflatten(1, (-1, scheme.group_size)).sum(-1)


def grid_errors(weight_NK, grid: Grid, importance_K) -> torch.Tensor:
    dequantized = on_grid(weight_NK, grid.scales_NG, grid.zeros_NG, grid.scheme)
    return group_errors(weight_NK, dequantized, importance_K, grid.scheme)


def min_max(weight_NK: torch.Tensor, scheme: Scheme, *, full_range: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """What most tools do: the range of the group, divided evenly; scales rounded to float16 as on disk."""
    scales, zeros = [], []
    for group in weight_NK.split(scheme.group_size, dim=1):
        low, high = group.amin(1).clamp_max(0), group.amax(1).clamp_min(0)
        if scheme.symmetric:
            levels = 2 ** (scheme.bits - 1)
            scale = torch.maximum(-low, high) / (levels if full_range else levels - 1)
            zero = torch.full_like(scale, levels)
        else:
            scale = (high - low) / (2**scheme.bits - 1)
            zero = None
        scale = scale.clamp_min(2.0**-24).half().float()
        scales.append(scale)
        zeros.append(torch.round(-low / scale).clamp(0, 2**scheme.bits - 1) if zero is None else zero)
    return torch.stack(scales, 1), torch.stack(zeros, 1)


def weights_of_kind(kind: str) -> torch.Tensor:
    return {
        "normal": randn(24, 200),
        "heavy tails": randn(24, 200) ** 3,
        "uniform": 2 * rand(24, 200) - 1,
        "shifted": randn(24, 200) + 2,
        "negative": -rand(24, 200) - 0.5,
        "outlier": torch.cat([randn(24, 199), torch.full((24, 1), 30.0)], dim=1),
    }[kind]


KINDS = ["normal", "heavy tails", "uniform", "shifted", "negative", "outlier"]


@pytest.mark.parametrize("kind", KINDS)
@both
@all_widths
def test_never_worse_than_min_max_in_any_group(bits, symmetric, kind):
    scheme = Scheme(bits=bits, group_size=32, symmetric=symmetric)
    weight, importance = weights_of_kind(kind), rand(200, seed=1) + 0.01
    found = grid_errors(weight, find_grid(weight, scheme, importance), importance)
    scales, zeros = min_max(weight, scheme)
    plain = group_errors(weight, on_grid(weight, scales, zeros, scheme), importance, scheme)
    assert (found <= plain * (1 + 1e-4) + 1e-12).all()
    if symmetric:  # the extra level may be on either side
        plain = group_errors(weight, on_grid(weight, -scales, zeros, scheme), importance, scheme)
        assert (found <= plain * (1 + 1e-4) + 1e-12).all()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_symmetric_grid_can_hold_both_ends(bits):
    """max |w| on the largest positive code, the usual symmetric grid, loses nothing here: as with ternary weights."""
    levels = 2 ** (bits - 1) - 1
    scheme = Scheme(bits=bits, group_size=32, symmetric=True)
    weight = torch.arange(-levels, levels + 1).repeat(32)[:32].float()[None]
    grid = find_grid(weight, scheme, torch.ones(32))
    assert float(grid_errors(weight, grid, torch.ones(32))) < 1e-4 * float(weight.square().sum())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_on_the_whole_no_worse_than_symmetric_min_max_without_the_extra_level(bits, kind):
    scheme = Scheme(bits=bits, group_size=32, symmetric=True)
    weight, importance = weights_of_kind(kind), torch.ones(200)
    found = grid_errors(weight, find_grid(weight, scheme, importance), importance).sum()
    scales, zeros = min_max(weight, scheme, full_range=False)
    assert found <= group_errors(weight, on_grid(weight, scales, zeros, scheme), importance, scheme).sum()


@pytest.mark.parametrize(("bits", "at_most"), [(2, 0.75), (3, 0.9)])
def test_the_search_pays_at_few_bits(bits, at_most):
    scheme = Scheme(bits=bits, group_size=64)
    weight, importance = randn(64, 256), torch.ones(256)
    found = grid_errors(weight, find_grid(weight, scheme, importance), importance).sum()
    plain = group_errors(weight, on_grid(weight, *min_max(weight, scheme), scheme), importance, scheme).sum()
    assert found < at_most * plain


@all_widths
@both
def test_importance_moves_the_grid_to_what_matters(bits, symmetric):
    scheme = Scheme(bits=bits, group_size=32, symmetric=symmetric)
    weight = randn(64, 32)
    importance = torch.where(torch.arange(32) < 4, 1000.0, 1.0)
    plain = find_grid(weight, scheme, torch.ones(32))
    weighted = find_grid(weight, scheme, importance)
    assert grid_errors(weight, weighted, importance).sum() < 0.9 * grid_errors(weight, plain, importance).sum()


@both
@all_widths
def test_what_is_found_can_be_stored_as_it_is(bits, symmetric):
    scheme = Scheme(bits=bits, group_size=24, symmetric=symmetric)
    weight = torch.cat([randn(8, 100), 1e-7 * randn(8, 100), 1e3 * randn(8, 100), torch.zeros(1, 100)])
    grid = find_grid(weight, scheme, rand(100))
    assert grid.scales_NG.shape == grid.zeros_NG.shape == (25, 5)
    assert grid.scales_NG.dtype == torch.float32
    assert torch.equal(grid.scales_NG.half().float(), grid.scales_NG)
    assert torch.isfinite(grid.scales_NG).all()
    assert (grid.scales_NG != 0).all()
    assert torch.equal(grid.zeros_NG, grid.zeros_NG.round())
    assert ((grid.zeros_NG >= 0) & (grid.zeros_NG <= max(grid.largest_codes))).all()
    if symmetric:
        assert (grid.zeros_NG == 2 ** (bits - 1)).all()
    else:
        assert (grid.scales_NG > 0).all()


@all_widths
def test_a_symmetric_scale_takes_the_sign_that_holds_the_longer_side(bits):
    levels = 2 ** (bits - 1)
    scheme = Scheme(bits=bits, group_size=32, symmetric=True)
    # Every whole number from -levels to levels - 1 has a code; mirrored, only a negative scale gives them all.
    weight = (
        torch.arange(-levels, levels).repeat(32)[:32].float() if bits < 8 else torch.linspace(-128, 127, 32).round()
    )
    for sign in (1.0, -1.0):
        row = (sign * weight)[None]
        grid = find_grid(row, scheme, torch.ones(32))
        assert float(grid.scales_NG) == sign
        assert torch.equal(on_grid(row, grid.scales_NG, grid.zeros_NG, scheme).float(), row)


@both
@all_widths
def test_groups_of_zeros_stay_zero(bits, symmetric):
    scheme = Scheme(bits=bits, group_size=16, symmetric=symmetric)
    weight = randn(4, 48)
    weight[:, 16:32] = 0
    grid = find_grid(weight, scheme, torch.ones(48))
    assert torch.isfinite(grid.scales_NG).all()
    assert (on_grid(weight, grid.scales_NG, grid.zeros_NG, scheme)[:, 16:32] == 0).all()


@both
@all_widths
@pytest.mark.parametrize("value", [1.0, -1.0, 0.37, -123.4, 3e-3])
def test_groups_of_one_value_are_kept(bits, symmetric, value):
    scheme = Scheme(bits=bits, group_size=16, symmetric=symmetric)
    weight = torch.full((3, 40), value)
    grid = find_grid(weight, scheme, torch.ones(40))
    found = on_grid(weight, grid.scales_NG, grid.zeros_NG, scheme)
    # A float16 scale has 11 significant bits, a subnormal one at least a quantum of 2**-24.
    scale = abs(value) / (2 ** (bits - 1) if symmetric else 2**bits - 1)
    torch.testing.assert_close(found.float(), weight, rtol=max(2.0**-11, 2.0**-25 / scale), atol=0)


@both
@all_widths
def test_large_weights_that_a_float16_scale_can_span(bits, symmetric):
    scheme = Scheme(bits=bits, group_size=16, symmetric=symmetric)
    levels = 2 ** (bits - 1) if symmetric else 2**bits - 1
    weight = (2 * rand(4, 64) - 1) * 0.45 * 65504 * levels
    grid = find_grid(weight, scheme, torch.ones(64))
    assert torch.isfinite(grid.scales_NG.half()).all()
    found = on_grid(weight, grid.scales_NG, grid.zeros_NG, scheme)
    scales, zeros = min_max(weight, scheme)
    assert torch.isfinite(found).all()
    assert (found - weight).square().sum() <= (on_grid(weight, scales, zeros, scheme) - weight).square().sum() * 1.0001


@both
@all_widths
def test_weights_beyond_what_a_float16_scale_can_span_are_refused(bits, symmetric):
    weight = torch.full((2, 16), 65504.0 * 2**bits)
    weight[:, ::2] *= -1
    with pytest.raises(CheckpointError, match="does not fit into float16"):
        find_grid(weight, Scheme(bits=bits, group_size=16, symmetric=symmetric), torch.ones(16))


@both
def test_a_range_that_would_be_clipped_by_float16_is_refused(symmetric):
    """Both signs near the limit: the span is twice the largest magnitude, and clipping it silently loses half."""
    scheme = Scheme(bits=2, group_size=16, symmetric=symmetric)
    weight = torch.full((2, 16), 65504.0 * 2.9)
    weight[:, ::2] *= -1
    try:
        grid = find_grid(weight, scheme, torch.ones(16))
    except CheckpointError:
        return
    found = on_grid(weight, grid.scales_NG, grid.zeros_NG, scheme)
    exact = on_grid(weight / 1024, *min_max(weight / 1024, scheme), scheme) * 1024
    assert (found - weight).square().sum() <= (exact - weight).square().sum() * 1.01


@all_widths
@pytest.mark.parametrize("size", [1e-1, 1e-2, 1e-3, 1e-4])
def test_small_weights_lose_no_more_than_large_ones(bits, size):
    """Scales below 2**-14 are subnormal in float16 but still have digits; a whole matrix may need them at 8 bits."""
    scheme = Scheme(bits=bits, group_size=64)
    weight, importance = randn(32, 256), torch.ones(256)
    expected = grid_errors(weight, find_grid(weight, scheme, importance), importance).sum()
    small = size * weight
    found = grid_errors(small, find_grid(small, scheme, importance), importance).sum() / size**2
    # At 1e-4 and 8 bits the scales are near 1.6e-6, where float16 counts in steps of 4 %.
    assert found < (1.5 if size == 1e-4 and bits == 8 else 1.1) * expected


@both
@all_widths
@pytest.mark.parametrize("num_columns", [1, 7, 32, 33, 71])
def test_a_short_last_group_is_a_matrix_of_its_own(bits, symmetric, num_columns):
    scheme = Scheme(bits=bits, group_size=32, symmetric=symmetric)
    weight, importance = randn(9, num_columns), rand(num_columns) + 0.1
    whole = find_grid(weight, scheme, importance)
    parts = [find_grid(w, scheme, h) for w, h in zip(weight.split(32, dim=1), importance.split(32), strict=True)]
    assert torch.equal(whole.scales_NG, torch.cat([part.scales_NG for part in parts], dim=1))
    assert torch.equal(whole.zeros_NG, torch.cat([part.zeros_NG for part in parts], dim=1))


@both
def test_rows_do_not_depend_on_the_pieces_they_are_searched_in(symmetric, monkeypatch):
    scheme = Scheme(bits=3, group_size=32, symmetric=symmetric)
    weight, importance = randn(20, 80), rand(80)
    whole = find_grid(weight, scheme, importance)
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 3 * 80)
    pieces = find_grid(weight, scheme, importance)
    assert torch.equal(whole.scales_NG, pieces.scales_NG)
    assert torch.equal(whole.zeros_NG, pieces.zeros_NG)


@both
@all_widths
def test_channels_without_importance_get_a_usable_grid(bits, symmetric):
    """Channels that were never active in calibration may be active later."""
    scheme = Scheme(bits=bits, group_size=32, symmetric=symmetric)
    weight = randn(8, 64)
    importance = torch.cat([torch.zeros(32), torch.ones(32)])
    grid = find_grid(weight, scheme, importance)
    found = grid_errors(weight, grid, torch.ones(64))
    plain = group_errors(weight, on_grid(weight, *min_max(weight, scheme), scheme), torch.ones(64), scheme)
    assert (found[:, 0] <= plain[:, 0] * 1.001).all()


@both
@all_widths
def test_bfloat16_weights_are_searched_in_float32(bits, symmetric):
    scheme = Scheme(bits=bits, group_size=32, symmetric=symmetric)
    weight, importance = randn(8, 64).bfloat16(), rand(64)
    one, two = (find_grid(w, scheme, importance) for w in (weight, weight.float()))
    assert one.scales_NG.dtype == torch.float32
    assert torch.equal(one.scales_NG, two.scales_NG)
    assert torch.equal(one.zeros_NG, two.zeros_NG)


def test_the_weight_is_left_as_it_was():
    weight, importance = randn(8, 64), rand(64)
    before = weight.clone(), importance.clone()
    find_grid(weight, Scheme(bits=2, group_size=16), importance)
    assert torch.equal(weight, before[0])
    assert torch.equal(importance, before[1])


@both
@all_widths
def test_rounding_takes_the_nearest_code(bits, symmetric):
    scheme = Scheme(bits=bits, group_size=24, symmetric=symmetric)
    weight = randn(12, 100)
    grid = find_grid(weight, scheme, torch.ones(100))
    codes = round_to_nearest(weight, grid)
    assert codes.dtype == torch.uint8
    group_of = torch.arange(100) // 24
    levels = torch.arange(2**bits)[:, None, None]
    values = (levels - grid.zeros_NG[:, group_of]) * grid.scales_NG[:, group_of]
    found = values.gather(0, codes.long()[None])[0]
    torch.testing.assert_close((found - weight).abs(), (values - weight).abs().amin(0), rtol=1e-5, atol=1e-6)
