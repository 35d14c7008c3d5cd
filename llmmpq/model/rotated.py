"""A checkpoint read as another: the residual stream turned by an orthogonal matrix R, the gains of its norms folded.

In exact arithmetic the model stays what it was. What is added to the stream is turned, R'W (embeddings, whose rows are
states, W R); what reads it takes in the gain g of the norm before it and turns back, W diag(g) R; the norm keeps a gain
of one. No second copy is stored: weights are turned whenever they are read, in float32.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

import torch

from llmmpq.errors import CheckpointError
from llmmpq.model.checkpoint import TORCH_DTYPES, Checkpoint, is_finite
from llmmpq.model.residual import Residual


class RotatedCheckpoint(Checkpoint):
    """`residual` names stored tensors. Those in `rounded` are read as they will be stored again: in their own dtype."""

    def __init__(
        self, source: Checkpoint, residual: Residual, rotation_DD: torch.Tensor, *, rounded: Collection[str] = ()
    ) -> None:
        super().__init__(source.folder, source.entries)
        self.source = source
        self.residual = residual
        self.rounded = frozenset(rounded)
        self._rotation_DD = rotation_DD.float()

    def read(
        self, names: Iterable[str], *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> dict[str, torch.Tensor]:
        names = list(names)
        tensors = self.source.read((name for name in names if not self._changes(name)), device=device, dtype=dtype)
        for name in filter(self._changes, names):
            stored_dtype = TORCH_DTYPES[self.entries[name].dtype]
            made = torch.empty(self.entries[name].shape, dtype=dtype or stored_dtype, device=torch.device(device))
            start = 0
            for rows in self._turned(name, made.device):
                made[start : start + len(rows)] = rows.to(stored_dtype) if name in self.rounded else rows
                start += len(rows)
            if not is_finite(made):
                raise CheckpointError(
                    f"tensor {name!r}, rotated, holds more than {made.dtype} does: use --dtype bfloat16 or float32"
                )
            tensors[name] = made
        return {name: tensors[name] for name in names}

    def row_chunks(self, name: str) -> Iterator[torch.Tensor]:
        if not self._changes(name):
            yield from self.source.row_chunks(name)
            return
        for rows in self._turned(name, torch.device("cpu")):
            yield rows.to(TORCH_DTYPES[self.entries[name].dtype])

    def check_finite(self, names: Iterable[str]) -> None:
        self.source.check_finite(names)

    def _changes(self, name: str) -> bool:
        parts = self.residual
        return any(name in places for places in (parts.readers, parts.writers, parts.embeddings, parts.norms))

    def _turned(self, name: str, device: torch.device) -> Iterator[torch.Tensor]:
        """The changed tensor in blocks of rows, in float32."""
        parts = self.residual
        if name in parts.norms:
            yield torch.full(self.entries[name].shape, parts.norms[name], device=device)
            return
        if self._rotation_DD.device != device:
            self._rotation_DD = self._rotation_DD.to(device)
        rotation_DD = self._rotation_DD
        blocks: Iterable[torch.Tensor] = (rows.to(device).float() for rows in self.source.row_chunks(name))
        if name in parts.writers:
            blocks = [rotation_DD.t() @ torch.cat(list(blocks))]  # its rows are channels: each is made of all
        for rows in blocks:
            turned = rows
            if name in parts.readers:
                turned = turned * self._gain(parts.readers[name], device)
            if name in parts.readers or name in parts.embeddings:
                turned = turned @ rotation_DD
            yield turned

    def _gain(self, norm: str, device: torch.device) -> torch.Tensor:
        weight = self.source.read([norm], device=device, dtype=torch.float32)[norm]
        return weight + (1 - self.residual.norms[norm])
