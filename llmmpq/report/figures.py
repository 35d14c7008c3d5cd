"""Figures as a reader sees them; one that is missing or not finite is a dash."""

from __future__ import annotations

from typing import Any

from llmmpq.allocate.budget import readable
from llmmpq.report.evidence import number

NOTHING = "-"


def figure(value: Any) -> str:
    known = number(value)
    return NOTHING if known is None else f"{known:.4g}".replace("e-0", "e-").replace("e+0", "e+")


def percent(value: Any) -> str:
    known = number(value)
    return NOTHING if known is None else f"{100 * known:.2g} %"


def size(value: Any) -> str:
    known = number(value)
    return NOTHING if known is None else readable(int(known))


def fixed(value: Any, digits: int) -> str:
    known = number(value)
    return NOTHING if known is None else f"{known:,.{digits}f}"
