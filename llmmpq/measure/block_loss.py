"""Additive sensitivities: what each option of each linear does to the output of its block.

In: a loaded block with its original weights. Out: for every linear and option the mean over probe tokens of

    |h_quantized - h|^2 / |h|^2        (h: the block's output for that token)

with this one matrix replaced. The norm of the token itself is the measure because the next norm layer divides by
it; it also keeps the few tokens with massive activations from drowning the rest. Whole-model terms, and how errors
of several layers combine, are the business of the cross-layer measurement.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch

from llmmpq.measure.candidates import MeasureSettings, candidates_of
from llmmpq.model.stream import Block
from llmmpq.quantize.linear import dequantized
from llmmpq.records import Scheme

__all__ = ["MeasureSettings", "measure_block"]

# The loss of an option that turns finite outputs into NaN or inf: far above any real one, yet a number.
NON_FINITE_LOSS = 1e6


def measure_block(
    block: Block,
    options: Mapping[str, Sequence[Scheme]],
    settings: MeasureSettings,
    *,
    on_candidate: Callable[[], None],
) -> tuple[dict[str, list[float]], list[str]]:
    """Losses by linear in the order of its options, and warnings."""
    warnings: list[str] = []
    losses = {spec.name: [0.0] * len(options[spec.name]) for spec in block.linears}
    num_batches = _num_probe_batches(block, settings.num_probe_tokens)
    reference: list[torch.Tensor] = []

    def keep(position: int, output: torch.Tensor) -> None:
        if position < num_batches:
            reference.append(output)

    for spec, position, packed in candidates_of(block, options, settings, warnings=warnings, on_output=keep):
        linear = block.linear(spec)
        original = linear.weight.data
        linear.weight.data = dequantized(packed, original.dtype)
        losses[spec.name][position] = _relative_error(block, reference)
        linear.weight.data = original
        on_candidate()
    return losses, warnings


def _num_probe_batches(block: Block, num_tokens: int) -> int:
    """Of this process's share of the probe windows."""
    window = block.states[0].shape[1]
    num_tokens = window * block.ranks.num_shared(math.ceil(num_tokens / window))
    if num_tokens == 0:
        return 0
    seen = 0
    for position, state in enumerate(block.states):
        seen += state.shape[0] * state.shape[1]
        if seen >= num_tokens:
            return position + 1
    return len(block.states)


def _relative_error(block: Block, reference: list[torch.Tensor]) -> float:
    total, count, num_broken = 0.0, 0.0, 0.0
    for expected, output in zip(reference, block.run(block.states[: len(reference)]), strict=True):
        expected = expected.float()
        change = (output.float() - expected).square().sum(-1)
        ratio = change / expected.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
        known = torch.isfinite(expected).all(-1)
        finite = torch.isfinite(ratio) & known
        total += float(ratio[finite].double().sum())
        count += int(finite.sum())
        num_broken += int((known & ~finite).sum())
    total, count, num_broken = block.ranks.sum_numbers(total, count, num_broken)
    if num_broken:
        return NON_FINITE_LOSS
    return total / max(count, 1)
