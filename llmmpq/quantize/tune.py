"""Tune all quantized linears of a block together, so that the block's output comes closer to what it should be.

In: the quantized matrices (codes, grid, and what each code would be if it alone need not be whole) and a loss that
runs the block with given weights on one batch. Out: better codes and scales on the same widths, zeros and groups. With
latent codes L and scale changes a the weight of a matrix is

    (clamp(round(L), 0, 2^b - 1) - z) * stored(s (1 + a))

Rounding to codes and to scales that can be stored is passed straight through by the gradient g of the weight:
dL = g s, da = sum over the group of g (q - z) s. Adam, both rates falling linearly to zero. L begins where the layer's
own error would have each code if all others stayed, within the interval that rounds to the code: what is nearly
undecided turns first. Related: BRECQ (Li et al., 2021), AutoRound (Cheng et al., 2023), EfficientQAT (Chen et al.,
2024).

Codes that overfit are the danger: some batches are held back, and where their loss does not fall, nothing is changed.

Rejected, see docs/log.md: sign gradients, latents that begin at the codes or, after descent, at what GPTQ rounded, and
inputs mixed with those of the unquantized model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from llmmpq.quantize.gptq import Factor
from llmmpq.quantize.grid import Grid

# Legend: N rows (outputs), K columns (inputs), G groups.
# How far Adam could go at 2 bits if all gradients had one sign: in code steps, and in shares of a scale. Figures in
# docs/log.md. Each further bit halves both: less is left to gain, and codes that turn without need cost as much.
CODE_REACH, SCALE_REACH = 0.5, 0.05
MOMENTUM = (0.9, 0.99)
# Gradients have no natural size, and Adam's usual 1e-8 would be large for some.
EPSILON = 1e-20
# How far from its code a latent may begin: short of the edge, so that a first pull does not turn every clipped code.
INSIDE = 0.49
# A scale never shrinks below this share of its start, and so keeps its sign.
SMALLEST_SHARE = 0.25
HELD_BACK = 16  # one batch of so many

# What the block makes of one batch with these weights: a scalar, differentiable in the weights.
Loss = Callable[[Sequence[torch.Tensor], int], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Rounded:
    """A matrix on its grid. `unrounded_NK`: what each code would be if it alone could be any number."""

    codes_NK: torch.Tensor
    unrounded_NK: torch.Tensor
    grid: Grid


def begin_tuning(weight_NK: torch.Tensor, codes_NK: torch.Tensor, grid: Grid, factor: Factor | None) -> Rounded:
    """With r = w - dq and H the damped second moment: q_k + (H r')_k / (H_kk s). Without a factor H is the identity."""
    size, num_columns = grid.scheme.group_size, codes_NK.shape[1]
    scales_NK = grid.scales_NG.repeat_interleave(size, dim=1)[:, :num_columns]
    rest_NK = weight_NK.float() - grid.values(codes_NK)
    if factor is not None:
        curvature_K = factor.moment_KK.diagonal() + factor.ridge_K
        rest_NK = torch.addmm(rest_NK * factor.ridge_K, rest_NK, factor.moment_KK).div_(curvature_K)
    return Rounded(codes_NK=codes_NK, unrounded_NK=rest_NK.div_(scales_NK).add_(codes_NK), grid=grid)


@dataclass(frozen=True, kw_only=True)
class TuneSettings:
    steps: int
    batches_per_step: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """The matrices, unchanged unless `kept`, and the loss on the batches that were held back."""

    matrices: list[Rounded]
    kept: bool
    loss_before: float
    loss_after: float
    changed_codes: list[float]  # share of each matrix, whether kept or not


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is tuned on: batches 0 to num_batches - 1, and how tensors are summed over processes."""

    loss_of: Loss
    num_batches: int
    sum_: Callable[..., None] = lambda *_tensors: None


def tune_matrices(matrices: Sequence[Rounded], work: Work, settings: TuneSettings) -> Tuned:
    generator = torch.Generator().manual_seed(settings.seed)
    order = torch.randperm(work.num_batches, generator=generator).tolist()
    num_held = 0 if work.num_batches < 2 else max(1, work.num_batches // HELD_BACK)
    held, trained = order[:num_held], order[num_held:]
    latents = [Latent(matrix) for matrix in matrices]
    before = _sum_of_losses(latents, work, held)
    draws = _draw(trained, generator)
    # Falling linearly to zero, with sum 1.
    rates = [2 * (settings.steps - step) / (settings.steps * (settings.steps + 1)) for step in range(settings.steps)]
    num_drawn = min(settings.batches_per_step, len(trained))
    for step in range(settings.steps):
        gradients = _gradients(latents, work, [next(draws) for _ in range(num_drawn)])
        work.sum_(*gradients)
        for latent, gradient_NK in zip(latents, gradients, strict=True):
            latent.follow(gradient_NK, step=step, share=rates[step])
        del gradients
    after = _sum_of_losses(latents, work, held)
    found = [latent.rounded() for latent in latents]
    changed = [float((new.codes_NK != old.codes_NK).double().mean()) for new, old in zip(found, matrices, strict=True)]
    kept = after < before or (before == after == 0.0)
    return Tuned(
        matrices=found if kept else list(matrices),
        kept=kept,
        loss_before=before,
        loss_after=after,
        changed_codes=changed,
    )


class Moving:
    """A tensor that Adam moves. Written out: torch.optim brings a compiler's import with it."""

    def __init__(self, start: torch.Tensor, reach: torch.Tensor) -> None:
        self.value, self.reach = start, reach  # reach of each column
        self.mean, self.square = torch.zeros_like(start), torch.zeros_like(start)

    def move(self, gradient: torch.Tensor, *, step: int, share: float) -> None:
        first, second = MOMENTUM
        self.mean.lerp_(gradient, 1 - first)
        self.square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        spread = (self.square / (1 - second ** (step + 1))).sqrt_().add_(EPSILON)
        self.value.addcdiv_(self.mean * self.reach, spread, value=-share / (1 - first ** (step + 1)))


class Latent:
    """One matrix while it is tuned."""

    def __init__(self, matrix: Rounded) -> None:
        grid = matrix.grid
        self.grid, self.size, self.num_columns = grid, grid.scheme.group_size, matrix.codes_NK.shape[1]
        codes_NK = matrix.codes_NK.float()
        tops_G = torch.tensor(grid.largest_codes, dtype=torch.float32, device=codes_NK.device)
        self.tops_K = tops_G.repeat_interleave(self.size)[: self.num_columns]
        self.latents = Moving(
            torch.clamp(matrix.unrounded_NK, codes_NK - INSIDE, codes_NK + INSIDE), CODE_REACH * 4 / (self.tops_K + 1)
        )
        self.changes = Moving(torch.zeros_like(grid.scales_NG), SCALE_REACH * 4 / (tops_G + 1))

    def codes(self) -> torch.Tensor:
        return torch.minimum(self.latents.value.round().clamp_(min=0), self.tops_K)

    def scales(self) -> torch.Tensor:
        return self.grid.stored.round(self.grid.scales_NG * (1 + self.changes.value))

    def weight(self) -> torch.Tensor:
        """In float32, exactly what the packed matrix will stand for."""
        return self.codes().sub_(self._spread(self.grid.zeros_NG)).mul_(self._spread(self.scales()))

    def gradients(self, gradient_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of latents and scale changes, from that of the weight, which is used up."""
        centred_NK = self.codes().sub_(self._spread(self.grid.zeros_NG))
        of_changes_NG = self._sum_groups(centred_NK.mul_(gradient_NK)).mul_(self.grid.scales_NG)
        return gradient_NK.mul_(self._spread(self.scales())), of_changes_NG

    def follow(self, gradient_NK: torch.Tensor, *, step: int, share: float) -> None:
        of_latents_NK, of_changes_NG = self.gradients(gradient_NK)
        self.latents.move(of_latents_NK, step=step, share=share)
        self.changes.move(of_changes_NG, step=step, share=share)
        # Latents beyond the outermost codes would have to come all the way back before anything changed.
        self.latents.value.clamp_(min=-INSIDE)
        torch.minimum(self.latents.value, self.tops_K + INSIDE, out=self.latents.value)
        self.changes.value.clamp_(min=SMALLEST_SHARE - 1)

    def rounded(self) -> Rounded:
        grid = replace(self.grid, scales_NG=self.scales())
        return Rounded(codes_NK=self.codes().to(torch.uint8), unrounded_NK=self.latents.value, grid=grid)

    def _spread(self, values_NG: torch.Tensor) -> torch.Tensor:
        return values_NG.repeat_interleave(self.size, dim=1)[:, : self.num_columns]

    def _sum_groups(self, values_NK: torch.Tensor) -> torch.Tensor:
        num_rows, num_groups = self.grid.scales_NG.shape
        missing = num_groups * self.size - values_NK.shape[1]
        whole = torch.nn.functional.pad(values_NK, (0, missing)) if missing else values_NK
        return whole.reshape(num_rows, num_groups, self.size).sum(-1)


def _gradients(latents: Sequence[Latent], work: Work, batches: Sequence[int]) -> list[torch.Tensor]:
    """Of the summed loss, by each weight. A matrix that no batch reaches gets zeros."""
    weights = [latent.weight().requires_grad_() for latent in latents]
    total: list[torch.Tensor] | None = None
    for batch in batches:
        with torch.enable_grad():
            loss = work.loss_of(weights, batch)
        found = torch.autograd.grad(loss, weights, materialize_grads=True)
        if total is None:
            total = list(found)
        else:
            for sum_NK, gradient_NK in zip(total, found, strict=True):
                sum_NK += gradient_NK
        del found
    return [torch.zeros_like(weight) for weight in weights] if total is None else total


def _sum_of_losses(latents: Sequence[Latent], work: Work, batches: Sequence[int]) -> float:
    weights = [latent.weight() for latent in latents]
    with torch.no_grad():
        losses = [float(work.loss_of(weights, batch)) for batch in batches]
    total = torch.tensor([sum(losses)], dtype=torch.float64)
    work.sum_(total)
    return float(total)


def _draw(batches: Sequence[int], generator: torch.Generator) -> Iterator[int]:
    """Every batch once in random order, then again in another."""
    while True:
        yield from (batches[i] for i in torch.randperm(len(batches), generator=generator).tolist())
