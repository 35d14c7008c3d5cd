"""Mean negative log likelihood of a text, the number whose exponential is the perplexity.

In: the logits that a causal language model gives for windows of token ids [W, T], each of which begins `stride` tokens
after the one before. Each window is read on its own, and every token is scored once, in the first window that holds it:

    nll = - 1 / N * sum over w and the scored t of log p(token_wt | token_w1 ... token_w(t-1))

With a stride of T, the default, windows do not overlap: tokens 2 to T of each are scored, N = W (T - 1). This is how
GPTQ and most papers after it count, with T = 2,048. With a shorter stride the first window scores tokens 2 to T and
every other its last `stride` tokens: each then has a context of at least T - stride, which gives a lower figure at
T / stride times the cost. Figures of different windows or strides do not compare.

The model writes all logits of a batch in its own dtype; the float32 copies that the softmax needs are made for a few
positions at a time, since with 128 thousand words one window of 1,024 takes 0.5 GB in float32, and softmax holds two.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
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
    """Of windows that do not overlap. Reads `batch` of them per forward and tells `advance` how many that were."""
    refuse_idle_windows(windows)
    started = time.perf_counter()
    total = 0.0
    for first, logits in whole_logits(model, windows, batch=batch):
        total += sum(window_nll(logits, windows, first=first))
        advance(len(logits))
    num_tokens = num_scored(windows)
    return NllResult(nll=total / num_tokens, num_tokens=num_tokens, seconds=time.perf_counter() - started)


def whole_logits(model: PreTrainedModel, windows: torch.Tensor, *, batch: int) -> Iterable[tuple[int, torch.Tensor]]:
    """The index of a batch's first window and its logits, batch by batch, from a model in memory."""
    for first in range(0, len(windows), batch):
        ids = windows[first : first + batch].to(model.device)
        with torch.inference_mode():
            logits = model(input_ids=ids, use_cache=False).logits
        yield first, logits


def refuse_idle_windows(windows: torch.Tensor) -> None:
    num_windows, window = windows.shape
    if num_windows < 1 or window < 2:
        raise CalibrationError(f"{num_windows} windows of {window} tokens predict nothing: one of 2 or more is needed")


def first_scored(window: int, index: int, stride: int | None = None) -> int:
    """The first position of a window whose token is scored there: it was in no window before, and has a context."""
    return 1 if index == 0 or stride is None else max(1, window - stride)


def num_scored(windows: torch.Tensor, stride: int | None = None) -> int:
    window = windows.shape[1]
    return sum(window - first_scored(window, index, stride) for index in range(len(windows)))


@torch.inference_mode()
def window_nll(
    logits_BTV: torch.Tensor, windows: torch.Tensor, *, first: int, stride: int | None = None
) -> list[float]:
    """The summed loss of each window of a batch, whose first one has the index `first` among all."""
    num_positions = max(1, CHUNK_NUM_LOGITS // logits_BTV.shape[-1])
    sums = []
    for index, logits_TV in enumerate(logits_BTV, start=first):
        start = first_scored(windows.shape[1], index, stride)
        ids_T = windows[index, start:].to(logits_TV.device)
        total = torch.zeros((), dtype=torch.float64)
        chunks = logits_TV[start - 1 : -1].split(num_positions)
        for logits_CV, ids_C in zip(chunks, ids_T.split(num_positions), strict=True):
            total += cross_entropy(logits_CV.float(), ids_C, reduction="none").cpu().double().sum()
        sums.append(total.item())
    if not math.isfinite(sum(sums)):
        raise CalibrationError(
            f"the loss is {sum(sums)} in windows {first + 1} to {first + len(sums)} of {len(windows)}, computed in "
            f"{str(logits_BTV.dtype).removeprefix('torch.')}: the model overflows or its weights are damaged. "
            "Try --dtype float32; if that fails too, the model itself is broken"
        )
    return sums
