"""From evidence to what the page draws: plain values, each already a sentence, a figure or a position."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmmpq.allocate.budget import asked_for, parts_of, readable
from llmmpq.report.axis import Axis, axis_of
from llmmpq.report.bit_map import Cell, Grid, Linear, bits_cell, grid_of, num_weights, runs_of, short_names
from llmmpq.report.evidence import Evidence, mapping, number

NOTHING = "–"
MAX_RANKED = 12  # matrices in the chart: what a person looks through
NUM_SHADES = 6  # of the style sheet, for losses
EDITED = "edited"


@dataclass(frozen=True, kw_only=True)
class Mark:
    """Something at a place of a track."""

    at: float
    text: str
    title: str
    kind: str = ""


@dataclass(frozen=True, kw_only=True)
class Track:
    """A line of a chart: a label, the marks on it, and the figure beside it."""

    label: str
    marks: tuple[Mark, ...]
    figure: str = ""


def figure(value: Any) -> str:
    known = number(value)
    return NOTHING if known is None else f"{known:.4g}"


def percent(value: Any) -> str:
    known = number(value)
    return NOTHING if known is None else f"{100 * known:.2g} %"


def size(value: Any) -> str:
    known = number(value)
    return NOTHING if known is None else readable(int(known))


def title_of(evidence: Evidence) -> str:
    return f"{model_name(evidence)} at {evidence.folder['bits_per_weight']:.2f} bits"


def model_name(evidence: Evidence) -> str:
    model = evidence.provenance.get("model")
    return str(model) if model else str(evidence.folder["folder"])


# Summary


def cards(evidence: Evidence) -> list[tuple[str, str, str]]:
    """The figures a reader looks for first: label, value, remark."""
    folder = evidence.folder
    source, total = number(evidence.report.get("source_nbytes")), folder["total_nbytes"]
    shrunk = f"{source / total:.2f} times smaller than {readable(int(source))}" if source and total else ""
    found = [
        ("True bits per weight", f"{folder['bits_per_weight']:.3f}", "scales and zeros included"),
        ("Code bits per weight", f"{folder['code_bits_per_weight']:.3f}", "codes alone"),
        ("Size", size(total), shrunk or "all weights of the folder"),
    ]
    if folder["predicted_loss"] is not None:
        found.append(("Predicted loss", figure(folder["predicted_loss"]), loss_unit(evidence)))
    if evidence.measured_kl is not None:
        found.append(("Measured KL", figure(evidence.measured_kl), "nats per token, on the probe"))
    if folder["optimality_gap"] is not None:
        found.append(("From the best plan", f"≤ {percent(folder['optimality_gap'])}", "proven, for what was measured"))
    results = evidence.results or {}
    if number(results.get("extra_nll")) is not None:
        found.append(("Extra loss", f"{results['extra_nll']:+.4f}", "nats per token, on evaluation text"))
    return found


def loss_unit(evidence: Evidence) -> str:
    return "relative error of block outputs" if is_local(evidence) else "KL, nats per token"


def is_local(evidence: Evidence) -> bool:
    return evidence.folder["method"] == "local"


def facts(evidence: Evidence) -> list[tuple[str, str]]:
    folder, linears = evidence.folder, evidence.folder["linears"]
    blocks = {linear["block"] for linear in linears}
    groups = ", ".join(str(value) for value in sorted({linear["group_size"] for linear in linears}))
    kinds = " and ".join(sorted({"symmetric" if linear["symmetric"] else "asymmetric" for linear in linears}))
    return [
        ("Asked for", asked_for(mapping(folder["budget"])) or "not recorded"),
        ("Chosen by", {EDITED: "hand: the plan was given as a file"}.get(folder["method"], folder["method"])),
        ("Quantized", f"{len(linears)} matrices in {len(blocks)} blocks, {folder['num_weights']:,} weights"),
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


def widths(evidence: Evidence) -> list[dict[str, Any]]:
    return [{"bits": run.bits, "share": 100 * run.share} for run in runs_of(evidence.folder["linears"])]


# Sensitivity


@dataclass(frozen=True, kw_only=True)
class SensitivityView:
    """`unit` is the power of ten that the figures of the grid are given in."""

    widths: tuple[int, ...]
    tracks: tuple[Track, ...]
    ticks: tuple[tuple[float, str], ...]
    narrowest: int
    grid: Grid
    unit: str
    num_tokens: int | None
    note: str


def losses_of(evidence: Evidence) -> dict[str, dict[int, float]]:
    """Name -> width -> what that width alone costs; for the matrices of the plan."""
    losses = mapping(mapping(evidence.report.get("sensitivity")).get("losses"))
    found = {}
    for linear in evidence.folder["linears"]:
        options = {
            int(bits): float(loss)
            for bits, loss in mapping(losses.get(linear["name"])).items()
            if str(bits).isdecimal() and number(loss) is not None
        }
        if options:
            found[linear["name"]] = dict(sorted(options.items()))
    return found


def sensitivity(evidence: Evidence) -> SensitivityView | None:
    """None when nothing was measured, or the folder is older than this record."""
    losses = losses_of(evidence)
    everything = [loss for options in losses.values() for loss in options.values() if loss > 0]
    if not everything:
        return None
    narrowest = min(bits for options in losses.values() for bits in options)
    at_narrowest = {name: options[narrowest] for name, options in losses.items() if narrowest in options}
    ranked = sorted(
        (linear for linear in evidence.folder["linears"] if linear["name"] in losses),
        key=lambda linear: -max(losses[linear["name"]].values()),
    )[:MAX_RANKED]
    axis = axis_of([loss for one in ranked for loss in losses[one["name"]].values() if loss > 0], log=True)
    largest = max(at_narrowest.values())
    exponent = 3 * math.floor(math.log10(largest) / 3) if largest > 0 else 0
    shades = axis_of(at_narrowest.values(), log=True)

    def cell(linears: Sequence[Linear]) -> Cell | None:
        found = [at_narrowest[one["name"]] for one in linears if one["name"] in at_narrowest]
        if not found:
            return None
        loss = sum(found)
        shade = min(NUM_SHADES - 1, int(NUM_SHADES * shades.percent(loss) / 100)) if loss > 0 else 0
        text = f"{loss / 10**exponent:.2g}" if loss / 10**exponent < 10 else f"{loss / 10**exponent:.0f}"
        names = ", ".join(one["name"] for one in linears)
        return Cell(text=text, title=f"{names}: {figure(loss)} at {narrowest} bits", kind=f"h{shade}")

    measured = mapping(evidence.report.get("sensitivity"))
    num_tokens = number(measured.get("num_tokens"))
    return SensitivityView(
        widths=tuple(sorted({bits for options in losses.values() for bits in options})),
        tracks=tuple(_ranked_track(linear, losses[linear["name"]], axis) for linear in ranked),
        ticks=tuple(axis.ticks()),
        narrowest=narrowest,
        grid=grid_of(evidence.folder["linears"], cell),
        unit=_power(exponent),
        num_tokens=None if num_tokens is None else int(num_tokens),
        note=loss_unit(evidence),
    )


def _ranked_track(linear: Linear, options: Mapping[int, float], axis: Axis) -> Track:
    marks = tuple(
        Mark(
            at=axis.percent(loss),
            text=str(bits),
            title=f"{linear['name']} at {bits} bits: {figure(loss)}{', chosen' if bits == linear['bits'] else ''}",
            kind=f"w{bits}{' chosen' if bits == linear['bits'] else ''}",
        )
        for bits, loss in options.items()
        if loss > 0
    )
    return Track(label=f"{linear['block']} · {linear['role']}", marks=marks, figure=f"{linear['bits']} bits")


def _power(exponent: int) -> str:
    return {0: "", -3: "thousandths", -6: "millionths", -9: "billionths"}.get(exponent, f"units of 1e{exponent}")


def matrices(evidence: Evidence) -> list[dict[str, Any]]:
    """Every matrix with all that is known of it."""
    losses, notes = losses_of(evidence), mapping(evidence.report.get("linears"))
    return [
        {
            "name": linear["name"],
            "shape": " × ".join(map(str, linear["shape"])),
            "bits": linear["bits"],
            "true_bits": f"{8 * linear['nbytes'] / num_weights(linear):.3f}",
            "size": size(linear["nbytes"]),
            "group_size": linear["group_size"],
            "algorithm": str(mapping(notes.get(linear["name"])).get("algorithm", NOTHING)),
            "losses": losses.get(linear["name"], {}),
        }
        for linear in evidence.folder["linears"]
    ]


# The curve


@dataclass(frozen=True, kw_only=True)
class CurveView:
    """Positions in percent, from the left and from the bottom."""

    points: tuple[dict[str, Any], ...]
    line: str
    x_ticks: tuple[tuple[float, str, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    chosen: dict[str, Any] | None
    remarks: tuple[str, ...]


def curve(evidence: Evidence) -> CurveView | None:
    if evidence.curve is None:
        return None
    points: list[Mapping[str, Any]] = evidence.curve["points"]
    folder, predicted = evidence.folder, number(evidence.folder["predicted_loss"])
    kept_nbytes = points[-1]["total_nbytes"] - points[-1]["nbytes"]
    own_nbytes = folder["quantized_nbytes"] + kept_nbytes
    same_method = evidence.curve.get("method") == folder["method"]
    shown = predicted is not None and is_local(evidence) == (evidence.curve.get("method") == "local")
    values = [point["predicted_loss"] for point in points] + ([predicted] if shown and predicted is not None else [])
    x = axis_of([point["total_nbytes"] for point in points] + [own_nbytes], log=False)
    y = axis_of(values, log=min(values) > 0)
    placed = [
        {
            "x": x.percent(point["total_nbytes"]),
            "y": y.percent(point["predicted_loss"]),
            "title": f"{point['bits_per_weight']:.3f} true bits, {size(point['total_nbytes'])}: "
            f"predicted loss {figure(point['predicted_loss'])}",
            "bits": f"{point['bits_per_weight']:.3f}",
            "size": size(point["total_nbytes"]),
            "loss": figure(point["predicted_loss"]),
            "gap": percent(point.get("optimality_gap")),
        }
        for point in points
    ]
    chosen = None
    if shown:
        chosen = {
            "x": x.percent(own_nbytes),
            "y": y.percent(predicted or 0.0),
            "text": f"{folder['bits_per_weight']:.2f} bits",
            "title": f"this folder: {folder['bits_per_weight']:.3f} true bits, {size(own_nbytes)}, "
            f"predicted loss {figure(predicted)}",
        }
    bytes_per_bit = points[-1]["nbytes"] / points[-1]["bits_per_weight"]
    return CurveView(
        points=tuple(placed),
        line=" ".join(f"{point['x']},{100 - point['y']:.3f}" for point in placed),
        x_ticks=tuple(
            (x.percent(at), size(at), f"{(at - kept_nbytes) / bytes_per_bit:.1f}" if at > kept_nbytes else "")
            for at in x.round_numbers(5)
        ),
        y_ticks=tuple(y.ticks()),
        chosen=chosen,
        remarks=tuple(_remarks(evidence, shown=shown, same_method=same_method)),
    )


def _remarks(evidence: Evidence, *, shown: bool, same_method: bool) -> Iterator[str]:
    method = mapping(evidence.curve).get("method")
    if not shown:
        yield "This folder's plan has no predicted loss of the same kind, so its point is not drawn."
    elif not same_method:
        yield f"The curve was made by {method}, this folder's plan by {evidence.folder['method']}."
    if evidence.measured_kl is not None:
        yield (
            "This folder's loss was predicted by a measurement around its own plan, the curve's by one around the "
            "original model: its point need not lie on the line."
        )


# Divergence


@dataclass(frozen=True, kw_only=True)
class DivergenceView:
    tracks: tuple[Track, ...]
    ticks: tuple[tuple[float, str], ...]
    sentence: str


KL_NAMES = {"mean": "mean", "median": "median", "p90": "90th percentile", "p99": "99th percentile"}


def divergence(evidence: Evidence) -> DivergenceView | None:
    """Predicted, measured and evaluated KL on one axis."""
    predicted = None if is_local(evidence) else number(evidence.folder["predicted_loss"])
    measured = number(evidence.measured_kl)
    kl = mapping(mapping(evidence.results).get("kl"))
    floor = kl.get("noise_floor")
    floor = mapping(floor).get("mean") if isinstance(floor, Mapping) else floor
    rows = [
        ("Predicted by the plan", predicted, "predicted"),
        ("Measured on the probe", measured, "measured"),
        *((f"Evaluation, {name}", number(kl.get(key)), "evaluated") for key, name in KL_NAMES.items()),
        ("Noise floor of the evaluation", number(floor), "floor"),
        (
            "Noise floor of the probe",
            number(mapping(evidence.report.get("sensitivity")).get("rounding_kl")),
            "floor",
        ),
    ]
    known = [(label, value, kind) for label, value, kind in rows if value is not None]
    if not known:
        return None
    axis = axis_of([value for _, value, _ in known], log=True)
    tracks = [
        Track(
            label=label,
            marks=(Mark(at=axis.percent(value), text="", title=f"{label}: {figure(value)}", kind=kind),)
            if value > 0
            else (),
            figure=figure(value),
        )
        for label, value, kind in known
    ]
    return DivergenceView(
        tracks=tuple(tracks), ticks=tuple(axis.ticks()), sentence=_compared(predicted, measured, number(kl.get("mean")))
    )


def _compared(predicted: float | None, measured: float | None, evaluated: float | None) -> str:
    if predicted is None or predicted <= 0:
        return ""
    if measured is not None:
        return f"On the probe, {measured / predicted:.2f} times the predicted KL was measured."
    if evaluated is not None:
        return f"On the evaluation text, the mean KL is {evaluated / predicted:.2f} times the predicted one."
    return ""


def evaluation(evidence: Evidence) -> dict[str, Any] | None:
    """A row per figure: this folder, the baseline."""
    results = evidence.results
    if results is None:
        return None
    baseline = mapping(results.get("baseline"))
    rows = [
        (label, *(form(model.get(key)) for model in (results, baseline)))
        for label, key, form in (
            ("Perplexity", "perplexity", lambda value: _fixed(value, 4)),
            ("Loss, nats per token", "nll", lambda value: _fixed(value, 5)),
            ("True bits per weight", "bits_per_weight", lambda value: _fixed(value, 3)),
            ("Size", "total_nbytes", size),
            ("Tokens per second", "tokens_per_second", lambda value: _fixed(value, 0)),
        )
    ]
    agreement = number(mapping(results.get("kl")).get("top1_agreement"))
    if agreement is not None:
        rows.append(("Same likeliest token", f"{100 * agreement:.2f} %", NOTHING))
    rows = [row for row in rows if row[1:] != (NOTHING, NOTHING)]
    num_tokens, window = number(results.get("num_tokens")), number(results.get("window"))
    text = str(results["text"]) if isinstance(results.get("text"), str) else "a text that is not named"
    told = f"{int(num_tokens):,} tokens of {text}" if num_tokens is not None else text
    return {
        "rows": rows,
        "baseline": str(baseline.get("model", "baseline")) if baseline else None,
        "extra_nll": number(results.get("extra_nll")),
        "on": told + ("" if window is None else f", in windows of {int(window):,}"),
        "remark": _other_model(evidence),
    }


def _fixed(value: Any, digits: int) -> str:
    known = number(value)
    return NOTHING if known is None else f"{known:,.{digits}f}"


def _other_model(evidence: Evidence) -> str:
    bits = number(mapping(evidence.results).get("bits_per_weight"))
    own = evidence.folder["bits_per_weight"]
    if bits is None or abs(bits - own) < 5e-4:
        return ""
    return f"These figures are of a model with {bits:.3f} true bits per weight, this folder has {own:.3f}."


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
        ("This folder", evidence.digests),
    )
    return [(title, [(str(name), str(digest)) for name, digest in found.items()]) for title, found in groups if found]


def axis_names(grid: Grid) -> list[tuple[str, str]]:
    """Short and whole names of the roles, where they differ."""
    return [(short, role) for short, role in zip(grid.headers, grid.roles, strict=True) if short != role]


