"""What the command line shows of speed and of what runs where: the tables of `bench` and `inspect --runtime`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmmpq.tables import NOTHING, size

Row = Mapping[str, Any]


def show_bench(console: Console, result: Row) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for header in ("model", "dtype", "batch", "first token", "read", "write", "weights", "of a copy"):
        table.add_column(header, justify="left" if header in ("model", "dtype") else "right")
    for row in result["rows"]:
        table.add_row(
            row["kind"],
            row["dtype"],
            str(row["batch"]),
            f"{1000 * row['first_token_s']:,.1f} ms",
            f"{row['prefill_tokens_per_s']:,.0f} t/s",
            f"{row['decode_tokens_per_s']:,.1f} t/s",
            size(row["weights_nbytes"]),
            f"{row['bandwidth_share']:.0%}",
        )
    console.print(table)
    where = result["device"] if result["device"] != "cpu" else f"a CPU, {result['threads']} threads"
    _say(
        console,
        f"{result['model']} on {where}, torch {result['torch']}: prompts of {result['prompt']} tokens, {result['new']} "
        f"written; a copy moves {result['copy_bandwidth'] / 1e9:,.1f} GB/s.",
    )
    times = _times_faster(result["rows"])
    if times:
        _say(console, f"Quantized writes {times} as fast.")
    for note in result["notes"]:
        _say(console, f"note: {note}")


def _times_faster(rows: list[Row]) -> str:
    rates = {(row["kind"], row["batch"]): row["decode_tokens_per_s"] for row in rows}
    pairs = [
        f"{rate / rates['dequantized', batch]:.2f} times (batch {batch})"
        for (kind, batch), rate in rates.items()
        if kind == "quantized" and ("dequantized", batch) in rates
    ]
    return ", ".join(pairs)


def show_runtime(console: Console, runtime: Row) -> None:
    """One row for each choice that was made; the matrices it was made for are counted, and the first is named."""
    groups: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    for linear in runtime["linears"]:
        for rows, candidates in linear["candidates"].items():
            chosen = next((c["backend"] for c in candidates if c["accepted"]), NOTHING)
            why = tuple((c["backend"], c["accepted"], c["reason"]) for c in candidates)
            groups[rows, chosen, why].append(linear["name"])
    _say(console, f"Computed on {runtime['device']} in {runtime['dtype']}:")
    for (rows, chosen, why), names in groups.items():
        what = "matrix" if len(names) == 1 else "matrices"
        _say(console, f"{rows} row{'s' if int(rows) > 1 else ''}: {chosen} for {len(names)} {what}, such as {names[0]}")
        for backend, accepted, reason in why:
            sign = "runs" if backend == chosen else "could run" if accepted else "cannot"
            _say(console, f"    {backend}: {sign}: {reason}")
    shared: dict[tuple[Any, ...], list[list[str]]] = defaultdict(list)
    for one in runtime["together"]:
        for rows, found in one["rows"].items():
            shared[rows, found["accepted"], found["reason"]].append(one["names"])
    for (rows, accepted, reason), sets in shared.items():
        what = f"{len(sets)} set{'s' if len(sets) > 1 else ''} of one input, such as {' + '.join(sets[0])}"
        launched = "one launch" if accepted else "a launch each"
        _say(console, f"{rows} row{'s' if int(rows) > 1 else ''}: {launched} for {what}: {reason}")


def _say(console: Console, sentence: str) -> None:
    console.print(Text(sentence), soft_wrap=True)
