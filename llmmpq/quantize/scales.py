"""Which scales can be stored: every scale that a search looks at is rounded to one of them first.

float16: 11 significant bits, either sign. float8 (`llmmpq_kernels.scales`): 5 significant bits, positive, as shares of
one base for each matrix. The base is taken from the range of the whole matrix, before any search: it only shifts the
range of the exponents, which is far wider than the spread of a matrix's scales, so nothing is gained by searching it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llmmpq.errors import CheckpointError
from llmmpq.records import Scheme
from llmmpq_kernels.scales import LARGEST_FACTOR, nearest_scale_codes, widen_scales

# The smallest positive float16. Subnormal scales are coarse, but the search sees the scale as it will be stored.
SMALLEST_SCALE = 2.0**-24
LARGEST_SCALE = 65504.0
# With it the smallest scale, base * 2^-18, is still a normal float32: devices that flush the others lose nothing.
SMALLEST_BASE = 2.0**-108


@dataclass(frozen=True, kw_only=True)
class StoredScales:
    """The scales that one matrix can have; `base` is None for float16."""

    base: torch.Tensor | None

    @property
    def signed(self) -> bool:
        return self.base is None

    @property
    def shortfall(self) -> float:
        """By how much, relative to it, a scale may be rounded down: half a step of 5 significant bits."""
        return 0.0 if self.base is None else 1 / 32

    def round(self, scales: torch.Tensor) -> torch.Tensor:
        """To the nearest that can be stored, never zero, as float32."""
        if self.base is not None:
            return widen_scales(nearest_scale_codes(scales, self.base), self.base)
        magnitude = scales.abs().clamp(SMALLEST_SCALE, LARGEST_SCALE).half().float()
        return torch.where(scales < 0, -magnitude, magnitude)

    def encode(self, scales: torch.Tensor) -> torch.Tensor:
        """The stored numbers of scales that `round` gave."""
        return scales.half() if self.base is None else nearest_scale_codes(scales, self.base)


def stored_scales_for(weight_NK: torch.Tensor, scheme: Scheme, narrowest: int) -> StoredScales:
    """What the scales of this matrix may be; the narrowest width of its groups needs the largest."""
    low, high = min(float(weight_NK.min()), 0.0), max(float(weight_NK.max()), 0.0)
    levels = 2 ** (narrowest - 1)
    largest = max(high, -low) / levels if scheme.symmetric else (high - low) / (2 * levels - 1)
    if largest > LARGEST_SCALE:
        raise CheckpointError(
            f"weights of a {weight_NK.shape[0]} x {weight_NK.shape[1]} layer reach {max(high, -low):.3g}: their scale "
            "does not fit into float16. Name the layer with --keep to leave it unquantized."
        )
    if scheme.scale_dtype == "float16":
        return StoredScales(base=None)
    if scheme.symmetric:
        largest *= levels / (levels - 1)  # wide enough for both ends, as the widest range that the search tries
    base = max(largest / LARGEST_FACTOR, SMALLEST_BASE)
    return StoredScales(base=torch.tensor([base], dtype=torch.float32, device=weight_NK.device))
