"""Mixed matrices and 8-bit scales against a reader of its own: Python integers and the text of docs/format.md."""

import math

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmmpq.records import Scheme
from llmmpq.scheme import WIDTHS
from llmmpq_kernels import dequantize, nearest_scale_codes, pack, pack_runs, pack_zeros, packed_linear, widen_scales


def read_row(words: list[int], bits: int, num_codes: int) -> list[int]:
    """Codes of one packed row: bit i of a stream is bit i mod 32 of word i // 32."""
    if bits == 3:
        chunks = len(words) // 3
        low, high = read_row(words[: 2 * chunks], 2, num_codes), read_row(words[2 * chunks :], 1, num_codes)
        return [a + 4 * b for a, b in zip(low, high, strict=True)]
    stream = sum((word % 2**32) << (32 * position) for position, word in enumerate(words))
    return [(stream >> (bits * k)) % 2**bits for k in range(num_codes)]


def read_matrix(stored: dict[str, torch.Tensor], scheme: Scheme, shape: tuple[int, int]) -> torch.Tensor:
    """The weights, one by one, as the format page says."""
    num_rows, num_columns = shape
    size, chunks_of_rows = scheme.group_size, math.ceil(num_rows / 32)
    weights = torch.full(shape, torch.nan)
    group = word = zero_word = 0
    for bits, count in scheme.runs or ((scheme.bits, math.ceil(num_columns / size)),):
        run_columns = count * size if scheme.runs else num_columns
        num_words = bits * math.ceil(run_columns / 32)
        codes = [read_row(row[word : word + num_words], bits, run_columns) for row in stored["words"].tolist()]
        for place in range(count):
            index = int(stored["order"][group + place]) if scheme.runs else place
            zeros = [2 ** (bits - 1)] * num_rows
            if "zeros" in stored:
                flat = stored["zeros"].flatten().tolist()
                start = zero_word + place * bits * chunks_of_rows
                zeros = read_row(flat[start : start + bits * chunks_of_rows], bits, num_rows)
            for n in range(num_rows):
                scale = np.float32(read_scale(stored, n, group + place))
                for column in range(size):
                    k = index * size + column
                    code = codes[n][place * size + column] if place * size + column < run_columns else 0
                    if k < num_columns:
                        weights[n, k] = float(np.float32(code - zeros[n]) * scale)
                    else:
                        assert code == 0
        group, word = group + count, word + num_words
        zero_word += count * bits * chunks_of_rows
    return weights


def read_scale(stored: dict[str, torch.Tensor], n: int, position: int) -> float:
    if "scale_base" not in stored:
        return float(stored["scales"][n, position])
    code = int(stored["scales"][n, position])
    exponent, fraction = code // 16, code % 16
    factor = fraction / 16 * 2.0**-14 if exponent == 0 else (1 + fraction / 16) * 2.0 ** (exponent - 15)
    return float(np.float32(stored["scale_base"].item()) * np.float32(factor))


@st.composite
def schemes_and_shapes(draw):
    num_rows, num_columns = draw(st.integers(1, 40)), draw(st.integers(1, 90))
    size = draw(st.integers(1, 40))
    num_groups = -(-num_columns // size)
    options = {
        "group_size": size,
        "symmetric": draw(st.booleans()),
        "scale_dtype": draw(st.sampled_from(["float16", "float8"])),
    }
    num_widths = draw(st.integers(1, min(4, num_groups)))
    widths = sorted(draw(st.permutations(WIDTHS))[:num_widths])
    if num_widths == 1:
        return Scheme(bits=widths[0], **options), (num_rows, num_columns)
    cuts = sorted(draw(st.permutations(range(1, num_groups)))[: num_widths - 1])
    counts = [b - a for a, b in zip([0, *cuts], [*cuts, num_groups], strict=True)]
    runs = tuple(zip(widths, counts, strict=True))
    return Scheme(bits=None, runs=runs, **options), (num_rows, num_columns)


def random_stored(scheme: Scheme, shape: tuple[int, int], seed: int) -> dict[str, torch.Tensor]:
    """Random codes, packed by runs, as a dictionary of stored tensors."""
    generator = torch.Generator().manual_seed(seed)
    num_rows, num_columns = shape
    runs, num_groups = scheme.widths(shape), scheme.num_groups(num_columns)
    order = torch.randperm(num_groups, generator=generator)
    counts = [count for _, count in runs]
    order = torch.cat([part.sort().values for part in order.split(counts)])
    width_of = torch.empty(num_groups, dtype=torch.int64)
    width_of[order] = torch.tensor([bits for bits, count in runs for _ in range(count)])

    def codes(dims, tops):
        return (torch.randint(0, 256, dims, generator=generator) % tops).to(torch.uint8)

    columns = width_of.repeat_interleave(scheme.group_size)[:num_columns]
    codes_NK, zeros_GN = codes(shape, 2**columns), codes((num_groups, num_rows), 2 ** width_of[:, None])
    stored = {"scales": torch.randn(num_rows, num_groups, generator=generator).half()}
    if scheme.scale_dtype == "float8":
        stored["scales"] = torch.randint(1, 256, (num_rows, num_groups), generator=generator, dtype=torch.uint8)
        stored["scale_base"] = torch.rand(1, generator=generator) + 0.01
    if scheme.mixed:
        stored["order"] = order.to(torch.int32)
        stored["words"] = pack_runs(codes_NK, order, runs=runs, group_size=scheme.group_size)
        stored["zeros"] = pack_zeros(zeros_GN, order, runs=runs)
    else:
        stored["words"] = pack(codes_NK, bits=scheme.bits)
        stored["zeros"] = pack(zeros_GN, bits=scheme.bits)
    if scheme.symmetric:
        del stored["zeros"]
    return stored


@settings(deadline=None)
@given(schemes_and_shapes(), st.integers(0, 2**31))
def test_what_is_packed_is_read_as_the_format_says(case, seed):
    scheme, shape = case
    stored = random_stored(scheme, shape, seed)
    assert {name: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in stored.items()} == dict(
        scheme.tensors(shape)
    )
    assert stored.keys() == set(scheme.stored_names)
    assert sum(tensor.nbytes for tensor in stored.values()) == scheme.nbytes(shape)

    rest = {name: stored.get(name) for name in ("order", "scale_base")}
    options = {"runs": scheme.widths(shape), "group_size": scheme.group_size, **rest}
    tensors = (stored["words"], stored["scales"], stored.get("zeros"))
    weights = dequantize(*tensors, **options, shape=shape, dtype=torch.float32)
    expected = read_matrix(stored, scheme, shape)
    assert torch.equal(weights, expected)
    assert torch.equal(dequantize(*tensors, **options, shape=shape, dtype=torch.bfloat16), expected.bfloat16())
    x = torch.eye(shape[1])
    assert torch.equal(packed_linear(x, *tensors, None, **options), expected.T)


@settings(deadline=None)
@given(schemes_and_shapes())
def test_schemes_survive_json_and_name_their_layout(case):
    scheme, shape = case
    assert Scheme.from_json(scheme.to_json()) == scheme
    new = scheme.mixed or scheme.scale_dtype == "float8"
    assert scheme.layout_version == (2 if new else 1)
    assert min(b for b, _ in scheme.widths(shape)) <= scheme.code_bits(shape) <= max(b for b, _ in scheme.widths(shape))


@settings(deadline=None)
@given(st.lists(st.floats(1e-9, 1e4), min_size=1, max_size=20), st.floats(1e-6, 1e3))
def test_the_code_of_a_scale_is_the_nearest(scales, base):
    base, wanted = torch.tensor([base]), torch.tensor(scales)
    codes = nearest_scale_codes(wanted, base)
    assert (codes >= 1).all()
    every = widen_scales(torch.arange(1, 256, dtype=torch.uint8), base)
    best = (every[None] - wanted[:, None]).abs().amin(1)
    assert torch.allclose((widen_scales(codes, base) - wanted).abs(), best, rtol=1e-4, atol=0)
    assert torch.equal(nearest_scale_codes(every, base), torch.arange(1, 256, dtype=torch.uint8))
