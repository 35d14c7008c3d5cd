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
    """`residual` names stored tensors. Those in `rounded` are read as they will be stored again: in their own dtype.

    All turning is done on one device, so that what is read and what is written are the same bits.
    """

    def __init__(
        self,
        source: Checkpoint,
        residual: Residual,
        rotation_DD: torch.Tensor,
        *,
        device: torch.device | str = "cpu",
        rounded: Collection[str] = (),
    ) -> None:
        super().__init__(source.folder, source.entries)
        self.source = source
        self.residual = residual
        self.device = torch.device(device)
        self.rounded = frozenset(rounded)
        self._rotation_DD = rotation_DD.to(self.device, torch.float32)

    def read(
        self, names: Iterable[str], *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> dict[str, torch.Tensor]:
        names = list(names)
        tensors = self.source.read((name for name in names if not self._changes(name)), device=device, dtype=dtype)
        for name in filter(self._changes, names):
            wanted = dtype or TORCH_DTYPES[self.entries[name].dtype]
            made = torch.empty(self.entries[name].shape, dtype=wanted, device=device)
            start = 0
            for rows in self.row_chunks(name) if name in self.rounded else self._turned(name):
                made[start : start + len(rows)] = self._cast(name, rows, wanted)
                start += len(rows)
            tensors[name] = made
        return {name: tensors[name] for name in names}

    def row_chunks(self, name: str) -> Iterator[torch.Tensor]:
        if not self._changes(name):
            yield from self.source.row_chunks(name)
            return
        for rows in self._turned(name):
            yield self._cast(name, rows, TORCH_DTYPES[self.entries[name].dtype]).cpu()

    def _cast(self, name: str, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        cast = rows.to(dtype)
        if not is_finite(cast):
            stored = TORCH_DTYPES[self.entries[name].dtype]
            mend = (
                "use --dtype bfloat16 or float32"
                if dtype != stored
                else "leave out --rotate, or convert the model to bfloat16 first"
            )
            raise CheckpointError(
                f"tensor {name!r}, rotated, reaches {float(rows.abs().max()):.3g}, more than {dtype} holds: {mend}"
            )
        return cast

    def _changes(self, name: str) -> bool:
        parts = self.residual
        return any(name in places for places in (parts.readers, parts.writers, parts.embeddings, parts.norms))

    def _turned(self, name: str) -> Iterator[torch.Tensor]:
        """The changed tensor in blocks of rows, in float32."""
        parts, rotation_DD = self.residual, self._rotation_DD
        if name in parts.norms:
            yield torch.full(self.entries[name].shape, parts.norms[name], device=self.device)
            return
        blocks: Iterable[torch.Tensor] = (rows.to(self.device).float() for rows in self.source.row_chunks(name))
        if name in parts.writers:
            blocks = [rotation_DD.t() @ torch.cat(list(blocks))]  # its rows are channels: each is made of all
        for rows in blocks:
            turned = rows
            if name in parts.readers:
                turned = turned * self._gain(parts.readers[name])
            if name in parts.readers or name in parts.embeddings:
                turned = turned @ rotation_DD
            yield turned

    def _gain(self, norm: str) -> torch.Tensor:
        weight = self.source.read([norm], device=self.device, dtype=torch.float32)[norm]
        return weight + (1 - self.residual.norms[norm])
