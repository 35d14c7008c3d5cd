"""Mean negative log likelihood of a text, the number whose exponential is the perplexity.

In: a loaded causal language model and windows of token ids [W, T] that do not overlap. Each window is read on its
own, and tokens 2 to T are predicted from those before them in it:

    nll = - 1 / (W (T - 1)) * sum over w, t >= 2 of log p(token_wt | token_w1 ... token_w(t-1))

A window that slides by less than its length would give every token more context and a lower figure, at many times the
cost; what matters here is the difference of two models on equal windows.

The model writes all logits of a batch in its own dtype; the float32 copies that the softmax needs are made for a few
positions at a time, since with 128 thousand words one window of 1,024 takes 0.5 GB in float32, and softmax holds two.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import cross_entropy

from llmmpq.errors import CalibrationError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHUNK_NUM_LOGITS = 2**24  # 64 MB in float32


@dataclass(frozen=True, kw_only=True)
class NllResult:
    """What reading the windows gave: nats per predicted token, how many tokens those were, and the time taken."""

    nll: float
    num_tokens: int
    seconds: float

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll) if self.nll < 700 else math.inf  # exp overflows a double at 710


def token_nll(
    model: PreTrainedModel, windows: torch.Tensor, *, batch: int, advance: Callable[[int], None]
) -> NllResult:
    """Reads `batch` windows per forward and tells `advance` how many windows that were."""
    num_windows, window = windows.shape
    if num_windows < 1 or window < 2:
        raise CalibrationError(f"{num_windows} windows of {window} tokens predict nothing: one of 2 or more is needed")
    total = 0.0
    started = time.perf_counter()
    with torch.inference_mode():
        for first in range(0, num_windows, batch):
            ids = windows[first : first + batch].to(model.device)
            logits = model(input_ids=ids, use_cache=False).logits
            loss = _sum_nll(logits[:, :-1], ids[:, 1:].to(logits.device))
            if not math.isfinite(loss):
                raise CalibrationError(
                    f"the loss is {loss} in windows {first + 1} to {first + len(ids)} of {num_windows}, computed in "
                    f"{str(model.dtype).removeprefix('torch.')}: the model overflows or its weights are damaged. "
                    "Try --dtype float32; if that fails too, the model itself is broken"
                )
            total += loss
            advance(len(ids))
    num_tokens = num_windows * (window - 1)
    return NllResult(nll=total / num_tokens, num_tokens=num_tokens, seconds=time.perf_counter() - started)


def _sum_nll(logits_BTV: torch.Tensor, ids_BT: torch.Tensor) -> float:
    num_positions = max(1, CHUNK_NUM_LOGITS // logits_BTV.shape[-1])
    total = torch.zeros((), dtype=torch.float64)
    for logits_TV, ids_T in zip(logits_BTV, ids_BT, strict=True):
        for logits_CV, ids_C in zip(logits_TV.split(num_positions), ids_T.split(num_positions), strict=True):
            total += cross_entropy(logits_CV.float(), ids_C, reduction="none").cpu().double().sum()
    return total.item()
