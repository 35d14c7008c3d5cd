"""All candidates ride one streaming pass: what each does to the model's output, and every pair of them together.

A candidate is one linear stored in one of its options. At its block it replaces the linear's weight for one forward
of the probe; the resulting states then travel through the following unperturbed blocks in a batch with those of all
other candidates, and meet final norm and head at the end. With z the logits of the unperturbed model (the base), p the
original model's probabilities and dz a candidate's change of the logits, let

    u = sqrt(p) * (dz - E_p[dz])        so that        KL(p || p_changed) = 1/2 |u|^2 + higher orders.

Summed over the N probe tokens, with changes of several linears adding up to first order,

    KL(x) ~ x' Q x,     Q_ij = 1/(2 N) sum of <u_i, u_j>

is positive semidefinite by construction and holds all pairs at the cost of one forward per candidate. When the base is
not the original model but a plan (re-linearising), u0 is the base's own change against the original and

    KL(x) ~ constant + linear'x + x' Q x,   constant = |u0|^2 / 2 N,   linear_i = <u0, u_i> / N

with u_i now the change against the base: the base's row rides in the same product. Exact KL figures of each single
candidate against the original come from the same logits.

Products of a chunk of tokens are formed in float32 and added up in float64: a chunk's error is below 1e-6 of the
product of norms, and does not grow with the number of tokens. Pieces of the probe go by turns to two halves, summed
apart: what these agree on is more than chance (`reliability`). Forming the Fisher matrix W'FW of the head once per
token instead of u was rejected: it costs vocabulary x hidden^2 per token, more than the products for large models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch

from llmmpq.measure.states import StateStore
from llmmpq.model.around import Around
from llmmpq.model.stream import Block
from llmmpq.ranks import ALONE, Ranks
from llmmpq.records import LinearSpec

# The KL of a candidate that turns finite logits into NaN or inf: far above any real one, yet a number.
NON_FINITE_KL = 1e6
CHUNK_NUM_LOGITS = 2**24  # of all candidates together at a time: 64 MB in float32, and a few copies
# Tokens that go to one half together. Neighbours agree because they are of one text, which another probe is not: pieces
# of 64 tokens said 0.05 to 0.1 more of the demo's products was signal than windows of 256 did.
PIECE = 256
ROW_BLOCK = 256  # rows of Q formed at a time: only blocks on and below the diagonal are computed


@dataclass(frozen=True, kw_only=True)
class Perturbations:
    """The quadratic model of the probe's KL, over all candidates in the order in which they joined."""

    gram_CC: np.ndarray
    half_CC: np.ndarray | None  # the same from the first half of the pieces alone, where there are two halves
    half_share: float  # of the tokens that they hold
    linear_C: np.ndarray
    constant: float
    kl_C: np.ndarray  # exact, of each candidate alone (on top of the base), against the original
    base_kl: float  # exact, of the base against the original
    rounding_kl: float | None  # exact, of the original computed in bfloat16: what no measurement can resolve
    num_tokens: int
    num_forwards: float  # passes of the whole probe through one block
    num_excluded: int  # tokens at which the base or the original is not finite


class Ride:
    """Carries the probe's states from block to block: the base's, the original's, and those of every candidate.

    `entering` holds the probe's embedded windows, one sequence each. The original is followed apart only where the
    base is something else.
    """

    def __init__(
        self,
        store: StateStore,
        entering: list[torch.Tensor],
        *,
        tokens_per_forward: int,
        base_is_original: bool,
        with_rounding: bool = False,
    ) -> None:
        self.store = store
        self.tokens_per_forward = tokens_per_forward
        self.num_rows = 0
        self.num_forwards = 0.0
        self._heads: _Heads | None = None
        self._base = list(entering)
        self._original = None if base_is_original else list(entering)
        self._rounded = list(entering) if with_rounding else None

    @torch.no_grad()
    def through(
        self,
        block: Block,
        candidates: Iterable[tuple[LinearSpec, torch.Tensor]],
        *,
        on_forward: Callable[[int], None],
    ) -> None:
        """Move everything through one block, whose weights are the base's; its own candidates join."""
        num_windows, earlier = len(self._base), self.num_rows
        for window, base in enumerate(self._base):
            step = max(1, self.tokens_per_forward // base.shape[1])
            for start in range(0, earlier, step):
                rows = slice(start, min(start + step, earlier))
                self.store.write(window, rows, block.run_many(self.store.read(window, rows)))
                self._count((rows.stop - start) / num_windows, on_forward)
        for spec, weight in candidates:
            linear = block.linear(spec)
            base_weight = linear.weight.data
            linear.weight.data = weight
            row = slice(self.num_rows, self.num_rows + 1)
            for window, output in enumerate(self._forward(block, self._base)):
                self.store.write(window, row, output)
            linear.weight.data = base_weight
            self.num_rows += 1
            self._count(1, on_forward)
        self._base = list(self._forward(block, self._base))
        self._count(1, on_forward)
        if self._original is not None:
            with block.with_original_weights():
                self._original = list(self._forward(block, self._original))
            self._count(1, on_forward)
        if self._rounded is not None:
            with block.with_original_weights():
                self._rounded = [block.run_rounded(state, torch.bfloat16) for state in self._rounded]
            self._count(1, on_forward)

    def through_head(self, block: Block, candidates: Iterable[tuple[LinearSpec, torch.Tensor]]) -> None:
        """The output head's own candidates join; they have no states, their weights wait for the end."""
        (spec,) = block.linears
        self._heads = _Heads(
            name=spec.name,
            base=block.linear(spec).weight.data,
            original=block.original_weights[spec.name],
            candidates=[weight for _, weight in candidates],
        )

    @property
    def num_windows(self) -> int:
        return len(self._base)

    def window_state(self, window: int) -> dict[str, torch.Tensor]:
        """What `restore` needs of one window to go on from the last block."""
        held = {"base": self._base[window]}
        if self._original is not None:
            held["original"] = self._original[window]
        if self._rounded is not None:
            held["rounded"] = self._rounded[window]
        if self.num_rows:
            held["rows"] = self.store.read(window, slice(0, self.num_rows))
        return {name: tensor.cpu().contiguous() for name, tensor in held.items()}

    def restore(self, window: int, held: Mapping[str, torch.Tensor]) -> None:
        device = self._base[window].device
        self._base[window] = held["base"].to(device)
        if self._original is not None:
            self._original[window] = held["original"].to(device)
        if self._rounded is not None:
            self._rounded[window] = held["rounded"].to(device)
        if "rows" in held:
            self.store.write(window, slice(0, len(held["rows"])), held["rows"].to(device))

    def _forward(self, block: Block, states: list[torch.Tensor]) -> Iterator[torch.Tensor]:
        """One forward for as many windows as it may hold."""
        step = max(1, self.tokens_per_forward // states[0].shape[1])
        for start in range(0, len(states), step):
            yield from block.run_many(torch.cat(states[start : start + step])).split(1)

    def _count(self, num: float, on_forward: Callable[[int], None]) -> None:
        before = int(self.num_forwards + 1e-6)
        self.num_forwards += num
        on_forward(int(self.num_forwards + 1e-6) - before)

    @torch.no_grad()
    def perturbations(self, around: Around, *, on_tokens: Callable[[int], None], ranks: Ranks = ALONE) -> Perturbations:
        """Norm, head and products, one chunk of tokens at a time; summed over processes, each with its windows."""
        heads = self._heads
        num_rows = self.num_rows + (0 if heads is None else len(heads.candidates))
        total = _Sums(num_rows)
        if heads is not None:
            around.logits(self._base[0][:, :1])  # reads the head, whose weights change places from here on
            heads.put(around, heads.base)
        for window, base in enumerate(self._base):
            num_tokens = base.shape[1]
            step = max(1, CHUNK_NUM_LOGITS // ((num_rows + 2) * _vocabulary(around)))
            for tokens, piece in _chunks(num_tokens, step):
                base_TV = around.logits(base[:, tokens])[0].float()
                original_TV = base_TV
                if self._original is not None:
                    with nullcontext() if heads is None else heads.with_original(around):
                        original_TV = around.logits(self._original[window][:, tokens])[0].float()
                rounded_TV = None
                if self._rounded is not None:
                    rounded_TV = around.logits(self._rounded[window][:, tokens].to(base.dtype))[0].float()
                logits_CTV = base_TV.new_empty((0, *base_TV.shape))
                if self.num_rows:
                    logits_CTV = around.logits(self.store.read(window, slice(0, self.num_rows), tokens)).float()
                if heads is not None:
                    logits_CTV = torch.cat([logits_CTV, *heads.logits(around, base[:, tokens])])
                half = (ranks.rank + ranks.num * window + piece) % 2  # by the window's place among all windows
                total.add(logits_CTV, base_TV, original_TV, rounded_TV, half=half)
                on_tokens(tokens.stop - tokens.start)
        total.sum_over(ranks)
        return total.result(self.num_forwards)


@dataclass(frozen=True, kw_only=True)
class _Heads:
    """The output head's weights: the base's, the original's, and those of its candidates."""

    name: str
    base: torch.Tensor
    original: torch.Tensor
    candidates: list[torch.Tensor]

    def put(self, around: Around, weight: torch.Tensor) -> None:
        around.skeleton.model.get_submodule(self.name).weight.data = weight

    @contextmanager
    def with_original(self, around: Around) -> Iterator[None]:
        self.put(around, self.original)
        try:
            yield
        finally:
            self.put(around, self.base)

    def logits(self, around: Around, states_BTD: torch.Tensor) -> Iterator[torch.Tensor]:
        for weight in self.candidates:
            self.put(around, weight)
            yield around.logits(states_BTD).float()
        self.put(around, self.base)


class _Sums:
    """Q, the linear term, and the exact KL figures, summed over tokens in float64."""

    def __init__(self, num_rows: int) -> None:
        # Of each half; row 0 is the base against the original, row i + 1 candidate i against the base.
        self.grams = torch.zeros(2, num_rows + 1, num_rows + 1, dtype=torch.float64)
        self.half_tokens = [0, 0]
        self.kl = torch.zeros(num_rows + 1, dtype=torch.float64)
        self.rounding_kl: float | None = None
        self.broken = torch.zeros(num_rows, dtype=torch.bool)
        self.num_excluded = 0

    @property
    def num_tokens(self) -> int:
        return sum(self.half_tokens)

    def add(
        self,
        logits_CTV: torch.Tensor,
        base_TV: torch.Tensor,
        original_TV: torch.Tensor,
        rounded_TV: torch.Tensor | None,
        *,
        half: int = 0,
    ) -> None:
        known_T = torch.isfinite(base_TV).all(-1) & torch.isfinite(original_TV).all(-1)
        if not bool(known_T.all()):
            self.num_excluded += int((~known_T).sum())
            logits_CTV, base_TV, original_TV = logits_CTV[:, known_T], base_TV[known_T], original_TV[known_T]
            rounded_TV = None if rounded_TV is None else rounded_TV[known_T]
        p_TV = original_TV.softmax(-1)
        base_change_TV = centred_change(base_TV - original_TV, p_TV)
        if rounded_TV is not None:
            change_TV = centred_change(rounded_TV - original_TV, p_TV)
            self.rounding_kl = (self.rounding_kl or 0.0) + float(kl_of_change(change_TV, p_TV).double().sum())
        # In place from here: the logits become the changes and then the rows u. Every pass over them counts.
        change_CTV = logits_CTV.sub_(base_TV)
        mean_CT = _mean(change_CTV, p_TV)
        broken_C = ~torch.isfinite(mean_CT.sum(1))
        if bool(broken_C.any()):
            self.broken |= broken_C.cpu()
            change_CTV[broken_C], mean_CT[broken_C] = 0.0, 0.0
        change_CTV.sub_(mean_CT[..., None])
        moved = bool(base_change_TV.any())
        kl_C = kl_of_change(change_CTV + base_change_TV if moved else change_CTV, p_TV).double().sum(-1)
        self.kl[1:] += kl_C.cpu()
        self.kl[0] += float(kl_of_change(base_change_TV, p_TV).double().sum())
        root_TV = p_TV.sqrt()
        rows, base_row = change_CTV.mul_(root_TV).flatten(1), base_change_TV.mul_(root_TV).flatten()
        gram = self.grams[half]
        gram[0, 0] += (base_row @ base_row).double().cpu()
        gram[1:, 0] += (rows @ base_row).double().cpu()
        for start in range(0, len(rows), ROW_BLOCK):
            part = rows[start : start + ROW_BLOCK]
            end = start + len(part)
            gram[start + 1 : end + 1, 1 : end + 1] += (part @ rows[:end].t()).double().cpu()
        self.half_tokens[half] += len(p_TV)

    def sum_over(self, ranks: Ranks) -> None:
        if ranks.num == 1:
            return
        broken = self.broken.double()
        ranks.sum_(self.grams, self.kl, broken)
        self.broken = broken > 0
        rounding_kl, first, second, num_excluded = ranks.sum_numbers(
            self.rounding_kl or 0.0, *self.half_tokens, self.num_excluded
        )
        self.rounding_kl = None if self.rounding_kl is None else rounding_kl
        self.half_tokens, self.num_excluded = [int(first), int(second)], int(num_excluded)

    def result(self, num_forwards: float) -> Perturbations:
        num = max(self.num_tokens, 1)
        half = None
        if min(self.half_tokens) > 0:
            half = (_symmetric(self.grams[0]) / (2 * self.half_tokens[0]))[1:, 1:].numpy()
        gram = _symmetric(self.grams[0] + self.grams[1]) / (2 * num)
        kl = self.kl / num
        for index in self.broken.nonzero().flatten().tolist():
            gram[index + 1, index + 1] = NON_FINITE_KL
            kl[index + 1] = NON_FINITE_KL
        return Perturbations(
            gram_CC=gram[1:, 1:].numpy().copy(),
            half_CC=half,
            half_share=self.half_tokens[0] / num,
            linear_C=2 * gram[0, 1:].numpy(),
            constant=float(gram[0, 0]),
            kl_C=kl[1:].numpy().copy(),
            base_kl=float(kl[0]),
            rounding_kl=None if self.rounding_kl is None else self.rounding_kl / num,
            num_tokens=self.num_tokens,
            num_forwards=num_forwards,
            num_excluded=self.num_excluded,
        )


def _chunks(num_tokens: int, step: int) -> Iterator[tuple[slice, int]]:
    """At most `step` tokens at a time, none across two pieces; and the number of the piece within the window."""
    for piece, first in enumerate(range(0, num_tokens, PIECE)):
        last = min(first + PIECE, num_tokens)
        for start in range(first, last, step):
            yield slice(start, min(start + step, last)), piece


def _symmetric(lower: torch.Tensor) -> torch.Tensor:
    return lower.tril() + lower.tril(-1).t()


def _mean(change: torch.Tensor, p_TV: torch.Tensor) -> torch.Tensor:
    return torch.einsum("...tv,tv->...t", change, p_TV)


def centred_change(change: torch.Tensor, p_TV: torch.Tensor) -> torch.Tensor:
    return change - _mean(change, p_TV)[..., None]


def kl_of_change(change: torch.Tensor, p_TV: torch.Tensor) -> torch.Tensor:
    """KL(p || p') where the logits of p' differ by `change`, whose mean under p is zero.

    It is log E_p[exp(change)]; written with expm1, so that small changes do not drown in the 1.
    """
    kl = torch.log1p(_mean(torch.expm1(change), p_TV))
    # Beyond the range of exp: by way of the largest exponent.
    far = ~torch.isfinite(kl)
    if bool(far.any()):
        log_p = p_TV.log()
        kl = torch.where(far, torch.logsumexp(change + log_p, -1), kl)
    return kl.clamp_min(0.0)


def _vocabulary(around: Around) -> int:
    return int(around.skeleton.model.config.get_text_config().vocab_size)


def expected_forwards(candidates_per_block: list[int], *, extra: int) -> int:
    """Passes of the probe through one block: every candidate from its own block on, `extra` trajectories throughout."""
    num_blocks = len(candidates_per_block)
    return sum(num * (num_blocks - index) for index, num in enumerate(candidates_per_block)) + extra * num_blocks
