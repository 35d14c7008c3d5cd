"""Positions along an axis, in percent of its length, so that a drawing can be stretched to any width."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
MAX_DECADES = 6  # labelled at once; where there are more, every second or third is
SHORT = 1.7  # decades: an axis that may hold only one power of ten also shows its doubles and fives
LEAST_DECADES, LEAST_SHARE = 0.5, 0.02  # what an axis spans at least, so that its labels differ
MARGIN = 0.04  # of the axis on either side, so that no mark is cut off


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A piece of the number line, or of its logarithm."""

    low: float
    high: float
    log: bool

    def percent(self, value: float) -> float:
        """0 at the low end, 100 at the high end; values beyond lie on the end."""
        if self.log:
            value = math.log10(value) if value > 0 else self.low
        share = (value - self.low) / (self.high - self.low)
        return round(100 * min(1.0, max(0.0, share)), 3)

    def ticks(self) -> list[tuple[float, str]]:
        """Position and label of round numbers, rising."""
        return self._decades() if self.log else [(self.percent(at), f"{at:.6g}") for at in self.round_numbers()]

    def round_numbers(self, most: int = 6) -> list[float]:
        rough = (self.high - self.low) / most
        unit = 10 ** math.floor(math.log10(rough))
        step = next(factor * unit for factor in (1, 2, 2.5, 5, 10) if factor * unit >= rough * 0.999)
        first, last = math.ceil(self.low / step), math.floor(self.high / step)
        return [step * count for count in range(first, last + 1)]

    def _decades(self) -> list[tuple[float, str]]:
        exponents = range(math.floor(self.low), math.floor(self.high) + 1)
        factors = (1,) if self.high - self.low > SHORT else (1, 2, 5)
        step = -(-len(exponents) // MAX_DECADES)
        marks = [(math.log10(factor) + e, factor, e) for e in exponents[::step] for factor in factors]
        return [
            (self.percent(10**at), f"{'' if factor == 1 else f'{factor}·'}10{str(exponent).translate(SUPERSCRIPTS)}")
            for at, factor, exponent in marks
            if self.low <= at <= self.high
        ]


def axis_of(values: Iterable[float], *, log: bool) -> Axis:
    """One that shows all finite values, and no others than positive ones when it is logarithmic."""
    shown = [value for value in values if math.isfinite(value) and (value > 0 or not log)]
    ends = [math.log10(value) if log else value for value in shown] or [0.0, 1.0]
    low, high = min(ends), max(ends)
    least = LEAST_DECADES if log else LEAST_SHARE * max(abs(low), abs(high)) or 1.0
    if high - low < least:
        low, high = (low + high - least) / 2, (low + high + least) / 2
    margin = MARGIN * (high - low)
    return Axis(low=low - margin, high=high + margin, log=log)
