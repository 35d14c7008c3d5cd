"""The GPTQ file format, which auto-round and gptqmodel write: read back to float32 without anybody's kernels.

For a linear of I inputs and O outputs, `qweight` [I * bits / 32, O] holds the codes of each output as one string of
bits, lowest first, over the words of its column; `qzeros` [groups, O * bits / 32] the zeros likewise along the row;
`scales` is [groups, O], and `g_idx` [I] the group of each input. weight = (code - zero) * scale.

The first version of the format stores zero - 1, later ones the zero, and which one a file has is said differently by
each writer. A wrong guess moves every weight by a whole step, so the one nearer to the original weights is right.

`g_idx` of inputs in their order says nothing and is not counted as bytes: 4 for each input is little for a wide
matrix, but 0.1 bits per weight and more on the narrow ones of a demo.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from qbench_exchange import AdapterError, nbytes_of, stored_tensors

PARTS = ("qweight", "qzeros", "scales", "g_idx")


def read_gptq(folder: Path, originals: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """Weights and bytes of every linear; `originals` are the weights [O, I] before quantization."""
    weights, nbytes = {}, {}
    for name, parts in stored_tensors(folder, originals).items():
        if missing := {"qweight", "qzeros", "scales"} - set(parts) | set(parts) - set(PARTS):
            raise AdapterError(f"{name} is stored as {', '.join(sorted(parts))}: not the GPTQ format ({missing})")
        original = originals[name].float()
        in_features = original.shape[1]
        num_groups = len(parts["scales"])
        in_order = torch.arange(in_features) // -(-in_features // num_groups)
        group_of_input = parts.get("g_idx", in_order).long()
        counted = [parts[key] for key in ("qweight", "qzeros", "scales")]
        if not torch.equal(group_of_input, in_order):
            counted.append(parts["g_idx"])
        nbytes[name] = nbytes_of(*counted)
        candidates = [_dequantize(parts, group_of_input, in_features, zero_offset=offset) for offset in (0, 1)]
        errors = [float((weight - original).norm() / original.norm()) for weight in candidates]
        best = min(errors)
        if not best < 1:
            raise AdapterError(f"{name} read back is not near the original, relative error {best:.2f}: another format")
        weights[name] = candidates[errors.index(best)]
    return weights, nbytes


def unpack_bits(words_WN: torch.Tensor, *, bits: int, num_codes: int) -> torch.Tensor:
    """Codes [num_codes, N] of columns that are strings of bits, lowest first, in words of 32."""
    words = words_WN.long() & 0xFFFFFFFF
    words = torch.cat([words, torch.zeros_like(words[:1])])  # so that the last code may look one word further
    position = torch.arange(num_codes) * bits
    word, shift = position // 32, (position % 32)[:, None]
    both = words[word] >> shift | words[word + 1] << (32 - shift)
    return both & (2**bits - 1)


def _dequantize(
    parts: Mapping[str, torch.Tensor], group_of_input: torch.Tensor, in_features: int, *, zero_offset: int
) -> torch.Tensor:
    bits = parts["qweight"].shape[0] * 32 // in_features
    codes_IO = unpack_bits(parts["qweight"], bits=bits, num_codes=in_features)
    zeros_GO = unpack_bits(parts["qzeros"].T, bits=bits, num_codes=codes_IO.shape[1]).T + zero_offset
    zeros_GO = zeros_GO & (2**bits - 1) if zero_offset else zeros_GO  # 2**bits wraps: nobody stores it
    steps_IO = codes_IO - zeros_GO[group_of_input]
    return (steps_IO.float() * parts["scales"].float()[group_of_input]).T.contiguous()
