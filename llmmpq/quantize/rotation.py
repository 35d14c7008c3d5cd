"""The rotation of the residual stream that suits quantizing: it flattens the weights that meet the stream.

A grid of a few codes for each group serves weights best that lie close together in size. Turning the stream turns all
weights that read it or are added to it, and the mean fourth power of what they become (at equal mean squares) tells how
far the largest stand out: 3 for a bell curve, 1 for signs alone. From a random rotation, steps along the orthogonal
matrices make it smaller: each by the weights of one block, with what the steps before were heading for.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

STEPS = 300
RATE = 0.1  # of the first step, in radians: its largest turn; later ones shrink to nothing
MOMENTUM = 0.9
POWER_STEPS = 10  # to find the largest turn


def random_rotation(size: int, *, seed: int) -> torch.Tensor:
    """Drawn evenly from all orthogonal matrices, in float32."""
    generator = torch.Generator().manual_seed(seed)
    return _orthogonal(torch.randn(size, size, generator=generator, dtype=torch.float64))


def learn_rotation(
    rows_of: Callable[[int], torch.Tensor],
    num_blocks: int,
    size: int,
    *,
    seed: int,
    device: torch.device | str = "cpu",
    on_step: Callable[[], None] = lambda: None,
) -> torch.Tensor:
    """`rows_of` a block are vectors [N, size] along the stream's channels, for each matrix at a mean square of one."""
    rotation_DD = random_rotation(size, seed=seed).to(device)
    one, heading = torch.eye(size, device=device), torch.zeros(size, size, device=device)
    for step in range(STEPS):
        rows_ND = rows_of(step % num_blocks)
        slope = rotation_DD.t() @ (rows_ND.t() @ (rows_ND @ rotation_DD).pow(3)) / len(rows_ND)
        heading = MOMENTUM * heading + (slope - slope.t())
        rate = RATE * (1 - step / STEPS) / _largest_turn(heading)
        # R (1 - S/2) (1 + S/2)^-1 with an antisymmetric S: orthogonal again, and turned against the slope.
        half = rate / 2 * heading
        rotation_DD = torch.linalg.solve(one + half, rotation_DD @ (one - half), left=False)
        on_step()
    return _orthogonal(rotation_DD.double().cpu())  # what rounding took off is put right


def fourth_power(rows_ND: torch.Tensor, rotation_DD: torch.Tensor) -> float:
    """The mean over all weights, turned."""
    return float((rows_ND @ rotation_DD.to(rows_ND.device)).pow(4).mean())


def _largest_turn(heading: torch.Tensor) -> float:
    """The spectral norm, closely: the length that a vector reaches under repeated turns."""
    # Drawn: a vector with a pattern of its own may be one that nothing turns.
    vector = torch.randn(len(heading), generator=torch.Generator().manual_seed(0)).to(heading.device)
    vector, length = vector / vector.norm(), 0.0
    for _ in range(POWER_STEPS):
        vector = heading @ vector
        length = float(vector.norm())
        vector = vector / max(length, 1e-30)
    return max(length, 1e-30)


def _orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    basis, triangle = torch.linalg.qr(matrix)
    return (basis * triangle.diagonal().sign()).float().contiguous()
