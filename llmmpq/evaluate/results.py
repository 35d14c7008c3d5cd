"""What `llmmpq eval --json` printed, as others read it: the model card and the report.

It may come from another version or another program, and may have been edited: what is missing is tolerated.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llmmpq.errors import CheckpointError
from llmmpq.evaluate.divergence import QUANTILES
from llmmpq.names import model_name, text_name

RESULTS_FILE = "eval.json"
KINDS_OF_RESULTS = ("kl", "divergence", "results")  # the last are those of lm-eval
KL_FIGURES = ("mean", *QUANTILES)
MOST_BITS_APART = 5e-4  # figures may have been written with three digits


def checked_results(results: dict[str, Any], path: Path) -> dict[str, Any]:
    """The results, without the folders of the machine they were made on; an error where they hold no figure."""
    if number(results.get("perplexity")) is None and not any(mapping(results.get(key)) for key in KINDS_OF_RESULTS):
        raise CheckpointError(
            f"{path} holds no 'perplexity', {' or '.join(map(repr, KINDS_OF_RESULTS))}: give what "
            "`llmmpq eval DIR --baseline MODEL --json` printed"
        )
    clean = _without_folders(results)
    if isinstance(results.get("baseline"), Mapping):
        clean["baseline"] = _without_folders(results["baseline"])
    return clean


def _without_folders(results: Mapping[str, Any]) -> dict[str, Any]:
    clean = dict(results)
    for key, short in (("model", model_name), ("text", text_name)):
        if isinstance(results.get(key), str):
            clean[key] = short(results[key])
    if isinstance(results.get("files"), list):  # those of lm-eval
        clean["files"] = [Path(str(name)).name for name in results["files"]]
    return clean


def other_model(results: Mapping[str, Any], found: Mapping[str, Any], digest: str | None) -> str:
    """Why the results are not of the folder that `inspect_folder` found; empty where nothing speaks against it.

    `digest` is that of the folder's digests.json. It decides alone where the results have one too.
    """
    seen = results.get("digest")
    if isinstance(seen, str) and digest is not None:
        return (
            "" if seen == digest else f"its digests.json has the digest {seen[:12]}, that of this folder {digest[:12]}"
        )
    bits, own = number(results.get("bits_per_weight")), found["bits_per_weight"]
    if bits is not None and abs(bits - own) >= MOST_BITS_APART:
        return f"it has {bits:.3f} true bits per weight, this folder has {own:.3f}"
    nbytes = results.get("total_nbytes")
    if nbytes is not None and nbytes != found["total_nbytes"]:
        return f"its files have {nbytes} bytes, those of this folder {found['total_nbytes']}"
    return ""


def task_figures(results: Mapping[str, Any]) -> Iterator[tuple[str, float, float | None]]:
    """The figures of lm-eval, by the names it gives them, beside the baseline's, without their errors."""
    others = mapping(mapping(results.get("baseline")).get("results"))
    for task, found in mapping(results.get("results")).items():
        for name, value in mapping(found).items():
            figure = number(value)
            if figure is not None and "_stderr" not in str(name):
                yield f"{task}: {str(name).partition(',')[0]}", figure, number(mapping(others.get(task)).get(name))


def mapping(value: Any) -> Mapping[str, Any]:
    """The value where it is one with names, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def number(value: Any) -> float | None:
    """The value where it is a finite number, else None."""
    return value if type(value) in (int, float) and math.isfinite(value) else None
