"""Bit packing: codes in [0, 2^b) to 32-bit words and back, for b in 2, 3, 4, 8. Each run of layout 2 is packed so too.

A row of K codes is padded with zero codes to a multiple of 32 and becomes b * ceil(K / 32) words.

- b = 2, 4, 8: a little-endian bit stream; code k is bits [b*k, b*(k+1)), from the least significant bit of word 0.
- b = 3: two planes, first the low 2 bits of every code packed as a 2-bit row, then the top bits as a 1-bit row.

Rejected: a 3-bit stream. It has the same size, but a third of its codes straddle bytes and every 32nd a word, so
each reader branches or gathers; two aligned planes unpack with the code of the other widths.

Words are int32 because torch has no shifts on uint32; the top bit of a word is an ordinary code bit. Words are
read as bytes, so the host must be little-endian, as every platform that torch is built for is.

Shape suffixes: N rows, K codes in a row, W words in a row.
"""

from __future__ import annotations

import torch

WORD_BITS = 32
CODES_PER_CHUNK = 32
WIDTHS = (2, 3, 4, 8)


def pack(codes_NK: torch.Tensor, *, bits: int) -> torch.Tensor:
    """Pack uint8 codes [N, K] into int32 words [N, bits * ceil(K / 32)]."""
    _check_bits(bits)
    if codes_NK.dtype != torch.uint8 or codes_NK.ndim != 2:
        raise ValueError(f"codes must be a uint8 matrix, got {codes_NK.dtype} of shape {tuple(codes_NK.shape)}")
    if codes_NK.numel() and int(codes_NK.max()) >= 1 << bits:
        raise ValueError(f"code {int(codes_NK.max())} does not fit {bits} bits: the largest is {(1 << bits) - 1}")
    padding = -codes_NK.shape[1] % CODES_PER_CHUNK
    if padding:
        codes_NK = torch.nn.functional.pad(codes_NK, (0, padding))
    if bits == 3:
        return torch.cat([_pack_stream(codes_NK & 3, bits=2), _pack_stream(codes_NK >> 2, bits=1)], dim=1)
    return _pack_stream(codes_NK, bits=bits)


def unpack(words_NW: torch.Tensor, *, bits: int, num_columns: int) -> torch.Tensor:
    """Unpack int32 words into uint8 codes [N, num_columns]."""
    _check_bits(bits)
    num_chunks = -(-num_columns // CODES_PER_CHUNK)
    if words_NW.dtype != torch.int32 or words_NW.ndim != 2 or words_NW.shape[1] != bits * num_chunks:
        raise ValueError(
            f"{num_columns} codes of {bits} bits need int32 words [N, {bits * num_chunks}],"
            f" got {words_NW.dtype} of shape {tuple(words_NW.shape)}"
        )
    if bits == 3:
        low, high = words_NW.split([2 * num_chunks, num_chunks], dim=1)
        codes_NK = _unpack_stream(high, bits=1).bitwise_left_shift_(2).bitwise_or_(_unpack_stream(low, bits=2))
    else:
        codes_NK = _unpack_stream(words_NW, bits=bits)
    return codes_NK[:, :num_columns]


def _check_bits(bits: int) -> None:
    if bits not in WIDTHS:
        raise ValueError(f"bits {bits!r} is not a stored width: use one of {WIDTHS}")


def _pack_stream(codes_NK: torch.Tensor, *, bits: int) -> torch.Tensor:
    per_word = WORD_BITS // bits
    codes_NWP = codes_NK.unflatten(1, (codes_NK.shape[1] // per_word, per_word))
    words_NW = torch.zeros(codes_NWP.shape[:2], dtype=torch.int32, device=codes_NK.device)
    for position in range(per_word):
        words_NW |= codes_NWP[:, :, position].to(torch.int32) << (bits * position)
    return words_NW


def _unpack_stream(words_NW: torch.Tensor, *, bits: int) -> torch.Tensor:
    """Spread each byte's codes over the bytes of an integer wide enough for them, halving the stride each step.

    Contiguous whole-tensor steps: three times as fast on a CPU as one strided write for each code position.
    """
    bytes_ = words_NW.view(torch.uint8)
    if bits == 8:
        return bytes_.clone()
    if bits == 4:
        pairs = bytes_.to(torch.int16)
        pairs = (pairs | pairs << 4) & 0x0F0F
        return pairs.view(torch.uint8)
    if bits == 2:
        quads = bytes_.to(torch.int32)
        quads = (quads | quads << 12) & 0x000F000F
        quads = (quads | quads << 6) & 0x03030303
        return quads.view(torch.uint8)
    octets = bytes_.to(torch.int64)
    octets = (octets | octets << 28) & 0x0000000F0000000F
    octets = (octets | octets << 14) & 0x0003000300030003
    octets = (octets | octets << 7) & 0x0101010101010101
    return octets.view(torch.uint8)
