"""The one evaluator of `qbench.py`: the reference model in float32 with a competitor's weights in its linears.

Against the unchanged model, on the same windows and predicted tokens: the extra NLL with its standard error, the KL
divergence of the next-token distribution from the original's, and how often both have the same likeliest token. Extra
NLL also moves with the luck of the true next tokens, which its standard error over windows shows; KL does not.

The original's log-probabilities stay in memory, for as many windows as fit into `KEPT_NBYTES`: KL and agreement are
of those, the NLL is of all.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from llmmpq.errors import CheckpointError

KEPT_NBYTES = 2**31


@dataclass(frozen=True, kw_only=True)
class Verdict:
    extra_nll: float
    extra_nll_error: float  # standard error of its mean over windows
    kl: float
    top1: float


class Judge:
    def __init__(self, model: PreTrainedModel, windows_WT: torch.Tensor) -> None:
        self.model, self.windows_WT = model, windows_WT
        num_words = model.config.get_text_config().vocab_size
        self.num_kept = max(1, min(len(windows_WT), KEPT_NBYTES // (4 * windows_WT.shape[1] * num_words)))
        self._kept = [self._log_probabilities(model, window) for window in windows_WT[: self.num_kept]]
        self.nll_W = self._nll(model, self._kept)
        # Computing the unchanged model in bfloat16; now, because `judge` overwrites its weights.
        self.noise_floor = self._verdict(copy.deepcopy(model).bfloat16())

    @property
    def nll(self) -> float:
        return float(self.nll_W.mean())

    def judge(self, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], torch.Tensor]) -> Verdict:
        """Every linear named in `shapes` takes the weight that `read` gives for it."""
        for name, shape in shapes.items():
            weight = read(name)
            if tuple(weight.shape) != tuple(shape) or not bool(torch.isfinite(weight).all()):
                raise CheckpointError(f"{name} came back as {tuple(weight.shape)}, expected finite {tuple(shape)}")
            with torch.no_grad():
                self.model.get_submodule(name).weight.copy_(weight)  # type: ignore[operator]
        return self._verdict(self.model)

    def _verdict(self, model: PreTrainedModel) -> Verdict:
        kl, same, found = 0.0, 0.0, []
        for window, expected_TV in zip(self.windows_WT, self._kept, strict=False):
            found_TV = self._log_probabilities(model, window)
            kl += float((expected_TV.exp() * (expected_TV - found_TV)).sum(-1).double().mean())
            same += float((expected_TV.argmax(-1) == found_TV.argmax(-1)).double().mean())
            found.append(_window_nll(found_TV, window))
        for window in self.windows_WT[self.num_kept :]:
            found.append(_window_nll(self._log_probabilities(model, window), window))
        extra_W = torch.tensor(found, dtype=torch.float64) - self.nll_W
        error = float(extra_W.std()) / math.sqrt(len(extra_W)) if len(extra_W) > 1 else math.nan
        return Verdict(
            extra_nll=float(extra_W.mean()),
            extra_nll_error=error,
            kl=kl / self.num_kept,
            top1=same / self.num_kept,
        )

    def _nll(self, model: PreTrainedModel, kept: list[torch.Tensor]) -> torch.Tensor:
        rest = (self._log_probabilities(model, window) for window in self.windows_WT[len(kept) :])
        every = (*kept, *rest)
        figures = [_window_nll(found, window) for found, window in zip(every, self.windows_WT, strict=True)]
        return torch.tensor(figures, dtype=torch.float64)

    @torch.no_grad()
    def _log_probabilities(self, model: PreTrainedModel, window_T: torch.Tensor) -> torch.Tensor:
        """[T - 1, V]: of the tokens from the second on, which are the predicted ones."""
        logits_TV = model(input_ids=window_T[None], use_cache=False).logits[0, :-1]
        return torch.log_softmax(logits_TV.float(), dim=-1)


def _window_nll(log_probabilities_TV: torch.Tensor, window_T: torch.Tensor) -> float:
    return -float(log_probabilities_TV.gather(1, window_T[1:, None]).double().mean())
