"""What `prediction.py` found, as tables, CSV and a plot."""

from __future__ import annotations

import csv
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

import llmmpq

RANGES = ((0.0, 0.02), (0.02, 0.1), (0.1, 0.5), (0.5, np.inf))  # of the true KL, nats per token


def ranks(values: np.ndarray) -> np.ndarray:
    return np.argsort(np.argsort(values)).astype(float)


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.corrcoef(ranks(first), ranks(second))[0, 1]) if len(first) > 2 else float("nan")


def agreement(predicted: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """Of positive figures. `exponent`: the slope of log true on log predicted, with an intercept."""
    ratio = true / predicted
    logs = np.log(predicted), np.log(true)
    return {
        "n": len(true),
        "spearman": spearman(predicted, true),
        "slope": float(predicted @ true / (predicted @ predicted)),
        "exponent": float(np.polyfit(*logs, 1)[0]) if len(true) > 2 else float("nan"),
        "median ratio": float(np.median(ratio)),
        "least ratio": float(ratio.min()),
        "largest ratio": float(ratio.max()),
    }


def tables(plans: list[dict[str, Any]], pairs: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    column = lambda key, kind="random": np.array([p[key] for p in plans if p["kind"] == kind])  # noqa: E731
    by_range, same_size, solved, terms = [], [], [], []
    bits = column("bits")
    slices = [(low, low + 0.25) for low in np.arange(2.0, 4.0, 0.25)]
    for text in ("probe", "heldout"):
        true = column(text)
        for name in ("quadratic", "mixed", "additive", "diagonal"):
            predicted = column(name)
            by_range.append({"truth": text, "prediction": name, "range": "all"} | agreement(predicted, true))
            for low, high in RANGES:
                inside = (true >= low) & (true < high)
                if inside.any():
                    label = {"truth": text, "prediction": name, "range": f"{low:g} to {high:g}"}
                    by_range.append(label | agreement(predicted[inside], true[inside]))
            # What allocation needs: the order among plans of one size.
            inner = [(bits >= low) & (bits < high) for low, high in slices]
            figures = [(m.sum(), spearman(predicted[m], true[m])) for m in inner if m.sum() >= 8]
            if figures:
                weights, values = np.array(figures).T
                mean = float(weights @ values / weights.sum())
                same_size.append({"truth": text, "prediction": name, "within 0.25 bits": mean})
    for point in plans:
        if point["kind"] != "random":
            keys = ("kind", "bits", "quadratic", "mixed", "additive", "probe", "heldout")
            solved.append({key: point[key] for key in keys})
    groups = {
        "uniform": [p for p in pairs if p["sample"] == "uniform"],
        "uniform, no 8 bits": [p for p in pairs if p["sample"] == "uniform" and max(p["bits_i"], p["bits_j"]) < 8],
        "all, one block": [p for p in pairs if p["one_block"]],
        "all, different blocks": [p for p in pairs if not p["one_block"]],
        "both 2 bits": [p for p in pairs if p["bits_i"] == p["bits_j"] == 2],
    }
    for name, members in groups.items():
        if len(members) < 3:
            continue
        predicted, true = (np.array([p[key] for p in members]) for key in ("predicted", "true"))
        root = np.sqrt([p["kl_i"] * p["kl_j"] for p in members])
        inside = np.abs(predicted) >= np.median(np.abs(predicted))  # ratios of terms near zero say nothing
        ratio = true[inside] / predicted[inside]
        terms.append(
            {
                "pairs": name,
                "n": len(members),
                "spearman": spearman(predicted, true),
                "pearson": float(np.corrcoef(predicted, true)[0, 1]),
                "slope": float(predicted @ true / (predicted @ predicted)),
                "same sign": float((np.sign(predicted) == np.sign(true)).mean()),
                "negative": float((true < 0).mean()),
                "larger half: median ratio": float(np.median(ratio)),
                "least": float(ratio.min()),
                "largest": float(ratio.max()),
                "rms cosine": float(np.sqrt(np.mean((predicted / (2 * root)) ** 2))),
            }
        )
    return {"plans": by_range, "plans of one size": same_size, "solved plans": solved, "pair terms": terms}


def render(table: Mapping[str, list[dict[str, Any]]]) -> str:
    """Markdown."""
    lines = []
    for title, rows in table.items():
        if not rows:
            continue
        lines += ["", title, "", "| " + " | ".join(rows[0]) + " |", "|" + " --- |" * len(rows[0])]
        for row in rows:
            cells = [f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def save(
    out: Path,
    meta: Mapping[str, Any],
    table: Mapping[str, list[dict[str, Any]]],
    plans: list[dict[str, Any]],
    pairs: list[dict[str, Any]],
    *,
    title: str,
) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps({"meta": meta, "tables": table}, indent=1) + "\n", encoding="utf-8")
    with out.with_suffix(".csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(
            ["kind", "bits", "quadratic", "mixed", "additive", "diagonal", "true_probe", "true_heldout", "pair"]
        )
        keys = ("kind", "bits", "quadratic", "mixed", "additive", "diagonal", "probe", "heldout")
        for point in plans:
            writer.writerow([point[k] if k == "kind" else f"{point[k]:.6g}" for k in keys] + [""])
        for pair in pairs:
            kind, bits = f"pair, {pair['sample']}", f"{pair['bits_i']}+{pair['bits_j']}"
            writer.writerow(
                [kind, bits, f"{pair['predicted']:.6g}", "", "", "", f"{pair['true']:.6g}", "", pair["names"]]
            )
    draw(out.with_suffix(".png"), plans, pairs, title=title)


def draw(path: Path, plans: list[dict[str, Any]], pairs: list[dict[str, Any]], *, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 4.2), layout="constrained")
    random = [p for p in plans if p["kind"] == "random"]
    true = [p["probe"] for p in random]
    left.loglog([p["additive"] for p in random], true, "o", ms=3, alpha=0.5, color="#bbbbbb", label="sum of single KL")
    left.loglog([p["quadratic"] for p in random], true, "o", ms=3, alpha=0.6, color="#1f6fb4", label="x'Qx")
    solved = [p for p in plans if p["kind"] == "solved quadratic"]
    left.loglog(
        [p["quadratic"] for p in solved], [p["probe"] for p in solved], "^", ms=5, color="#c1440e", label="x'Qx, solved"
    )
    ends = [min(true) / 1.3, max(true) * 1.3]
    left.loglog(ends, ends, "-", lw=0.8, color="black")
    left.set(xlabel="predicted KL", ylabel="true KL (nats per token)", title="random plans, 2 to 4 bits")
    left.legend(frameon=False)
    for sample, colour in (("uniform", "#1f6fb4"), ("2-bit", "#c1440e")):
        members = [p for p in pairs if p["sample"] == sample]
        right.plot(
            [p["predicted"] for p in members],
            [p["true"] for p in members],
            "o",
            ms=3,
            alpha=0.6,
            color=colour,
            label=f"{sample} pairs",
        )
    ends = [min(p["predicted"] for p in pairs), max(p["predicted"] for p in pairs)]
    right.plot(ends, ends, "-", lw=0.8, color="black")
    threshold = float(np.quantile([abs(p["true"]) for p in pairs], 0.2))
    right.set_xscale("symlog", linthresh=threshold)
    right.set_yscale("symlog", linthresh=threshold)
    for axis in (right.xaxis, right.yaxis):
        axis.set_major_locator(ticker.FixedLocator([-1e-2, -1e-4, -1e-6, 0, 1e-6, 1e-4, 1e-2]))
    right.set(xlabel="predicted 2 Q_ij", ylabel="true KL_ij - KL_i - KL_j", title="pair terms")
    right.legend(frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def provenance() -> dict[str, Any]:
    here = Path(__file__).parent
    say = lambda *words: subprocess.run(words, cwd=here, capture_output=True, text=True, check=False).stdout  # noqa: E731
    cpu = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "commit": say("git", "rev-parse", "HEAD").strip() + ("+" if say("git", "status", "--short", "-uno") else ""),
        "llmmpq": llmmpq.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "machine": f"{cpu[0] if cpu else platform.processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} used",
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).is_file() else []
