"""What a person asks for, as one number of bytes for the quantized linears."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from math import floor


def avg_bits_to_nbytes(avg_bits: float, num_weights: int) -> int:
    """The most bytes that `num_weights` weights may take at this many true bits each.

    Computed in fractions of the decimal that was typed: 3.3 means 33/10, not the nearest double.
    """
    return floor(Fraction(str(avg_bits)) * num_weights / 8)


def describe(budget: Mapping[str, object]) -> str:
    if budget["kind"] == "avg_bits":
        return f"--avg-bits {budget['value']}"
    return f"--bits {budget['value']}"
