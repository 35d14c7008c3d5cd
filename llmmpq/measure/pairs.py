"""The KL of every two candidates together, one forward for each pair: CLADO as published, an oracle for small models.

    Q_ii = KL_i,      Q_ij = (KL_ij - KL_i - KL_j) / 2      so that      x'Qx = sum of KL_i + sum of pair terms

(Deng et al., "Mixed-Precision Quantization with Cross-Layer Dependencies", arXiv 2307.05657). Two options of one linear
are never chosen together; their entries are zero, as in the authors' code. Nothing makes the measured Q positive
semidefinite, which the solver needs: negative eigenvalues are set to zero, as published. That changes the predictions,
those of single candidates included, and the report says by how much.

`perturb.py` gets the second-order part of the same terms from one forward per candidate; this module is what to hold it
against. All blocks and all candidates stay in memory. A pair starts from the states that its first candidate alone
gives at the block of the second, so only what lies behind is run again:

    block passes = sum over first candidates of (L - l)  +  sum over pairs of (L - m)

with L blocks, the first candidate in block l and the second in block m >= l.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from llmmpq.measure.perturb import CHUNK_NUM_LOGITS, NON_FINITE_KL, centred_change, kl_of_change
from llmmpq.model.around import Around
from llmmpq.model.stream import Block
from llmmpq.records import LinearSpec

# About a day at a second for each; 12 blocks of 7 linears with 4 options stay below it.
MAX_NUM_PAIRS = 2**16
# Of states that have left the last block and wait for the head: loading it once must serve many candidates.
WAITING_NBYTES = 2**28


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """One linear in all of its options. `first_row` is the place of the first option among all candidates."""

    spec: LinearSpec
    first_row: int
    weights: tuple[torch.Tensor, ...]

    @property
    def rows(self) -> range:
        return range(self.first_row, self.first_row + len(self.weights))


class LoadedModel:
    """All blocks with their original weights, every candidate, and the probe's states on the way into each block."""

    def __init__(
        self,
        blocks: Sequence[Block],
        candidates: Sequence[Candidates],
        around: Callable[[], AbstractContextManager[Around]],
        probe_WT: torch.Tensor,
        *,
        tokens_per_forward: int,
        on_pass: Callable[[int], None],
    ) -> None:
        self.blocks, self.candidates = blocks, candidates
        self.num_rows = sum(len(one.weights) for one in candidates)
        self._around, self._probe_WT, self._on_pass = around, probe_WT, on_pass
        self._step = max(1, tokens_per_forward // probe_WT.shape[1])
        self.num_excluded = 0
        with around() as whole, torch.no_grad():
            entering = [whole.embed(window[None]) for window in probe_WT]
        dtype = next(blocks[0].module.parameters()).dtype
        self._entering = [torch.cat(entering).to(dtype)[None]]  # into each block, and out of the last; [1, W, T, D]
        for block in blocks:
            self._entering.append(self._through(block, self._entering[-1]))

    def pairs_of(self, position: int) -> tuple[torch.Tensor, torch.Tensor]:
        """KL of each option of one linear alone [O], and with every candidate of the linears behind it [O, rows].

        The other columns are zero.
        """
        first = self.candidates[position]
        home = first.spec.block
        labels: list[tuple[int, int | None]] = []  # (option, other row) of the states below, in their order
        states: list[torch.Tensor] = []
        found_O = torch.zeros(len(first.weights), dtype=torch.float64)
        found_OC = torch.zeros(len(first.weights), self.num_rows, dtype=torch.float64)

        def settle(*, everything: bool) -> None:
            waiting = sum(state.nbytes for state in states)
            if not states or (waiting < WAITING_NBYTES and not everything):
                return
            for (option, other), kl in zip(labels, self._kl(torch.cat(states)).tolist(), strict=True):
                if other is None:
                    found_O[option] = kl
                else:
                    found_OC[option, other] = kl
            labels.clear()
            states.clear()

        options = range(len(first.weights))
        base = self._entering[home]
        block = self.blocks[home]
        for other, weight, row in self._behind(position, home):
            outputs = []
            for mine in first.weights:
                with _swapped(block, first.spec, mine), _swapped(block, other, weight):
                    outputs.append(self._through(block, base))
            states.append(self._to_the_end(home + 1, torch.cat(outputs)))
            labels += [(option, row) for option in options]
            settle(everything=False)
        outputs = []
        for mine in first.weights:
            with _swapped(block, first.spec, mine):
                outputs.append(self._through(block, base))
        ahead = torch.cat(outputs)  # what each option alone gives at the next block; [O, W, T, D]
        for index in range(home + 1, len(self.blocks)):
            block = self.blocks[index]
            for other, weight, row in self._behind(position, index):
                with _swapped(block, other, weight):
                    changed = self._through(block, ahead)
                states.append(self._to_the_end(index + 1, changed))
                labels += [(option, row) for option in options]
                settle(everything=False)
            ahead = self._through(block, ahead)
        states.append(ahead)
        labels += [(option, None) for option in options]
        settle(everything=True)
        return found_O, found_OC

    def passes_of(self, position: int) -> int:
        """What `pairs_of` takes, in passes of the probe through one block."""
        first, num_blocks = self.candidates[position], len(self.blocks)
        behind = sum(len(one.weights) * (num_blocks - one.spec.block) for one in self.candidates[position + 1 :])
        return len(first.weights) * (num_blocks - first.spec.block + behind)

    def _behind(self, position: int, index: int) -> Iterator[tuple[LinearSpec, torch.Tensor, int]]:
        """Candidates of one block that come after a linear."""
        for other in self.candidates[position + 1 :]:
            if other.spec.block == index:
                for weight, row in zip(other.weights, other.rows, strict=True):
                    yield other.spec, weight, row

    def _to_the_end(self, index: int, states: torch.Tensor) -> torch.Tensor:
        for block in self.blocks[index:]:
            states = self._through(block, states)
        return states

    def _through(self, block: Block, states: torch.Tensor) -> torch.Tensor:
        """States [N, W, T, D] through a block with the weights that it has now."""
        flat = states.flatten(0, 1)
        output = torch.cat([block.run_many(part) for part in flat.split(self._step)]).view_as(states)
        self._on_pass(len(states))
        return output

    @torch.no_grad()
    def _kl(self, states_NWTD: torch.Tensor) -> torch.Tensor:
        """KL of each row of final states against the original, mean over the probe's tokens."""
        total_N = torch.zeros(len(states_NWTD), dtype=torch.float64)
        num_tokens = 0
        with self._around() as around:
            around.embed(self._probe_WT[:1])
            for window, base in enumerate(self._entering[-1][0]):
                vocabulary = around.logits(base[None, :1]).shape[-1]
                step = max(1, CHUNK_NUM_LOGITS // ((len(states_NWTD) + 1) * vocabulary))
                for start in range(0, len(base), step):
                    tokens = slice(start, start + step)
                    base_TV = around.logits(base[None, tokens])[0].float()
                    known_T = torch.isfinite(base_TV).all(-1)
                    base_TV = base_TV[known_T]
                    logits_NTV = around.logits(states_NWTD[:, window, tokens]).float()[:, known_T]
                    p_TV = base_TV.softmax(-1)
                    kl_NT = kl_of_change(centred_change(logits_NTV.sub_(base_TV), p_TV), p_TV)
                    total_N += kl_NT.double().sum(-1).cpu()
                    num_tokens += len(base_TV)
        self.num_excluded = self._probe_WT.numel() - num_tokens
        return torch.nan_to_num(total_N / max(num_tokens, 1), nan=NON_FINITE_KL, posinf=NON_FINITE_KL)


@contextmanager
def _swapped(block: Block, spec: LinearSpec, weight: torch.Tensor) -> Iterator[None]:
    linear = block.linear(spec)
    original, linear.weight.data = linear.weight.data, weight
    try:
        yield
    finally:
        linear.weight.data = original


def to_gram(kl_C: np.ndarray, kl_CC: np.ndarray, linear_of_C: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Q from single and pair KL, with negative eigenvalues clipped; and what there is to say about that.

    A candidate that breaks the model alone pairs with nothing. A pair that breaks it counts as if both errors pointed
    the same way.
    """
    broken_C = kl_C >= NON_FINITE_KL
    paired_CC = (linear_of_C[:, None] != linear_of_C[None, :]) & ~(broken_C[:, None] | broken_C[None, :])
    half = (kl_CC - kl_C[:, None] - kl_C[None, :]) / 2
    half = np.where(kl_CC >= NON_FINITE_KL, np.sqrt(kl_C[:, None] * kl_C[None, :]), half)
    gram = np.where(paired_CC, half, 0.0) + np.diag(kl_C)
    known = np.flatnonzero(~broken_C)
    values, vectors = np.linalg.eigh(gram[np.ix_(known, known)])
    negative = values < 0
    if not negative.any():
        return gram, []
    clipped = (vectors * values.clip(min=0)) @ vectors.T
    before = np.diagonal(gram)[known]
    raised = float(np.median((np.diagonal(clipped) - before) / np.maximum(before, np.finfo(float).tiny)))
    gram[np.ix_(known, known)] = (clipped + clipped.T) / 2
    share = -values[negative].sum() / np.abs(values).sum()
    return gram, [
        f"the measured pairs are not positive semidefinite: {negative.sum()} of {len(values)} eigenvalues, "
        f"{100 * share:.2g} % of their absolute sum, were negative and set to zero; the KL of a single option is "
        f"counted {100 * raised:.2g} % higher for it (median)"
    ]


def count_pairs(options_per_linear: Sequence[Sequence[int]]) -> int:
    """Candidates of different linears, two at a time. `options_per_linear`: for each block, of each of its linears."""
    flat = [num for block in options_per_linear for num in block]
    return (sum(flat) ** 2 - sum(num**2 for num in flat)) // 2


def count_passes(options_per_linear: Sequence[Sequence[int]]) -> int:
    """Passes of the whole probe through one block."""
    num_blocks = total = len(options_per_linear)  # the original's own
    earlier = 0
    for index, block in enumerate(options_per_linear):
        for num in block:
            total += (num + num * earlier) * (num_blocks - index)
            earlier += num
    return total
