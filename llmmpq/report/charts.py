"""From evidence to the drawings of the page: marks on axes, in percent, with the words that belong to them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmmpq.bitmap import bits_text, mean_bits, narrower_width
from llmmpq.evaluate.results import KL_FIGURES, mapping, number
from llmmpq.report.axis import Axis, axis_of
from llmmpq.report.bit_map import Cell, Grid, Linear, grid_of
from llmmpq.report.evidence import Evidence
from llmmpq.report.figures import figure, percent, size

MAX_RANKED = 12  # matrices in the chart: what a person looks through
NUM_SHADES = 6  # of the style sheet, for losses


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


# Sensitivity


@dataclass(frozen=True, kw_only=True)
class SensitivityView:
    """`unit` is the power of ten that the figures of the grid are given in."""

    widths: tuple[float, ...]
    tracks: tuple[Track, ...]
    ticks: tuple[tuple[float, str], ...]
    narrowest: float
    grid: Grid
    unit: str
    num_tokens: int | None
    note: str


def sensitivity(evidence: Evidence) -> SensitivityView | None:
    """None when nothing was measured, or the folder is older than this record."""
    losses = evidence.losses
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
        text = _short(loss / 10**exponent)
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
        note=evidence.loss_unit,
    )


def _ranked_track(linear: Linear, options: Mapping[float, float], axis: Axis) -> Track:
    chosen = mean_bits(linear)
    marks = tuple(
        Mark(
            at=axis.percent(loss),
            text=bits_text(bits),
            title=f"{linear['name']} at {bits} bits: {figure(loss)}{', chosen' if bits == chosen else ''}",
            kind=f"w{narrower_width(bits)}{' chosen' if bits == chosen else ''}",
        )
        for bits, loss in options.items()
        if loss > 0
    )
    return Track(label=f"{linear['block']} · {linear['role']}", marks=marks, figure=bits_text(chosen))


def _short(value: float) -> str:
    """At most four characters, for a small cell."""
    digits = 2 if value < 1 else 1 if value < 10 else 0
    return "0" if value < 0.005 else f"{value:.{digits}f}"


def _power(exponent: int) -> str:
    return {0: "", -3: "thousandths", -6: "millionths", -9: "billionths"}.get(exponent, f"units of 1e{exponent}")


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
    shown = predicted is not None and evidence.is_local == (evidence.curve.get("method") == "local")
    values = [point["predicted_loss"] for point in points] + ([predicted] if shown and predicted is not None else [])
    x = axis_of([point["total_nbytes"] for point in points] + [own_nbytes], log=False)
    y = axis_of(values, log=min(values) > 0)
    placed: list[dict[str, Any]] = [
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
            (x.percent(at), _round_size(at), f"{(at - kept_nbytes) / bytes_per_bit:.1f}" if at > kept_nbytes else "")
            for at in x.round_numbers(5)
        ),
        y_ticks=tuple(y.ticks()),
        chosen=chosen,
        remarks=tuple(_remarks(evidence, shown=shown, same_method=same_method)),
    )


def _round_size(nbytes: float) -> str:
    unit, name = next((u, n) for u, n in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "bytes")) if nbytes >= u or u == 1)
    return f"{nbytes / unit:.4g} {name}"


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


def divergence(evidence: Evidence) -> DivergenceView | None:
    """Predicted, measured and evaluated KL on one axis."""
    predicted = None if evidence.is_local else number(evidence.folder["predicted_loss"])
    measured = number(evidence.measured_kl)
    kl = evidence.kl
    rows = [
        ("Predicted by the plan", predicted, "predicted"),
        ("Measured on the probe", measured, "measured"),
        *((f"Evaluation: {key}", number(kl.get(key)), "evaluated") for key in KL_FIGURES),
        ("Noise floor of the evaluation", number(kl.get("noise_floor")), "floor"),
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
