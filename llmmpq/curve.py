"""The curve of predicted loss against bytes: what each further bit of a model would buy.

The budgets lie from the smallest to the largest plan at equal ratios, so closer together where bits are few and the
curve bends. Budgets that choose the same plan become one point, and one that costs more and loses no less (its search
ended by the time limit) is left out: the loss falls from point to point.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmmpq.errors import CheckpointError
from llmmpq.model.checkpoint import write_text
from llmmpq.records import Plan

JSON_FILE, PICTURE_FILE = "pareto.json", "pareto.png"
NO_PICTURE = f"matplotlib is not installed, so {PICTURE_FILE} is not drawn: pip install 'llmmpq[plot]'"


def curve_budgets(smallest_nbytes: int, largest_nbytes: int, num_budgets: int) -> list[dict[str, Any]]:
    """Rising, without repetitions, both ends among them."""
    ratio = largest_nbytes / smallest_nbytes
    steps = range(num_budgets - 1)
    between = [round(smallest_nbytes * ratio ** (step / (num_budgets - 1))) for step in steps]
    sizes = sorted({max(smallest_nbytes, min(size, largest_nbytes)) for size in [*between, largest_nbytes]})
    return [{"kind": "nbytes", "value": size, "nbytes": size} for size in sizes]


def frontier(plans: Iterable[Plan]) -> list[Plan]:
    """In rising order of bytes, with falling loss."""
    best: list[Plan] = []
    for plan in sorted(plans, key=lambda plan: (plan.nbytes, _loss(plan))):
        if not best or _loss(plan) < _loss(best[-1]):
            best.append(plan)
    return best


def curve_of(plans: Sequence[Plan], *, kept_nbytes: int) -> dict[str, Any]:
    """What `pareto.json` holds. `total_nbytes` counts the kept tensors too."""
    points = [
        {
            "nbytes": plan.nbytes,
            "total_nbytes": plan.nbytes + kept_nbytes,
            "bits_per_weight": plan.bits_per_weight,
            "code_bits_per_weight": plan.code_bits_per_weight,
            "predicted_loss": _loss(plan),
            "optimality_gap": plan.optimality_gap,
        }
        for plan in plans
    ]
    return {"format": "llmmpq-pareto", "method": plans[0].method, "kept_nbytes": kept_nbytes, "points": points}


def write_curve(folder: Path, curve: Mapping[str, Any], *, title: str) -> list[str]:
    """`pareto.json`, and `pareto.png` where matplotlib is there. Returns the names of the files."""
    write_text(folder / JSON_FILE, json.dumps(curve, indent=2) + "\n")
    try:
        _draw(folder / PICTURE_FILE, curve, title=title)
    except ImportError:
        return [JSON_FILE]
    except OSError as error:
        raise CheckpointError(f"cannot write {folder / PICTURE_FILE}: {error.strerror}. Give another --out.") from None
    return [JSON_FILE, PICTURE_FILE]


def _draw(path: Path, curve: Mapping[str, Any], *, title: str) -> None:
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    points, kept = curve["points"], curve["kept_nbytes"]
    bytes_per_bit = points[-1]["nbytes"] / points[-1]["bits_per_weight"]
    unit, unit_name = (10**9, "GB") if points[-1]["total_nbytes"] >= 10**9 else (10**6, "MB")
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    losses = [point["predicted_loss"] for point in points]
    axes.plot([point["total_nbytes"] / unit for point in points], losses, marker="o", markersize=4)
    if min(losses) > 0:
        axes.set_yscale("log")
    axes.set_xlabel(f"size in {unit_name}, of which {kept / unit:.3g} {unit_name} kept unquantized")
    axes.set_ylabel("predicted loss")
    axes.set_title(title)
    axes.grid(alpha=0.3)

    def to_bits(size: Any) -> Any:
        return (size * unit - kept) / bytes_per_bit

    def to_size(bits: Any) -> Any:
        return (bits * bytes_per_bit + kept) / unit

    top = axes.secondary_xaxis("top", functions=(to_bits, to_size))
    top.set_xlabel("true bits per weight")
    figure.savefig(path, dpi=150, metadata={"Software": None})  # without a version: equal curves, equal files


def _loss(plan: Plan) -> float:
    assert plan.predicted_loss is not None
    return plan.predicted_loss
