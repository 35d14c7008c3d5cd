"""Calibration and evaluation tokens: text in, seeded windows of token ids with a digest out.

Documents are tokenized one by one, separated by the end-of-text token, packed and cut into windows. Only the first
`POOL_FACTOR` times the wanted tokens are read, in the order of the source; the windows taken are a seeded sample of
that pool. So a data set of any size costs the same, and equal arguments give equal tokens. A sample of the whole
source was rejected: it would read (or download) everything for a few thousand tokens.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from llmmpq.errors import CalibrationError
from llmmpq.model.text import resolve_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SELF_SOURCE = "self"  # text that the model writes: see model/sampling.py
POOL_FACTOR = 4
MIN_WINDOW = 32  # below this most positions lack the context that makes activations typical


@dataclass(frozen=True, kw_only=True, eq=False)  # eq of tensors is a tensor: compare digests
class TokenWindows:
    """What the model is calibrated on: ids of shape [num_windows, window]."""

    ids: torch.Tensor
    source: str
    digest: str
    notes: tuple[str, ...] = ()

    @property
    def num_tokens(self) -> int:
        return self.ids.numel()


def load_tokens(
    tokenizer: PreTrainedTokenizerBase,
    *,
    source: str,
    num_tokens: int,
    window: int,
    seed: int,
    max_window: int | None = None,
    vocab_size: int | None = None,
) -> TokenWindows:
    """As many whole windows as `num_tokens` holds (at least one), drawn from the source by the seed."""
    text = resolve_text(source)
    notes = list(text.notes)
    if max_window is not None and window > max_window:
        notes.append(f"The calibration window was lowered from {window} to {max_window}, the most the model reads.")
        window = max_window
    if num_tokens < 1 or window < 1:
        raise CalibrationError(f"{num_tokens} tokens in windows of {window} cannot be taken; both must be at least 1")
    num_wanted = max(1, num_tokens // window)
    pool, num_parts_read = _pack(tokenizer, text.parts, limit=POOL_FACTOR * num_wanted * window)
    if num_parts_read < len(text.parts):
        notes.append(
            f"Calibration read the first {num_parts_read} of {len(text.parts)} files of {text.source}: enough tokens."
        )
    if len(pool) < min(window, MIN_WINDOW):
        raise CalibrationError(
            f"calibration text {text.source} gives {len(pool)} tokens; at least {min(window, MIN_WINDOW)} are needed. "
            "Use a longer text, or --calib builtin"
        )
    if len(pool) < window:
        notes.append(f"The calibration window was lowered from {window} to {len(pool)}, all that {text.source} gives.")
        window = len(pool)
    if vocab_size is not None and max(pool) >= vocab_size:
        raise CalibrationError(
            f"the tokenizer gives token {max(pool)}, the model knows {vocab_size} tokens (0 to {vocab_size - 1}): "
            "they do not belong together. Use the tokenizer of this model"
        )
    num_windows = len(pool) // window
    windows = torch.tensor(pool[: num_windows * window], dtype=torch.long).reshape(num_windows, window)
    order = torch.randperm(num_windows, generator=torch.Generator().manual_seed(seed))
    ids = windows[order[:num_wanted]]
    if num_windows < num_wanted:
        notes.append(f"Calibration uses {ids.numel()} tokens, all that {text.source} gives, of {num_tokens} asked for.")
    return TokenWindows(ids=ids, source=text.source, digest=digest_of_ids(ids), notes=tuple(notes))


def split_windows(drawn: TokenWindows, *, probe_share: float) -> tuple[TokenWindows, TokenWindows]:
    """Calibration windows in front, the probe's behind; a single window has to be both."""
    num_windows = len(drawn.ids)
    if num_windows == 1:
        note = f"{drawn.source} gives one window only: plans are measured on the text they were calibrated on."
        return dataclasses.replace(drawn, notes=(*drawn.notes, note)), dataclasses.replace(drawn, notes=())
    num_probe = min(max(1, round(num_windows * probe_share)), num_windows - 1)
    parts = drawn.ids[: num_windows - num_probe], drawn.ids[num_windows - num_probe :]
    calibration, probe = (
        TokenWindows(ids=ids.contiguous(), source=drawn.source, digest=digest_of_ids(ids), notes=()) for ids in parts
    )
    return dataclasses.replace(calibration, notes=drawn.notes), probe


def advise_num_tokens(num_tokens: int, widest_in_features: int) -> str | None:
    """A sentence when the second moments of the widest layer input cannot have full rank."""
    if num_tokens >= widest_in_features:
        return None
    return (
        f"{num_tokens} calibration tokens are fewer than the {widest_in_features} inputs of the widest layer, whose "
        f"statistics stay incomplete; {2 * widest_in_features} tokens would do."
    )


def evaluation_windows(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    window: int,
    *,
    stride: int | None = None,
    max_tokens: int | None = None,
    notes: list[str] | None = None,
) -> torch.Tensor:
    """The text in order, cut into windows that begin `stride` tokens apart (`window`, unless told otherwise).

    The last partial window is dropped. The text is encoded as one piece: no marks are put where documents meet.
    `notes` is told when the text has more than `max_tokens`.
    """
    ids = _encode(tokenizer, text)
    if max_tokens is not None and len(ids) > max_tokens:
        ids = ids[:max_tokens]
        if notes is not None:
            notes.append(f"No more than the first {max_tokens:,} tokens are read (--tokens).")
    if window < 1 or len(ids) < window:
        raise CalibrationError(
            f"the text gives {len(ids)} tokens, less than one evaluation window of {window}: give a longer text, "
            "or a smaller --window"
        )
    return torch.tensor(ids, dtype=torch.long).unfold(0, window, stride or window).contiguous()


def _pack(tokenizer: PreTrainedTokenizerBase, parts: Sequence[Iterable[str]], *, limit: int) -> tuple[list[int], int]:
    """At most `limit` tokens of the documents, and how many parts they came from."""
    marks = [mark for mark in (tokenizer.eos_token_id, tokenizer.bos_token_id) if mark is not None]
    pool: list[int] = []
    for num_parts_before, documents in enumerate(parts):
        for document in documents:
            ids = _encode(tokenizer, document)
            # Many tokenizers mark the start of a text themselves; one mark between documents is enough.
            if pool and ids and marks and pool[-1] not in marks and ids[0] not in marks:
                pool.append(marks[0])
            pool += ids
            if len(pool) >= limit:
                return pool[:limit], num_parts_before + 1
    return pool, len(parts)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    # verbose: a long document would be reported as too long for the model, before we cut it.
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    return ids


def digest_of_ids(ids: torch.Tensor) -> str:
    header = f"int64 {tuple(ids.shape)} ".encode()
    return hashlib.sha256(header + ids.numpy().astype("<i8").tobytes()).hexdigest()
