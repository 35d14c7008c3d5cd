"""How the products between options of different linears are spread: a measured Gram matrix beside a drawn one."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

HEADINGS = (
    "bits",
    "norm^2",
    "sigma",
    "in a block",
    "between",
    "largest",
    "mean",
    "next option",
    "directions",
)


def spread_table(
    gram_OO: np.ndarray, *, linear_O: np.ndarray, block_O: np.ndarray, bits_O: np.ndarray
) -> Iterator[tuple[float, ...]]:
    """One row for each width: the mean and the spread of log norm^2 between linears, the deviation of cosines in a
    block and between blocks, the largest and the mean of them, the mean cosine of an option to the next wider one of
    its linear, and in how many directions the cosines' squares would lie were all equal."""
    size_O = np.sqrt(np.maximum(np.diag(gram_OO), 1e-300))
    levels = np.unique(bits_O)
    for level in levels:
        here = np.flatnonzero(bits_O == level)
        cosine = gram_OO[np.ix_(here, here)] / np.outer(size_O[here], size_O[here])
        others = linear_O[here][:, None] != linear_O[here]
        near = others & (block_O[here][:, None] == block_O[here])
        logs = 2 * np.log(size_O[here])
        yield (
            float(level),
            float(np.exp(logs.mean())),
            float(logs.std()),
            _deviation(cosine[near]),
            _deviation(cosine[others & ~near]),
            float(np.abs(cosine[others]).max(initial=0.0)),
            float(cosine[others].mean()) if others.any() else 0.0,
            _next_cosine(gram_OO, size_O, here, linear_O),
            len(here) ** 2 / float(np.square(cosine).sum()),
        )


def _deviation(cosines: np.ndarray) -> float:
    return float(np.sqrt(np.square(cosines).mean())) if len(cosines) else 0.0


def _next_cosine(gram_OO: np.ndarray, size_O: np.ndarray, here: np.ndarray, linear_O: np.ndarray) -> float:
    """Options lie in rising order of bits."""
    wider = np.minimum(here + 1, len(linear_O) - 1)
    known = (linear_O[wider] == linear_O[here]) & (wider != here)
    if not known.any():
        return float("nan")
    first, second = here[known], wider[known]
    return float((gram_OO[first, second] / (size_O[first] * size_O[second])).mean())


def print_spread(rows: Iterator[tuple[float, ...]]) -> None:
    print(" ".join(f"{name:>11}" for name in HEADINGS))
    for bits, norm, *rest in rows:
        print(f"{bits:11.2f} {norm:11.3e} " + " ".join(f"{value:11.3f}" for value in rest))
