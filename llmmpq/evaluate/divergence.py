"""How far a model's predictions are from the original's: the KL divergence of the next-token distribution.

At one position, with p the original's probabilities over the vocabulary and q the other model's,

    KL(p || q) = sum over v of p_v (log p_v - log q_v)        in nats, at least 0, and 0 only where q = p.

In: float32 logits of both at the same positions. Out: one figure per position, and whether both have the same first
choice; a mean, a median and the tails of many. The mean alone hides what users notice: a model that is wrong at one
token in a hundred and right at all others has a small mean and a large p99.

The formula is evaluated in float64, a few positions at a time. In float32 single positions are off by up to 6e-7 nats
with either sign (docs/log.md). Equal logits give equal logs bit for bit, and so exactly 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from llmmpq.errors import CalibrationError

CHUNK_NUM_LOGITS = 2**21  # 16 MB in float64, and a few copies: what stays near a core's cache is fastest
QUANTILES = {"median": 0.5, "p90": 0.9, "p99": 0.99}


@dataclass(frozen=True, kw_only=True, eq=False)
class Divergence:
    """KL(p || q) and agreement of the first choices, position by position."""

    kl_N: torch.Tensor
    agrees_N: torch.Tensor

    @classmethod
    def of(cls, parts: Iterable[Divergence]) -> Divergence:
        parts = list(parts)
        return cls(kl_N=torch.cat([part.kl_N for part in parts]), agrees_N=torch.cat([p.agrees_N for p in parts]))

    def to_json(self) -> dict[str, float | int]:
        quantiles = torch.quantile(self.kl_N, torch.tensor(list(QUANTILES.values()), dtype=self.kl_N.dtype))
        return {
            "kl_mean": self.kl_N.mean().item(),
            **{f"kl_{name}": value for name, value in zip(QUANTILES, quantiles.tolist(), strict=True)},
            "top1_agreement": self.agrees_N.double().mean().item(),
            "num_tokens": len(self.kl_N),
        }


@torch.inference_mode()
def divergence(original_NV: torch.Tensor, other_NV: torch.Tensor) -> Divergence:
    """Computed where `other_NV` is; NaN in it is an error, a word that it holds for impossible gives infinity."""
    kl, agrees = [], []
    for original_CV, other_CV in _chunks(original_NV, other_NV):
        original_CV = original_CV.to(other_CV.device)
        log_p_CV, log_q_CV = original_CV.double().log_softmax(-1), other_CV.double().log_softmax(-1)
        p_CV = log_p_CV.exp()
        # Where p is 0 so is the term, whatever q is: some models give words that only pad their vocabulary -inf.
        terms_CV = torch.where(p_CV > 0, p_CV * (log_p_CV - log_q_CV), 0.0)
        kl.append(terms_CV.sum(-1).clamp_min(0.0).cpu())
        agrees.append((original_CV.argmax(-1) == other_CV.argmax(-1)).cpu())
    found = Divergence(kl_N=torch.cat(kl), agrees_N=torch.cat(agrees))
    if bool(found.kl_N.isnan().any()):
        raise CalibrationError(
            f"the model's logits are NaN at {int(found.kl_N.isnan().sum())} of {len(found.kl_N)} positions: it "
            "overflows or its weights are damaged. Try --dtype float32; if that fails too, the model itself is broken"
        )
    return found


def _chunks(original_NV: torch.Tensor, other_NV: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    num_positions = max(1, CHUNK_NUM_LOGITS // other_NV.shape[-1])
    return zip(original_NV.split(num_positions), other_NV.split(num_positions), strict=True)
