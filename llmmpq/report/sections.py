"""From evidence to the words and tables of the page: plain values, each already a sentence or a figure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from llmmpq.allocate.budget import asked_for, parts_of, readable
from llmmpq.bitmap import mean_bits
from llmmpq.evaluate.results import mapping, number, other_model, task_figures
from llmmpq.records import EDITED
from llmmpq.report.bit_map import Grid, Linear, bits_cell, bits_of, grid_of, num_weights, runs_of
from llmmpq.report.evidence import Evidence
from llmmpq.report.figures import NOTHING, figure, fixed, percent, size

METHODS = {
    "iqp": "what all pairs of options do together (iqp)",
    "pairs": "what every two options do together, each pair measured (pairs)",
    "additive": "what each option does alone, added up (additive)",
    "local": "what each option does to its own block (local)",
    "uniform": "no measurement (uniform)",
    EDITED: "hand: the plan was given as a file",
}


def title_of(evidence: Evidence) -> str:
    return f"{model_name(evidence)} at {evidence.folder['bits_per_weight']:.2f} bits"


def model_name(evidence: Evidence) -> str:
    model = evidence.provenance.get("model")
    return str(model) if model else evidence.name


# Summary


def cards(evidence: Evidence) -> list[tuple[str, str, str]]:
    """The figures a reader looks for first: label, value, remark."""
    folder = evidence.folder
    source, total = number(evidence.report.get("source_nbytes")), folder["total_nbytes"]
    shrunk = f"{source / total:.2f} times smaller than {readable(int(source))}" if source and total else ""
    found = [
        ("True bits", f"{folder['bits_per_weight']:.3f}", "per weight, scales and zeros included"),
        ("Code bits", f"{folder['code_bits_per_weight']:.3f}", "per weight, codes alone"),
        ("Size", size(total), shrunk or "all weights of the folder"),
    ]
    if folder["predicted_loss"] is not None:
        found.append(("Predicted loss", figure(folder["predicted_loss"]), evidence.loss_unit))
    if evidence.measured_kl is not None:
        found.append(("Measured KL", figure(evidence.measured_kl), "nats per token, on the probe"))
    if folder["optimality_gap"] is not None:
        found.append(("Gap", f"≤ {percent(folder['optimality_gap'])}", "from the best plan, for what was measured"))
    results = evidence.results or {}
    if number(results.get("extra_nll")) is not None:
        found.append(("Extra loss", f"{results['extra_nll']:+.4f}", "nats per token, on evaluation text"))
    return found


def facts(evidence: Evidence) -> list[tuple[str, str]]:
    folder, linears = evidence.folder, evidence.folder["linears"]
    grid = bit_map(evidence)
    num_blocks = sum(len(panel.rows) for panel in grid.panels)
    groups = ", ".join(str(value) for value in sorted({linear["group_size"] for linear in linears}))
    kinds = " and ".join(sorted({"symmetric" if linear["symmetric"] else "asymmetric" for linear in linears}))
    return [
        ("Asked for", asked_for(mapping(folder["budget"])) or "not recorded"),
        ("Chosen by", METHODS.get(folder["method"], folder["method"])),
        (
            "Quantized",
            f"{len(linears)} matrices in {num_blocks} blocks{' and outside them' if grid.outside else ''}, "
            f"{folder['num_weights']:,} weights",
        ),
        ("Groups", f"of {groups} inputs, {kinds}"),
        ("Stored as", f"layout version {folder['layout_version']}"),
    ]


def size_bars(evidence: Evidence) -> list[dict[str, Any]]:
    """Before and after to one scale; the second in two parts."""
    folder, source = evidence.folder, number(evidence.report.get("source_nbytes"))
    longest = max(source or 0, folder["total_nbytes"]) or 1
    bars = []
    if source:
        parts = [{"kind": "original", "label": "original", "share": 100 * source / longest, "size": size(source)}]
        bars.append({"label": "Before", "size": size(source), "parts": parts})
    parts = [
        {"kind": kind, "label": label, "share": 100 * nbytes / longest, "size": size(nbytes)}
        for kind, label, nbytes in (
            ("quantized", "quantized", folder["quantized_nbytes"]),
            ("kept", "kept at 16 bits or more", folder["kept_nbytes"]),
        )
    ]
    return [*bars, {"label": "After", "size": size(folder["total_nbytes"]), "parts": parts}]


def budget_parts(evidence: Evidence) -> list[tuple[str, str]]:
    """What a budget of a total goes to."""
    budget = mapping(evidence.folder["budget"])
    if number(budget.get("total_nbytes")) is None or not isinstance(budget.get("reserved"), Mapping):
        return []
    try:
        parts = parts_of(budget, evidence.folder["quantized_nbytes"])
    except (KeyError, TypeError):  # edited by hand
        return []
    left = budget["total_nbytes"] - sum(parts.values())
    rows = [(name, size(nbytes)) for name, nbytes in parts.items()]
    return [("asked for", size(budget["total_nbytes"])), *rows, ("left" if left >= 0 else "too much", size(abs(left)))]


def kept(evidence: Evidence) -> list[tuple[str, int, str, str]]:
    """Reason, number, size and largest of the tensors that stay as they are."""
    by_reason: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for tensor in map(mapping, evidence.folder["kept"]):
        nbytes = int(number(tensor.get("nbytes")) or 0)
        by_reason[str(tensor.get("reason"))].append((nbytes, str(tensor.get("name"))))
    rows = sorted(by_reason.items(), key=lambda item: -sum(nbytes for nbytes, _ in item[1]))
    return [(why, len(found), size(sum(n for n, _ in found)), max(found)[1]) for why, found in rows]


# Bits


def bit_map(evidence: Evidence) -> Grid:
    return grid_of(evidence.folder["linears"], bits_cell)


def kinds(evidence: Evidence) -> list[dict[str, str]]:
    """What the columns of the map are called in the model, and what each kind of matrix got on average."""
    by_role: dict[str, list[Linear]] = defaultdict(list)
    for linear in evidence.folder["linears"]:
        by_role[linear["role"]].append(linear)
    grid = bit_map(evidence)
    shorts = dict(zip(grid.roles, grid.headers, strict=True))
    return [
        {
            "short": shorts.get(role, role),
            "role": role,
            "bits": f"{sum(run.bits * run.share for run in runs_of(linears)):.2f}",
            "share": f"{100 * sum(map(num_weights, linears)) / evidence.folder['num_weights']:.0f} %",
        }
        for role, linears in by_role.items()
    ]


def widths(evidence: Evidence) -> list[dict[str, Any]]:
    return [{"bits": run.bits, "share": 100 * run.share} for run in runs_of(evidence.folder["linears"])]


def matrices(evidence: Evidence) -> list[dict[str, Any]]:
    """Every matrix with all that is known of it."""
    losses, notes = evidence.losses, mapping(evidence.report.get("linears"))
    return [
        {
            "name": linear["name"],
            "shape": " x ".join(map(str, linear["shape"])),
            "bits": bits_of(linear),
            "mean_bits": mean_bits(linear),
            "true_bits": f"{8 * linear['nbytes'] / num_weights(linear):.3f}",
            "size": size(linear["nbytes"]),
            "group_size": linear["group_size"],
            "algorithm": str(mapping(notes.get(linear["name"])).get("algorithm", NOTHING)),
            "losses": losses.get(linear["name"], {}),
        }
        for linear in evidence.folder["linears"]
    ]


# Evaluation


def evaluation(evidence: Evidence) -> dict[str, Any] | None:
    """A row per figure: this folder, the baseline."""
    results = evidence.results
    if results is None:
        return None
    baseline = mapping(results.get("baseline"))
    rows = [
        (label, *(form(model.get(key)) for model in (results, baseline)))
        for label, key, form in (
            ("Perplexity", "perplexity", lambda value: fixed(value, 4)),
            ("Loss, nats per token", "nll", lambda value: fixed(value, 5)),
            ("True bits per weight", "bits_per_weight", lambda value: fixed(value, 3)),
            ("Size", "total_nbytes", size),
            ("Tokens per second", "tokens_per_second", lambda value: fixed(value, 0)),
        )
    ]
    agreement = number(evidence.kl.get("top1_agreement"))
    if agreement is not None:
        rows.append(("Same likeliest token", f"{100 * agreement:.2f} %", NOTHING))
    rows += [(label, fixed(here, 4), fixed(there, 4)) for label, here, there in task_figures(results)]
    rows = [row for row in rows if row[1:] != (NOTHING, NOTHING)]
    num_tokens, window = number(results.get("num_tokens")), number(results.get("window"))
    text = str(results["text"]) if isinstance(results.get("text"), str) else "a text that is not named"
    told = f"{int(num_tokens):,} tokens of {text}" if num_tokens is not None else f"On {text}"
    return {
        "rows": rows,
        "baseline": str(baseline.get("model", "not named")) if baseline else None,
        "extra_nll": number(results.get("extra_nll")),
        "on": told + ("" if window is None else f", in windows of {int(window):,}"),
        "remark": _other_model(evidence, results),
    }


def _other_model(evidence: Evidence, results: Mapping[str, Any]) -> str:
    why = other_model(results, evidence.folder, evidence.digest)
    return f"These figures are of another model: {why}." if why else ""


# Provenance


def origin(evidence: Evidence) -> list[tuple[str, str]]:
    provenance = evidence.provenance
    calibration, probe = mapping(provenance.get("calibration")), mapping(provenance.get("probe"))
    numerics, recipe = mapping(provenance.get("numerics")), evidence.recipe
    seed = mapping(recipe.get("calibration")).get("seed")
    rows = [
        ("Model", provenance.get("model")),
        ("Revision", provenance.get("revision")),
        ("Made with", f"llmmpq {provenance['llmmpq']}" if "llmmpq" in provenance else None),
        ("Calibration text", calibration.get("source")),
        ("Calibration", _tokens(calibration)),
        ("Probe", _tokens(probe)),
        ("Seed", seed),
        *((str(key).capitalize(), value) for key, value in numerics.items() if key != "llmmpq"),
    ]
    return [(label, str(value)) for label, value in rows if value is not None]


def _tokens(text: Mapping[str, Any]) -> str | None:
    num_tokens, window = number(text.get("num_tokens")), number(text.get("window"))
    if num_tokens is None:
        return None
    return f"{int(num_tokens):,} tokens" + ("" if window is None else f" in windows of {int(window):,}")


def digests(evidence: Evidence) -> list[tuple[str, list[tuple[str, str]]]]:
    """Groups of name and sha256: what went in, what came out."""
    provenance = evidence.provenance
    texts = {
        f"{name} tokens": mapping(provenance.get(name)).get("digest")
        for name in ("calibration", "probe")
        if "digest" in mapping(provenance.get(name))
    }
    groups = (
        ("Original model", mapping(provenance.get("model_files"))),
        ("Text", texts),
        ("Rotation of the residual stream", {"R": provenance["rotation"]} if "rotation" in provenance else {}),
        ("This folder", evidence.digests),
    )
    return [(title, [(str(name), str(digest)) for name, digest in found.items()]) for title, found in groups if found]
