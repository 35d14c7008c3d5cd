"""Arguments of the benchmarks' command lines."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection


def names_among(allowed: Collection[str], kind: str) -> Callable[[str], list[str]]:
    """Reads names with commas between; one that is not allowed is named beside those that are."""

    def read(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in allowed:
                raise argparse.ArgumentTypeError(f"{name!r} is no {kind}; there are {', '.join(map(repr, allowed))}")
        return names

    return read
