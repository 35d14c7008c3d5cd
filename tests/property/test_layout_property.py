"""Packing loses nothing and costs what the scheme says, for every width and shape."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmmpq.scheme import WIDTHS, Scheme
from llmmpq_kernels import pack, unpack

widths = st.sampled_from(WIDTHS)
sizes = st.integers(min_value=1, max_value=200)


@st.composite
def code_matrices(draw):
    bits = draw(widths)
    shape = (draw(st.integers(1, 8)), draw(sizes))
    raw = draw(st.binary(min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]))
    codes = torch.from_numpy(np.frombuffer(raw, dtype=np.uint8).copy()).reshape(shape)
    return bits, codes & ((1 << bits) - 1)


@settings(deadline=None)
@given(code_matrices())
def test_unpack_inverts_pack(matrix):
    bits, codes = matrix
    words = pack(codes, bits=bits)
    assert torch.equal(unpack(words, bits=bits, num_columns=codes.shape[1]), codes)


@settings(deadline=None)
@given(code_matrices())
def test_padding_is_zero_codes(matrix):
    bits, codes = matrix
    padded = -(-codes.shape[1] // 32) * 32
    assert not unpack(pack(codes, bits=bits), bits=bits, num_columns=padded)[:, codes.shape[1] :].any()


@settings(deadline=None)
@given(bits=widths, group_size=sizes, symmetric=st.booleans(), num_rows=sizes, num_columns=sizes)
def test_bytes_are_those_of_the_scheme(bits, group_size, symmetric, num_rows, num_columns):
    scheme = Scheme(bits=bits, group_size=group_size, symmetric=symmetric)
    num_groups = -(-num_columns // group_size)
    packed = {
        "words": pack(torch.zeros((num_rows, num_columns), dtype=torch.uint8), bits=bits),
        "scales": torch.zeros((num_rows, num_groups), dtype=torch.float16),
    }
    if not symmetric:
        packed["zeros"] = pack(torch.zeros((num_groups, num_rows), dtype=torch.uint8), bits=bits)
    assert sum(tensor.nbytes for tensor in packed.values()) == scheme.nbytes((num_rows, num_columns))
    shapes = {name: dims for name, (_, dims) in scheme.tensors((num_rows, num_columns)).items()}
    assert {name: tuple(tensor.shape) for name, tensor in packed.items()} == shapes
