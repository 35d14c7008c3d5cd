"""Where the states of all candidates wait between blocks: on the device, in host memory, or in files.

One array per probe window, of shape [num_rows, tokens, hidden], a row for each candidate. It is filled from the front:
the candidates of block l join when block l is reached. On disk a window is one file, read and written in slices
through a mapping that is closed again at once, so that resident memory is the slice and not the file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

Place = Literal["device", "host", "disk"]


class StateStore:
    """Rows of states for each window, wherever they fit."""

    def __init__(
        self,
        *,
        num_rows: int,
        window_shapes: list[tuple[int, int]],
        dtype: torch.dtype,
        place: Place,
        device: torch.device,
        folder: Path,
        name: str = "states",
    ) -> None:
        self.shapes = [(num_rows, *shape) for shape in window_shapes]
        self.dtype, self.place, self.device = dtype, place, device
        self._files = [folder / f"{name}-{index:04d}.bin" for index in range(len(window_shapes))]
        self._held: list[torch.Tensor] = []
        if place == "disk":
            folder.mkdir(parents=True, exist_ok=True)
            for path, shape in zip(self._files, self.shapes, strict=True):
                with path.open("wb") as stream:
                    stream.truncate(_num_elements(shape) * dtype.itemsize)
        else:
            where = device if place == "device" else torch.device("cpu")
            self._held = [torch.empty(shape, dtype=dtype, device=where) for shape in self.shapes]

    def read(self, window: int, rows: slice, tokens: slice = slice(None)) -> torch.Tensor:
        return self._window(window)[rows, tokens].to(self.device, copy=self.place == "disk")

    def write(self, window: int, rows: slice, states: torch.Tensor) -> None:
        self._window(window)[rows].copy_(states)

    def close(self) -> None:
        self._held.clear()
        for path in self._files:
            path.unlink(missing_ok=True)

    def _window(self, window: int) -> torch.Tensor:
        if self.place != "disk":
            return self._held[window]
        shape = self.shapes[window]
        mapped = torch.from_file(str(self._files[window]), shared=True, size=_num_elements(shape), dtype=self.dtype)
        return mapped.view(shape)


def _num_elements(shape: tuple[int, ...]) -> int:
    num = 1
    for size in shape:
        num *= size
    return num
