"""The packing against an independent packer: Python integers, one bit string per row, no shifts on tensors."""

import pytest
import torch

from llmmpq_kernels import dequantize, pack, packed_linear, reference, unpack

WIDTHS = (2, 3, 4, 8)


def slow_row(codes: list[int], bits: int) -> list[int]:
    """The words of one row as the format page states them."""
    codes = codes + [0] * (-len(codes) % 32)
    if bits == 3:
        return slow_row([code % 4 for code in codes], 2) + _stream([code // 4 for code in codes], 1)
    return _stream(codes, bits)


def _stream(codes: list[int], bits: int) -> list[int]:
    number = sum(code * 2 ** (bits * position) for position, code in enumerate(codes))
    raw = number.to_bytes(len(codes) * bits // 8, "little")
    return [int.from_bytes(raw[start : start + 4], "little", signed=True) for start in range(0, len(raw), 4)]


def random_codes(num_rows: int, num_columns: int, bits: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1 << bits, (num_rows, num_columns), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("num_columns", [1, 31, 32, 33, 64, 100, 257])
@pytest.mark.parametrize("bits", WIDTHS)
def test_words_are_those_of_the_slow_packer(bits, num_columns):
    codes = random_codes(3, num_columns, bits)
    words = pack(codes, bits=bits)
    assert words.dtype == torch.int32
    assert words.tolist() == [slow_row(row, bits) for row in codes.tolist()]
    assert torch.equal(unpack(words, bits=bits, num_columns=num_columns), codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_all_ones_fill_the_sign_bit(bits):
    codes = torch.full((2, 64), (1 << bits) - 1, dtype=torch.uint8)
    words = pack(codes, bits=bits)
    assert (words == -1).all()
    assert torch.equal(unpack(words, bits=bits, num_columns=64), codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_strided_inputs(bits):
    codes = random_codes(40, 7, bits).T
    words = pack(codes, bits=bits)
    assert torch.equal(words, pack(codes.contiguous(), bits=bits))
    wide = torch.stack([words, torch.zeros_like(words)], dim=1).flatten(0, 1)
    assert torch.equal(unpack(wide[::2], bits=bits, num_columns=40), codes)
    scattered = torch.stack([words, torch.zeros_like(words)], dim=2)[:, :, 0]
    assert torch.equal(unpack(scattered.contiguous(), bits=bits, num_columns=40), codes)


def test_unpacking_shares_no_memory_with_the_words():
    words = pack(random_codes(2, 32, 8), bits=8)
    before = words.clone()
    unpack(words, bits=8, num_columns=32).fill_(0)
    assert torch.equal(words, before)


@pytest.mark.parametrize("bits", WIDTHS)
def test_no_rows(bits):
    words = pack(torch.empty((0, 40), dtype=torch.uint8), bits=bits)
    assert words.shape == (0, 2 * bits)
    assert unpack(words, bits=bits, num_columns=40).shape == (0, 40)


def test_mistakes_are_named():
    codes = random_codes(2, 32, 2)
    with pytest.raises(ValueError, match="code 4 does not fit 2 bits"):
        pack(torch.full((2, 32), 4, dtype=torch.uint8), bits=2)
    with pytest.raises(ValueError, match="uint8 matrix"):
        pack(codes.to(torch.int32), bits=2)
    with pytest.raises(ValueError, match="bits 5"):
        pack(codes, bits=5)
    with pytest.raises(ValueError, match=r"\[N, 4\].*\(2, 2\)"):
        unpack(pack(codes, bits=2), bits=2, num_columns=33)


def slow_dequantize(codes, scales, zeros, bits, group_size):
    """The formula, one weight at a time, in float32 arithmetic."""
    weights = torch.empty(codes.shape)
    for n in range(codes.shape[0]):
        for k in range(codes.shape[1]):
            g = k // group_size
            zero = 2 ** (bits - 1) if zeros is None else int(zeros[g, n])
            weights[n, k] = (int(codes[n, k]) - zero) * scales[n, g].float()
    return weights


@pytest.mark.parametrize(("num_columns", "group_size"), [(64, 32), (72, 32), (20, 32), (33, 1), (50, 7)])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", WIDTHS)
def test_dequantize_is_the_formula(bits, symmetric, num_columns, group_size, monkeypatch):
    monkeypatch.setattr(reference, "CPU_BLOCK_WEIGHTS", 3 * num_columns)  # several blocks, and a short last one
    num_rows, num_groups = 10, -(-num_columns // group_size)
    codes = random_codes(num_rows, num_columns, bits)
    zeros = None if symmetric else random_codes(num_groups, num_rows, bits, seed=1)
    scales = torch.randn(num_rows, num_groups, generator=torch.Generator().manual_seed(2)).to(torch.float16)
    packed = (pack(codes, bits=bits), scales, None if symmetric else pack(zeros, bits=bits))
    options = {"runs": ((bits, num_groups),), "group_size": group_size}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        weights = dequantize(*packed, **options, shape=(num_rows, num_columns), dtype=dtype)
        assert weights.dtype == dtype
        assert torch.equal(weights, slow_dequantize(codes, scales, zeros, bits, group_size).to(dtype))

    x = torch.randn(2, 3, num_columns, generator=torch.Generator().manual_seed(3))
    bias = torch.randn(num_rows, generator=torch.Generator().manual_seed(4))
    expected = torch.einsum("bck,nk->bcn", x, slow_dequantize(codes, scales, zeros, bits, group_size)) + bias
    torch.testing.assert_close(packed_linear(x, *packed, bias, **options), expected)
