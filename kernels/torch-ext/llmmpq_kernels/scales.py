"""8-bit scales: a positive scale is base * f(code), base a float32 of the matrix.

f(code) is the float16 whose bits are code << 6: no sign, 4 bits of exponent, 4 of fraction, from f(1) = 2^-18 to
f(255) = 1.9375. f(0) = 0 is never written. The steps are 1/16 apart at most (relative) above f(16) = 2^-14. The
product is float32.

Rejected: torch.float8_e4m3fn. It spends a bit on a sign that only symmetric grids could use, and a shift to float16
is one instruction where a device has no conversion.
"""

from __future__ import annotations

import torch

LARGEST_FACTOR = 1.9375  # f(255): the base of a matrix is its largest scale over this
NUM_CODES = 256


def widen_scales(scales: torch.Tensor, scale_base: torch.Tensor | None) -> torch.Tensor:
    """Stored scales (float16, or codes with their base) as float32."""
    if scale_base is None:
        return scales.to(torch.float32)
    return _factors(scales).mul_(scale_base)


def nearest_scale_codes(scales: torch.Tensor, scale_base: torch.Tensor) -> torch.Tensor:
    """The codes (uint8, 1 to 255) whose scales are nearest to these positive ones."""
    factors = _factors(torch.arange(1, NUM_CODES, dtype=torch.uint8, device=scales.device))
    between = (factors[1:] + factors[:-1]) / 2  # exact: two 5-bit fractions
    return torch.bucketize(scales / scale_base, between).add_(1).to(torch.uint8)


def _factors(codes: torch.Tensor) -> torch.Tensor:
    return (codes.to(torch.int16) << 6).view(torch.float16).to(torch.float32)
