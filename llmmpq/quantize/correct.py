"""Let a layer repair the error that reaches it (the asymmetric calibration of GPTAQ and Qronos, damped), or its stream.

The quantized layer gets the input x of the partly quantized model, but should reproduce W x0, the original layer's
output on the original input x0. The best weight for that, in the least-squares sense, is

    W + E[e x'] E[x x']^-1,    e = W (x0 - x)

and GPTQ is then run on it. Where the output is added to a stream, what matters is the sum: e is then the difference
of the streams just behind the addition (see `model/landing.py`): W (x0 - x), and what earlier layers left there.

The full step overfits the calibration text and moves the weight off what the scales can hold; a share `a` of it (0.5
by default, see docs/log.md) was better than none and than all of it.
"""

from __future__ import annotations

import torch

from llmmpq.quantize.gptq import Factor


def correction_target(weight_NK: torch.Tensor, cross_KK: torch.Tensor) -> torch.Tensor:
    """W E[(x0 - x) x']: all that is needed of the cross moment, which may be freed after it."""
    return torch.mm(weight_NK.float(), cross_KK)


def corrected_weight(weight_NK: torch.Tensor, target_NK: torch.Tensor, factor: Factor, *, share: float) -> torch.Tensor:
    """W + share * target (H + damping)^-1, with the inverse applied through its triangular factor."""
    upper, order = factor.upper_KK, factor.order_K
    moved_NK = torch.mm(torch.mm(target_NK[:, order], upper.t()), upper)
    corrected_NK = weight_NK.float().clone()
    corrected_NK[:, order] += moved_NK.mul_(share)
    return corrected_NK
