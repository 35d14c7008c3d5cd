"""What a person asks for, as one number of bytes for the quantized linears.

A budget is a dictionary, stored in the plan: `kind`, `value` as typed, and `nbytes` for the quantized linears. One that
limits more than them also has `total_nbytes`, what it limits, and `reserved`, the bytes of everything else in there.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from math import floor
from typing import Any

# What running a model takes beside weights and cache. Fixed: CUDA's context and libraries (0.3 to 0.5 GB), the block of
# 2**24 weights that the torch reference unpacks at a time (0.25 GB), small models' buffers. A share, because it grows
# with what the memory is filled with: fragmentation, one dequantized matrix, activations of the prompt, a layer's cache
# while it is copied to grow. A prompt of many thousand tokens that is read in one piece needs more.
VRAM_MARGIN_NBYTES = 800_000_000
VRAM_MARGIN_DIVISOR = 20  # a share of 5 %

RESERVED = {
    "kept": "kept unquantized",
    "headers": "file headers and index",
    "kv_cache": "KV cache",
    "margin": "margin for the runtime",
}


def avg_bits_to_nbytes(avg_bits: float, num_weights: int) -> int:
    """The most bytes that `num_weights` weights may take at this many true bits each.

    Computed in fractions of the decimal that was typed: 3.3 means 33/10, not the nearest double.
    """
    return floor(Fraction(str(avg_bits)) * num_weights / 8)


def vram_margin_nbytes(vram_nbytes: int) -> int:
    return VRAM_MARGIN_NBYTES + -(-vram_nbytes // VRAM_MARGIN_DIVISOR)


def describe(budget: Mapping[str, Any]) -> str:
    """The budget as flags."""
    flags = f"--{str(budget['kind']).replace('_', '-')} {''.join(str(budget['value']).split())}"
    if budget["kind"] != "fit_vram":
        return flags
    several = f" --sequences {budget['sequences']}" if budget["sequences"] > 1 else ""
    return f"{flags} --context {budget['context']}{several}"


def asked_for(budget: Mapping[str, Any]) -> str | None:
    """The budget as a person would say it; None for one that is not known."""
    value = budget.get("value")
    return {
        "avg_bits": f"{value} true bits per weight on average",
        "bits": f"{value} bits everywhere",
        "max_size": f"at most {value} of files of weights",
        "fit_vram": f"to run in {value} of GPU memory",
        "plan": "the widths of a plan file",
    }.get(str(budget.get("kind")))


def parts_of(budget: Mapping[str, Any], quantized_nbytes: int) -> dict[str, int]:
    """What `total_nbytes` goes to, in words; empty for a budget that limits the quantized linears alone."""
    if "reserved" not in budget:
        return {}
    reserved = {_in_words(budget, key): nbytes for key, nbytes in budget["reserved"].items()}
    return {"quantized": quantized_nbytes} | reserved


def too_small(budget: Mapping[str, Any], smallest_nbytes: int, *, pinned: bool) -> str:
    """Why a budget of a total cannot be met, and the smallest that can. `smallest_nbytes` is of quantized linears."""
    reserved, total = budget["reserved"], budget["total_nbytes"]
    in_vram = budget["kind"] == "fit_vram"
    needed = smallest_nbytes + sum(reserved.values())
    if in_vram:
        # The margin grows with the memory: the least T with T - T / 20 - fixed >= the rest.
        rest = needed - reserved["margin"] + VRAM_MARGIN_NBYTES
        needed = -(-rest * VRAM_MARGIN_DIVISOR // (VRAM_MARGIN_DIVISOR - 1))
        reserved = {**reserved, "margin": vram_margin_nbytes(needed)}
    parts = [f"{readable(smallest_nbytes)} quantized"]
    parts += [f"{readable(nbytes)} {_in_words(budget, key)}{_most(budget, key)}" for key, nbytes in reserved.items()]
    binds = ", ".join(parts)
    alone = ""
    if in_vram and reserved["kv_cache"] > total:
        alone = f" The KV cache alone does not fit in {readable(total)}."
    flag, enough = ("--fit-vram" if in_vram else "--max-size"), size_of_at_least(needed)
    ways = [f"Raise {flag} to {enough} or more", "use larger groups"]
    if in_vram:
        ways.insert(1, "shorten --context" + (" or run fewer --sequences" if budget["sequences"] > 1 else ""))
    if pinned:
        ways.append("loosen the pins")
    return (
        f"{describe(budget)} cannot be met: the smallest plan needs {enough} ({needed:,} bytes), of which {binds}."
        f"{alone} {', '.join(ways[:-1])}, or {ways[-1]}."
    )


def _in_words(budget: Mapping[str, Any], key: str) -> str:
    words = RESERVED[key]
    if key == "kv_cache":
        return f"{words} for {budget['sequences']:,} x {budget['context']:,} tokens at 16 bits"
    if key == "margin":
        return f"{words} ({100 // VRAM_MARGIN_DIVISOR} % + {VRAM_MARGIN_NBYTES / 1e9:g} GB)"
    return words


def _most(budget: Mapping[str, Any], key: str) -> str:
    if key != "kept" or "largest_kept" not in budget:
        return ""
    largest = budget["largest_kept"]
    return f" (of which {readable(largest['nbytes'])} {largest['name']} at {largest['bits']} bits)"


def readable(nbytes: int) -> str:
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if nbytes >= unit:
            return f"{nbytes / unit:.2f} {name}"
    return f"{nbytes} bytes"


def size_of_at_least(nbytes: int) -> str:
    """A size to type, in thousandths of its unit, rounded up: a budget of it holds `nbytes`."""
    unit, name = next(
        (choice for choice in ((10**9, "GB"), (10**6, "MB")) if nbytes >= choice[0]),
        (10**3, "KB"),
    )
    whole, part = divmod(-(-nbytes * 1000 // unit), 1000)
    return f"{whole}.{part:03d}".rstrip("0").rstrip(".") + name
