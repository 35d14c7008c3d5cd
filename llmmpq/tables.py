"""What the command line shows of a result: tables and summaries on a rich console, from the dicts of `pipeline`.

Everything must read without colour (a log, a paper, a colour-blind eye) and at 80 columns.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import ceil
from typing import Any

from rich.console import Console, RenderableType
from rich.filesize import decimal
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from llmmpq.allocate.budget import asked_for, parts_of
from llmmpq.bitmap import bit_map, bits_text, narrower_width, short_names, width_shares
from llmmpq.pieces import NOTHING, columns, say, show_alarms, show_rows, size
from llmmpq.progress import duration

Row = Mapping[str, Any]

WIDTH_STYLES = {2: "red", 3: "yellow", 4: "green", 8: "cyan"}
MAX_MAP_ROWS = 40  # what a screen shows at once; a longer map continues beside itself where the terminal is wide enough
MAX_EXAMPLES = 3


def show_quantized(console: Console, result: Row) -> None:
    plan = result["plan"]
    linears = list(plan["linears"].values())
    show_bit_map(console, linears)
    output_nbytes, source_nbytes = result["total_nbytes"], result["source_nbytes"]
    ratio = f"{source_nbytes / output_nbytes:.2f} times smaller" if output_nbytes else ""
    rows = {
        "Written to": result["out"],
        **_plan_rows(plan, linears),
        **_part_rows(plan["budget"].get("total_nbytes"), parts_of(plan["budget"], plan["nbytes"])),
        "Size": f"{size(source_nbytes)} -> {size(output_nbytes)}, {ratio}",
        "of which": f"{size(plan['nbytes'])} quantized, {size(result['kept_nbytes'])} kept at 16 bits or more",
        "Took": f"{duration(result['seconds'])}, at most {decimal(result['peak_rss_nbytes'])} of memory",
    }
    if result["resumed_blocks"]:
        rows["Continued"] = f"{result['resumed_blocks']} blocks were taken over from an earlier run"
    if result["already_done"]:
        rows["Continued"] = "nothing was left to do: the folder already holds this result"
    show_rows(console, rows)
    show_alarms(console, "fallback", result["fallbacks"])
    show_alarms(console, "warning", result["warnings"])
    if result["pushed"] is not None:
        show_pushed(console, result["pushed"])


def show_plans(console: Console, result: Row) -> None:
    plans = result["plans"]
    if len(plans) == 1:
        linears = list(plans[0]["linears"].values())
        show_bit_map(console, linears)
        budget, nbytes = plans[0]["budget"], plans[0]["nbytes"]
        parts = _part_rows(budget.get("total_nbytes"), parts_of(budget, nbytes))
        show_rows(console, {**_plan_rows(plans[0], linears), **parts, "Size": f"{size(nbytes)} in these matrices"})
    elif plans:
        # Around a plan another point is the model's middle: only what was measured compares plans then.
        is_measured = any(plan["measured_kl"] is not None for plan in plans)
        headers = ["asked", "true bits", "code bits", "size", "predicted loss", "gap"]
        headers += ["measured KL"] if is_measured else []
        table = columns(*headers, "weights by width", right=range(len(headers)))
        for plan in plans:
            table.add_row(
                f"{plan['budget'].get('value', '')}{' of VRAM' if plan['budget'].get('kind') == 'fit_vram' else ''}",
                f"{plan['bits_per_weight']:.3f}",
                f"{plan['code_bits_per_weight']:.3f}",
                size(plan["nbytes"]),
                _figure(plan["predicted_loss"]),
                _gap(plan["optimality_gap"]),
                *([_figure(plan["measured_kl"])] if is_measured else []),
                _shares(plan["linears"].values(), separator="\n"),
            )
        console.print(table)
    if "curve" in result:
        _show_curve(console, result["curve"], result["out"])
    if not plans:
        return
    if result["out"] is None:
        say(console, "No plan file was written; --out FOLDER writes what `llmmpq quantize --plan FILE` carries out.")
    else:
        say(console, f"Plan files are in {result['out']}.")


def _show_curve(console: Console, curve: Row, out: str | None) -> None:
    table = columns("true bits", "code bits", "size", "with kept", "predicted loss", "gap", right=range(6))
    for point in curve["points"]:
        table.add_row(
            f"{point['bits_per_weight']:.3f}",
            f"{point['code_bits_per_weight']:.3f}",
            size(point["nbytes"]),
            size(point["total_nbytes"]),
            _figure(point["predicted_loss"]),
            _gap(point["optimality_gap"]),
        )
    console.print(table)
    say(console, f"{len(curve['points'])} different plans for {curve['num_budgets']} budgets, smallest to largest.")
    if out is None:
        say(console, "No file was written; --out FOLDER writes pareto.json, and pareto.png with matplotlib.")
    else:
        say(console, f"Written to {out}: {', '.join(curve['files'])}.")
    for note in curve["notes"]:
        say(console, f"note: {note}")


def show_check(console: Console, result: Row) -> None:
    seconds = result["seconds"]
    rows = {
        "Model": f"{result['model']} ({result['architecture']})",
        "To quantize": f"{result['num_linears']} matrices in {result['num_blocks']} blocks, "
        f"{result['num_weights']:,} weights",
        "Budget": f"{result['budget']}; "
        f"possible are {result['smallest_bits']:.2f} to {result['largest_bits']:.2f} true bits per weight",
        **_part_rows(result["budget_total_nbytes"], result["budget_parts"]),
        "Size": f"{size(result['source_nbytes'])} -> {size(result['output_nbytes'])}",
        "of which": f"{size(result['quantized_nbytes'])} quantized, {size(result['kept_nbytes'])} kept",
        "Computes on": f"{result['device']} in {result['dtype']}",
        "Memory": _needed(result["ram_nbytes"], result["ram_free_nbytes"]),
        "GPU memory": _needed(result["vram_nbytes"], result["vram_free_nbytes"]),
        "Disk": _needed(result["disk_nbytes"], result["disk_free_nbytes"]),
        "Work disk": _needed(result["work_disk_nbytes"], result["work_disk_free_nbytes"]),
        "Time": None if seconds is None else f"about {duration(seconds)} (a rough estimate)",
    }
    show_rows(console, rows)
    show_kept(console, result["kept"])
    if short := result["short_groups"]:
        say(console, f"A short last group: {_examples(short)}")
    for note in result["notes"]:
        say(console, f"note: {note}")
    show_alarms(console, "problem", result["problems"])
    if not result["problems"]:
        say(console, "Nothing stands in the way.")


def show_kept(console: Console, kept: Iterable[Row]) -> None:
    by_reason: dict[str, list[Row]] = defaultdict(list)
    for tensor in kept:
        by_reason[tensor["reason"]].append(tensor)
    if not by_reason:
        return
    table = columns("kept as it is, because", "tensors", "size", "such as", right=(1, 2))
    for reason, tensors in sorted(by_reason.items(), key=lambda item: -sum(one["nbytes"] for one in item[1])):
        nbytes = sum(tensor["nbytes"] for tensor in tensors)
        largest = max(tensors, key=lambda tensor: tensor["nbytes"])
        table.add_row(reason, str(len(tensors)), size(nbytes), largest["name"])
    console.print(table)


def show_inspected(console: Console, result: Row) -> None:
    linears = result["linears"]
    show_bit_map(console, linears)
    rows = {
        "Folder": f"{result['folder']} (layout version {result['layout_version']})",
        **_plan_rows(result, linears),
        "Size": f"{size(result['total_nbytes'])}: {size(result['quantized_nbytes'])} quantized, "
        f"{size(result['kept_nbytes'])} kept at 16 bits or more",
    }
    show_rows(console, rows)
    show_alarms(console, "fallback", result["fallbacks"])
    show_alarms(console, "warning", result["warnings"])
    show_alarms(console, "problem", result["problems"])
    if not result["problems"]:
        sound = "Every file is there and has the digest it was written with."
        say(console, sound if result["verified"] else "Every packed tensor is there; there are no digests to verify.")


def show_report(console: Console, result: Row) -> None:
    say(console, f"Written to {result['out']} ({size(result['nbytes'])}): open it in any browser.")
    missing = {
        "has_sensitivity": "what each width costs: nothing was measured for this folder",
        "has_curve": "the curve of loss against size: --pareto takes what `llmmpq plan --pareto --out` wrote",
        "has_results": "evaluation figures: --results takes what `llmmpq eval --json` printed",
    }
    for key, sentence in missing.items():
        if not result[key]:
            say(console, f"Not in it: {sentence}.")
    show_alarms(console, "problem", result["problems"])


def show_evaluated(console: Console, result: Row) -> None:
    models = [result] if result.get("baseline") is None else [result, result["baseline"]]
    table = columns("", *(model["model"] for model in models), right=(1, 2))
    for label, key, form in (
        ("perplexity", "perplexity", "{:.4f}"),
        ("nats per token", "nll", "{:.5f}"),
        ("true bits per weight", "bits_per_weight", "{:.3f}"),
        ("size", "total_nbytes", None),
        ("tokens per second", "tokens_per_second", "{:,.0f}"),
    ):
        values = [model.get(key) for model in models]
        shown = [NOTHING if v is None else size(v) if form is None else form.format(v) for v in values]
        if any(value is not None for value in values):
            table.add_row(label, *shown)
    console.print(table)
    if len(models) == 2:
        say(console, f"Extra loss against the baseline: {result['extra_nll']:+.5f} nats per token.")
    say(
        console,
        f"{result['num_tokens']:,} tokens of {result['text']}, in windows of {result['window']}"
        + ("" if result["stride"] == result["window"] else f" that begin {result['stride']} tokens apart")
        + ".",
    )
    if "divergence" in result:
        _show_divergence(console, result["model"], result["divergence"], result["noise_floor"])
    for note in result["notes"]:
        say(console, f"note: {note}")


def _show_divergence(console: Console, model: str, found: Row, floor: Row) -> None:
    console.print()
    table = columns("KL divergence, nats per token", model, "bf16 noise floor", right=(1, 2))
    for key, form in (
        ("kl_mean", "{:.4g}"),
        ("kl_median", "{:.4g}"),
        ("kl_p90", "{:.4g}"),
        ("kl_p99", "{:.4g}"),
        ("top1_agreement", "{:.2%}"),
    ):
        label = {"top1_agreement": "same first choice"}.get(key, key.removeprefix("kl_"))
        table.add_row(label, form.format(found[key]), form.format(floor[key]))
    console.print(table)
    say(console, f"Of {found['num_tokens']:,} tokens, from the baseline in float32.")


def show_tasks(console: Console, result: Row) -> None:
    """One row for each task and figure, as lm-eval names them."""
    models = [result] if result.get("baseline") is None else [result, result["baseline"]]
    table = columns("task", "figure", *(model["model"] for model in models), right=range(2, 2 + len(models)))
    for task, figures in result["results"].items():
        names = [name for name in figures if "_stderr" not in name]
        for position, name in enumerate(names):
            values = (_with_error(model["results"][task], name) for model in models)
            table.add_row("" if position else task, name, *values)
    console.print(table)
    for task, num in result["num_examples"].items():
        say(console, f"{task}: {num} examples, {result['num_fewshot'][task]} shown before each.")
    for file in (file for model in models for file in model["files"]):
        say(console, f"Saved as {file}")


def _with_error(figures: Row, name: str) -> str:
    metric, comma, kind = name.partition(",")
    error = figures.get(f"{metric}_stderr{comma}{kind}")
    return f"{figures[name]:.4f}" + ("" if error is None else f" ± {error:.4f}")


def show_pushed(console: Console, result: Row) -> None:
    sent, there = result["uploaded"], result["unchanged"]
    show_rows(
        console,
        {
            "Pushed to": result["url"],
            "Sent": f"{size(result['uploaded_nbytes'])} in {len(sent)} files" if sent else "nothing",
            "There already": f"{len(there)} files" if there else None,
            "Removed": _examples(result["deleted"]) if result["deleted"] else None,
            "Commit": result["commit"],
        },
    )
    for note in result["notes"]:
        say(console, f"note: {note}")


def show_bit_map(console: Console, linears: Sequence[Row]) -> None:
    """Rows are blocks, columns are roles in the order of the model, cells are code bits."""
    shown = bit_map(linears)
    roles, rows = shown.roles, shown.merged()
    headers = short_names(roles)
    panels = _panels(console, headers, rows)
    if panels is None:  # too many or too long roles for this terminal
        letters = [chr(ord("a") + index) if index < 26 else str(index) for index in range(len(roles))]
        panels = _panels(console, letters, rows) or [_map_table(letters, rows)]
        say(console, ", ".join(f"{letter} = {header}" for letter, header in zip(letters, headers, strict=True)))
    grid = Table.grid(padding=(0, 4))
    grid.add_row(*panels)
    console.print(grid)
    for role, cell in shown.outside.items():
        say(console, f"{role}: {_cell(cell)} bits")
    if any(not cell for _, cells in rows for cell in cells):
        say(console, f"{NOTHING} holds no quantized matrix")


def _panels(console: Console, headers: Sequence[str], rows: Sequence[Any]) -> list[RenderableType] | None:
    """The map in as many pieces beside each other as help; None when even one is too wide."""
    boundless = console.options.update(width=10**6)  # in its own options rich never measures more than the terminal
    width = Measurement.get(console, boundless, _map_table(headers, rows)).maximum
    if width > console.width:
        return None
    num_panels = min(ceil(len(rows) / MAX_MAP_ROWS), (console.width + 4) // (width + 4))
    num_rows = ceil(len(rows) / max(1, num_panels))
    return [_map_table(headers, rows[first : first + num_rows]) for first in range(0, len(rows), num_rows)]


def _map_table(headers: Sequence[str], rows: Sequence[Any]) -> Table:
    table = columns("block", *headers, right=range(len(headers) + 1), no_wrap=True)
    for label, cells in rows:
        table.add_row(label, *(_cell(cell) for cell in cells))
    return table


def _cell(widths: frozenset[float]) -> Text:
    shown = [Text(bits_text(bits), style=WIDTH_STYLES[narrower_width(bits)]) for bits in sorted(widths)]
    text = Text("/").join(shown)
    return text if widths else Text(NOTHING, style="dim")


def _plan_rows(plan: Row, linears: Sequence[Row]) -> dict[str, str | None]:
    """The lines that a plan, a result and a folder have in common."""
    groups = sorted({linear["group_size"] for linear in linears})
    kinds = sorted({"symmetric" if linear["symmetric"] else "asymmetric" for linear in linears})
    scales = " and ".join(sorted({linear.get("scale_dtype", "float16") for linear in linears}))
    return {
        "Asked for": asked_for(plan["budget"]),
        "True bits": f"{plan['bits_per_weight']:.3f} per weight, scales and zeros included",
        "Code bits": f"{plan['code_bits_per_weight']:.3f} per weight, codes alone",
        "Widths": _shares(linears, separator=", "),
        "Groups of": f"{', '.join(map(str, groups))} inputs, {' and '.join(kinds)}, {scales} scales",
        "Rotated": "the residual stream, exactly" if plan.get("provenance", {}).get("rotation") else None,
        "Chosen by": None if plan["budget"].get("kind") == "plan" else ", ".join(_choice(plan)),
    }


def _part_rows(total_nbytes: int | None, parts: Mapping[str, int]) -> dict[str, str]:
    """What a budget of a total goes to, a line for each part."""
    if total_nbytes is None:
        return {}
    sizes = [size(nbytes) for nbytes in [total_nbytes, *parts.values()]]
    width = max(map(len, sizes))
    lines = [f"{shown:>{width}}  {what}" for shown, what in zip(sizes, ["asked for", *parts], strict=True)]
    left = total_nbytes - sum(parts.values())
    lines.append(f"{size(left):>{width}}  left" if left >= 0 else f"{size(-left):>{width}}  too much")
    return {"Goes to": "\n".join(lines)}


def _choice(plan: Row) -> Iterator[str]:
    yield plan["method"]
    if plan["predicted_loss"] is not None:
        yield f"predicted loss {_figure(plan['predicted_loss'])}"
    if plan.get("measured_kl") is not None:
        yield f"measured KL {_figure(plan['measured_kl'])} on the probe"
    if plan["optimality_gap"] is not None:
        yield f"at most {_gap(plan['optimality_gap'])} from the best"


def _shares(linears: Iterable[Row], *, separator: str) -> str:
    """What part of the weights has each width."""
    weights: dict[int, float] = defaultdict(float)
    for linear in linears:
        for bits, share in width_shares(linear):
            weights[bits] += share * linear["shape"][0] * linear["shape"][1]
    total = sum(weights.values())
    return separator.join(f"{bits} bits {100 * count / total:.0f} %" for bits, count in sorted(weights.items()))


def _needed(wanted: int | None, free: int | None) -> str | None:
    if wanted is None:
        return None
    return f"about {decimal(wanted)} needed" + ("" if free is None else f", {decimal(free)} free")


def _figure(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.4g}"


def _gap(value: float | None) -> str:
    return NOTHING if value is None else f"{100 * value:.2g} %"


def _examples(names: Sequence[str]) -> str:
    more = len(names) - MAX_EXAMPLES
    return ", ".join(names[:MAX_EXAMPLES]) + (f" and {more} more" if more > 0 else "")
