"""Frozen words of layout version 1. If one of these changes, every published model becomes unreadable."""

import pytest
import torch

from llmmpq_kernels import pack, unpack

NUM_ROWS, NUM_COLUMNS = 2, 40

# One line of words for each row.
FROZEN = {
    2: (
        "-1357451157 113007553 61807 0",
        "1808116762 -1045490000 48218 0",
    ),
    3: (
        "-1357451157 113007553 61807 0 -1420647062 149",
        "1808116762 -1045490000 48218 0 710323530 181",
    ),
    4: (
        "-1220486557 1660650782 497496265 -934089868 1930270271 0 0 0",
        "783827434 -630981483 -2061588672 818504443 -344711770 0 0 0",
    ),
    8: (
        "-841292045 -1683508032 1752531342 910315355 51387433 -773985545 -1632913468 1819837842"
        " 960910175 118693933 0 0 0 0 0 0",
        "-723390726 -1565606968 1870432661 1028281955 169288752 -656018946 -1498234933 1937804441"
        " 1095588454 236660532 0 0 0 0 0 0",
    ),
}


def codes(bits: int) -> torch.Tensor:
    """A fixed scramble of the position: the middle bits of a multiple of Knuth's 2654435761."""
    position = torch.arange(1, NUM_ROWS * NUM_COLUMNS + 1, dtype=torch.int64).reshape(NUM_ROWS, NUM_COLUMNS)
    return (((2654435761 * position) >> 7) % (1 << bits)).to(torch.uint8)


@pytest.mark.parametrize("bits", FROZEN)
def test_words_are_frozen(bits):
    frozen = torch.tensor([[int(word) for word in row.split()] for row in FROZEN[bits]], dtype=torch.int32)
    assert torch.equal(pack(codes(bits), bits=bits), frozen)
    assert torch.equal(unpack(frozen, bits=bits, num_columns=NUM_COLUMNS), codes(bits))
