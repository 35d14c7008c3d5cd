"""What the command line shows of speed and of what runs where: the tables of `bench` and `inspect --runtime`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from rich.console import Console

from llmmpq.pieces import NOTHING, columns, say, size

Row = Mapping[str, Any]


def show_bench(console: Console, result: Row) -> None:
    table = columns(
        "model", "dtype", "batch", "first token", "read", "write", "weights", "of a copy", right=range(2, 8)
    )
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
    say(
        console,
        f"{result['model']} on {where}, torch {result['torch']}: prompts of {result['prompt']} tokens, {result['new']} "
        f"written; a copy moves {result['copy_bandwidth'] / 1e9:,.1f} GB/s.",
    )
    times = _times_faster(result["rows"])
    if times:
        say(console, f"Quantized writes {times} as fast.")
    for note in result["notes"]:
        say(console, f"note: {note}")


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
    say(console, f"Computed on {runtime['device']} in {runtime['dtype']}:")
    for (rows, chosen, why), names in groups.items():
        what = "matrix" if len(names) == 1 else "matrices"
        say(console, f"{rows} row{'s' if int(rows) > 1 else ''}: {chosen} for {len(names)} {what}, such as {names[0]}")
        for backend, accepted, reason in why:
            sign = "runs" if backend == chosen else "could run" if accepted else "cannot"
            say(console, f"    {backend}: {sign}: {reason}")
    shared: dict[tuple[Any, ...], list[list[str]]] = defaultdict(list)
    for one in runtime["together"]:
        for rows, found in one["rows"].items():
            shared[rows, found["accepted"], found["reason"]].append(one["names"])
    for (rows, accepted, reason), sets in shared.items():
        what = f"{len(sets)} set{'s' if len(sets) > 1 else ''} of one input, such as {' + '.join(sets[0])}"
        launched = "one launch" if accepted else "a launch each"
        say(console, f"{rows} row{'s' if int(rows) > 1 else ''}: {launched} for {what}: {reason}")
