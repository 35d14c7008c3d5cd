"""Tune a quantized block on the states that enter it, towards what the original block makes of the original states.

The loss of a batch is the squared difference e of the two outputs, each token's summed and divided by the mean energy
of the original's tokens; or e'Me with a metric M of mean eigenvalue 1, by what the rest of the model makes of e (see
`measure/output_metric.py`). Kept besides the block: one more copy of the states (the original's outputs), and for every
weight its code unrounded, its gradient and the two means of Adam.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from llmmpq.model.stream import Block
from llmmpq.quantize.tune import Rounded, Tuned, TuneSettings, Work, tune_matrices

# In one step, over all processes: at least this many, in whole batches.
TOKENS_PER_STEP = 1024


@dataclass(frozen=True, kw_only=True)
class BlockLoss:
    """How far the block is from the original on one of the batches that can be tuned on."""

    block: Block
    names: Sequence[str]  # of the linears whose weights are given
    dtype: torch.dtype
    positions: Sequence[int]  # among the block's states
    targets: Sequence[torch.Tensor]
    energy: float  # of a token, mean
    metric_DD: torch.Tensor | None

    def __call__(self, weights: Sequence[torch.Tensor], batch: int) -> torch.Tensor:
        state = self.block.states[self.positions[batch]].to(self.block.device)
        with self.block.with_weights({n: w.to(self.dtype) for n, w in zip(self.names, weights, strict=True)}):
            output = self.block.call(state)
        target = self.targets[batch].to(self.block.device)
        error = output.float() - target.float()
        weighed = error if self.metric_DD is None else error @ self.metric_DD
        return (weighed * error).sum() / self.energy


def tune_block(
    block: Block, matrices: Mapping[str, Rounded], *, steps: int, metric_DD: torch.Tensor | None = None
) -> Tuned | None:
    """The block's linears by name, tuned; None when no batch of states can be used."""
    loss = _loss_on(block, list(matrices), metric_DD)
    num_batches, _ = block.ranks.sum_numbers(len(loss.positions), 0)
    if not num_batches:
        return None
    tokens = block.states[0].shape[0] * block.states[0].shape[1]
    settings = TuneSettings(
        steps=steps,
        batches_per_step=max(1, round(TOKENS_PER_STEP / tokens / block.ranks.num)),
        seed=block.index,
    )
    work = Work(loss_of=loss, num_batches=len(loss.positions), sum_=block.ranks.sum_)
    return tune_matrices(list(matrices.values()), work, settings)


def _loss_on(block: Block, names: Sequence[str], metric_DD: torch.Tensor | None) -> BlockLoss:
    """Batches in which an output is NaN or infinite are left out: attention has spread what is wrong in them."""
    originals = block.states if block.original_states is None else block.original_states
    with block.with_original_weights():
        targets = [target.to(state.device) for target, state in zip(block.run(originals), block.states, strict=True)]
    finite = [
        bool(torch.isfinite(target).all()) and bool(torch.isfinite(output).all())
        for target, output in zip(targets, block.run(), strict=True)
    ]
    positions = [position for position, usable in enumerate(finite) if usable]
    targets = [targets[position] for position in positions]
    energy = sum(float(target.double().square().sum()) for target in targets)
    num_tokens = sum(target.shape[0] * target.shape[1] for target in targets)
    all_energy, all_tokens = block.ranks.sum_numbers(energy, num_tokens)
    dtype = block.linear(block.linears[0]).weight.dtype
    return BlockLoss(
        block=block,
        names=names,
        dtype=dtype,
        positions=positions,
        targets=targets,
        energy=all_energy / max(all_tokens, 1) or 1.0,
        metric_DD=metric_DD,
    )
